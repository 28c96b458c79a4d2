"""Tokenize a source into a Megatron-LM shard.

python scripts/prepare_data.py --kind jsonl --paths corpus --tokenizer tokenizer.json --output shards/web

writes shards/web.bin, shards/web.idx and shards/web.json; --validation-fraction adds shards/web_validation.*.
Train on them with `data=tokens 'data.sources.0.paths=[shards/web]'` and the same tokenizer.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from moe_data.prepare import build
from moe_data.sources import SourceConfig, SourceKind, TextUnit
from moe_data.tokenizers import BytesTokenizer, load_tokenizer_file

KINDS = [kind.value for kind in SourceKind if kind is not SourceKind.tokens]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="prefix of the files to write")
    parser.add_argument("--tokenizer", required=True, help="bytes, a tokenizer.json, a folder or a Hub name")
    parser.add_argument("--end-of-document", help="text of the token that ends a document")
    parser.add_argument("--name", help="name of the source (default: of the output); kind=embedded: the domain")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--paths", nargs="*", default=[], help="files, folders, globs, or one Hub name")
    parser.add_argument("--text-field", default="text", help="column that holds the text")
    parser.add_argument("--unit", choices=[unit.value for unit in TextUnit], default="file")
    parser.add_argument("--split", default="train", help="kind=hub: the split")
    parser.add_argument("--subset", help="kind=hub: the data set's configuration")
    parser.add_argument("--revision", help="kind=hub: branch, tag or commit")
    parser.add_argument("--max-megabytes", type=float, help="take no more text than this")
    parser.add_argument("--validation-fraction", type=float, default=0.0, help="documents to hold out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        source = SourceConfig(
            name=options.name or options.output.name,
            kind=SourceKind(options.kind),
            paths=options.paths,
            text_field=options.text_field,
            unit=TextUnit(options.unit),
            split=options.split,
            subset=options.subset,
            revision=options.revision,
            max_megabytes=options.max_megabytes,
            validation_fraction=options.validation_fraction,
        )
        if options.tokenizer == "bytes":
            tokenizer = BytesTokenizer()
        else:
            tokenizer = load_tokenizer_file(options.tokenizer, options.end_of_document)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        # Built in a folder beside the output, on the same disk: the renames at the end cannot fail half-way.
        with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".prepare-") as folder:
            build(Path(folder), source, tokenizer, 0)
            for part, suffix in (("train", ""), ("validation", "_validation")):
                for end in (".json", ".bin", ".idx"):
                    if (Path(folder) / f"{part}{end}").exists():
                        os.replace(Path(folder) / f"{part}{end}", f"{options.output}{suffix}{end}")
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

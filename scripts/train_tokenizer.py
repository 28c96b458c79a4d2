"""Learn a byte-level BPE from a source and write its tokenizer.json.

python scripts/train_tokenizer.py --kind text --paths corpus --vocab-size 16384 --output tokenizer.json
python scripts/train_tokenizer.py --kind embedded --name prose --vocab-size 4096 --output tokenizer.json

Use it with `tokenizer=file tokenizer.path=tokenizer.json`. (`tokenizer=bpe` does this by itself for a run.)
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from moe_data.cache import replaced
from moe_data.prepare import limited, training_documents
from moe_data.sources import SourceConfig, SourceKind, TextUnit
from moe_data.tokenizers import train_bpe

KINDS = [kind.value for kind in SourceKind if kind is not SourceKind.tokens]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, end of document included")
    parser.add_argument("--name", default="corpus", help="kind=embedded: the domain")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--paths", nargs="*", default=[], help="files, folders, globs, or one Hub name")
    parser.add_argument("--text-field", default="text", help="column that holds the text")
    parser.add_argument("--unit", choices=[unit.value for unit in TextUnit], default="file")
    parser.add_argument("--split", default="train", help="kind=hub: the split")
    parser.add_argument("--subset", help="kind=hub: the data set's configuration")
    parser.add_argument("--max-megabytes", type=float, default=64.0, help="text to learn from")
    parser.add_argument("--validation-fraction", type=float, default=0.0, help="documents to leave out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        source = SourceConfig(
            name=options.name,
            kind=SourceKind(options.kind),
            paths=options.paths,
            text_field=options.text_field,
            unit=TextUnit(options.unit),
            split=options.split,
            subset=options.subset,
            validation_fraction=options.validation_fraction,
        )
        began = time.monotonic()
        documents = limited(training_documents(source), options.max_megabytes)
        library = train_bpe((document.text for document in documents), options.vocab_size)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with replaced(options.output) as partial:
            library.save(str(partial))
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    logging.info("wrote %s: %d entries in %.1f s", options.output, options.vocab_size, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())

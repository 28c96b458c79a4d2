"""Count on text how often each expert of a model is used, for maps that keep the most used ones (init=resize).

python scripts/count_usage.py runs/moe --to usage.safetensors --text README.md --text docs/log.md --tokens 65536

One process, on a GPU if there is one. The file has the slots of the experts of each layer, as `layers.<number>.count`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.usage import measure_usage, save_usage
from moe_parallel.convert.verify import batches_of_text
from moe_parallel.start import open_pretrained, tokenizer_of


def main(arguments: list[str] | None = None) -> int:
    """Count and write the file. Exit code 2 for a mistake in the arguments."""
    try:
        count(parse(arguments))
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="run, checkpoint, or a model's folder")
    parser.add_argument("--to", required=True, type=Path, help="file to write")
    parser.add_argument("--text", required=True, type=Path, action="append", help="file; may be given again")
    parser.add_argument("--tokens", type=int, default=65_536, help="of all texts together (%(default)s)")
    parser.add_argument("--sequence-tokens", type=int, default=512, help="of each sequence (%(default)s)")
    return parser.parse_args(arguments)


def count(given: argparse.Namespace) -> None:
    """All of it. Raises ValueError for a model without experts or without a tokenizer."""
    for name in ("tokens", "sequence_tokens"):
        if getattr(given, name) < 2:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 2")
    source = open_pretrained("model", given.model)
    if source.architecture.num_moe_layers == 0:
        raise ValueError(f"{given.model} is dense: it has no experts to count")
    texts = [path.read_text() for path in given.text]
    batches = batches_of_text(texts, tokenizer_of(source.path), given.sequence_tokens, given.tokens, rows=8)
    if not batches:
        raise ValueError("the text has not two tokens; give more of it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(source.architecture, source.weights, device=device)
    usage = measure_usage(model, (batch.to(device) for batch in batches))
    save_usage(given.to, usage)
    for layer, count_E in usage.items():
        share_E = 100 * count_E / count_E.sum()
        print(
            f"layer {layer}: least used {share_E.min():.2f} %, most used {share_E.max():.2f} % of {count_E.sum():.0f}"
        )
    print(given.to)


if __name__ == "__main__":
    sys.exit(main())

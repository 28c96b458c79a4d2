"""Measure which other tokens a router lets a token's output depend on.

python scripts/probe_causality.py router=expert_choice
python scripts/probe_causality.py router=plugin router.plugin=path/to/file.py:ClassConfig

Takes the options of train.py. The layer and model that are probed have the configured router, experts and balance at a
small width. Exit code 0 if nothing looks at more than it declares and evaluation never looks at the future, 1 if
something does or cannot be measured, 2 for a mistake in the options.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moe_parallel import options
from moe_parallel.causality import probe

CONFIGS = Path(__file__).parents[1] / "configs"


def main(arguments: list[str] | None = None) -> int:
    """Print what was declared and what was measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return 0
    torch.set_num_threads(1)
    try:
        findings = probe(options.architecture(options.composed(arguments, CONFIGS), tokenizer_vocabulary=64))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'':20s} {'declared':34s} {'measured':34s}")
    for finding in findings:
        print(f"{finding.what:20s} {finding.declared!s:34s} {finding.measured!s:34s} {finding.verdict}")
    return 0 if all(finding.is_fine for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())

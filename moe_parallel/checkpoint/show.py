"""`python -m moe_parallel.checkpoint.show PATH`: what a checkpoint is. Imports no torch, reads no tensor."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moe_parallel.checkpoint.folder import UnusableCheckpointError, read_meta


def describe(path: Path) -> str:
    """A few lines on one complete checkpoint. Raises UnusableCheckpointError otherwise."""
    meta = read_meta(path)
    size = sum(meta["files"].values()) / 2**30
    lines = [
        f"step {meta['step']}, {meta['tokens']} tokens, complete",
        f"{size:.3f} GiB in {len(meta['files'])} files",
        f"format {meta['format']}, torch {meta['torch']}",
        "about " + json.dumps(meta["about"], sort_keys=True),
        "identity " + json.dumps(meta["identity"], indent=1, sort_keys=True),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Say what a checkpoint is.")
    parser.add_argument("path", type=Path, help="a folder such as runs/NAME/checkpoints/step_00001000")
    try:
        print(describe(parser.parse_args().path))
    except UnusableCheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

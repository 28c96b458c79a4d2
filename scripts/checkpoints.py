"""Say what checkpoints are: step, tokens, model, layout, size, and whether they are whole. Needs no torch.

python scripts/checkpoints.py runs/NAME                           all of a run
python scripts/checkpoints.py runs/NAME/checkpoints/step_00001000 --verify

Ends with 1 if one is damaged, with 2 if there is none. `--json` prints one object a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moe_parallel.checkpoint.folder import UnusableCheckpointError
from moe_parallel.checkpoint.listing import describe, find, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a run, its folder of checkpoints, or one checkpoint")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    try:
        found = find(arguments.path)
    except UnusableCheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    damaged = False
    for path in found:
        facts = describe(path, arguments.verify)
        damaged = damaged or facts["state"] == "damaged"
        print(json.dumps(facts) if arguments.json else text(facts), flush=True)
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())

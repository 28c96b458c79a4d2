"""Find the fastest implementation of the experts for a model on this machine, and store it.

python scripts/tune_kernels.py model=qwen3_30b_a3b parallel.ep=8
python scripts/tune_kernels.py --ranks 8 --rows 512,2048 --out tuned.json moe.num_experts=64 train.dtype=bfloat16

Overrides are those of train.py; they give the width, the experts of a rank, and with --ranks the rows that it gets.
Training takes what is stored with moe.kernel_table=FILE. Every candidate's result is compared before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from moe_kernels.choice import Problem, read_table, write_table
from moe_kernels.tuning import tune
from moe_parallel import launch, options, relations

CONFIGS = Path(__file__).parents[1] / "configs"


def parse(arguments: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("tuned.json"), help="table to write, or to add to (tuned.json)"
    )
    parser.add_argument("--ranks", type=int, default=None, help="ranks of the run; default: parallel.ep")
    parser.add_argument("--rows", default=None, help="mean rows of an expert, separated by commas; default: the run's")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="options of train.py")
    return parser.parse_intermixed_args(arguments)


def problems(arguments: argparse.Namespace) -> tuple[list[Problem], int]:
    """The shapes that a rank computes, and the experts of a token. Raises ConfigError."""
    config = options.composed(arguments.overrides, CONFIGS)
    layout = relations.check(config, arguments.ranks or config.parallel.ep)
    device = torch.device(launch.device_type())
    dtype = config.train.compute_type(device.type)
    num_experts, top_k = config.moe.num_experts // layout.ep, config.router.top_k
    _, sequences = config.train.micro_batches(layout.batch_ranks)
    tokens = sequences * config.train.sequence_tokens // layout.sequence_ranks
    # Balanced: each of the ranks of ep sends as many rows as it gets.
    rows = [max(tokens * top_k // num_experts, 1)]
    if arguments.rows is not None:
        rows = [int(part) for part in arguments.rows.split(",")]
        if min(rows) < 1:
            raise options.ConfigError([f"--rows {arguments.rows} must be at least 1 each"])
    dims = (config.model.dim, config.moe.expert_dim, num_experts)
    return [Problem(device, dtype, *dims, num_rows=count * num_experts) for count in rows], top_k


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    try:
        shapes, top_k = problems(given)
        table = json.loads(given.out.read_text())["entries"] if given.out.exists() and read_table(given.out) else []
    except ValueError as error:  # ConfigError is one
        print(f"tune_kernels.py: {error}", file=sys.stderr)
        return 2
    for problem in shapes:
        mean = problem.num_rows // problem.num_experts
        print(
            f"width {problem.dim}, {problem.num_experts} experts of width {problem.expert_dim}, {mean} rows an expert, "
            f"{str(problem.dtype).removeprefix('torch.')} on {problem.device.type}"
        )
        line = tune(problem, min(top_k, problem.num_experts), say=lambda text: print("  " + text, flush=True))
        same = ("device", "dtype", "dim", "expert_dim", "num_experts", "rows_per_expert")
        table = [old for old in table if any(old[name] != line[name] for name in same)] + [line]
        write_table(given.out, table)
    print(f"{given.out}: {len(table)} shapes; train.py takes them with moe.kernel_table={os.path.abspath(given.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

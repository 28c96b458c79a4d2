"""Weak and strong scaling of the native engine over 1, 2 and 4 gloo ranks of this machine, as ratios to one rank.

make bench-scaling

Strong: the same global batch on more ranks. Weak: as much for each rank. Every round measures all layouts, one after
the other, and compares within the round: the machine may be shared. One thread a rank; a machine of c cores can give a
speed of c at most, however many ranks there are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from against_transformers import batch_of
from report import processor, write_between

from moe_parallel import launch
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.meter import peak_memory_bytes
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.initialize import InitConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig

BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
VOCABULARY, LENGTH, ROWS, MICRO_BATCHES = 1024, 256, 16, 4
"""Rows of the global batch of one rank, over all its micro-batches."""


@dataclass(frozen=True)
class Setting:
    """A layout, and whether each rank gets as much as one alone."""

    name: str
    ranks: int
    degrees: tuple[tuple[str, int], ...] = ()
    weak: bool = False

    def command(self, steps: int) -> list[str]:
        """What measures it."""
        worker = [__file__, "--worker", json.dumps(asdict(self)), "--steps", str(steps)]
        if self.ranks == 1:
            return [sys.executable, *worker]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        return [sys.executable, *torchrun, *worker]


LAYOUTS = (
    ("one rank", 1, {}),
    ("data, sharded", 2, {}),
    ("data, replicated", 2, {"shard": 1}),
    ("experts (ep)", 2, {"ep": 2}),
    ("tensor + sequence (tp)", 2, {"tp": 2, "ep": 2}),
    ("context (cp)", 2, {"cp": 2, "ep": 2}),
    ("pipeline (pp)", 2, {"pp": 2}),
    ("data, sharded", 4, {}),
    ("experts (ep)", 4, {"ep": 4}),
    ("tp 2 x cp 2, ep 4", 4, {"tp": 2, "cp": 2, "ep": 4}),
    ("pp 2 x ep 2", 4, {"pp": 2, "ep": 2}),
)
SETTINGS = [
    Setting(name, ranks, tuple(degrees.items()), weak)
    for name, ranks, degrees in LAYOUTS
    for weak in (False, True)
    if ranks > 1 or not weak
]


def worker(setting: Setting, steps: int) -> None:
    """Timed steps of one layout; rank 0 prints a line of JSON."""
    torch.set_num_threads(1)
    here = launch.start(timeout_seconds=300)
    shape = Architecture(
        model=ModelConfig(dim=256, num_layers=4),
        attention=GroupedQueryConfig(num_heads=4),
        moe=MoEConfig(num_experts=16, expert_dim=128, num_shared_experts=1),
        router=TokenChoiceConfig(top_k=4),
        balance=BalanceConfig(global_coefficient=0.01),
        vocab_size=VOCABULARY,
    )
    parallel = ParallelConfig(**dict(setting.degrees))
    layout = make_layout(parallel, setting.ranks, shape.moe.num_experts)
    engine = NativeEngine(
        shape, ParallelMesh(layout, "cpu"), parallel, OptimConfig(), torch.device("cpu"), torch.float32
    )
    engine.init_weights(InitConfig(), seed=0)
    rows = ROWS * (setting.ranks if setting.weak else 1)
    mine, targets = rows // layout.batch_ranks // MICRO_BATCHES, rows * LENGTH
    seconds = []
    for step in range(steps + 2):
        first = (step * layout.batch_ranks + layout.batch_rank(here.rank)) * MICRO_BATCHES
        batches = [batch_of(mine, LENGTH, VOCABULARY, first + index) for index in range(MICRO_BATCHES)]
        dist.barrier()
        began = time.perf_counter()
        engine.forward_backward(batches, step, targets, targets)
        engine.step(1e-3, engine.gradient_norm())
        dist.barrier()
        if step >= 2:  # the first two build caches and optimizer state
            seconds.append(time.perf_counter() - began)
    if here.is_first:
        memory = peak_memory_bytes(here.device) / 2**30
        speed = targets / statistics.median(seconds)
        print("RESULT " + json.dumps({"tokens_per_second": speed, "peak_GiB": memory}), flush=True)
    launch.finish()


def measure(setting: Setting, steps: int) -> dict[str, float]:
    """Start the ranks of a setting and read what the first says."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1")
    done = subprocess.run(setting.command(steps), capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{setting} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def table(rounds: list[dict[Setting, dict[str, float]]]) -> str:
    """Markdown: speeds relative to one rank, medians over rounds with their range."""
    one = SETTINGS[0]
    lines = ["| ranks | layout | strong (range) | weak (range) | peak GiB of a rank, strong | weak |"]
    lines.append("|---|---|---|---|---|---|")
    for name, ranks, _ in LAYOUTS[1:]:
        cells, memory = [], []
        for setting in [s for s in SETTINGS if (s.name, s.ranks) == (name, ranks)]:
            ratios = [r[setting]["tokens_per_second"] / r[one]["tokens_per_second"] for r in rounds]
            cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f})")
            memory.append(f"{statistics.median(r[setting]['peak_GiB'] for r in rounds):.2f}")
        lines.append(f"| {ranks} | {name} | {' | '.join(cells)} | {' | '.join(memory)} |")
    speed = statistics.median(r[one]["tokens_per_second"] for r in rounds)
    memory_of_one = statistics.median(r[one]["peak_GiB"] for r in rounds)
    return "\n".join([f"One rank: {speed:,.0f} tokens/s, peak {memory_of_one:.2f} GiB.", "", *lines])


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often all layouts are measured")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a layout and round")
    parser.add_argument("--quick", action="store_true", help="one round of one step, prints only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        given = json.loads(arguments.worker)
        degrees = tuple((name, degree) for name, degree in given.pop("degrees"))
        return worker(Setting(degrees=degrees, **given), arguments.steps)
    rounds: list[dict[Setting, dict[str, float]]] = []
    for _ in range(1 if arguments.quick else arguments.rounds):
        rounds.append({})
        for setting in SETTINGS:
            rounds[-1][setting] = measure(setting, 1 if arguments.quick else arguments.steps)
            print(setting.ranks, setting.name, "weak" if setting.weak else "strong", rounds[-1][setting], flush=True)
    facts = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}; `make bench-scaling`"
    )
    what = (
        f"4 layers of width 256, 16 experts of 128 and a shared one, top 4; {ROWS} sequences of {LENGTH} tokens a step "
        f"for one rank (strong: for all) in {MICRO_BATCHES} micro-batches, float32, one thread a rank. Speed relative "
        f"to one rank; these {os.cpu_count()} cores can give {os.cpu_count()} at most."
    )
    text = f"{facts}\n\n{what}\n\n{table(rounds)}"
    print(text)
    if not arguments.quick:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

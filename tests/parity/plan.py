"""Cases of configurations, each run by the planner on one rank of its real number of ranks, without memory."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from moe_parallel import options
from moe_parallel.mesh import Layout
from moe_parallel.planner.cluster import ClusterConfig
from moe_parallel.planner.rank import Weight, plan_rank

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: overrides as on the command line, and which of the ranks."""

    name: str
    overrides: tuple[str, ...]
    place: float = 0.0
    """0 is the first rank, 1 the last."""
    few_ranks: bool = False
    """The config names no number of ranks: take the fewest that split and shard the experts, and one sequence each."""
    step: bool = True
    """Run a step; otherwise only build and shard."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """What was seen on one rank."""

    config: options.Config
    layout: Layout
    rank: int
    rows: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """That were run."""
    weights: list[Weight]
    sent_bytes: list[int]
    """Bytes that each all-to-all of rows sent, sorted."""
    gathered_bytes: list[int]
    """Bytes of each all-gather of weights."""
    reduced_bytes: list[int]
    """Bytes of each reduce-scatter of gradients."""
    peak_bytes: int
    """Most bytes of tensors that were alive at once."""
    seconds: float


def load(overrides: tuple[str, ...]) -> options.Config:
    """Compose and convert exactly as train.py does."""
    return options.composed(list(overrides), CONFIGS)


def load_plan(plan: Plan) -> options.Config:
    """The config of a plan, with its number of ranks."""
    config = load(plan.overrides)
    if not plan.few_ranks:
        return config
    ep = next(d for d in range(2, config.moe.num_experts + 1) if config.moe.num_experts % d == 0)
    ranks, length = 2 * ep, config.train.sequence_tokens
    return load((
        *plan.overrides, f"parallel.ranks={ranks}", f"parallel.ep={ep}", f"train.global_batch_tokens={ranks * length}"
    ))  # fmt: skip


def run(plan: Plan) -> Planned:
    """Build, shard, and run one optimizer step."""
    started = time.perf_counter()
    config = load_plan(plan)
    ranks = config.parallel.ranks
    assert ranks is not None
    trace = plan_rank(config, ClusterConfig(), round(plan.place * (ranks - 1)), run=plan.step)

    def sizes(op: str, purpose: str) -> list[int]:
        amounts = [(m, a) for phase in trace.phases for m, a in phase.messages.items()]
        return sorted(n for m, a in amounts if (m.op, m.purpose) == (op, purpose) for n in a.sizes.elements())

    return Planned(
        config,
        trace.layout,
        trace.rank,
        trace.sequences,
        trace.taken,
        trace.weights,
        sizes("all_to_all", "experts"),
        sizes("all_gather", "weights"),
        sizes("reduce_scatter", "weights"),
        trace.timeline.peak_bytes,
        time.perf_counter() - started,
    )

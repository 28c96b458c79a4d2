"""Seconds of a step from what its passes compute and exchange: the one rule for formulas and for traces.

computation             is never hidden
weights and gradients   run beside `cluster.overlap` of the pass's computation; what is longer waits
rows of experts         run beside the shared experts, and with chunks beside the routed ones (docs/architecture.md)
all others              wait
pipeline                the slowest stage, and while the first micro-batches come and the last ones go, nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_parallel.mesh import PipelineSchedule

PARTS = {
    "matmul": "dense matrix products",
    "attention": "attention",
    "experts": "the experts' products",
    "other": "element-wise operations",
    "rows": "exchange of rows with experts, not hidden",
    "sequences": "exchange between tp and cp ranks",
    "weights": "gathering weights and reducing gradients, not hidden",
    "stages": "messages between pipeline stages",
    "sums": "small sums over ranks",
    "optimizer": "optimizer",
    "bubble": "pipeline stages that wait",
}
"""What a step's time is made of."""


Seconds = dict[str, float]
"""By part."""


def added(*parts: Mapping[str, float], times: float = 1) -> Seconds:
    """The sum, part by part; the last one counts so many times."""
    total: Seconds = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + (times if part is parts[-1] else 1) * seconds
    return total


@dataclass(frozen=True)
class Hiding:
    """What runs beside collectives."""

    overlap: float
    """Part of the computation beside which collectives of weights run."""
    ways: int
    """Exchanges of rows in one forward pass of a stage: two for each pass over experts."""
    chunks: int
    """`dispatch.chunks`."""
    shared_seconds: float
    """Of the shared experts of one layer, forward."""


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a micro-batch through a stage, or an optimizer step."""

    compute: dict[str, float]
    """Seconds of matmul, attention, experts, other."""
    messages: dict[str, float]
    """Seconds of collectives: rows, sequences, weights, stages, sums."""

    def exposed(self, hiding: Hiding, backward: bool) -> Seconds:
        """Seconds of each part, without what is hidden."""
        parts = added(self.compute, self.messages)
        compute = sum(self.compute.values())
        parts["weights"] = max(0.0, self.messages.get("weights", 0.0) - hiding.overlap * compute)
        rows = self.messages.get("rows", 0.0)
        if rows and hiding.ways:
            ways = hiding.ways
            way, shared = rows / ways, hiding.shared_seconds * (2 if backward else 1)
            hidden = (min(2 * shared / 3, way) + min(shared / 3, way)) / 2
            left, chunks = way - hidden, hiding.chunks
            beside = self.compute.get("experts", 0.0) / ways  # each way has half of the layer's experts to run beside
            parts["rows"] = ways * (left / chunks + max(0.0, left * (chunks - 1) / chunks - beside))
        return parts


@dataclass(frozen=True)
class StageTime:
    """What one pipeline stage does in a step."""

    micro_batch: Seconds
    """Seconds of forward and backward of a micro-batch, by part."""
    once: Seconds
    """Besides, after the last one: sums over replicas, the optimizer."""


def stage_time(
    forward: Pass, backward: Pass, last_only: dict[str, float], optimizer: Pass, hiding: Hiding
) -> StageTime:
    """Put a stage's passes together.

    Args:
        last_only: seconds of collectives that run beside the last backward pass only.
    """
    micro_batch = added(forward.exposed(hiding, backward=False), backward.exposed(hiding, backward=True))
    last = Pass(backward.compute, added(backward.messages, last_only)).exposed(hiding, backward=True)
    beside = added(last, backward.exposed(hiding, backward=True), times=-1)
    optimizing = {"optimizer": sum(optimizer.compute.values())}
    return StageTime(micro_batch, added(optimizing, optimizer.messages, beside))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a whole step, by part, for the stage that decides."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(stages: Sequence[StageTime], micro_batches: int, bubble: float, imbalance: float = 1.0) -> StepTime:
    """The slowest stage's micro-batches, and the bubble.

    Args:
        bubble: micro-batches whose time passes without work, from `bubble_micro_batches`.
        imbalance: what the slowest stage takes longer than it was computed to.
    """

    def total(stage: StageTime) -> float:
        return micro_batches * sum(stage.micro_batch.values()) + sum(stage.once.values())

    slowest = max(stages, key=total)
    parts = dict.fromkeys(PARTS, 0.0)
    for name, seconds in slowest.micro_batch.items():
        parts[name] += imbalance * micro_batches * seconds
    for name, seconds in slowest.once.items():
        parts[name] += seconds
    parts["bubble"] = imbalance * bubble * sum(slowest.micro_batch.values())
    return StepTime(parts)


def bubble_micro_batches(schedule: PipelineSchedule, pp: int, stages_per_rank: int) -> float:
    """Micro-batches that a rank waits in a step, as Table 2 of arXiv 2412.19437 and arXiv 2401.10241 count them.

    A backward pass is taken as twice a forward pass (F = 1/3 of a micro-batch), its part for the weights as a third.
    """
    if pp == 1:
        return 0.0
    third = 1 / 3
    waiting = {
        PipelineSchedule.one_f_one_b: (pp - 1) * 1.0,
        PipelineSchedule.interleaved: (pp - 1) / stages_per_rank,
        PipelineSchedule.interleaved_zero_bubble: (pp - 1) / stages_per_rank * third,
        PipelineSchedule.zero_bubble_v: (pp - 1) / stages_per_rank * third,
        PipelineSchedule.dual_pipe_v: (pp - 1) * third,
    }
    return waiting[schedule]

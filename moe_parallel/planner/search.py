"""All legal layouts of a model on a cluster, those that fit by the time of their step, the best of them run on fake tensors.

Formulas sort all of them; the engine itself, rank by rank of those stages that differ, confirms the first few.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass as plain_dataclass

from pydantic.dataclasses import dataclass

from moe_parallel.mesh import Layout, Recompute, make_layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import MemoryEstimate
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.options import Config, ConfigError, architecture
from moe_parallel.planner.cluster import ClusterConfig, Device
from moe_parallel.planner.formulas import estimated_time, even_layers, hiding, stage_memory, stages_of
from moe_parallel.planner.rank import RankTrace, plan_rank
from moe_parallel.planner.step_time import StepTime, bubble_micro_batches, step_time
from moe_parallel.planner.trace_time import traced_time
from moe_parallel.relations import check

VOCABULARY = 257
"""Of a model whose vocabulary is its tokenizer's: that of bytes."""


@dataclass(kw_only=True)
class PlanConfig:
    expert_imbalance: float = 1.0
    """Rows of the fullest rank's experts over the mean of the ranks: with one expert a rank a run's
    experts/max_over_mean, with more less than that. Scales compute, memory and exchange of the experts."""
    stage_imbalance: float = 1.0
    """What the slowest pipeline stage takes over what its layers take."""
    simulate: int = 2
    """Layouts, the fastest by formulas, that are run on fake tensors; 0 trusts the formulas."""
    show: int = 10
    """Layouts to list."""
    search: bool = True
    """Look for the best layout; false plans the one that is given."""
    sequence_tokens: int = 4096
    """Length of sequences where neither an experiment nor train.sequence_tokens says it."""
    sequences_per_rank: int = 8
    """Of a step, where neither an experiment nor train.global_batch_tokens says the batch."""
    max_micro_batch_sequences: int = 8
    """Largest micro-batch that the search tries."""

    def __post_init__(self) -> None:
        for name in ("expert_imbalance", "stage_imbalance"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be at least 1, which is perfect balance")
        for name in ("show", "sequence_tokens", "sequences_per_rank", "max_micro_batch_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan.{name}={getattr(self, name)} must be at least 1")
        if self.simulate < 0:
            raise ValueError(f"plan.simulate={self.simulate} must not be negative")


@plain_dataclass(frozen=True)
class Planned:
    """A layout, what it takes and how long."""

    config: Config
    layout: Layout
    memory: MemoryEstimate
    """Of the fullest stage, by formulas."""
    time: StepTime
    traces: tuple[RankTrace, ...] = ()
    """Of the stages that differ, if they were run; the time is then theirs."""

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank: seen, or estimated."""
        return max((trace.timeline.peak_bytes for trace in self.traces), default=self.memory.total)

    @property
    def fullest(self) -> RankTrace:
        return max(self.traces, key=lambda trace: trace.timeline.peak_bytes)


@plain_dataclass(frozen=True)
class Question:
    """What is to be planned."""

    config: Config
    cluster: ClusterConfig
    plan: PlanConfig
    fixed: frozenset[str] = frozenset()
    """Options such as "parallel.ep" that the search leaves as they are."""

    def __post_init__(self) -> None:
        if self.plan.expert_imbalance != 1 and not isinstance(self.config.dispatch, AllToAllConfig):
            raise ValueError(
                f"plan.expert_imbalance={self.plan.expert_imbalance} is planned for dispatch=all_to_all only: others even "
                "loads out or count a token once a node; set plan.expert_imbalance=1 or dispatch=all_to_all"
            )

    @property
    def shape(self) -> Architecture:
        return architecture(self.config, None if self.config.model.vocab_size else VOCABULARY)

    @property
    def compute_bytes(self) -> int:
        return self.config.train.compute_type(self.cluster.device.value).itemsize


@plain_dataclass(frozen=True)
class Answer:
    """What was found."""

    legal: int
    fitting: int
    """By formulas."""
    best: list[Planned]
    """The fastest first: those that were run, then others by formulas."""
    least: Planned | None
    """The one that needs least memory, if none fits."""


def degrees(ranks: int, question: Question) -> Iterator[dict[str, int]]:
    """Every combination of degrees that `make_layout` accepts, of those that the search considers.

    tp stays within a node and cp is at most 8. `shard` is all ranks that have the same weights, those of a node, as many
    as `ep`, or 1.
    """
    config, cluster = question.config, question.cluster
    near = [d for d in _divisors(cluster.ranks_per_node)]
    experts = [d for d in _divisors(config.moe.num_experts) if ranks % d == 0]
    names = {"pp": [1], "tp": near, "cp": [d for d in (1, 2, 4, 8) if ranks % d == 0], "ep": experts}
    for name in question.fixed & {f"parallel.{n}" for n in names}:
        names[name.removeprefix("parallel.")] = [getattr(config.parallel, name.removeprefix("parallel."))]
    for pp in names["pp"]:
        for tp in names["tp"]:
            for cp in names["cp"]:
                for ep in names["ep"]:
                    weights = ranks // (pp * tp) if ranks % (pp * tp) == 0 else 1
                    shards = {weights, min(weights, max(1, cluster.ranks_per_node // tp)), min(weights, ep), 1}
                    if "parallel.shard" in question.fixed:
                        shards = {config.parallel.shard or weights}
                    for shard in sorted(shards):
                        found = {"pp": pp, "tp": tp, "cp": cp, "ep": ep, "shard": shard}
                        if _is_layout(question, ranks, found):
                            yield found


def _is_layout(question: Question, ranks: int, found: dict[str, int]) -> bool:
    parallel = dataclasses.replace(question.config.parallel, ranks=ranks, **found)
    try:
        make_layout(parallel, ranks, question.config.moe.num_experts)
    except ValueError:
        return False
    return True


def legal_layouts(question: Question) -> Iterator[tuple[Config, Layout]]:
    """Degrees, recomputation and micro-batches that a run would accept."""
    ranks, config, fixed = question.cluster.ranks, question.config, question.fixed
    for found in degrees(ranks, question):
        parallel = dataclasses.replace(config.parallel, ranks=ranks, **found)
        first = dataclasses.replace(config, parallel=parallel, train=_with_size(config, 1))
        try:
            layout = check(first, ranks)
        except ConfigError:
            continue
        sequences = config.train.global_batch_sequences // layout.batch_ranks
        sizes = [d for d in _divisors(sequences) if d <= question.plan.max_micro_batch_sequences]
        if "train.micro_batch_sequences" in fixed:
            sizes = [s for s in (config.train.micro_batch_sequences or sequences,) if sequences % s == 0]
        ways = [parallel.recompute] if "parallel.recompute" in fixed else list(Recompute)
        keep = {parallel.reshard_after_forward} if "parallel.reshard_after_forward" in fixed else {True, False}
        for size in sizes:
            for how in ways:
                for reshard in sorted(keep, reverse=True):
                    own = dataclasses.replace(parallel, recompute=how, reshard_after_forward=reshard)
                    yield dataclasses.replace(config, parallel=own, train=_with_size(config, size)), layout


def _with_size(config: Config, sequences: int | None) -> object:
    return dataclasses.replace(config.train, micro_batch_sequences=sequences)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def estimate(question: Question, config: Config, layout: Layout) -> Planned:
    """Memory and time by formulas."""
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    stages = stages_of(question.shape, even_layers(config.model.num_layers, layout.pp), micro_batches)
    imbalance, size = question.plan.expert_imbalance, question.compute_bytes
    memory = max((stage_memory(config, layout, s, size, imbalance) for s in stages), key=lambda m: m.total)
    times = [estimated_time(config, layout, s, question.cluster, size, imbalance) for s in stages]
    time = step_time(times, micro_batches, _bubble(config, layout), question.plan.stage_imbalance)
    return Planned(config, layout, memory, time)


def _bubble(config: Config, layout: Layout) -> float:
    return bubble_micro_batches("1f1b", layout.pp, 1)


def search(question: Question) -> Answer:
    """Rank what is legal and fits, and confirm the best by running them."""
    if question.plan.search:
        layouts = list(legal_layouts(question))
    else:
        ranks = question.cluster.ranks
        config = dataclasses.replace(question.config, parallel=dataclasses.replace(question.config.parallel, ranks=ranks))
        layouts = [(config, check(config, ranks))]
    found = sorted((estimate(question, *layout) for layout in layouts), key=lambda planned: planned.time.seconds)
    usable = question.cluster.usable_bytes
    fitting = [planned for planned in found if planned.memory.total <= usable]
    run = confirm(question, fitting[: question.plan.simulate] or found[:1] * (not question.plan.search))
    confirmed = sorted((p for p in run if p.peak_bytes <= usable), key=lambda planned: planned.time.seconds)
    others = fitting[len(run) :] if fitting else []
    least = min(found, key=lambda planned: planned.peak_bytes, default=None)
    return Answer(len(found), len(fitting), confirmed + others, least)


def confirm(question: Question, candidates: Sequence[Planned]) -> list[Planned]:
    """The same with what a rank of each stage was seen to do."""
    jobs = [(planned, rank) for planned in candidates for rank in ranks_to_run(planned.layout)]
    if not jobs:
        return []
    traces = run_all([(p.config, question.cluster, rank, question.plan.expert_imbalance) for p, rank in jobs])
    found = []
    for planned in candidates:
        own = tuple(trace for (other, _), trace in zip(jobs, traces) if other is planned)
        micro_batches, _ = planned.config.train.micro_batches(planned.layout.batch_ranks)
        stages = stages_of(question.shape, even_layers(planned.config.model.num_layers, planned.layout.pp), micro_batches)
        times = []
        for trace in own:
            shape = stages[trace.rank // planned.layout.stage_ranks].architecture
            hides = hiding(planned.config, planned.layout, shape, question.cluster, question.compute_bytes)
            times.append(traced_time(trace, hides))
        bubble = _bubble(planned.config, planned.layout)
        time = step_time(times, micro_batches, bubble, question.plan.stage_imbalance)
        found.append(dataclasses.replace(planned, time=time, traces=own))
    return found


def ranks_to_run(layout: Layout) -> list[int]:
    """The first rank of the first, a middle and the last stage."""
    stages = sorted({0, layout.pp // 2, layout.pp - 1})
    return [stage * layout.stage_ranks for stage in stages]


def run_all(jobs: Collection[tuple[Config, ClusterConfig, int, float]]) -> list[RankTrace]:
    """Each in a process of its own kind: a fake process group bears no other one beside it. Two at a time."""
    with ProcessPoolExecutor(min(2, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(plan_rank, c, cluster, rank, imbalance=skew) for c, cluster, rank, skew in jobs]
        return [future.result() for future in futures]


def device_peak(cluster: ClusterConfig, compute_bytes: int) -> float:
    """FLOP/s of one rank, by its sheet."""
    return (cluster.bfloat16_TFLOPS if compute_bytes == 2 else cluster.float32_TFLOPS) * 1e12


def is_gpu(cluster: ClusterConfig) -> bool:
    return cluster.device is Device.cuda

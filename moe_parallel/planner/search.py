"""Legal layouts of a model on a cluster, those that fit by the time of a step, the best of them run on fake tensors.

Formulas sort all of them; the engine itself, rank by rank of those stages that differ, confirms the first few.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from typing import Any

from pydantic.dataclasses import dataclass

from moe_parallel.engines.stages import stages_per_rank
from moe_parallel.mesh import Layout, PipelineSchedule, Recompute, make_layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import MemoryEstimate
from moe_parallel.moe.balance import GlobalEstimator
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.options import Config, ConfigError, architecture
from moe_parallel.planner.cluster import ClusterConfig, Device
from moe_parallel.planner.formulas import estimated_time, hiding, stage_memory, stages_of
from moe_parallel.planner.rank import RankTrace, layers_to_run, plan_rank
from moe_parallel.planner.step_time import StepTime, bubble_micro_batches, step_time
from moe_parallel.planner.trace_time import traced_time
from moe_parallel.relations import check
from moe_parallel.train_options import TrainConfig

VOCABULARY = 257
"""Of a model whose vocabulary is its tokenizer's: that of bytes."""


@dataclass(kw_only=True)
class PlanConfig:
    expert_imbalance: float = 1.0
    """Rows of the fullest rank's experts over the mean of the ranks: with one expert a rank a run's
    experts/max_over_mean, with more less than that. Scales compute, memory and exchange of the experts."""
    stage_imbalance: float = 1.0
    """What the slowest pipeline stage takes over what its layers take."""
    keep: int = 60
    """Combinations of degrees, the fastest ones, that all recomputations and micro-batches are tried with."""
    simulate: int = 3
    """Layouts, the fastest by formulas, that are run on fake tensors; 0 trusts the formulas."""
    simulate_layers: int = 150
    """Layers times micro-batches that are run in all, which is what takes the time; the first layout is always run."""
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
        for name in ("keep", "show", "sequence_tokens", "sequences_per_rank", "max_micro_batch_sequences"):
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
        return max((trace.peak_bytes for trace in self.traces), default=self.memory.total)

    @property
    def fullest(self) -> RankTrace:
        return max(self.traces, key=lambda trace: trace.peak_bytes)


@plain_dataclass(frozen=True)
class Question:
    """What is to be planned."""

    config: Config
    cluster: ClusterConfig
    plan: PlanConfig
    fixed: frozenset[str] = frozenset()
    """Options such as "parallel.ep" that the search leaves as they are."""

    def __post_init__(self) -> None:
        if self.config.balance.global_estimator is GlobalEstimator.exact and self.config.balance.global_coefficient:
            raise ValueError(
                "balance.global_estimator=exact counts in passes of its own, which are not planned; plan with "
                "balance.global_estimator=look_ahead, and add a third to the computation"
            )
        if self.plan.expert_imbalance != 1 and not isinstance(self.config.dispatch, AllToAllConfig):
            raise ValueError(
                f"plan.expert_imbalance={self.plan.expert_imbalance} is planned for dispatch=all_to_all only: others "
                "even loads out or count a token once a node; set plan.expert_imbalance=1 or dispatch=all_to_all"
            )

    @cached_property
    def shape(self) -> Architecture:
        return architecture(self.config, None if self.config.model.vocab_size else VOCABULARY)

    @cached_property
    def compute_bytes(self) -> int:
        return self.config.train.compute_type(self.cluster.device.value).itemsize


@plain_dataclass(frozen=True)
class Answer:
    """What was found."""

    legal: int
    """Combinations of degrees."""
    tried: int
    """Layouts of the best of them: with their schedules, recomputations and micro-batches."""
    fitting: int
    """Of these, by formulas."""
    best: list[Planned]
    """The fastest first: those that were run, then others by formulas."""
    least: Planned | None
    """The one that needs least memory, if none fits."""


SCHEDULES = (PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved, PipelineSchedule.zero_bubble_v)
"""Those that the search considers."""


def degrees(question: Question) -> Iterator[tuple[Config, Layout]]:
    """Every legal combination of degrees of those that the search considers.

    tp stays within a node, cp is at most 8 and pp at most 32. `shard` is all ranks that have the same weights, those
    of a node, as many as `ep`, or 1.
    """
    config, cluster, ranks = question.config, question.cluster, question.cluster.ranks
    names = {
        "pp": [d for d in _divisors(ranks) if d <= min(32, config.model.num_layers)],
        "tp": _divisors(cluster.ranks_per_node),
        "cp": [d for d in (1, 2, 4, 8) if ranks % d == 0],
        "ep": [d for d in _divisors(config.moe.num_experts) if ranks % d == 0],
    }
    for name in names:
        if f"parallel.{name}" in question.fixed:
            names[name] = [getattr(config.parallel, name)]
    for pp, tp, cp, ep in itertools.product(*names.values()):
        weights = max(1, ranks // (pp * tp))
        shards = {weights, min(weights, max(1, cluster.ranks_per_node // tp)), min(weights, ep), 1}
        if "parallel.shard" in question.fixed:
            shards = {config.parallel.shard or weights}
        for shard in sorted(shards):
            own = dataclasses.replace(config.parallel, ranks=ranks, pp=pp, tp=tp, cp=cp, ep=ep, shard=shard)
            try:
                layout = make_layout(own, ranks, config.moe.num_experts)
            except ValueError:
                continue
            yield dataclasses.replace(config, parallel=own), layout


def legal_layouts(question: Question) -> Iterator[tuple[Config, Layout]]:
    """Degrees that a run would accept, with what takes least memory: full recomputation, micro-batches of a sequence.

    What the command line fixed stays.
    """
    fixed = question.fixed
    for config, layout in degrees(question):
        if "parallel.recompute" not in fixed:
            config = _with(config, recompute=Recompute.full)
        if "parallel.reshard_after_forward" not in fixed:
            config = _with(config, reshard_after_forward=True)
        if "train.micro_batch_sequences" not in fixed:
            config = dataclasses.replace(config, train=_sized(config, 1))
        if _is_legal(config):
            yield config, layout


def variants(question: Question, config: Config, layout: Layout) -> Iterator[tuple[Config, Layout]]:
    """The same degrees with every legal schedule, recomputation and size of micro-batches that the search considers."""
    fixed, several = question.fixed, layout.pp > 1
    sequences = config.train.global_batch_sequences // layout.batch_ranks
    sizes: list[int | None] = [d for d in _divisors(sequences) if d <= question.plan.max_micro_batch_sequences]
    if "train.micro_batch_sequences" in fixed:
        sizes = [config.train.micro_batch_sequences]
    parallel = config.parallel
    schedules = SCHEDULES if several and "parallel.schedule" not in fixed else (parallel.schedule,)
    ways = [parallel.recompute] if "parallel.recompute" in fixed else list(Recompute)
    keep = [parallel.reshard_after_forward] if "parallel.reshard_after_forward" in fixed else [True, False]
    for schedule, how, size in itertools.product(schedules, ways, sizes):
        own = _with(dataclasses.replace(config, train=_sized(config, size)), schedule=schedule, recompute=how)
        if _is_legal(own):
            for reshard in keep:
                yield _with(own, reshard_after_forward=reshard), layout


def _with(config: Config, **parallel: Any) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def _is_legal(config: Config) -> bool:
    assert config.parallel.ranks is not None
    try:
        check(config, config.parallel.ranks)
    except ConfigError:
        return False
    return True


def _sized(config: Config, sequences: int | None) -> TrainConfig:
    return dataclasses.replace(config.train, micro_batch_sequences=sequences)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def estimate(question: Question, config: Config, layout: Layout) -> Planned:
    """Memory and time by formulas."""
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    stages = [stages_of(config, question.shape, micro_batches)[rank] for rank in _different(layout.pp)]
    imbalance, size = question.plan.expert_imbalance, question.compute_bytes
    memory = max((stage_memory(config, layout, s, size, imbalance) for s in stages), key=lambda m: m.total)
    times = [estimated_time(config, layout, s, question.cluster, size, imbalance) for s in stages]
    time = step_time(times, micro_batches, _bubble(config), question.plan.stage_imbalance)
    return Planned(config, layout, memory, time)


def _bubble(config: Config) -> float:
    parallel = config.parallel
    return bubble_micro_batches(parallel.schedule, parallel.pp, stages_per_rank(parallel))


def search(question: Question) -> Answer:
    """Rank what is legal and fits, and confirm the best by running them."""
    usable = question.cluster.usable_bytes

    def estimated(layouts: Iterator[tuple[Config, Layout]]) -> list[Planned]:
        return sorted((estimate(question, *layout) for layout in layouts), key=_order)

    if question.plan.search:
        first = estimated(legal_layouts(question))
        kept = [planned for planned in first if planned.memory.total <= usable][: question.plan.keep]
        found = estimated(v for planned in kept for v in variants(question, planned.config, planned.layout))
    else:
        config = _with(question.config, ranks=question.cluster.ranks)
        found = first = estimated(iter([(config, check(config, question.cluster.ranks))]))
    fitting = [planned for planned in found if planned.memory.total <= usable]
    confirmed, run = _confirmed(question, fitting if question.plan.search else found)
    seen = {id(planned) for planned, _ in run}
    ratio = max((trace.peak_bytes / planned.memory.total for planned, trace in run), default=1.0)
    others = [p for p in fitting if id(p) not in seen and p.memory.total * ratio <= usable]
    least = min([*(trace for _, trace in run), *first], key=lambda planned: planned.peak_bytes, default=None)
    return Answer(len(first), len(found), len(fitting), confirmed + others, least)


ROUNDS = 3
"""How often layouts are run before the search gives up on those that do not fit when run."""


def _confirmed(question: Question, candidates: list[Planned]) -> tuple[list[Planned], list[tuple[Planned, Planned]]]:
    """Run the first candidates until some fit: those, the fastest first, and all that were run, before and after.

    What a run is found to need more than formulas say is held against later candidates.
    """
    usable, ratio = question.cluster.usable_bytes, 1.0
    run: list[tuple[Planned, Planned]] = []
    for _ in range(ROUNDS if question.plan.simulate else 0):
        seen = {id(planned) for planned, _ in run}
        left = [p for p in candidates if id(p) not in seen and (p.memory.total * ratio <= usable or not run)]
        chosen = _affordable(question, left)
        found = confirm(question, chosen)
        run += zip(chosen, found)
        fit = sorted((p for p in found if p.peak_bytes <= usable), key=lambda planned: planned.time.seconds)
        if fit or not chosen:
            return fit, run
        ratio = max(trace.peak_bytes / planned.memory.total for planned, trace in run)
    return [], run


def _affordable(question: Question, candidates: Sequence[Planned]) -> list[Planned]:
    """The first candidates, as many as `simulate` and `simulate_layers` allow; one at least."""
    chosen: list[Planned] = []
    layers = 0
    for planned in candidates[: question.plan.simulate]:
        layers += sum(layers_to_run(planned.config, planned.layout, rank) for rank in ranks_to_run(planned.layout))
        if chosen and layers > question.plan.simulate_layers:
            break
        chosen.append(planned)
    return chosen


def _order(planned: Planned) -> tuple[float, int]:
    """The fastest; of those that formulas cannot tell apart, the smallest."""
    return float(f"{planned.time.seconds:.3g}"), planned.memory.total


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
        stages = stages_of(planned.config, question.shape, micro_batches)
        times = []
        for trace in own:
            shape = stages[trace.rank // planned.layout.stage_ranks].architecture
            hides = hiding(planned.config, planned.layout, shape, question.cluster, question.compute_bytes)
            times.append(traced_time(trace, hides))
        bubble = _bubble(planned.config)
        time = step_time(times, micro_batches, bubble, question.plan.stage_imbalance)
        found.append(dataclasses.replace(planned, time=time, traces=own))
    return found


def ranks_to_run(layout: Layout) -> list[int]:
    """The first rank of the first, a middle and the last stage."""
    return [rank * layout.stage_ranks for rank in _different(layout.pp)]


def _different(pp: int) -> list[int]:
    return sorted({0, pp // 2, pp - 1})


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

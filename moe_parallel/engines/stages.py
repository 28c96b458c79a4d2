"""Which layers each stage of a pipeline has, which rank has which stages, and what the schedules ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from moe_parallel.mesh import Compile, ParallelConfig, PipelineSchedule, Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Part


@dataclass(frozen=True)
class StagePlan:
    """Stages of a pipeline, in the order in which a micro-batch passes them."""

    layers: tuple[range, ...]
    """Of each stage."""
    ranks: int
    """Of the pipeline."""
    is_v: bool = False

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.layers) - 1

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that has a stage."""
        down, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.is_v and down % 2 else place

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage in range(len(self.layers)) if self.rank_of(stage) == rank]

    def part_of(self, rank: int) -> Part:
        """What of the model a rank has."""
        stages = self.stages_of(rank)
        layers = tuple(layer for stage in stages for layer in self.layers[stage])
        return Part(layers, first=0 in stages, last=self.last in stages)

    def stage_of(self, name: str) -> int:
        """The stage that runs a module of the model, by its name."""
        where, _, rest = name.partition(".")
        if where == "layers":
            layer = int(rest.partition(".")[0])
            return next(stage for stage, layers in enumerate(self.layers) if layer in layers)
        return 0 if where == "embedding" else self.last

    def hands_carry(self, stage: int, architecture: Architecture) -> bool:
        """Whether a router before the end of this stage hands something on to the next stage."""
        width = architecture.router.carry_width(architecture.moe.num_experts)
        return width > 0 and self.layers[stage].stop > architecture.model.first_dense_layers


def stages_per_rank(config: ParallelConfig) -> int:
    """What the option says, or what it means if it is null."""
    if config.stages_per_rank is not None:
        return config.stages_per_rank
    return 1 if config.pp == 1 or config.schedule is PipelineSchedule.one_f_one_b else 2


def stage_plan(config: ParallelConfig, num_layers: int) -> StagePlan:
    """The stages of a legal configuration."""
    stages = config.pp * stages_per_rank(config)
    sizes = even_split(num_layers, stages) if config.stage_layers is None else config.stage_layers
    stops = list(accumulate(sizes))
    layers = tuple(range(stop - size, stop) for size, stop in zip(sizes, stops))
    return StagePlan(layers, config.pp, config.schedule.is_v)


def even_split(num_layers: int, stages: int) -> list[int]:
    """Layers of each stage: equally many. Inner stages get one each of those left over, then the first, which has the
    embedding besides. The last has the head, the dearest of all, and gets none."""
    least, left_over = divmod(num_layers, stages)
    longer = [*range(1, stages - 1), 0][:left_over]
    return [least + (stage in longer) for stage in range(stages)]


def pipeline_problems(config: ParallelConfig, architecture: Architecture, device_type: str | None) -> list[str]:
    """Why there is no such pipeline, with the remedy of each."""
    if config.pp > 1:
        return [*_stages(config, architecture), *_schedule(config, architecture, device_type)]
    given = {
        "schedule": None if config.schedule is PipelineSchedule.one_f_one_b else config.schedule.value,
        "stages_per_rank": None if config.stages_per_rank == 1 else config.stages_per_rank,
        "stage_layers": config.stage_layers,
    }
    return [
        f"parallel.{name}={value} is of a pipeline, but parallel.pp=1 has none; leave it out"
        for name, value in given.items()
        if value is not None
    ]


def schedule_problems(config: ParallelConfig, engine: str) -> list[str]:
    """For engines that have schedules of their own, or none: what says how torch's go is not for them."""
    return [
        f"parallel.{name}={value} is of engine=native; leave it out with engine={engine}"
        for name, value, default in (
            ("schedule", config.schedule.value, PipelineSchedule.one_f_one_b.value),
            ("stages_per_rank", config.stages_per_rank, None),
            ("stage_layers", config.stage_layers, None),
        )
        if value != default
    ]


def _stages(config: ParallelConfig, architecture: Architecture) -> Iterator[str]:
    pp, each, num_layers = config.pp, stages_per_rank(config), architecture.model.num_layers
    named = f"parallel.schedule={config.schedule.value}"
    if config.schedule is PipelineSchedule.one_f_one_b and each != 1:
        yield f"{named} has one stage on each rank, not parallel.stages_per_rank={each}; set it to 1, or interleaved"
    elif config.schedule.is_v and each != 2:
        yield f"{named} has two stages on each rank, not parallel.stages_per_rank={each}; set it to 2"
    elif config.schedule is PipelineSchedule.interleaved and each < 2:
        yield f"{named} needs parallel.stages_per_rank of at least 2, not {each}; one_f_one_b is the schedule for 1"
    elif each < 1:
        yield f"parallel.stages_per_rank={each} must be at least 1"
    elif pp * each > num_layers:
        yield (
            f"parallel.pp={pp} * parallel.stages_per_rank={each} makes {pp * each} stages, more than "
            f"model.num_layers={num_layers}; lower one of them: each stage has a layer at least"
        )
    elif (layers := config.stage_layers) is not None:
        if len(layers) != pp * each:
            yield (
                f"parallel.stage_layers={layers} names {len(layers)} stages, but parallel.pp={pp} * "
                f"parallel.stages_per_rank={each} makes {pp * each}"
            )
        if min(layers, default=0) < 1 or sum(layers) != num_layers:
            yield (
                f"parallel.stage_layers={layers} must be positive numbers that sum to model.num_layers={num_layers}, "
                f"not to {sum(layers)}; null gives {even_split(num_layers, pp * each)}"
            )


def _schedule(config: ParallelConfig, architecture: Architecture, device_type: str | None) -> Iterator[str]:
    named, model, chain = (
        f"parallel.schedule={config.schedule.value}",
        architecture.model,
        architecture.moe.chain.iterations,
    )
    if config.schedule.is_v and architecture.last_embeds:
        why = "model.tie_embeddings=true" if model.tie_embeddings else "model.mtp_layers > 0"
        yield (
            f"{named} puts the first stage and the last one on the same rank; with {why} both need the embedding, "
            "which FSDP cannot gather for two stages of a rank; choose parallel.schedule=interleaved_zero_bubble"
        )
    if config.schedule.is_v and device_type == "cpu" and _torch_version() < (2, 13):
        yield (
            f"{named} cannot run on a CPU with torch {torch.__version__}: its ranks send to themselves, which gloo "
            "refuses; use torch 2.13 or newer, or parallel.schedule=interleaved_zero_bubble"
        )
    if not config.schedule.splits_backward:
        return
    if config.recompute is Recompute.full:
        yield (
            f"{named} runs the backward pass of a stage in parts, and parallel.recompute=full would compute its blocks "
            "again for each of them; set parallel.recompute=selective or none, or parallel.schedule=interleaved"
        )
    if config.compile is not Compile.none:
        yield (
            f"{named} computes gradients of weights apart from those of inputs, which the compiled graphs of "
            f"parallel.compile={config.compile.value} cannot do; set it to none, or parallel.schedule=interleaved"
        )
    again = {
        f"moe.chain.iterations={chain}": architecture.num_moe_layers > 0 and chain > 1,
        f"model.mtp_layers={model.mtp_layers}": model.mtp_layers > 1,
        "model.tie_embeddings=true and model.mtp_layers=1": model.tie_embeddings and model.mtp_layers == 1,
    }
    for options, used in again.items():
        if used:
            yield (
                f"{named} computes gradients of weights apart from those of inputs; with {options} a weight is used "
                "again on the way to its own gradient, which torch's schedules cannot do; set "
                "parallel.schedule=interleaved"
            )


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])


def micro_batch_problems(config: ParallelConfig, micro_batches: int, sequences: int) -> list[str]:
    """Whether a step has a number of micro-batches, of so many sequences, that the schedule can order."""
    if config.pp == 1 or legal_micro_batches(config, micro_batches):
        return []
    rows = micro_batches * sequences
    legal = [d for d in range(1, rows + 1) if rows % d == 0 and legal_micro_batches(config, rows // d)]
    remedy = f"legal values of train.micro_batch_sequences: {legal}"
    return [
        f"parallel.schedule={config.schedule.value} with parallel.pp={config.pp} cannot order the {micro_batches} "
        f"micro-batches of {sequences} sequences that a rank has in a step; "
        f"{remedy if legal else 'raise train.global_batch_tokens, or lower parallel.pp'}"
    ]


def legal_micro_batches(config: ParallelConfig, micro_batches: int) -> bool:
    """The conditions that torch's schedules have."""
    if config.schedule is PipelineSchedule.one_f_one_b:
        return micro_batches >= config.pp
    if config.schedule is PipelineSchedule.dual_pipe_v:
        return micro_batches >= 2 * config.pp
    if config.schedule is PipelineSchedule.zero_bubble_v:
        return micro_batches >= 1
    return micro_batches % max(1, micro_batches // config.pp) == 0

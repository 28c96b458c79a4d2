"""What the options of every engine have in common."""

from __future__ import annotations

import dataclasses

import torch
from pydantic.dataclasses import dataclass

from moe_parallel.engines.stages import micro_batch_problems, pipeline_problems
from moe_parallel.mesh import Layout, ParallelConfig
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class EngineSetting:
    """What the relations between an engine and the run depend on."""

    architecture: Architecture
    layout: Layout
    parallel: ParallelConfig
    dispatch: DispatchConfig
    optim: OptimConfig
    device_type: str | None = None
    """What the ranks compute on; None if that is not known, in a plan."""
    dtype: torch.dtype | None = None
    """What they compute in; None likewise."""
    micro_batches: tuple[int, int] | None = None
    """Of a rank in a step, and the sequences of one; None if that is not known."""


@dataclass(kw_only=True)
class EngineConfig:
    """What shards, reduces and steps. Each engine has its options, and some have none."""

    def problems(self, setting: EngineSetting) -> list[str]:
        """Why it cannot train this, with the remedy of each. Needs neither its package nor a process group."""
        return []


def learning_options_problems(optim: OptimConfig, engine: str) -> list[str]:
    """For engines that have buffers of their own for gradients, in which every weight learns at every step."""
    return [
        f"optim.{name}={value} is of engine=native; leave it out with engine={engine}"
        for name, value, default in (
            ("frozen", optim.frozen, []),
            ("router_only_steps", optim.router_only_steps, 0),
        )
        if value != default
    ]


def expert_form_problems(architecture: Architecture, engine: str) -> list[str]:
    """For engines that know experts by their two matrices."""
    rank = architecture.moe.delta_rank
    if rank is None or architecture.num_moe_layers == 0:
        return []
    return [
        f"moe.expert_form=delta with moe.delta_rank={rank}: engine={engine} knows experts by their own matrices, not "
        "by factors and a base; set moe.expert_form=full, or engine=native"
    ]


@dataclass(kw_only=True)
class NativeEngineConfig(EngineConfig):
    """torch's own FSDP2, all-to-all and pipelines. Its options are those of `parallel`."""

    def problems(self, setting: EngineSetting) -> list[str]:
        parallel = setting.parallel
        found = pipeline_problems(parallel, setting.architecture, setting.device_type)
        if not found and setting.micro_batches is not None:
            found += micro_batch_problems(parallel, *setting.micro_batches)
        return found

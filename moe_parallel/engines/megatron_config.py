"""Options of the Megatron-Core engine, and what it cannot train. Knows nothing of the package itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from moe_parallel.convert.megatron_weights import attention_problems
from moe_parallel.engines.config import EngineConfig, EngineSetting, expert_form_problems, learning_options_problems
from moe_parallel.engines.stages import pipeline_problems, stages_per_rank
from moe_parallel.mesh import Compile, PipelineSchedule
from moe_parallel.moe.chain import ChainBlock, Renormalize

PACKAGE = "megatron-core>=0.16.1"


@dataclass(kw_only=True)
class MegatronConfig(EngineConfig):
    """Megatron-Core's model, schedules and optimizer (arXiv 2104.04473), with our mixture-of-experts layers."""

    distributed_optimizer: bool = True
    """Split float32 weights, moments and the work of a step over the ranks that have the same weights."""

    def problems(self, setting: EngineSetting) -> list[str]:
        refused = learning_options_problems(setting.optim, "megatron")
        refused += expert_form_problems(setting.architecture, "megatron")
        return [*_package(), *_stages(setting), *_parallel(setting), *_architecture(setting), *refused]


def _package() -> Iterator[str]:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        yield f'engine=megatron needs the package megatron-core: pip install "{PACKAGE}"'


def _stages(setting: EngineSetting) -> Iterator[str]:
    parallel, layout, layers = setting.parallel, setting.layout, setting.architecture.model.num_layers
    found = pipeline_problems(parallel, setting.architecture, setting.device_type)
    yield from found
    if found or layout.pp == 1:
        return
    if parallel.schedule not in (PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved):
        yield (
            f"parallel.schedule={parallel.schedule.value} is none of Megatron-Core's; choose one_f_one_b or interleaved"
        )
    stages = layout.pp * stages_per_rank(parallel)
    if layers % stages != 0:
        legal = [d for d in range(1, layers + 1) if layers % d == 0]
        yield (
            f"{stages} stages (parallel.pp={layout.pp}) do not divide model.num_layers={layers}: those of "
            f"Megatron-Core have equally many layers; legal numbers of stages: {legal}"
        )
    elif parallel.stage_layers not in (None, [layers // stages] * stages):
        yield (
            f"parallel.stage_layers={parallel.stage_layers} is uneven; stages of Megatron-Core have equally many "
            "layers: leave it out"
        )


def _parallel(setting: EngineSetting) -> Iterator[str]:
    parallel, layout = setting.parallel, setting.layout
    if parallel.shard is not None:
        yield (
            f"parallel.shard={parallel.shard} splits weights as torch's FSDP does; Megatron-Core has "
            "engine.distributed_optimizer instead; leave parallel.shard out"
        )
    if not parallel.reshard_after_forward:
        yield "parallel.reshard_after_forward=false is an option of torch's FSDP; leave it out with engine=megatron"
    if parallel.compile is not Compile.none:
        yield f"parallel.compile={parallel.compile.value} fuses our own blocks; set it to none with engine=megatron"
    vocabulary = setting.architecture.vocab_size
    if layout.tp > 1 and vocabulary > 1 and vocabulary % layout.tp != 0:  # 1 stands for a tokenizer's, not known yet
        rounded = vocabulary + -vocabulary % layout.tp
        yield (
            f"parallel.tp={layout.tp} does not divide the vocabulary of {vocabulary} words, which Megatron-Core "
            f"splits; set model.vocab_size={rounded}"
        )


def _architecture(setting: EngineSetting) -> Iterator[str]:
    architecture = setting.architecture
    chain = architecture.moe.chain
    yield from attention_problems(architecture)
    if architecture.model.mtp_layers > 0:
        yield (
            f"model.mtp_layers={architecture.model.mtp_layers}: multi-token prediction of engine=megatron is not ours; "
            "set model.mtp_layers=0"
        )
    if architecture.num_moe_layers and architecture.router.carry_width(architecture.moe.num_experts) > 0:
        yield (
            "this router hands something on from layer to layer, which Megatron-Core's layers do not; set "
            "router.logit_residual=false, or engine=native"
        )
    if architecture.num_moe_layers and chain.renormalize is not Renormalize.none:
        yield (
            f"moe.chain.renormalize={chain.renormalize.value} needs the residual stream, which Megatron-Core's layers "
            "do not hand on; set moe.chain.renormalize=none"
        )
    if architecture.num_moe_layers and chain.block is not ChainBlock.pre_norm:
        yield (
            f"moe.chain.block={chain.block.value} replaces the residual stream, which Megatron-Core's layers keep; set "
            "moe.chain.block=pre_norm"
        )

"""Rows of the parity table that Megatron-Core computes, in processes of their own: see `megatron_on_cpu`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.hashing import hash_key
from moe_parallel.mesh import ParallelConfig, ParallelMesh, PipelineSchedule, Recompute, make_layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import InitConfig, normal_part
from tests.batches import join_batches
from tests.parity.cases import OPTIM, SEED, STEPS, Case, Outcome, _buffers, router_factor


@dataclass(frozen=True)
class MegatronCase(Case):
    """A row with an even vocabulary, which tensor parallelism splits, and layers for stages of a pipeline."""

    pp: int = 1
    stages_per_rank: int = 1
    distributed_optimizer: bool = True
    num_layers: int = 3
    first_dense_layers: int = 1
    dtype: str = "float32"

    @property
    def batch_ranks(self) -> int:
        return self.world // (self.pp * self.tp * self.cp)

    def architecture(self) -> Architecture:
        plain = super().architecture()
        model = replace(plain.model, num_layers=self.num_layers, first_dense_layers=self.first_dense_layers)
        return replace(plain, model=model, vocab_size=38)


def megatron_engine(case: MegatronCase, seed: int = SEED) -> Any:
    """The engine with first values of a size at which routing is lively."""
    import tests.engines.megatron_on_cpu  # noqa: F401 - before anything of Megatron
    from moe_parallel.engines.config import EngineSetting
    from moe_parallel.engines.megatron import MegatronEngine
    from moe_parallel.engines.megatron_config import MegatronConfig

    warnings.simplefilter("ignore")
    degrees = {"ep": case.ep, "tp": case.tp, "cp": case.cp, "pp": case.pp}
    schedule = PipelineSchedule.interleaved if case.stages_per_rank > 1 else PipelineSchedule.one_f_one_b
    parallel = ParallelConfig(
        **degrees, schedule=schedule, stages_per_rank=case.stages_per_rank, recompute=Recompute(case.recompute)
    )
    layout = make_layout(parallel, dist.get_world_size(), case.num_experts)
    setting = EngineSetting(case.architecture(), layout, parallel, case.dispatch, OPTIM, "cpu")
    config = MegatronConfig(distributed_optimizer=case.distributed_optimizer)
    engine = MegatronEngine(
        config, setting, ParallelMesh(layout, "cpu"), torch.device("cpu"), getattr(torch, case.dtype), seed
    )
    engine.init_weights(InitConfig(std=0.1), seed)
    enliven(engine)
    return engine


@torch.no_grad()
def enliven(engine: Any) -> None:
    """As `_prepare` does for the others: in what the optimizer steps, and from there in what computes."""
    for one in engine._held:
        for segment, flat in one.parts(one.main.detach()):
            if ".router." in segment.name or ".later_routers." in segment.name:
                flat.values.mul_(router_factor(segment.name))
            if segment.name.endswith("later_scale"):
                flat.values.fill_(0.5)
            if segment.name.endswith("adjugates.down"):
                offsets, sizes = flat.box
                box = torch.empty(sizes)
                normal_part(box, segment.shape, offsets, 0.3, hash_key(SEED, int(segment.name.split(".")[1])))
                flat.values.copy_(box.flatten()[flat.start : flat.start + flat.values.numel()])
    engine._publish()


def whole_tensors(parts: list[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Tensors from the ranges of all ranks, on each of them; NaN where no rank has a part."""
    mine = [
        (segment.name, segment.shape, flat.box, flat.start, flat.values.detach().clone()) for segment, flat in parts
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, Tensor] = {}
    for name, shape, (offsets, sizes), start, values in (part for rank in everyone for part in rank):
        whole = found.setdefault(name, torch.full(shape, torch.nan))
        box = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
        flat = box.flatten()  # a copy
        flat[start : start + values.numel()] = values
        box.copy_(flat.view_as(box))
    return found


def gradients(engine: Any) -> dict[str, Tensor]:
    """After `gradient_norm`, which gives them to what the optimizer steps."""
    return whole_tensors([pair for one in engine._held for pair in one.parts(one.main.grad)])


def weights(engine: Any) -> dict[str, Tensor]:
    return whole_tensors([pair for one in engine._held for pair in one.parts(one.main)])


def batches_of(case: Case, step: int, batch_rank: int) -> tuple[list[Any], int, int]:
    batches = [join_batches([case.batch(step, m, batch_rank)]) for m in range(case.micro_batches)]
    everyone = [case.batch(step, m, r) for m in range(case.micro_batches) for r in range(case.batch_ranks)]
    return batches, sum(b.num_targets for b in everyone), sum(b.num_valid for b in everyone)


def run_megatron(case: MegatronCase, steps: int = STEPS) -> list[Outcome]:
    """The engine on this rank, gradients gathered to full tensors."""
    engine = megatron_engine(case)
    outcomes = []
    for step in range(steps):
        batches, num_targets, num_valid = batches_of(case, step, engine.layout.batch_rank(dist.get_rank()))
        sums, _ = engine.forward_backward(batches, step, num_targets, num_valid)
        totals = sums.summed(engine.group)
        norm = engine.gradient_norm()
        gradient = gradients(engine)
        engine.step(OPTIM.learning_rate, norm)
        engine.update_routers(totals)
        buffers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(buffers, _buffers(engine.layers))
        stages = [buffers[stage * engine.layout.stage_ranks] for stage in range(case.pp)]
        outcomes.append(
            Outcome(
                loss=float(totals.cross_entropy) / num_targets,
                balance=float(totals.balance) / num_valid,
                norm=float(norm),
                gradients=gradient,
                counts=totals.count_LE,
                dropped=float(totals.dropped_L.sum()),
                buffers=[buffer for stage in stages for buffer in stage],
            )
        )
    engine.close()
    return outcomes


def run_megatron_cases(cases: list[MegatronCase]) -> list[list[Outcome]]:
    """All cases on this rank."""
    return [run_megatron(case) for case in cases]

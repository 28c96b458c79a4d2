"""What DeepSpeed computes, in the terms of the parity suite: its table of cases, and the engine's side of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.deepspeed import DeepSpeedEngine
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.engines.deepspeed_experts import our_name
from moe_parallel.mesh import ParallelConfig, ParallelMesh, Recompute, make_layout
from moe_parallel.model.initialize import InitConfig
from tests.parity.cases import OPTIM, SEED, Case, Outcome, router_factor, run_steps
from tests.parity.table import (
    ALL_LOSSES,
    BIAS,
    BIASED,
    CHAIN,
    CHUNKS_2,
    DOMAINS,
    EXACT,
    GATED,
    GLOBAL,
    OFFSETS,
    RESIDUAL,
    SCALED_CHAIN,
    SIGMOID,
    SPILL,
    TERNARY,
    THREE,
    THRESHOLD,
    TWO_NODES,
    WHOLE,
)

Row = tuple[Case, dict[str, object]]
"""A case, and the options of its engine."""


def row(name: str, world: int, options: dict[str, object], **case: object) -> Row:
    """DeepSpeed knows no float64. Two micro-batches unless said otherwise."""
    return Case(name, world, dtype="float32", **{"micro_batches": 2, **case}), options  # type: ignore[arg-type]


ONE, TWO, THREE_WHOLE = {"stage": 1}, {"stage": 2}, {"stage": 3}
SMALL = {"reduce_bucket_elements": 600, "gather_bucket_elements": 600}
"""Buckets that hold some parameters, cut others, and are smaller than the largest."""
CUT = {"stage": 3, "keep_elements": 0, **SMALL}
"""Every parameter is cut, however small."""
CPU = {"offload_optimizer": "cpu"}

WORLD_TWO = [
    row("zero 1, ep 1, chain of 2", 2, ONE, moe=CHAIN, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    row("zero 1, ep 2, all losses", 2, {**ONE, **SMALL}, ep=2, balance=ALL_LOSSES),
    row("zero 1, ep 2, expert choice", 2, ONE, ep=2, kind="expert_choice", router=WHOLE, rows=2),
    row("zero 2, ep 1, exact, latent attention, tied", 2, TWO, latent_attention=True, tied=True, balance=EXACT),
    row("zero 2, ep 2, bias", 2, {**TWO, **SMALL}, ep=2, attention=BIASED, router=SIGMOID, balance=BIAS),
    row("zero 2, ep 2, chain of 3, full recompute", 2, TWO, ep=2, moe=THREE, recompute="full", balance=GLOBAL),
    row("zero 2, ep 2, least loaded, starved rank", 2, TWO, ep=2, dispatch=SPILL, starved_rank=True, balance=BIAS),
    row("zero 2, ep 2, optimizer on the host", 2, {**TWO, **CPU}, ep=2, moe=GATED, balance=GLOBAL),
    row("zero 2, overlapped, idle rank", 2, {**TWO, "overlap_communication": True}, ep=2, idle_rank=True, balance=BIAS),
    row("zero 3, whole parameters, ep 2", 2, THREE_WHOLE, ep=2, balance=ALL_LOSSES),
    row("zero 3, ep 1, exact, latent attention, tied", 2, CUT, latent_attention=True, tied=True, balance=EXACT),
    row("zero 3, ep 2, bias", 2, CUT, ep=2, attention=BIASED, router=SIGMOID, balance=BIAS),
    row("zero 3, ep 2, scaled chain, full recompute", 2, CUT, ep=2, moe=SCALED_CHAIN, recompute="full", balance=GLOBAL),
    row("zero 3, ep 2, expert choice", 2, CUT, ep=2, kind="expert_choice", router=WHOLE, rows=2),
    row("zero 3, ep 2, least loaded, starved rank", 2, CUT, ep=2, dispatch=SPILL, starved_rank=True, balance=BIAS),
    row("zero 3, multi-token prediction", 2, CUT, ep=2, mtp_layers=2, rows=2, balance=ALL_LOSSES),
    row("zero 3, domains, offsets", 2, CUT, ep=2, kind="domain", router={**DOMAINS, **OFFSETS}, balance=ALL_LOSSES),
    row("zero 3, ternary experts, 2 chunks", 2, CUT, ep=2, dispatch=CHUNKS_2, moe=TERNARY, balance=ALL_LOSSES),
    row("zero 2, ternary experts, full recompute", 2, TWO, ep=2, moe=TERNARY, recompute="full", balance=GLOBAL),
    row("zero 2, residual logits", 2, TWO, ep=2, router=RESIDUAL, mtp_layers=1, rows=2, balance=ALL_LOSSES),
    row("zero 3, all on the host", 2, {**CUT, **CPU, "offload_parameters": "cpu"}, ep=2, moe=GATED, balance=GLOBAL),
]  # fmt: skip

WORLD_FOUR = [
    row("zero 1, ep 4", 4, ONE, ep=4, balance=ALL_LOSSES),
    row("zero 1, ep 2, chain of 2", 4, {**ONE, **SMALL}, ep=2, moe=CHAIN, balance=GLOBAL),
    row("zero 2, ep 4, two hops", 4, TWO, ep=4, dispatch=TWO_NODES, balance=ALL_LOSSES),
    row("zero 2, ep 2, bias", 4, {**TWO, **SMALL}, ep=2, router=SIGMOID, balance=BIAS),
    row("zero 2, ep 2, threshold", 4, TWO, ep=2, kind="expert_choice", router=THRESHOLD, rows=2),
    row("zero 3, ep 4, chain of 2", 4, CUT, ep=4, moe=CHAIN, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    row("zero 3, ep 2", 4, CUT, ep=2, balance=ALL_LOSSES),
    row("zero 3, ep 1, idle rank", 4, {"stage": 3, "keep_elements": 64}, idle_rank=True, router=SIGMOID, balance=BIAS),
]  # fmt: skip


def build(case: Case, **options: object) -> DeepSpeedEngine:
    """The engine of a case, without values."""
    parallel = ParallelConfig(ep=case.ep, recompute=Recompute(case.recompute))
    layout = make_layout(parallel, dist.get_world_size(), case.num_experts)
    dtype = getattr(torch, case.dtype)
    setting = EngineSetting(case.architecture(), layout, parallel, case.dispatch, OPTIM, "cpu", dtype)
    config = DeepSpeedConfig(**options)  # type: ignore[arg-type]
    return DeepSpeedEngine(config, setting, ParallelMesh(layout, "cpu"), torch.device("cpu"), dtype)


def lively(engine: DeepSpeedEngine, case: Case) -> None:
    """The weights of the parity suite, on this rank's ranges of them."""
    engine.init_weights(InitConfig(std=0.1), SEED)
    with engine.partitions.published():
        for ranges, flat, _ in engine.partitions.visit(write=True):
            for held in ranges:
                if "router" in held.name:
                    held.range_in(flat).mul_(router_factor(held.name))
                if held.name.endswith("later_scale"):
                    held.range_in(flat).fill_(0.5)
    if case.starved_rank:
        for layer in engine.layers:
            assert layer.router.bias is not None
            layer.router.bias[: case.num_experts // case.ep] += 100.0


def gradients(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Of whole parameters: DeepSpeed gathers those of this rank's experts, and the others' come from their ranks."""
    found = {}
    for theirs, parameter in engine.model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if (name := our_name(theirs)) is not None:
            if ".experts." in name and engine.layout.ep > 1:
                parts = [torch.empty_like(gradient) for _ in range(engine.layout.ranks)]
                dist.all_gather(parts, gradient.contiguous())
                gradient = torch.cat(parts[: engine.layout.ep])
            found[name] = gradient.clone()
    return found


def run_zero(case: Case, **options: object) -> list[Outcome]:
    """Two steps of a case."""
    engine = build(case, **options)
    lively(engine, case)
    outcomes = run_steps(engine, case, lambda: gradients(engine))
    engine.close()
    return outcomes


def run_all(cases: list[Row]) -> list[list[Outcome]]:
    """All cases on this rank."""
    return [run_zero(case, **options) for case, options in cases]

"""Ternary experts beside the whole dense network, which stays in every token's way as the shared expert (MoTE, arXiv
2506.14435)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Constant, Joined, Scaled, Stacked
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.granular import num_slices, slice_of
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_from_dense,
    check_one_source,
    copied,
    dense_network,
    moe_networks,
    new_parts,
)
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.expert_forms import ExpertForm


class TernaryStart(str, Enum):
    source = "source"
    """Parts of the dense network, or all of it, as wide as the experts; rounded when they compute."""
    drawn = "drawn"
    """New."""


@dataclass(kw_only=True)
class TernaryConfig(UpcycleConfig):
    ternary_start: TernaryStart = TernaryStart.source
    """What the routed experts are at first."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_one_source(sources, "ternary")
        check_from_dense(sources, target, ExpertForm.ternary)
        width, moe = source.model.ffn_dim, target.moe
        slices = num_slices(source, target)
        if moe.num_shared_experts != slices:
            raise ValueError(
                f"moe.num_shared_experts={moe.num_shared_experts} must be {slices}: times moe.expert_dim="
                f"{moe.expert_dim} it is model.ffn_dim={width} of the source, which becomes the shared expert"
            )
        if self.ternary_start is TernaryStart.source and moe.num_experts % slices != 0:
            raise ValueError(
                f"moe.num_experts={moe.num_experts} must be a multiple of {slices}, the slices of the source's network;"
                f" nearest legal value: {-(-moe.num_experts // slices) * slices}"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        """Routed experts add to the dense network from the first step on, as much as it returns itself."""
        return Preserves.none

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        (source,), moe = sources, target.moe
        slices = num_slices(source.architecture, target)
        plan = copied(source, target) | new_parts(target, draw)
        for name in moe_networks(target):
            network = dense_network(source.weights, name)
            plan[f"{name}.shared.gate_up.weight"] = Joined(network[:2])
            plan[f"{name}.shared.down.weight"] = network[2]
            if moe.shared_expert_gate:  # of zeros it is sigmoid(0) = 1/2 for every token
                plan[f"{name}.shared_gate.weight"] = Constant((1, target.model.dim))
                plan[f"{name}.shared.down.weight"] = Scaled(network[2], 2)
            experts = [slice_of(network, e % slices, moe.expert_dim) for e in range(moe.num_experts)]
            for what, stack in zip(("gate_up", "down"), map(Stacked, zip(*experts, strict=True)), strict=True):
                full = f"{name}.experts.{what}"
                plan[full] = stack if self.ternary_start is TernaryStart.source else draw(full)
        return plan

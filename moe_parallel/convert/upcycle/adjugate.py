"""Adjugates on experts that exist (Grove MoE, arXiv 2508.07785). Nothing else changes; at first they add nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import (
    check_has_experts,
    check_nothing_is_lost,
    check_same_experts,
    same_routing,
)
from moe_parallel.convert.upcycle.map import Draw, Plan, Preserves, UpcycleConfig
from moe_parallel.model.architecture import Architecture


@dataclass(kw_only=True)
class AdjugateStartConfig(UpcycleConfig):
    """Options of adjugates are those of `moe`; init.std draws what leads into them."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_has_experts(sources, "adjugate")
        if target.moe.adjugate_groups == 0:
            raise ValueError(
                f"init=adjugate adds adjugates, but moe.adjugate_groups=0 has none; set it, to "
                f"{max(1, source.moe.num_experts // 2)} for pairs of experts"
            )
        if source.moe.adjugate_groups > 0:
            raise ValueError("init.sources[0] has adjugates already; take init.weights")
        check_same_experts(source, target, ["adjugate_groups", "adjugate_dim", "adjugate_scale"])

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        return Preserves.exact if same_routing(sources[0], target) else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        theirs, names = sources[0].weights, shapes_of(target)
        check_nothing_is_lost(theirs, names)
        return {name: theirs[name] if name in theirs else draw(name) for name in names}

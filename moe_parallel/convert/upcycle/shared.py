"""A shared expert that is the whole dense network, and routed experts that are slices of specialized ones: the shape of
Innovator (arXiv 2507.18671). Knowledge of the general model stays in every token's way."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Constant, Joined, Lazy, Scaled, Stacked
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.granular import num_slices, slice_of
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_from_dense,
    copied,
    dense_network,
    moe_networks,
    new_parts,
    passes_once,
)
from moe_parallel.model.architecture import Architecture


class RoutedStart(str, Enum):
    zero = "zero"
    """Their down projections start at zero: at first the model is the general one."""
    whole = "whole"
    """They are what they were: with weights of 1 the slices of a discipline add its whole network."""


@dataclass(kw_only=True)
class SharedConfig(UpcycleConfig):
    routed_start: RoutedStart = RoutedStart.zero
    """What routed experts return at first."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        if not sources:
            raise ValueError("init.sources is empty; give the general model first, then those of the disciplines")
        check_from_dense(sources, target)
        width, moe = sources[0].model.ffn_dim, target.moe
        disciplines = [source.model.ffn_dim for source in sources[1:]]
        if any(other != width for other in disciplines):
            raise ValueError(
                f"init.sources have model.ffn_dim={', '.join(map(str, [width, *disciplines]))}; slices of all must be "
                "equally many, so these must be the same"
            )
        slices = num_slices(sources[0], target)
        if moe.num_shared_experts != slices:
            raise ValueError(
                f"moe.num_shared_experts={moe.num_shared_experts} must be {slices}: times moe.expert_dim="
                f"{moe.expert_dim} it is model.ffn_dim={width} of the general model, which becomes the shared expert"
            )
        wanted = slices * max(1, len(disciplines))
        if moe.num_experts % wanted != 0:
            raise ValueError(
                f"moe.num_experts={moe.num_experts} must be a multiple of {wanted}, {slices} slices of each of "
                f"{max(1, len(disciplines))} networks; nearest legal value: {-(-moe.num_experts // wanted) * wanted}"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        exact = self.routed_start is RoutedStart.zero and passes_once(target)
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        general, disciplines, moe = sources[0], sources[1:] or sources[:1], target.moe
        slices = num_slices(general.architecture, target)
        plan = copied(general, target) | new_parts(target, draw)
        for name in moe_networks(target):
            gate, up, down = dense_network(general.weights, name)
            plan[f"{name}.shared.gate_up.weight"] = Joined([gate, up])
            plan[f"{name}.shared.down.weight"] = down
            if moe.shared_expert_gate:  # of zeros it is sigmoid(0) = 1/2 for every token
                plan[f"{name}.shared_gate.weight"] = Constant((1, target.model.dim))
                plan[f"{name}.shared.down.weight"] = Scaled(down, 2)
            networks = [dense_network(source.weights, name) for source in disciplines]
            experts = [
                slice_of(networks[e // slices % len(networks)], e % slices, moe.expert_dim)
                for e in range(moe.num_experts)
            ]
            plan[f"{name}.experts.gate_up"] = Stacked([gate_up for gate_up, _ in experts])
            plan[f"{name}.experts.down"] = self._down([down for _, down in experts])
        return plan

    def _down(self, downs: Sequence[Lazy]) -> Lazy:
        stack = Stacked(downs)
        return Constant(stack.shape) if self.routed_start is RoutedStart.zero else stack

"""From a plain mixture of experts to a chain of experts: later passes over the same experts, each with a router of its
own (arXiv 2506.18945). With moe.chain.learned_scale they count nothing at first, and the model is the plain one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

from pydantic.dataclasses import dataclass

from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import check_has_experts, check_same_experts, same_routing
from moe_parallel.convert.upcycle.map import Draw, Plan, Preserves, UpcycleConfig, without_chain
from moe_parallel.model.architecture import Architecture

_LATER_ROUTER = re.compile(r"\.later_routers\.\d+\.")


class LaterRouters(str, Enum):
    drawn = "drawn"
    """New ones: each iteration learns its own choice."""
    copied = "copied"
    """The layer's router: each iteration first asks the same experts, as far as what it sees is alike."""


@dataclass(kw_only=True)
class ChainStartConfig(UpcycleConfig):
    later_routers: LaterRouters = LaterRouters.drawn
    """What the routers of later iterations start as."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source, chain = check_has_experts(sources, "chain"), target.moe.chain
        if source.moe.chain.iterations > 1:
            raise ValueError(
                f"init.sources[0] is a chain of {source.moe.chain.iterations} iterations already; go on with it by "
                "init.weights"
            )
        if chain.iterations == 1:
            raise ValueError("moe.chain.iterations=1 is no chain; set it to 2 or more, or take init.weights")
        if self.later_routers is LaterRouters.copied and not chain.own_routers:
            raise ValueError(
                "init.later_routers=copied with moe.chain.own_routers=false, where no iteration has a router of its "
                "own; leave one of the two out"
            )
        check_same_experts(source, target, ["chain"])
        _check_shapes(source, target)

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        source, chain, router = sources[0], target.moe.chain, target.router
        exact = chain.learned_scale and chain.block is source.moe.chain.block
        # What is handed to the router of the next layer would come from the last iteration.
        exact = exact and router.carry_width(target.moe.num_experts) == 0
        return Preserves.exact if exact and same_routing(target, source) else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        theirs, plan = sources[0].weights, {}
        for name in shapes_of(target):
            origin = without_chain(name)
            if self.later_routers is LaterRouters.copied:
                origin = _LATER_ROUTER.sub(".router.", origin)
            plan[name] = theirs[origin] if origin in theirs else draw(name)
        return plan


def _check_shapes(source: Architecture, target: Architecture) -> None:
    """Raises ValueError where weights of the source would be left out, or do not fit."""
    shapes = shapes_of(target)
    for name, shape in shapes_of(source).items():
        if shapes.get(name) != shape:
            here = "nothing like it" if name not in shapes else f"it of shape {shapes[name]}"
            raise ValueError(
                f"init.sources[0] has {name} of shape {shape}, this model has {here}; set router and balance as the "
                "source has them"
            )

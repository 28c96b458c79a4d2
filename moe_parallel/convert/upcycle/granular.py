"""Granular upcycling: experts are slices of copies of the dense network (He et al., arXiv 2410.07524).

    slices of a copy  G = model.ffn_dim of the source / moe.expert_dim
    copies            moe.num_experts / G

All slices of a copy share one row of the router: a virtual group. Their scores are equal, so the best top_k = k * G
experts are k whole copies, and their slices add up to k dense networks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from enum import Enum

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Joined, Lazy, Repeated, Scaled, Stacked, columns_of, rows_of
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_from_dense,
    check_one_source,
    check_width,
    copied,
    dense_network,
    moe_networks,
    new_parts,
    passes_once,
    with_noise,
)
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.routers.token_choice import Score, TokenChoiceConfig

_ROWS_OF_EXPERTS = re.compile(r"\.ffn\.(router|later_routers\.\d+)\.(weight|residual)$")


class ScaleMode(str, Enum):
    exact_glu = "exact_glu"
    """On the up and down projections, the square root on each: both act linearly, so the sum is the dense network's."""
    paper = "paper"
    """The cube root on gate, up and down, as published. Exact where the activation is a squared ReLU; in a SwiGLU
    network the gate's is not linear, and with 4 slices a layer's output is about 13 percent off."""


class Layout(str, Enum):
    grouped = "grouped"
    """Slices of a copy are neighbors: with expert parallelism a token travels to few ranks."""
    strided = "strided"
    """Equal slices of all copies are neighbors: a token travels to many ranks, and all of them have equal work."""


@dataclass(kw_only=True)
class GranularConfig(UpcycleConfig):
    scale_mode: ScaleMode = ScaleMode.exact_glu
    """Where the factor goes that makes up for the combine weights."""
    layout: Layout = Layout.grouped
    """The order of the experts; it changes no output."""
    copy_noise: float = 0.0
    """Standard deviation of what is added to the dense network's weights in each copy, before it is sliced; 0 leaves
    the copies equal. The router needs none: its rows differ from copy to copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.copy_noise < math.inf:
            raise ValueError(f"init.copy_noise={self.copy_noise} must not be negative; 0 leaves the copies equal")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_one_source(sources, "upcycle_granular")
        check_from_dense(sources, target)
        router, moe, slices = target.router, target.moe, num_slices(source, target)
        check_width("moe.num_shared_experts", moe.num_shared_experts, 0, "slices would be added to a shared expert")
        if type(router) is not TokenChoiceConfig:  # kinds that are made of it score in other ways
            raise ValueError(
                "init=upcycle_granular gives all slices of a copy equal scores, which only routers keep by which each "
                "token chooses experts by their scores; set router=softmax_normalized, softmax or sigmoid"
            )
        _check_multiple("moe.num_experts", moe.num_experts, slices, "all slices of each copy are experts")
        _check_multiple(
            "router.top_k", router.top_k, slices,
            "slices of a copy have equal scores, and which ones a smaller choice takes is nobody's intent",
        )  # fmt: skip
        in_group = moe.num_experts // router.num_groups
        if router.num_groups > 1 and (self.layout is Layout.strided or in_group % slices != 0):
            raise ValueError(
                f"router.num_groups={router.num_groups} of {in_group} experts each would cut copies of {slices} slices "
                f"with init.layout={self.layout.value}; set router.num_groups=1, or init.layout=grouped and groups of "
                "whole copies"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        router = target.router
        assert isinstance(router, TokenChoiceConfig)
        exact = router.normalize and not router.forced_balance and passes_once(target)
        exact = exact and self.scale_mode is ScaleMode.exact_glu and self.copy_noise == 0
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        moe, source = target.moe, sources[0]
        slices = num_slices(source.architecture, target)
        plan = copied(source, target)
        for name, lazy in new_parts(target, draw).items():
            plan[name] = self._one_row_a_copy(lazy, slices) if _ROWS_OF_EXPERTS.search(name) else lazy
        for name in moe_networks(target):
            dense = dense_network(source.weights, name)
            copies = [self._copy(dense, f"{name}.{c}", seed) for c in range(moe.num_experts // slices)]
            copies = [self._scaled(network, self._factor(target, slices)) for network in copies]
            if self.layout is Layout.grouped:
                experts = [slice_of(network, s, moe.expert_dim) for network in copies for s in range(slices)]
            else:
                experts = [slice_of(network, s, moe.expert_dim) for s in range(slices) for network in copies]
            plan[f"{name}.experts.gate_up"] = Stacked([gate_up for gate_up, _ in experts])
            plan[f"{name}.experts.down"] = Stacked([down for _, down in experts])
        return plan

    def _one_row_a_copy(self, drawn: Lazy, slices: int) -> Lazy:
        """A router's rows, of which the first ones are taken for the copies."""
        rows = rows_of(drawn, 0, drawn.shape[0] // slices)
        return Repeated(rows, slices) if self.layout is Layout.grouped else Joined([rows] * slices)

    def _copy(self, dense: Sequence[Lazy], name: str, seed: int) -> list[Lazy]:
        return [
            with_noise(weight, self.copy_noise, seed, f"{name}.{what}")
            for weight, what in zip(dense, ("gate", "up", "down"), strict=True)
        ]

    def _scaled(self, network: Sequence[Lazy], factor: float) -> list[Lazy]:
        gate, up, down = network
        if self.scale_mode is ScaleMode.paper:
            return [Scaled(weight, math.cbrt(factor)) for weight in (gate, up, down)]
        return [gate, Scaled(up, math.sqrt(factor)), Scaled(down, math.sqrt(factor))]

    def _factor(self, target: Architecture, slices: int) -> float:
        """What a token's k whole copies, weighted, must be multiplied by to be one dense network.

        k times the weight of a slot is that network's share. Weights that are not normalized depend on the token; those
        of a router that prefers nothing stand for them, as in the paper: copies * slices^2 / top_k for softmax.
        """
        router = target.router
        assert isinstance(router, TokenChoiceConfig)
        if router.normalize:
            weight = 1 / router.top_k
        else:
            weight = 1 / target.moe.num_experts if router.score is Score.softmax else 0.5
        return slices / (router.top_k * weight * router.route_scale)


def num_slices(source: Architecture, target: Architecture) -> int:
    """Experts that together are as wide as the dense network. Raises ValueError where that is no whole number."""
    width, expert = source.model.ffn_dim, target.moe.expert_dim
    if width % expert != 0:
        near = [n for n in range(1, width + 1) if width % n == 0]
        legal = sorted(near, key=lambda n: abs(n - expert))[:2]
        raise ValueError(
            f"moe.expert_dim={expert} must divide model.ffn_dim={width} of the source into slices; nearest legal "
            f"values: {', '.join(map(str, sorted(legal)))}"
        )
    return width // expert


def slice_of(network: Sequence[Lazy], number: int, width: int) -> tuple[Lazy, Lazy]:
    """Some neurons of a dense network (gate, up, down) as an expert: gate_up (2F, D) and down (D, F). The sum of what
    all slices return is what the network returns."""
    gate, up, down = network
    first = number * width
    return Joined([rows_of(gate, first, width), rows_of(up, first, width)]), columns_of(down, first, width)


def _check_multiple(option: str, value: int, of: int, why: str) -> None:
    if value % of != 0:
        legal = sorted({max(of, value // of * of), (value // of + 1) * of})
        raise ValueError(
            f"{option}={value} must be a multiple of the {of} slices of a copy (model.ffn_dim of the source / "
            f"moe.expert_dim): {why}; nearest legal values: {', '.join(map(str, legal))}"
        )

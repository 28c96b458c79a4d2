"""Sparse upcycling: every expert is a copy of the dense network (Komatsuzaki et al., arXiv 2212.05055)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Joined, Stacked
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
    weights_sum_to_one,
    with_noise,
)
from moe_parallel.model.architecture import Architecture


@dataclass(kw_only=True)
class SparseConfig(UpcycleConfig):
    copy_noise: float = 0.0
    """Standard deviation of what is added to the weights of each copy; 0 leaves them equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.copy_noise < math.inf:
            raise ValueError(f"init.copy_noise={self.copy_noise} must not be negative; 0 leaves the copies equal")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source, moe = check_one_source(sources, "upcycle"), target.moe
        check_from_dense(sources, target)
        check_width("moe.expert_dim", moe.expert_dim, source.model.ffn_dim, "each expert is a whole dense network")
        check_width("moe.num_shared_experts", moe.num_shared_experts, 0, "the copies would be added to a shared one")

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        exact = weights_sum_to_one(target) and passes_once(target) and self.copy_noise == 0
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        plan = copied(sources[0], target) | new_parts(target, draw)
        for network in moe_networks(target):
            gate, up, down = dense_network(sources[0].weights, network)
            for what, weight in (("gate_up", Joined([gate, up])), ("down", down)):
                name = f"{network}.experts.{what}"
                plan[name] = Stacked(
                    [with_noise(weight, self.copy_noise, seed, f"{name}.{e}") for e in range(target.moe.num_experts)]
                )
        return plan

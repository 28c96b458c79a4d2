"""Sparse upcycling: every expert is a copy of the dense network (Komatsuzaki et al., arXiv 2212.05055)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Joined, Lazy, Stacked, Sum
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.map import (
    Draw,
    Noise,
    Plan,
    Preserves,
    UpcycleConfig,
    check_dense,
    check_one_source,
    check_same,
    check_width,
    copied,
    dense_ffn,
    experts_name,
    new_parts,
    weights_sum_to_one,
)
from moe_parallel.model.architecture import Architecture


@dataclass(kw_only=True)
class SparseConfig(UpcycleConfig):
    copy_noise: float = 0.0
    """Standard deviation of what is added to the weights of each copy; 0 leaves them equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copy_noise < 0:
            raise ValueError(f"init.copy_noise={self.copy_noise} must not be negative; 0 leaves the copies equal")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_one_source(sources, "upcycle")
        check_dense(source)
        check_same(sources, target, ignore=["model.ffn_dim"] if target.model.first_dense_layers == 0 else [])
        moe = target.moe
        check_width("moe.expert_dim", moe.expert_dim, source.model.ffn_dim, "each expert is a whole dense network")
        check_width("moe.num_shared_experts", moe.num_shared_experts, 0, "the copies would be added to a shared one")

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        exact = weights_sum_to_one(target) and self.copy_noise == 0 and target.moe.chain.iterations == 1
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        plan = copied(sources[0], target) | new_parts(target, draw)
        for layer in target.moe_layers:
            gate, up, down = dense_ffn(sources[0].weights, layer)
            for what, weight in (("gate_up", Joined([gate, up])), ("down", down)):
                name = experts_name(layer, what)
                plan[name] = Stacked([self._copy(weight, seed, name, e) for e in range(target.moe.num_experts)])
        return plan

    def _copy(self, weight: Lazy, seed: int, name: str, expert: int) -> Lazy:
        if self.copy_noise == 0:
            return weight
        return Sum([weight, Noise(weight.shape, self.copy_noise, seed, f"{name}.{expert}")], [1, 1])

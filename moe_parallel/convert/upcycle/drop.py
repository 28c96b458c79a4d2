"""Drop-Upcycling: copies of the dense network, each with some of its neurons re-drawn (Nakamura et al., arXiv
2502.19261). The order of neurons, which the released converter shuffles as well, changes nothing and is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_kernels.hashing import distinct_integers, hash_key
from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.lazy import Constant, Joined, Lazy, Stacked, whole
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.map import (
    Draw,
    Noise,
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


class IndexSet(str, Enum):
    shared = "shared"
    """The same neurons in gate, up and down: the others stay whole (the paper)."""
    independent = "independent"
    """Each matrix chooses for itself: at 0.5 an eighth of the neurons stay whole (the released code)."""


@dataclass(kw_only=True)
class DropConfig(UpcycleConfig):
    drop_fraction: float = 0.5
    """Share of each expert's neurons that get new weights; 0 copies the dense network."""
    index_set: IndexSet = IndexSet.shared
    """Which neurons these are."""
    drop_noise: float | None = None
    """Null draws their weights anew, with the mean and the standard deviation of those that they replace. A number
    keeps them and adds noise of that standard deviation (0.02 in the released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_fraction <= 1:
            raise ValueError(f"init.drop_fraction={self.drop_fraction} must lie in 0..1")
        if self.drop_noise is not None and not 0 < self.drop_noise < math.inf:
            raise ValueError(f"init.drop_noise={self.drop_noise} must be positive; null draws weights anew")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_one_source(sources, "upcycle_drop")
        check_from_dense(sources, target)
        moe = target.moe
        check_width("moe.expert_dim", moe.expert_dim, source.model.ffn_dim, "each expert is a whole dense network")
        check_width("moe.num_shared_experts", moe.num_shared_experts, 0, "the copies would be added to a shared one")
        if self.drop_fraction > 0 and self.num_dropped(moe.expert_dim) == 0:
            raise ValueError(
                f"init.drop_fraction={self.drop_fraction} of {moe.expert_dim} neurons is less than one; set "
                f"init.drop_fraction=0, or at least {1 / moe.expert_dim:.4g}"
            )

    def num_dropped(self, width: int) -> int:
        """Neurons of an expert that get new weights, in each of its matrices."""
        return int(self.drop_fraction * width)

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        width = target.moe.expert_dim
        dropped = self.num_dropped(width)
        if dropped == width and self.drop_noise is None:
            return Preserves.none
        exact = dropped == 0 and weights_sum_to_one(target) and passes_once(target)
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        plan = copied(sources[0], target) | new_parts(target, draw)
        for name in moe_networks(target):
            dense = dense_network(sources[0].weights, name)
            experts = [self._expert(dense, f"{name}.{e}", seed) for e in range(target.moe.num_experts)]
            plan[f"{name}.experts.gate_up"] = Stacked([Joined([gate, up]) for gate, up, _ in experts])
            plan[f"{name}.experts.down"] = Stacked([down for _, _, down in experts])
        return plan

    def _expert(self, dense: Sequence[Lazy], name: str, seed: int) -> list[Lazy]:
        """Gate, up and down of one expert."""
        matrices: list[Lazy] = []
        for weight, what, dim in zip(dense, ("gate", "up", "down"), (0, 0, 1), strict=True):
            width = weight.shape[dim]
            of = name if self.index_set is IndexSet.shared else f"{name}.{what}"
            chosen = Chosen(hash_key(seed, "drop", of), self.num_dropped(width), width, dim)
            new: Lazy = Redrawn(weight, chosen, seed, f"{name}.{what}")
            if self.drop_noise is not None:
                new = with_noise(weight, self.drop_noise, seed, f"{name}.{what}")
            matrices.append(Replaced(weight, new, chosen) if chosen.count else weight)
        return matrices


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some rows or columns of a matrix, a function of a key alone."""

    key: int
    count: int
    width: int
    """How many there are to choose from."""
    dim: int

    def indices(self) -> Tensor:
        """int64 (count), in ascending order."""
        return distinct_integers(torch.zeros(1, dtype=torch.int64), self.key, self.count, self.width)[0].sort().values

    def __str__(self) -> str:
        return f"{self.count} of {self.width} {'columns' if self.dim else 'rows'}"


class Replaced(Lazy):
    """A matrix of which some rows or columns come from another one."""

    def __init__(self, old: Lazy, new: Lazy, chosen: Chosen) -> None:
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        self.old, self.new, self.chosen = old, new, chosen
        self.shape, self.dtype = old.shape, old.dtype

    def read(self, box: Box) -> Tensor:
        dim, first, size = self.chosen.dim, box[0][self.chosen.dim], box[1][self.chosen.dim]
        indices = self.chosen.indices() - first
        here = indices[(indices >= 0) & (indices < size)]
        out = self.old.read(box).clone()
        if len(here):
            out.index_copy_(dim, here, self.new.read(box).index_select(dim, here))
        return out

    def moment(self, order: int) -> Lazy:
        return Replaced(self.old.moment(order), self.new.moment(order), self.chosen)

    def __str__(self) -> str:
        return f"{self.old} but {self.chosen} {self.new}"


class Redrawn(Lazy):
    """Normal numbers with the mean and the standard deviation of some rows or columns of a matrix."""

    def __init__(self, of: Lazy, chosen: Chosen, seed: int, name: str) -> None:
        self.of, self.chosen, self.shape, self.dtype = of, chosen, of.shape, of.dtype
        self._noise = Noise(of.shape, 1.0, seed, name)

    def read(self, box: Box) -> Tensor:
        mean, std = self.statistics()
        return (self._noise.read(box) * std + mean).to(self.dtype)

    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation. They need the whole matrix, whichever part of it is wanted; nothing is kept."""
        entries = whole(self.of).index_select(self.chosen.dim, self.chosen.indices()).double()
        return float(entries.mean()), float(entries.std(correction=0))

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape, dtype=self.of.moment(order).dtype)

    def __str__(self) -> str:
        return "re-drawn with their mean and deviation"

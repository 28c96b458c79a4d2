"""Back from experts to a dense network: sums, means, the largest neurons or singular vectors of all experts.

Knowledge gathering of "One Student Knows All Experts Know" (arXiv 2201.10890), whose result is meant to be trained on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.convert.lazy import Computed, Joined, Kept, Lazy, Scaled, Sum, rows_of, whole
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import Network, check_has_experts, check_matrices, network_of
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_same,
    check_width,
    moe_networks,
)
from moe_parallel.convert.upcycle.neurons import largest, picked
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.chain import ChainBlock
from moe_parallel.moe.expert_forms import ExpertForm


class Gather(str, Enum):
    mean = "mean"
    """The mean of all experts' weights."""
    sum = "sum"
    """Their sum."""
    top_k = "top_k"
    """Of each expert equally many neurons, those with the largest norm, side by side."""
    svd = "svd"
    """The sum of all experts' matrices, each reduced to its largest singular values."""


@dataclass(kw_only=True)
class DensifyConfig(UpcycleConfig):
    gather: Gather = Gather.mean
    """What becomes of the routed experts. Shared ones stay whole: their neurons come first in the dense network."""
    gather_rank: int | None = None
    """For gather=svd: singular values kept of each expert's matrix; null takes min(width, model.dim) / num_experts."""
    gather_scale: float = 1.0
    """Factor on what the gathered neurons give. 1/num_experts makes experts side by side their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gather_scale < math.inf:
            raise ValueError(f"init.gather_scale={self.gather_scale} must be positive")
        if self.gather_rank is not None and self.gather is not Gather.svd:
            raise ValueError(
                f"init.gather_rank={self.gather_rank} is of init.gather=svd, not of {self.gather.value}; leave it out"
            )

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_has_experts(sources, "densify")
        if target.num_moe_layers > 0:
            raise ValueError(
                f"model.first_dense_layers={target.model.first_dense_layers} leaves layers with experts, but init="
                f"densify makes all dense; set it to model.num_layers={target.model.num_layers}"
            )
        check_same(sources, target)
        _check_plain(source)
        self._check_width(source, target)

    def _check_width(self, source: Architecture, target: Architecture) -> None:
        moe, width = source.moe, target.model.ffn_dim
        shared, experts = moe.num_shared_experts * moe.expert_dim, moe.num_experts
        of_shared = f" and {shared} of the shared ones" if shared else ""
        if self.gather is Gather.top_k:
            gathered = width - shared
            if not (0 < gathered <= experts * moe.expert_dim and gathered % experts == 0):
                below = max(1, min(moe.expert_dim, gathered // experts)) * experts + shared
                raise ValueError(
                    f"model.ffn_dim={width} must be a multiple of moe.num_experts={experts}, at most {experts} times "
                    f"moe.expert_dim={moe.expert_dim},{of_shared}: equally many neurons of each expert; nearest below: "
                    f"{below}"
                )
            return
        why = f"the width of one expert{of_shared}; init.gather=top_k makes others"
        if source.model.first_dense_layers > 0 and source.model.ffn_dim != moe.expert_dim + shared:
            why += f". The source's dense layers have {source.model.ffn_dim}, and all must be equal: only top_k fits"
        check_width("model.ffn_dim", width, moe.expert_dim + shared, why)
        most = min(moe.expert_dim, source.model.dim)
        if self.gather is Gather.svd and not 1 <= self._rank(source) <= most:
            raise ValueError(
                f"init.gather_rank={self.gather_rank} (null: {most} / moe.num_experts={experts}) must lie in 1..{most}"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        return Preserves.none

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        source = sources[0]
        shelf: list[Kept] = []
        plan = {name: source.weights[name] for name in shapes_of(target) if name in source.weights}
        for network in moe_networks(source.architecture):
            gate, up, down = self._gathered(source, network, target, shelf)
            down = down if self.gather_scale == 1 else Scaled(down, self.gather_scale)
            shared = f"{network}.shared."
            if f"{shared}down.weight" in source.weights:
                gate_up, width = (
                    source.weights[f"{shared}gate_up.weight"],
                    source.weights[f"{shared}down.weight"].shape[1],
                )
                gate = Joined([rows_of(gate_up, 0, width), gate])
                up = Joined([rows_of(gate_up, width, width), up])
                down = Joined([source.weights[f"{shared}down.weight"], down], dim=1)
            plan |= {f"{network}.gate.weight": gate, f"{network}.up.weight": up, f"{network}.down.weight": down}
        return plan

    def _gathered(self, source: Pretrained, name: str, target: Architecture, shelf: list[Kept]) -> Network:
        moe = source.architecture.moe
        networks = [network_of(source.weights, name, expert) for expert in range(moe.num_experts)]
        if self.gather is Gather.top_k:
            each = (target.model.ffn_dim - moe.num_shared_experts * moe.expert_dim) // moe.num_experts
            if each < moe.expert_dim:
                networks = [
                    picked(one, each, functools.cache(functools.partial(largest, one, each)), f"{each} largest neurons")
                    for one in networks
                ]
            gates, ups, downs = zip(*networks)
            return Joined(gates), Joined(ups), Joined(downs, dim=1)
        if self.gather is Gather.svd:
            rank = self._rank(source.architecture)
            reduced = [Kept(_low_rank_sum(weights, rank), shelf) for weights in zip(*networks)]
            return reduced[0], reduced[1], reduced[2]
        share = 1.0 if self.gather is Gather.sum else 1 / moe.num_experts
        gate, up, down = (Sum(weights, [share] * moe.num_experts) for weights in zip(*networks))
        return gate, up, down

    def _rank(self, source: Architecture) -> int:
        if self.gather_rank is not None:
            return self.gather_rank
        return min(source.moe.expert_dim, source.model.dim) // source.moe.num_experts


def _check_plain(source: Architecture) -> None:
    """Raises ValueError where a layer is more than a weighted sum of networks on its input."""
    moe = source.moe
    check_matrices(source, "densify")
    if moe.expert_form is not ExpertForm.full:
        raise ValueError(
            f"init.sources[0] has moe.expert_form={moe.expert_form.value}: its weights are not what it computes with; "
            "init=densify is for full ones"
        )
    if moe.shared_expert_gate:
        raise ValueError(
            "init.sources[0] has moe.shared_expert_gate=true: a dense network has no gate for a part of its neurons"
        )
    if moe.chain.iterations > 1 or moe.chain.block is not ChainBlock.pre_norm:
        raise ValueError(
            f"init.sources[0] has moe.chain.iterations={moe.chain.iterations}, moe.chain.block={moe.chain.block.value};"
            " a dense layer is one pass that is added to the stream"
        )


def _low_rank_sum(weights: Sequence[Lazy], rank: int) -> Lazy:
    def compute() -> Tensor:
        total = torch.zeros(weights[0].shape, dtype=torch.float64)
        for weight in weights:
            left, value, right = torch.linalg.svd(whole(weight).double(), full_matrices=False)
            total += (left[:, :rank] * value[:rank]) @ right[:rank]
        return total.to(weights[0].dtype)

    text = f"sum of {len(weights)} matrices of rank {rank}: {weights[0]} and others"
    return Computed(weights[0].shape, weights[0].dtype, compute, text)

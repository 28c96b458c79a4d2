"""From a model with experts to one with more of them, by copies, or with fewer, by merging those that are alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from enum import Enum
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.convert.lazy import Joined, Lazy, Scaled, Stacked, Sum, expert_of, rows_of, whole
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import (
    check_has_experts,
    check_matrices,
    check_nothing_is_lost,
    check_same_experts,
    network_of,
    same_routing,
)
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    moe_networks,
    with_noise,
)
from moe_parallel.convert.upcycle.neurons import alike, picked
from moe_parallel.convert.usage import Usage, load_usage, usage_of_checkpoint
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.routers.token_choice import Score, TokenChoiceConfig


class RouterRows(str, Enum):
    dominant = "dominant"
    """That of the most used expert of those that are merged."""
    mean = "mean"
    """Their mean, weighted by usage."""


@dataclass(kw_only=True)
class ResizeConfig(UpcycleConfig):
    usage: str | None = None
    """File of how often experts are used (scripts/count_usage.py); null takes what the source's checkpoint knows of its
    last step. Decides which experts stay, and which get one copy more where copies do not come out even."""
    copy_noise: float = 0.0
    """More experts: standard deviation of what is added to the weights of each copy but an expert's first."""
    router_noise: float = 0.0
    """More experts: the same for their rows in the router, so that copies are not chosen together for long."""
    align_neurons: bool = True
    """Fewer experts: put neurons in the order of those that they are merged with before averaging."""
    router_rows: RouterRows = RouterRows.dominant
    """Fewer experts: what is a merged expert's row in the router."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("copy_noise", "router_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"init.{name}={getattr(self, name)} must be 0, which leaves copies equal, or positive")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        source = check_has_experts(sources, "resize")
        check_same_experts(source, target, ["num_experts"])
        check_matrices(source, "resize")
        theirs, ours, router = source.moe.num_experts, target.moe.num_experts, target.router
        if type(router) is not TokenChoiceConfig or router.carry_width(ours) > 0:
            raise ValueError(
                "init=resize copies and merges rows of a router that scores each expert by itself; choose "
                "router=softmax or sigmoid, without router.logit_residual"
            )
        if ours == theirs:
            raise ValueError(
                f"moe.num_experts={ours} is what init.sources[0] has: nothing to resize; take init.weights"
            )
        left_out, direction = ("align_neurons", "router_rows"), "more"
        if ours < theirs:
            left_out, direction = ("copy_noise", "router_noise"), "fewer"
        for name in left_out:
            value = getattr(self, name)
            if value != getattr(ResizeConfig, name):
                raise ValueError(
                    f"init.{name}={str(getattr(value, 'value', value)).lower()} does nothing for {direction} experts: "
                    f"moe.num_experts={ours}, {theirs} in init.sources[0]; leave it out"
                )
        if self.usage is not None and ours % theirs == 0:
            raise ValueError(
                f"init.usage={self.usage} does nothing: each of {theirs} experts is copied {ours // theirs} times; "
                "leave it out"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        source, ours, theirs = sources[0], target.router, sources[0].router
        times, rest = divmod(target.moe.num_experts, source.moe.num_experts)
        assert isinstance(ours, TokenChoiceConfig)
        assert isinstance(theirs, TokenChoiceConfig)
        exact = rest == 0 and ours.top_k == times * theirs.top_k and self.copy_noise == self.router_noise == 0
        # What the copies of an expert weigh together: sigmoids do not share.
        gain = times if ours.score is Score.sigmoid and not ours.normalize else 1
        exact = exact and ours.route_scale * gain == theirs.route_scale
        # A group's best copies are those of its best experts: it is worth `times` as much, like all others.
        exact = exact and ours.group_score is theirs.group_score
        exact = exact and same_routing(source, target, ignore=("top_k", "route_scale", "group_score"))
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        source, names = sources[0], shapes_of(target)
        check_nothing_is_lost(source.weights, names)
        plan = {name: source.weights[name] if name in source.weights else draw(name) for name in names}
        usage = self._usage(source, target)
        for layer, network in zip(target.moe_layers, moe_networks(target), strict=True):
            experts = self._experts(source, target, network, None if usage is None else usage[layer])
            plan |= self._matrices(source, network, experts, seed)
            routers = (f"{network}.router.", f"{network}.later_routers.")
            for name in names:
                if name.startswith(routers) and name in source.weights:
                    rows = self._rows(source.weights[name], name, experts, seed)
                    plan[name] = Scaled(rows, _bias_scale(source, target)) if name.endswith(".bias") else rows
        return plan

    def _usage(self, source: Pretrained, target: Architecture) -> Usage | None:
        if target.moe.num_experts % source.architecture.moe.num_experts == 0:
            return None
        if self.usage is not None:
            return load_usage(Path(self.usage), source.architecture)
        found = usage_of_checkpoint(source)
        if found is None:
            raise ValueError(
                f"init.usage=null takes what a checkpoint knows of its last step, but {source.path} knows nothing "
                "(only a loss over the global batch keeps counts); write a file by scripts/count_usage.py and give it "
                "as init.usage"
            )
        return found

    def _experts(
        self, source: Pretrained, target: Architecture, network: str, usage_E: Tensor | None
    ) -> list[NewExpert]:
        """In order. Groups of experts that tokens choose first keep their experts."""
        theirs, ours = source.architecture.moe.num_experts, target.moe.num_experts
        config, other = target.router, source.architecture.router
        assert isinstance(config, TokenChoiceConfig)
        assert isinstance(other, TokenChoiceConfig)
        groups = config.num_groups if config.num_groups == other.num_groups else 1
        found = []
        for experts in torch.arange(theirs).chunk(groups):
            if ours > theirs:
                found += copies(experts.tolist(), ours // groups, usage_E)
            else:
                assert usage_E is not None
                row_ED = whole(source.weights[f"{network}.router.weight"])
                found += merged(experts.tolist(), ours // groups, usage_E, row_ED)
        return found

    def _matrices(self, source: Pretrained, network: str, experts: Sequence[NewExpert], seed: int) -> Plan:
        found: dict[str, list[Lazy]] = {"gate_up": [], "down": []}
        for number, expert in enumerate(experts):
            for what, weight in self._expert(source, network, expert).items():
                name = f"{network}.experts.{what}.{number}"
                found[what].append(with_noise(weight, self.copy_noise if expert.copy else 0.0, seed, name))
        return {f"{network}.experts.{what}": Stacked(weights) for what, weights in found.items()}

    def _expert(self, source: Pretrained, name: str, expert: NewExpert) -> dict[str, Lazy]:
        """Its two matrices."""
        dominant = expert.parts[0]
        if len(expert.parts) == 1:
            return {what: expert_of(source.weights[f"{name}.experts.{what}"], dominant) for what in ("gate_up", "down")}
        first = network_of(source.weights, name, dominant)
        parts = [first]
        for other in expert.parts[1:]:
            network = network_of(source.weights, name, other)
            if self.align_neurons:
                pick = functools.cache(functools.partial(alike, network, first))
                network = picked(network, first[0].shape[0], pick, "aligned neurons")
            parts.append(network)
        gate, up, down = (Sum(weights, expert.shares) for weights in zip(*parts))
        return {"gate_up": Joined([gate, up]), "down": down}

    def _rows(self, weight: Lazy, name: str, experts: Sequence[NewExpert], seed: int) -> Lazy:
        """Of a router's weights, bias or offsets: one for each expert."""
        rows: list[Lazy] = []
        for number, expert in enumerate(experts):
            of_parts = [rows_of(weight, part, 1) for part in expert.parts]
            row: Lazy = Sum(of_parts, expert.shares) if self.router_rows is RouterRows.mean else of_parts[0]
            noise = self.router_noise if name.endswith(".weight") else 0.0
            rows.append(with_noise(row, noise if expert.copy else 0.0, seed, f"{name}.{number}"))
        return Joined(rows)


@plain_dataclass(frozen=True)
class NewExpert:
    """What an expert of the new model is made of."""

    parts: tuple[int, ...]
    """Experts of the source; the first is the most used of them."""
    shares: tuple[float, ...] = (1.0,)
    """Of each in their mean; they sum to 1."""
    copy: int = 0
    """How many copies of the same came before."""


def copies(experts: Sequence[int], count: int, usage_E: Tensor | None) -> list[NewExpert]:
    """Copies of experts side by side, equally many of each; what is left over goes to the most used."""
    times, rest = divmod(count, len(experts))
    more: set[int] = set()
    if rest > 0:
        assert usage_E is not None
        more = set(_most_used(experts, usage_E)[:rest])
    return [NewExpert((e,), copy=copy) for e in experts for copy in range(times + (e in more))]


def merged(experts: Sequence[int], count: int, usage_E: Tensor, row_ED: Tensor) -> list[NewExpert]:
    """The most used experts, each with those others that are most like it, in the order of their numbers.

    The groups of MC-SMoE (arXiv 2310.01334), which calls two experts alike by the cosine of their logits over tokens.
    That is the cosine of their rows in the router where inputs have no preferred direction, which needs no text.
    """
    dominant = sorted(_most_used(experts, usage_E)[:count])
    unit_ED = torch.nn.functional.normalize(row_ED.double(), dim=1)
    members: dict[int, list[int]] = {e: [e] for e in dominant}
    for expert in experts:
        if expert not in members:
            likeness = unit_ED[dominant] @ unit_ED[expert]
            members[dominant[int(likeness.argmax())]].append(expert)
    found = []
    for parts in members.values():
        count_P = usage_E[parts]
        shares = count_P / count_P.sum() if count_P.sum() > 0 else torch.full_like(count_P, 1 / len(parts))
        found.append(NewExpert(tuple(parts), tuple(shares.tolist())))
    return found


def _bias_scale(source: Pretrained, target: Architecture) -> float:
    """A bias is added to scores; those of a softmax are the smaller the more experts share them."""
    assert isinstance(target.router, TokenChoiceConfig)
    if target.router.score is Score.sigmoid:
        return 1.0
    return source.architecture.moe.num_experts / target.moe.num_experts


def _most_used(experts: Sequence[int], usage_E: Tensor) -> list[int]:
    """The most used first; equally used ones by number."""
    return sorted(experts, key=lambda e: (-float(usage_E[e]), e))

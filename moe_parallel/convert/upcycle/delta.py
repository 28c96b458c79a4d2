"""Delta experts: a base that the experts of a layer share, and differences of given rank (FlexMoRE). From dense models,
each of which becomes an expert, from one, of which all experts are copies at first, or from experts that exist."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.lazy import Constant, Joined, Kept, Lazy, Stacked, Sum, expert_of, rows_of, whole
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import check_nothing_is_lost
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_form,
    check_from_dense,
    check_one_source,
    check_same,
    check_width,
    dense_network,
    moe_networks,
    new_parts,
    outside_of_experts,
    passes_once,
    weights_sum_to_one,
    without_chain,
)
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.expert_forms import ExpertForm

_SAME = ["num_experts", "expert_dim", "num_shared_experts", "shared_expert_gate", "chain"]
_SAME += ["adjugate_groups", "adjugate_dim", "adjugate_scale"]


class DeltaBase(str, Enum):
    mean = "mean"
    """The mean of the experts; of several dense models, all else is averaged as well."""
    first = "first"
    """The first expert, whose own difference is zero; of several dense models, all else is the first one's."""


@dataclass(kw_only=True)
class DeltaConfig(UpcycleConfig):
    delta_base: DeltaBase = DeltaBase.mean
    """What experts are differences from. Its truncation keeps the largest singular values of each difference."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        if not sources:
            raise ValueError("init.sources is empty; give dense models, or one with experts")
        moe = target.moe
        if sources[0].num_moe_layers > 0:
            self._check_experts(check_one_source(sources, "delta"), target)
            return
        check_from_dense(sources, target, ExpertForm.delta)
        for number, source in enumerate(sources):
            why = f"each expert is a whole dense network of init.sources[{number}]"
            check_width("moe.expert_dim", moe.expert_dim, source.model.ffn_dim, why)
        check_width("moe.num_shared_experts", moe.num_shared_experts, 0, "the networks would be added to a shared one")
        if len(sources) > 1:
            check_width("moe.num_experts", moe.num_experts, len(sources), "each of init.sources becomes one expert")

    def _check_experts(self, source: Architecture, target: Architecture) -> None:
        check_form(target, ExpertForm.delta)
        if source.moe.expert_form is not ExpertForm.full:
            raise ValueError(
                f"init.sources[0] has moe.expert_form={source.moe.expert_form.value}, but differences are those of "
                "experts that have matrices of their own"
            )
        check_same([source], target)
        if source.moe_layers != target.moe_layers:
            raise ValueError(
                f"layers {target.moe_layers} have experts here, {source.moe_layers} in init.sources[0]; set "
                f"model.first_dense_layers={source.model.first_dense_layers}"
            )
        for name in _SAME:
            ours, theirs = getattr(target.moe, name), getattr(source.moe, name)
            if ours != theirs:
                raise ValueError(f"moe.{name}={ours}, but init.sources[0] has {theirs}; set it as the source has it")
        if source.router != target.router:
            raise ValueError(
                f"the router is {target.router}, that of init.sources[0] {source.router}; its weights are kept, so set "
                "router and its options as the source has them"
            )

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        if sources[0].num_moe_layers > 0:
            exact = target.moe.delta_rank == min(target.model.dim, target.moe.expert_dim)
        elif len(sources) > 1:
            return Preserves.none
        else:
            exact = weights_sum_to_one(target) and passes_once(target)
        return Preserves.exact if exact else Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        plan = self._rest(sources, target, draw)
        shelf: list[Kept] = []
        width = target.moe.expert_dim
        for name in moe_networks(target):
            gate_ups, downs = _experts(sources, name, target)
            # All experts of a layer want their base.
            bases = Kept(self._mixed(gate_ups), shelf), Kept(self._mixed(downs), shelf)
            plan[f"{name}.base.gate_up.weight"], plan[f"{name}.base.down.weight"] = bases
            # Gate and up are matrices of their own, whose differences have ranks of their own.
            halves = [[rows_of(gate_up, first, width) for first in (0, width)] for gate_up in (*gate_ups, bases[0])]
            for what, experts, base in (
                ("gate_up", halves[:-1], halves[-1]),
                ("down", [[d] for d in downs], bases[1:]),
            ):
                prefix = f"{name}.experts.{what}"
                plan[f"{prefix}_out"], plan[f"{prefix}_in"] = self._factors(prefix, experts, base, target, draw)
        return plan

    def _rest(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw) -> Plan:
        """Everything but routed experts and their base."""
        names = shapes_of(target)
        new = {name: lazy for name, lazy in new_parts(target, draw).items() if ".ffn.base." not in name}
        if sources[0].architecture.num_moe_layers > 0:
            experts = {f"{network}.experts.{what}" for network in moe_networks(target) for what in ("gate_up", "down")}
            theirs = {name: lazy for name, lazy in sources[0].weights.items() if name not in experts}
            check_nothing_is_lost(theirs, names)
            return new | theirs
        outside = outside_of_experts(list(names), target)
        return new | {name: self._mixed([s.weights[without_chain(name)] for s in sources]) for name in outside}

    def _mixed(self, parts: Sequence[Lazy]) -> Lazy:
        """The base of these, or another weight of these models."""
        if self.delta_base is DeltaBase.first or len(parts) == 1:
            return parts[0]
        return Sum(parts, [1 / len(parts)] * len(parts))

    def _factors(
        self,
        prefix: str,
        experts: Sequence[Sequence[Lazy]],
        base: Sequence[Lazy],
        target: Architecture,
        draw: Draw,
    ) -> tuple[Lazy, Lazy]:
        """Stacked factors (E, m, r) and (E, r, n), those of an expert's matrices one below the other."""
        rank, out, into = target.moe.delta_rank, draw(f"{prefix}_out"), draw(f"{prefix}_in")
        assert rank is not None
        if len(experts) == 1:  # all experts are the base, as in a model that starts from nothing
            return Constant(out.shape), into
        outs: list[Lazy] = []
        intos: list[Lazy] = []
        for number, matrices in enumerate(experts):
            if self.delta_base is DeltaBase.first and number == 0:
                outs.append(Constant(out.shape[1:]))
                intos.append(expert_of(into, 0))
                continue
            pairs = [_Factors(matrix, b, rank) for matrix, b in zip(matrices, base, strict=True)]
            outs.append(Joined([_Factor(pair, 0) for pair in pairs]))
            intos.append(Joined([_Factor(pair, 1) for pair in pairs]))
        return Stacked(outs), Stacked(intos)


def _experts(sources: Sequence[Pretrained], name: str, target: Architecture) -> tuple[list[Lazy], list[Lazy]]:
    """`gate_up` (2F, D) and `down` (D, F) of each expert to be, or of the one that all are."""
    if sources[0].architecture.num_moe_layers > 0:
        stacks = (sources[0].weights[f"{name}.experts.{what}"] for what in ("gate_up", "down"))
        gate_ups, downs = ([expert_of(stack, e) for e in range(target.moe.num_experts)] for stack in stacks)
        return list(gate_ups), list(downs)
    networks = [dense_network(source.weights, name) for source in sources]
    return [Joined([gate, up]) for gate, up, _ in networks], [down for _, _, down in networks]


class _Factors:
    """`matrix - base` (m, n) as the product of (m, r) and (r, n) that is closest to it: its largest singular values,
    their roots on either side.

    Of the Gram matrix of the shorter side, in float64: what that loses of small singular values is below the rounding
    of float32. The product is the projection of the difference on the singular vectors, whatever the values.
    """

    def __init__(self, matrix: Lazy, base: Lazy, rank: int) -> None:
        self.matrix, self.base, self.rank = matrix, base, rank
        self._unread: dict[int, Tensor] = {}

    def side(self, place: int) -> Tensor:
        """One of the two, which are computed together; the other one is kept until it is asked for."""
        if place not in self._unread:
            difference = whole(self.matrix).double() - whole(self.base).double()
            self._unread = dict(enumerate(factorized(difference, self.rank)))
        return self._unread.pop(place)


def factorized(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(m, n) -> the float32 factors (m, r) and (r, n) of its best approximation of rank r, of equal norms.

    A direction whose singular value is below the rounding of the largest one keeps a unit vector on one side: with both
    sides near zero it would never learn.
    """
    if matrix.shape[0] > matrix.shape[1]:
        into, out = factorized(matrix.mT, rank)
        return out.mT, into.mT
    vectors = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :rank]
    rows = vectors.mT @ matrix
    value = rows.norm(dim=1)
    root = torch.where(value > torch.finfo(torch.float32).eps * value.max(), value.sqrt(), 1.0)
    return (vectors * root).float(), (rows / root[:, None]).float()


class _Factor(Lazy):
    """One of two factors."""

    dtype = torch.float32

    def __init__(self, pair: _Factors, place: int) -> None:
        self.pair, self.place = pair, place
        rows, columns = pair.matrix.shape
        self.shape = (rows, pair.rank) if place == 0 else (pair.rank, columns)

    def read(self, box: Box) -> Tensor:
        offsets, sizes = box
        value = self.pair.side(self.place)
        return value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return f"rank {self.pair.rank} of {self.pair.matrix} - {self.pair.base}"

"""Adjugates: a small network for each group of neighboring experts, which a token takes along with them (Grove MoE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_parallel.moe.routing import Choice, Routing

ADJUGATE_DIM, ADJUGATE_SCALE = 128, 0.05
"""Defaults: those of GroveMoE-Base."""


def check_adjugates(num_experts: int, groups: int, dim: int, scale: float) -> None:
    """Raises ValueError where options of adjugates do not fit."""
    if groups == 0:
        for name, value, unused in (("dim", dim, ADJUGATE_DIM), ("scale", scale, ADJUGATE_SCALE)):
            if value != unused:
                raise ValueError(
                    f"moe.adjugate_{name}={value} is of adjugates, but moe.adjugate_groups=0 has none; raise it, or "
                    f"leave moe.adjugate_{name} out"
                )
        return
    if groups < 0 or num_experts % groups != 0:
        legal = [0, *(d for d in range(1, num_experts + 1) if num_experts % d == 0)]
        raise ValueError(
            f"moe.adjugate_groups={groups} does not divide moe.num_experts={num_experts}; legal values: {legal}"
        )
    if dim < 1:
        raise ValueError(f"moe.adjugate_dim={dim} must be at least 1")
    if not 0 < scale <= groups / num_experts:
        raise ValueError(
            f"moe.adjugate_scale={scale} must be positive and at most moe.adjugate_groups={groups} / moe.num_experts="
            f"{num_experts} = {groups / num_experts:g}, one over the experts that share an adjugate"
        )


@dataclass(frozen=True)
class AdjugatePart:
    """The adjugates of one part of the experts that are computed here."""

    gate_up: Tensor
    down: Tensor
    group_size: int
    """Consecutive experts that share each of them."""
    scale: float

    def of_groups(
        self, routing: Routing, host_counts: Sequence[int] | None
    ) -> tuple[Routing, Tensor, Tensor, Sequence[int] | None]:
        """What computes them: slots of groups instead of experts, the two weights, and counts on the host.

        Slots are sorted by expert, so they are sorted by group. Where a rank has the tokens themselves, all with
        equally many slots, slots of one token in one group become one, with the sum of their weights.
        """
        size, weight_N = self.group_size, routing.weight_N
        count_G = routing.count_E.view(-1, size).sum(1)
        if weight_N is None:  # they stayed at the source
            dtype = torch.promote_types(self.gate_up.dtype, torch.float32)
            weight_N = torch.full(routing.token_N.shape, self.scale, dtype=dtype, device=routing.token_N.device)
        elif size > 1 and routing.slot_TK is not None and routing.slot_TK.shape[1] > 1 and not routing.uniform_count:
            return _merged(replace(routing, weight_N=weight_N * self.scale), count_G), self.gate_up, self.down, None
        else:
            weight_N = weight_N * self.scale
        if host_counts is not None:
            host_counts = [sum(host_counts[first : first + size]) for first in range(0, len(host_counts), size)]
        of_groups = replace(routing, weight_N=weight_N, count_E=count_G, uniform_count=None)
        return of_groups, self.gate_up, self.down, host_counts


def _merged(routing: Routing, count_G: Tensor) -> Routing:
    """One slot for each token and group: the first keeps the sum of the weights, the others fall away.

    Waits for the device once, for the number of slots.
    """
    assert routing.slot_TK is not None
    num_groups = len(count_G)
    group_N = torch.arange(num_groups, device=count_G.device).repeat_interleave(
        count_G, output_size=len(routing.token_N)
    )
    group_TK, weight_TK = group_N[routing.slot_TK], routing.weights()[routing.slot_TK]
    same_TKK = group_TK[:, :, None] == group_TK[:, None, :]
    is_first_TK = ~same_TKK.tril(-1).any(-1)
    sum_TK = (same_TKK * weight_TK[:, None, :]).sum(-1)
    return Routing.of(Choice(group_TK).only(is_first_TK, num_groups), sum_TK, num_groups)


class Adjugates(nn.Module):
    """`y = sum_i weight_i * (E_i(x) + scale * A_group(i)(x))`: what the groups of a bank of experts add to them.

    Source: Grove MoE (arXiv 2508.07785). Where rows stay on the rank of their tokens, each adjugate is computed once
    for a token, with the sum of its experts' weights. Rows that came from other ranks each have their group's adjugate
    added before they travel back: that costs some products twice, and not one more row in either exchange.
    """

    def __init__(self, num_experts: int, num_groups: int, dim: int, hidden_dim: int, scale: float) -> None:
        super().__init__()
        self.group_size, self.scale = num_experts // num_groups, scale
        self.gate_up = nn.Parameter(torch.empty(num_groups, 2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(num_groups, dim, hidden_dim))

    def parts(
        self, gate_up: Tensor, down: Tensor, num_parts: int, transfer: Callable[[Tensor], Tensor] | None
    ) -> list[AdjugatePart]:
        """For each part of the experts that are computed here.

        Args:
            gate_up, down: what this rank holds.
            num_parts, transfer: of the ticket.
        """
        size = self.group_size
        if transfer is not None or len(gate_up) % num_parts != 0:
            # Borrowed experts come without the rest of their groups, and a part may begin within one: a copy for each.
            gate_up, down = (weight.repeat_interleave(size, dim=0) for weight in (gate_up, down))
            size = 1
        if transfer is not None:
            gate_up, down = transfer(gate_up), transfer(down)
        each = len(gate_up) // num_parts
        return [
            AdjugatePart(*pair, size, self.scale) for pair in zip(gate_up.split(each), down.split(each), strict=True)
        ]

    def extra_repr(self) -> str:
        return f"groups of {self.group_size}, gate_up={tuple(self.gate_up.shape)}, down={tuple(self.down.shape)}"

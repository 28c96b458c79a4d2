"""Operands of the expert kernels: ragged routings of every kind, small enough for an interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.counting_sort import sort_slots
from moe_kernels.permute import invert_permutation


@dataclass(frozen=True)
class Operands:
    """What `moe_mlp` takes, in float64; `cast` makes what a kernel computes with."""

    x_TD: Tensor
    gate_up: Tensor
    down: Tensor
    weight_N: Tensor
    token_N: Tensor
    count_E: Tensor
    slot_TK: Tensor | None
    added_TD: Tensor

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        """Leaves: x, gate_up, down, weights (at least float32), added."""
        wide = torch.promote_types(dtype, torch.float32)
        operands = (self.x_TD, self.gate_up, self.down, self.weight_N, self.added_TD)
        types = (dtype, dtype, dtype, wide, dtype)
        return [o.to(t, copy=True).requires_grad_() for o, t in zip(operands, types)]


KINDS = ("top-k", "an empty expert", "one expert takes all", "dropped slots", "expert choice", "rows in order")


def operands(
    kind: str, tokens: int = 37, dim: int = 16, hidden: int = 16, experts: int = 5, top_k: int = 2
) -> Operands:
    """One routing of each kind that the toolkit has."""
    g = torch.Generator().manual_seed(len(kind) * 1009 + tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    score_TE = torch.rand(tokens, experts, generator=g)
    if kind == "an empty expert":
        score_TE[:, 1] = -1
    if kind == "one expert takes all":
        top_k, score_TE[:, 2] = 1, 2
    slot_TK: Tensor | None = None
    if kind == "expert choice":  # every expert takes its best tokens; a token may have any number of experts
        room = max(tokens * top_k // experts, 1)
        token_N = score_TE.topk(room, dim=0).indices.T.flatten()
        count_E = torch.full((experts,), room)
    elif kind == "rows in order":
        count_E = torch.bincount(torch.randint(experts, (tokens,), generator=g), minlength=experts)
        token_N = torch.randperm(tokens, generator=g)
        slot_TK = invert_permutation(token_N)[:, None]
    else:
        expert_TK = score_TE.topk(top_k, dim=-1).indices
        if kind == "dropped slots":
            expert_TK[torch.rand(tokens, top_k, generator=g) < 0.4] = experts
        order_N, count_E, place_N = sort_slots(expert_TK, experts)
        order_N = order_N[: int(count_E.sum())]
        token_N = order_N // top_k
        if kind != "dropped slots":
            slot_TK = place_N.view(tokens, top_k)
    return Operands(
        x_TD=draw(tokens, dim),
        gate_up=draw(experts, 2 * hidden, dim) * dim**-0.5,
        down=draw(experts, dim, hidden) * hidden**-0.5,
        weight_N=torch.rand(len(token_N), generator=g, dtype=torch.float64),
        token_N=token_N,
        count_E=count_E,
        slot_TK=slot_TK,
        added_TD=draw(tokens, dim),
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Of the norm; infinite for anything that is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))

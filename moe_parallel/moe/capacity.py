"""Capacity: drop the slots that an expert cannot take, in a stated and stable order."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

from moe_kernels.permute import invert_permutation


class DropOrder(str, Enum):
    position = "position"
    """First come, first served: first choices of all tokens, then second choices, each by position (GShard)."""
    weight = "weight"
    """The lowest combine weights go first; equal weights by position."""


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Slots an expert takes of one rank's micro-batch: ceil(factor * T * K / E)."""
    return math.ceil(factor * num_tokens * top_k / num_experts)


def keep_within_capacity(
    expert_TK: Tensor, weight_TK: Tensor, capacity: int, num_experts: int, order: DropOrder
) -> Tensor:
    """Which slots stay, bool (T, K).

    Args:
        expert_TK: int64; `num_experts` marks a slot that is not used (padding) and stays out of the count.
        weight_TK: combine weights, used for their order only.
    """
    num_tokens, top_k = expert_TK.shape
    if order is DropOrder.position:
        flat_N = expert_TK.T.reshape(-1)
        queue_N = torch.arange(flat_N.numel(), device=flat_N.device)
    else:
        flat_N = expert_TK.reshape(-1)
        queue_N = weight_TK.detach().reshape(-1).argsort(descending=True, stable=True)
    # Stable sort by expert of slots that already stand in queue order: place within the expert = place in its queue.
    by_expert_N = queue_N[flat_N[queue_N].argsort(stable=True)]
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_N.device)
    count.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    start = count.cumsum(0) - count
    place_N = invert_permutation(by_expert_N) - start[flat_N]
    keep_N = (place_N < capacity) & (flat_N < num_experts)
    if order is DropOrder.position:
        return keep_N.view(top_k, num_tokens).T
    return keep_N.view(num_tokens, top_k)

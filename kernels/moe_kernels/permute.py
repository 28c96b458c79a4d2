"""Gather token rows into expert order, and combine expert rows back into tokens.

Both directions are written as gathers wherever every token has the same number of slots: a gather has one writer
per element, so sums keep one order and two runs agree to the last bit, which `index_add` on a GPU does not give.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.combine import combine, gather, grad_combine


def invert_permutation(order_N: Tensor) -> Tensor:
    """The place of each element: `invert_permutation(order)[order[i]] == i`."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, token_N: Tensor, slot_TK: Tensor | None, fused: bool) -> Tensor:
        ctx.save_for_backward(token_N, slot_TK)
        ctx.num_tokens, ctx.fused = x_TD.shape[0], fused
        return gather(x_TD.contiguous(), token_N, fused)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        token_N, slot_TK = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        return combine(grad_ND, None, token_N, slot_TK, ctx.num_tokens, fused=ctx.fused), None, None, None


def gather_rows(x_TD: Tensor, token_N: Tensor, slot_TK: Tensor | None = None, fused: bool = False) -> Tensor:
    """Copy each slot's token row: (T, D) -> (N, D).

    Args:
        token_N: int64, the row of x_TD that fills each slot.
        slot_TK: int64, the places of each token's K slots, when every token has exactly K: the inverse of
            `token_N`, which turns the backward pass into a gather. None for any other list of slots.
        fused: by a Triton kernel each way.
    """
    return _GatherRows.apply(x_TD, token_N, slot_TK, fused)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, weight_N, token_N, slot_TK, num_tokens, fused, *added):
        ctx.save_for_backward(rows_ND, weight_N, token_N)
        ctx.fused = fused
        return combine(rows_ND, weight_N, token_N, slot_TK, num_tokens, added, fused)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_ND, weight_N, token_N = ctx.saved_tensors
        grad_rows_ND, grad_weight_N = grad_combine(grad_TD.contiguous(), rows_ND, weight_N, token_N, ctx.fused)
        grad_added = [grad_TD if needed else None for needed in ctx.needs_input_grad[6:]]
        return grad_rows_ND, grad_weight_N, None, None, None, None, *grad_added


def combine_rows(
    rows_ND: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    slot_TK: Tensor | None,
    num_tokens: int,
    added: Sequence[Tensor] = (),
    fused: bool = False,
) -> Tensor:
    """Weighted sum of each token's slots: (N, D) -> (T, D). Sums in the wider dtype of rows and weights.

    Args:
        rows_ND: expert outputs in slot order.
        weight_N: combine weight of each slot, float32 (or float64).
        token_N, slot_TK: as in `gather_rows`. A token without slots gets zeros.
        added: tensors (T, D) that are added to the sum before it is rounded.
        fused: by a Triton kernel each way.
    """
    return _CombineRows.apply(rows_ND.contiguous(), weight_N.contiguous(), token_N, slot_TK, num_tokens, fused, *added)


def chunk_order(count_PL: Tensor, total: int) -> Tensor:
    """Permutation that turns rows grouped by (source rank, expert) into rows grouped by (expert, source rank).

    Args:
        count_PL: int64, rows of each chunk as they lie.
        total: host-known sum of `count_PL`.
    Returns:
        order_R: int64; `rows[order_R]` is grouped by expert, within an expert by source rank.
    """
    num_ranks, num_experts = count_PL.shape
    expert_PL = torch.arange(num_experts, device=count_PL.device).repeat(num_ranks)
    expert_R = expert_PL.repeat_interleave(count_PL.reshape(-1), output_size=total)
    return expert_R.argsort(stable=True)

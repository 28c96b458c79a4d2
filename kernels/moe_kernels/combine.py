"""The sum of each token's slots, weighted or not; with one slot a row, a copy of rows in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.triton_support import block_of, jit, tl, triton


def combine_reference(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    token_N: Tensor,
    slot_TK: Tensor | None,
    num_tokens: int,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """See `combine`."""
    wide = torch.promote_types(rows_ND.dtype, torch.float32 if weight_N is None else weight_N.dtype)
    if slot_TK is None:
        out_TD = torch.zeros(num_tokens, rows_ND.shape[1], dtype=wide, device=rows_ND.device)
        out_TD.index_add_(0, token_N, rows_ND.to(wide) if weight_N is None else rows_ND * weight_N[:, None])
    else:
        weight_TK = None if weight_N is None else weight_N[slot_TK]
        out_TD = torch.zeros((), dtype=wide, device=rows_ND.device)
        for k, slot_T in enumerate(slot_TK.unbind(1)):
            row_TD = rows_ND.index_select(0, slot_T).to(wide)
            if weight_TK is None:
                out_TD = row_TD if k == 0 else out_TD.add_(row_TD)
            else:
                weight_T1 = weight_TK[:, k : k + 1]
                out_TD = row_TD.mul_(weight_T1) if k == 0 else out_TD.addcmul_(row_TD, weight_T1)
    for term_TD in added:
        out_TD += term_TD
    return out_TD.to(rows_ND.dtype)


@jit
def _weighted_row(rows_ptr, weight_ptr, slot_ptr, column, inside, D: tl.constexpr, WEIGHTED: tl.constexpr):
    slot = tl.load(slot_ptr).to(tl.int64)
    row = tl.load(rows_ptr + slot * D + column, inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        row = row * tl.load(weight_ptr + slot)
    return row


@jit
def combine_kernel(
    rows_ptr, weight_ptr, slot_ptr, first_ptr, added_ptr, more_ptr, out_ptr,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK columns. K = 0: the token's slots are those from first[t] to first[t + 1]."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    if K == 0:
        for place in range(tl.load(first_ptr + token), tl.load(first_ptr + token + 1)):
            total += _weighted_row(rows_ptr, weight_ptr, slot_ptr + place, column, inside, D, WEIGHTED)
    else:
        for k in tl.static_range(K):  # unrolled: all rows are on their way at once
            place = token.to(tl.int64) * K + k
            total += _weighted_row(rows_ptr, weight_ptr, slot_ptr + place, column, inside, D, WEIGHTED)
    here = token.to(tl.int64) * D + column
    if ADDED > 0:
        total += tl.load(added_ptr + here, inside, other=0.0).to(tl.float32)
    if ADDED > 1:
        total += tl.load(more_ptr + here, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, total.to(out_ptr.dtype.element_ty), inside)


@torch.library.custom_op("moe_kernels::combine", mutates_args=())
def _combine(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    slot: Tensor,
    first_T: Tensor | None,
    num_tokens: int,
    added: list[Tensor],
) -> Tensor:
    out_TD = rows_ND.new_empty(num_tokens, rows_ND.shape[1])
    block = min(block_of(rows_ND.shape[1]), 2048)
    if num_tokens > 0:
        more = [term.contiguous() for term in added] + [None, None]
        combine_kernel[(num_tokens, triton.cdiv(rows_ND.shape[1], block))](
            rows_ND,
            weight_N,
            slot,
            first_T,
            more[0],
            more[1],
            out_TD,
            D=rows_ND.shape[1],
            K=0 if first_T is not None else slot.shape[1],
            WEIGHTED=weight_N is not None,
            ADDED=len(added),
            BLOCK=block,
            num_warps=4 if block >= 1024 else 1,
        )
    return out_TD


@_combine.register_fake
def _(rows_ND, weight_N, slot, first_T, num_tokens, added):
    return rows_ND.new_empty(num_tokens, rows_ND.shape[1])


def combine(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    token_N: Tensor,
    slot_TK: Tensor | None,
    num_tokens: int,
    added: Sequence[Tensor] = (),
    fused: bool = False,
) -> Tensor:
    """(N, D) -> (T, D): weighted sums in at least float32, rounded once to the type of the rows.

    Args:
        weight_N: one a slot; None for ones.
        token_N: the token of each slot.
        slot_TK: the places of each token's slots when every token has exactly K of them, else None.
        added: (T, D) each; added to the sum before it is rounded.
        fused: one Triton kernel that reads every row once, in one order; else in plain torch, where a list of slots is
            summed on a GPU in no fixed order.
    """
    if not fused:
        return combine_reference(rows_ND, weight_N, token_N, slot_TK, num_tokens, added)
    if len(added) > 2:  # the kernel takes two
        added = [added[0], torch.stack(list(added[1:])).sum(0)]
    if slot_TK is not None:
        return _combine(rows_ND, weight_N, slot_TK, None, num_tokens, list(added))
    sorted_N, slot_N = token_N.sort(stable=True)
    bound_T = torch.arange(num_tokens + 1, dtype=sorted_N.dtype, device=sorted_N.device)
    first_T = torch.searchsorted(sorted_N, bound_T, out_int32=True)
    return _combine(rows_ND, weight_N, slot_N.to(torch.int32), first_T, num_tokens, list(added))


def gather(rows_TD: Tensor, index_N: Tensor | None, fused: bool) -> Tensor:
    """A copy of the rows in the order of `index_N`: (T, D) -> (N, D); the rows themselves without one."""
    if index_N is None:
        return rows_TD
    if not fused:
        return rows_TD.index_select(0, index_N)
    return _combine(rows_TD, None, index_N.unsqueeze(1), None, index_N.shape[0], [])


def grad_combine_reference(
    grad_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    """See `grad_combine`."""
    grad_ND = grad_TD.index_select(0, token_N)
    grad_weight_N = (grad_ND.to(weight_N.dtype) * rows_ND).sum(-1)
    return (grad_ND * weight_N[:, None]).to(rows_ND.dtype), grad_weight_N


@jit
def grad_combine_kernel(
    grad_ptr, rows_ptr, weight_ptr, token_ptr, grad_rows_ptr, grad_weight_ptr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One slot."""
    slot = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    token = tl.load(token_ptr + slot).to(tl.int64)
    here = slot.to(tl.int64) * D + column
    grad = tl.load(grad_ptr + token * D + column, inside, other=0.0).to(tl.float32)
    row = tl.load(rows_ptr + here, inside, other=0.0).to(tl.float32)
    tl.store(grad_rows_ptr + here, (grad * tl.load(weight_ptr + slot)).to(grad_rows_ptr.dtype.element_ty), inside)
    tl.store(grad_weight_ptr + slot, tl.sum(grad * row, 0))


@torch.library.custom_op("moe_kernels::grad_combine", mutates_args=())
def _grad_combine(grad_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows_ND, grad_weight_N = torch.empty_like(rows_ND), torch.empty_like(weight_N)
    num_rows, dim = rows_ND.shape
    if num_rows > 0:
        block = block_of(dim)
        grad_combine_kernel[(num_rows,)](
            grad_TD,
            rows_ND,
            weight_N,
            token_N,
            grad_rows_ND,
            grad_weight_N,
            D=dim,
            BLOCK=block,
            num_warps=max(1, min(block // 512, 8)),
        )
    return grad_rows_ND, grad_weight_N


@_grad_combine.register_fake
def _(grad_TD, rows_ND, weight_N, token_N):
    return torch.empty_like(rows_ND), torch.empty_like(weight_N)


def grad_combine(
    grad_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (N, D) and of the weights (N) of a weighted sum, from that of the sum (T, D)."""
    if not fused:
        return grad_combine_reference(grad_TD, rows_ND, weight_N, token_N)
    return _grad_combine(grad_TD, rows_ND, weight_N, token_N)

"""Collectives of expert parallelism: all-to-all with a gradient, sums by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, received, sent, group):
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


def all_to_all_rows(rows: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send rows to the ranks of `group` and receive theirs; the gradient travels the other way.

    Args:
        rows: (sum(sent), ...), grouped by destination rank.
        received, sent: rows from and to each rank, known on the host; any may be 0.
    Returns:
        (sum(received), ...), grouped by source rank.
    """
    return _AllToAllRows.apply(rows, received, sent, group)


class _LendWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, lent, sent, received, group):
        ctx.lent, ctx.sent, ctx.received, ctx.group = lent, sent, received, group
        num_own, num_borrowed = own.shape[0], sum(received)
        copies = torch.cat([own[index : index + 1] for index in lent]) if lent else own[:0]
        if num_borrowed == 0:
            _exchange(copies, received, sent, group)
            return own.view_as(own)
        out = own.new_empty(num_own + num_borrowed, *own.shape[1:])
        out[:num_own].copy_(own)
        dist.all_to_all_single(out[num_own:], copies.contiguous(), list(received), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        num_own = grad.shape[0] - sum(ctx.received)
        returned = _exchange(grad[num_own:], ctx.sent, ctx.received, ctx.group)
        # A copy, also where nothing was lent: a view would keep the gradient of the borrowed weights alive.
        grad_own = grad[:num_own].clone() if ctx.lent or num_own < grad.shape[0] else grad
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        for index in sorted(set(ctx.lent)):
            total = grad[index].to(accumulate, copy=True)
            for place, lent in enumerate(ctx.lent):  # one order: index_add_ on a GPU has none
                if lent == index:
                    total += returned[place]
            grad_own[index] = total
        return grad_own, None, None, None, None


def lend_weights(
    own: Tensor, *, lent: Sequence[int], sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Append copies of other ranks' weights to one's own; their gradients return and are added to the owner's.

    The sum of an owner's gradient and the returned ones is taken in float32 (or float64) and rounded once. All ranks of
    `group` enter, also those that neither lend nor borrow, here and in the backward pass.

    Args:
        own: (L, ...), the same trailing shape on all ranks.
        lent: indices of the weights to send, grouped by destination rank; a weight may go to several.
        sent, received: weights to and from each rank.
    Returns:
        (L + sum(received), ...): one's own, then the borrowed ones, grouped by owner.
    """
    return _LendWeights.apply(own, lent, sent, received, group)


def exchange_counts(count_PL: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tell each rank how many rows it will get for each of its experts: row p of the input goes to rank p."""
    out_PL = torch.empty_like(count_PL)
    dist.all_to_all_single(out_PL, count_PL.contiguous(), group=group)
    return out_PL


def sum_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over `group` into a new tensor, without gradient."""

    def summed(value: Tensor) -> Tensor:
        out = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    return summed


def gather_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A function that stacks a tensor of every rank of `group`, in their order, without gradient."""

    def gathered(value: Tensor) -> Tensor:
        value = value.detach().contiguous()  # also for the copies: gloo reads and writes memory in its order
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value, group=group)
        return torch.stack(parts)

    return gathered

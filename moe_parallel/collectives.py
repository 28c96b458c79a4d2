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


def exchange_counts(count_PL: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tell each rank how many rows it will get for each of its experts: row p of the input goes to rank p."""
    out_PL = torch.empty_like(count_PL)
    dist.all_to_all_single(out_PL, count_PL.contiguous(), group=group)
    return out_PL


def sum_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over `group` into a new tensor, without gradient."""

    def summed(value: Tensor) -> Tensor:
        out = value.detach().clone()
        dist.all_reduce(out, group=group)
        return out

    return summed

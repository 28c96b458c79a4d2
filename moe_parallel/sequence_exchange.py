"""How ranks that share sequences meet in attention and in dense networks; each way has its gradient.

Between these each rank holds consecutive tokens, (B, S / (cp * tp), D), in the order (cp, tp).

    gather    tp   tokens of this rank -> tokens of all tp ranks               gradient: sum, scattered
    scatter   tp   partial sums over tp, all their tokens -> sums, own tokens  gradient: gather
    to_heads  cp   some tokens, all heads -> all tokens, some heads            gradient: to_tokens
    to_tokens cp   the reverse

The way by heads leaves attention as it is: each rank sees whole sequences, with all documents, and equal work. Its
price is that heads must be enough: cp * tp divides them. Keys and values of fewer heads are sent once for each rank
that needs them. Source: sequence parallelism arXiv 2205.05198, all-to-all of heads arXiv 2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.collectives import all_to_all_rows, sum_over

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class SequenceExchange:
    """The two groups of one rank. A group of one rank exchanges nothing."""

    cp: dist.ProcessGroup
    tp: dist.ProcessGroup

    @property
    def cp_ranks(self) -> int:
        return dist.get_world_size(self.cp)

    @property
    def tp_ranks(self) -> int:
        return dist.get_world_size(self.tp)

    @property
    def cp_rank(self) -> int:
        return dist.get_rank(self.cp)

    @property
    def tp_rank(self) -> int:
        return dist.get_rank(self.tp)

    def gather(self, *parts_BSD: Tensor) -> tuple[Tensor, ...]:
        """(B, s, D) each, of several D, in one message -> (B, tp * s, D) each."""
        if self.tp_ranks == 1:
            return parts_BSD
        whole = _Linear.apply(torch.cat(parts_BSD, dim=-1), _gathered, _scattered, self.tp)
        return whole.split([part.shape[-1] for part in parts_BSD], dim=-1)

    def scatter(self, x_BSD: Tensor) -> Tensor:
        """(B, tp * s, D), a part of the sum on each rank -> (B, s, D), the sum of own tokens."""
        return x_BSD if self.tp_ranks == 1 else _Linear.apply(x_BSD, _scattered, _gathered, self.tp)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over tp, with gradient."""
        return x if self.tp_ranks == 1 else _Linear.apply(x, _summed, _summed, self.tp) / self.tp_ranks

    def to_heads(self, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, s, d) each, in one message -> (B, H / cp, cp * s, d) each.

        Keys and values of fewer heads than the queries' are repeated, as little as an even division needs.
        """
        count = self.cp_ranks
        if count == 1:
            return q_BHSd, k_BHSd, v_BHSd
        wide = [repeat_heads(part, q_BHSd.shape[1], count) for part in (q_BHSd, k_BHSd, v_BHSd)]
        packed = [_pack(part.unflatten(1, (count, -1)).movedim(1, 0)) for part in wide]
        arrived = _swapped(torch.cat(packed, dim=1), self.cp)
        out: list[Tensor] = []
        for part, piece in zip(wide, arrived.split([p.shape[1] for p in packed], dim=1)):
            batch, heads, tokens, width = part.shape
            piece_cBHsd = piece.view(count, batch, heads // count, tokens, width)
            out.append(piece_cBHsd.movedim(0, 2).flatten(2, 3))
        q_BHSd, k_BHSd, v_BHSd = out
        return q_BHSd, k_BHSd, v_BHSd

    def to_tokens(self, x_BHSd: Tensor) -> Tensor:
        """(B, H / cp, cp * s, d) -> (B, H, s, d)."""
        count = self.cp_ranks
        if count == 1:
            return x_BHSd
        batch, heads, tokens, width = x_BHSd.shape
        packed = _pack(x_BHSd.unflatten(2, (count, -1)).movedim(2, 0))
        piece_cBHsd = _swapped(packed, self.cp).view(count, batch, heads, tokens // count, width)
        return piece_cBHsd.movedim(0, 1).flatten(1, 2)


def repeat_heads(x_BHSd: Tensor, most: int, ranks: int) -> Tensor:
    """Heads repeated until `ranks` divides them, each beside its copies; `most` heads are as many as queries have."""
    heads = x_BHSd.shape[1]
    times = next(n for n in range(1, most // heads + 1) if heads * n % ranks == 0 and most % (heads * n) == 0)
    return x_BHSd if times == 1 else x_BHSd.repeat_interleave(times, dim=1)


def _pack(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


class _Linear(torch.autograd.Function):
    """An exchange and the one that its gradient takes."""

    @staticmethod
    def forward(ctx, x, there, back, group):
        ctx.back, ctx.group = back, group
        return there(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.group), None, None, None


def _gathered(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x_BSD.new_empty(dist.get_world_size(group) * x_BSD.shape[0], *x_BSD.shape[1:])
    _all_gather(out, x_BSD.contiguous(), group=group)
    return out.unflatten(0, (-1, x_BSD.shape[0])).transpose(0, 1).flatten(1, 2)


def _scattered(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = x_BSD.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1).flatten(0, 1).contiguous()
    out = parts.new_empty(x_BSD.shape[0], *parts.shape[1:])
    _reduce_scatter(out, parts, group=group)
    return out


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return sum_over(group)(x)


def _swapped(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row p of (ranks, ...) goes to rank p, with gradient."""
    one_each = [1] * dist.get_world_size(group)
    return all_to_all_rows(rows, one_each, one_each, group)

"""All-to-alls of rows that travel while something else is computed, in the forward and in the backward pass.

An exchange has one part or several, each an all-to-all of its own. One way a whole tensor is sent at once and its parts
are waited for one by one; the other way parts are sent one by one, and the whole is waited for:

    start_all(rows) -> tokens    wait(token, part) -> rows           to the experts
    start(rows, part) -> token   wait_all(tokens) -> rows            back

Each is the other's gradient. Autograd runs what was computed last first, so the backward pass of a wait starts the
reverse exchange, then runs what was computed between start and wait, and the backward pass of the start waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RowExchange:
    """One exchange and its gradient. For one forward pass and the backward passes through it.

    What is started and not yet waited for stands in tokens: empty tensors that carry the gradient's order, so that
    nothing can read rows that have not arrived. All ranks of the group must start parts in the same order.
    """

    def __init__(
        self, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], group: dist.ProcessGroup
    ) -> None:
        """
        Args:
            sent, received: rows to and from each rank, for each part; known on the host, any may be 0.
        """
        self.sent, self.received, self.group = sent, received, group
        self._under_way: dict[int, tuple[dist.Work, Tensor, Tensor]] = {}
        self._whole: Tensor | None = None

    def way_back(self) -> RowExchange:
        """Another exchange, of what the receivers made of the rows."""
        return RowExchange(self.received, self.sent, self.group)

    def start_all(self, rows: Tensor) -> list[Tensor]:
        """Send (all rows, ...), grouped by part and within a part by destination rank. A token for each part."""
        return list(_StartAll.apply(rows, self))

    def wait(self, token: Tensor, part: int) -> Tensor:
        """The rows of a part that arrived, grouped by source rank."""
        return _Wait.apply(token, self, part)

    def start(self, rows: Tensor, part: int) -> Tensor:
        """Send the rows of one part, grouped by destination rank."""
        return _Start.apply(rows, self, part)

    def wait_all(self, tokens: Sequence[Tensor]) -> Tensor:
        """The rows of all parts that arrived, grouped by part, then by source rank."""
        return _WaitAll.apply(self, *tokens)

    def _send(self, part: int, rows: Tensor, out: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        rows = rows.contiguous()
        work = dist.all_to_all_single(out, rows, list(received), list(sent), group=self.group, async_op=True)
        # Both tensors are held until the wait: the allocator would give their memory to whoever asks next.
        self._under_way[part] = (work, rows, out)

    def _take(self, part: int) -> Tensor:
        work, _, out = self._under_way.pop(part)
        work.wait()
        return out

    def _send_whole(
        self, rows: Tensor, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], order: Sequence[int]
    ) -> None:
        pieces = rows.split([sum(to_rank) for to_rank in sent])
        for part in order:
            out = rows.new_empty(sum(received[part]), *rows.shape[1:])
            self._send(part, pieces[part], out, sent[part], received[part])

    def _send_part(
        self, part: int, rows: Tensor, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]
    ) -> None:
        arriving = [sum(from_rank) for from_rank in received]
        if self._whole is None:
            self._whole = rows.new_empty(sum(arriving), *rows.shape[1:])
        out = self._whole.narrow(0, sum(arriving[:part]), arriving[part])
        self._send(part, rows, out, sent[part], received[part])

    def _take_whole(self) -> Tensor:
        whole, self._whole = self._whole, None
        assert whole is not None
        assert len(self._under_way) == len(self.sent), "a part was not sent"
        for part in list(self._under_way):
            self._take(part)
        return whole


class _StartAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        exchange._send_whole(rows, exchange.sent, exchange.received, range(len(exchange.sent)))
        return tuple(rows.new_empty(0) for _ in exchange.sent)

    @staticmethod
    def backward(ctx, *tokens):
        return ctx.exchange._take_whole(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, exchange, part):
        ctx.exchange, ctx.part = exchange, part
        return exchange._take(part)

    @staticmethod
    def backward(ctx, grad):
        ctx.exchange._send_part(ctx.part, grad, ctx.exchange.received, ctx.exchange.sent)
        return grad.new_empty(0), None, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange, part):
        ctx.exchange, ctx.part = exchange, part
        exchange._send_part(part, rows, exchange.sent, exchange.received)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, token):
        return ctx.exchange._take(ctx.part), None, None


class _WaitAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *tokens):
        ctx.exchange = exchange
        return exchange._take_whole()

    @staticmethod
    def backward(ctx, grad):
        exchange, parts = ctx.exchange, range(len(ctx.exchange.sent))
        # What was computed last is wanted first.
        exchange._send_whole(grad, exchange.received, exchange.sent, parts[::-1])
        return None, *(grad.new_empty(0) for _ in parts)

"""Dispatch by one all-to-all: experts are split evenly over the ranks of the `ep` axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pydantic.dataclasses
import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.permute import chunk_order, combine_rows, gather_rows, invert_permutation
from moe_parallel.collectives import exchange_counts
from moe_parallel.moe.dispatch.config import DispatchConfig, DispatchSetting
from moe_parallel.moe.experts import Part, Ticket
from moe_parallel.moe.routing import LayerContext, Routing
from moe_parallel.row_exchange import RowExchange


@pydantic.dataclasses.dataclass(kw_only=True)
class AllToAllConfig(DispatchConfig):
    """One exchange between all ranks of `ep`."""

    chunks: int = 1
    """Groups of a rank's experts: one is computed while the rows of others travel. Must divide a rank's experts."""

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"dispatch.chunks={self.chunks} must be at least 1, which computes all experts at once")

    def check(self, setting: DispatchSetting) -> None:
        """Raises ValueError unless the experts of one rank are that many groups of equal size."""
        chunks, ep = self.chunks, setting.ep
        if chunks > 1 and ep == 1:
            raise ValueError(f"dispatch.chunks={chunks} has no exchange to hide with parallel.ep=1; raise it, or set 1")
        num_local = setting.num_experts // ep
        if num_local % chunks != 0:
            legal = [d for d in range(1, num_local + 1) if num_local % d == 0]
            raise ValueError(
                f"dispatch.chunks={chunks} does not divide the {num_local} experts of a rank (moe.num_experts="
                f"{setting.num_experts} / parallel.ep={ep}); legal values: {legal}"
            )


@dataclass(frozen=True, kw_only=True)
class ExchangePart(Part):
    """Rows of one part of an exchange."""

    index: int
    there: RowExchange
    back: RowExchange
    arrived: Callable[[], Routing]
    """Asked for while the rows are on the way."""
    host_counts: Sequence[int]

    def receive(self, token: Tensor) -> tuple[Tensor, Routing]:
        arrived = self.arrived()
        return self.there.wait(token, self.index), arrived

    def send(self, rows_RD: Tensor) -> Tensor:
        return self.back.start(rows_RD, self.index)


@dataclass(frozen=True)
class _Sizes:
    """What the ranks tell each other. Letters besides the usual: C chunks."""

    arriving_CPL: Tensor
    """int64: rows from each rank for each expert of a chunk."""
    sent: Sequence[Sequence[int]]
    """Rows of each chunk to each rank."""
    arriving: Sequence[Sequence[Sequence[int]]]
    """The same as `arriving_CPL`, on the host."""


@dataclass(frozen=True, kw_only=True)
class ExchangeTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    there: RowExchange
    back: RowExchange
    num_tokens: int
    order_N: Tensor | None
    """Permutation from slots by expert to slots by chunk, then by expert; None for one chunk."""
    inverse_N: Tensor | None


class AllToAllDispatcher:
    """Sends each row to the rank of its expert and brings the result back.

    Rank p of the group owns experts p * L to (p + 1) * L - 1. Combine weights stay with the source, so their
    gradient needs no exchange.

    Chunk c holds experts c * L / C to (c + 1) * L / C - 1 of every rank. All chunks are sent at once: the link is then
    never idle before the last has arrived, and results follow as they are computed. Every expert has all its rows in
    one chunk, so that its weights are used once and its gradient is one product.
    """

    def __init__(self, group: dist.ProcessGroup, chunks: int = 1, fused: bool = False) -> None:
        """
        Args:
            fused: rows are packed and combined by Triton kernels.
        """
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.chunks = chunks
        self.fused = fused

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], ExchangeTicket]:
        """Start the rows of (T, D) on their way. They arrive by chunk, source rank and expert.

        An expert takes its rows in the order of source ranks, and of slots within a rank.
        """
        ticket = self.prepare(routing, x_TD.shape[0], context)
        return self.start(x_TD, routing, ticket), ticket

    def prepare(self, routing: Routing, num_tokens: int, context: LayerContext) -> ExchangeTicket:
        """The part of `dispatch` that needs no rows: sizes on the host, and in which order to pack."""
        sizes: _Sizes = context.once("sizes", lambda: self._sizes(routing))
        received = [[sum(counts) for counts in from_ranks] for from_ranks in sizes.arriving]
        there = RowExchange(sizes.sent, received, self.group)
        back = there.way_back()
        order_N = inverse_N = None
        if self.chunks > 1:
            count_PC = routing.count_E.view(self.num_ranks, self.chunks, -1).sum(-1)
            order_N = context.once("packing", lambda: chunk_order(count_PC, routing.token_N.numel()))
            inverse_N = invert_permutation(order_N)

        def arrived(chunk: int) -> Callable[[], Routing]:
            count_PL, total = sizes.arriving_CPL[chunk], sum(received[chunk])
            order = lambda: chunk_order(count_PL, total)  # noqa: E731
            return lambda: Routing.of_rows(context.once(f"order_{chunk}", order), count_PL.sum(0))

        parts = [
            ExchangePart(
                index=chunk,
                there=there,
                back=back,
                arrived=arrived(chunk),
                host_counts=[sum(column) for column in zip(*sizes.arriving[chunk])],
            )
            for chunk in range(self.chunks)
        ]
        return ExchangeTicket(
            parts=parts, there=there, back=back, num_tokens=num_tokens, order_N=order_N, inverse_N=inverse_N
        )

    def start(self, x_TD: Tensor, routing: Routing, ticket: ExchangeTicket) -> list[Tensor]:
        """Pack rows in the order of the exchange and send them."""
        packed = routing.reordered(ticket.order_N, ticket.inverse_N)
        return ticket.there.start_all(gather_rows(x_TD, packed.token_N, packed.slot_TK, self.fused))

    def combine(
        self, rows: Sequence[Tensor], routing: Routing, ticket: ExchangeTicket, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Wait for what the experts return, then the weighted sum of each token's slots: (T, D)."""
        rows_ND = ticket.back.wait_all(rows)
        packed = routing.reordered(ticket.order_N, ticket.inverse_N)
        weight_N, num_tokens = packed.weights(), ticket.num_tokens
        return combine_rows(rows_ND, weight_N, packed.token_N, packed.slot_TK, num_tokens, added, self.fused)

    def _sizes(self, routing: Routing) -> _Sizes:
        """Rows that arrive for each local expert from each rank, and rows to send."""
        count_PL, uniform = routing.count_E.view(self.num_ranks, -1), routing.uniform_count
        num_local = count_PL.shape[1] // self.chunks
        if uniform is not None:
            sent = [[uniform * num_local] * self.num_ranks] * self.chunks
            return _Sizes(self._by_chunk(count_PL), sent, [[[uniform] * num_local] * self.num_ranks] * self.chunks)
        count_CPL, arriving_CPL = self._by_chunk(count_PL), self._by_chunk(exchange_counts(count_PL, self.group))
        # The one wait for the device: an all-to-all needs its sizes on the host.
        sent_CPL, arriving = torch.stack([count_CPL, arriving_CPL]).tolist()
        return _Sizes(arriving_CPL, [[sum(counts) for counts in to_ranks] for to_ranks in sent_CPL], arriving)

    def _by_chunk(self, count_PL: Tensor) -> Tensor:
        """(P, L) -> (C, P, L / C)."""
        return count_PL.view(self.num_ranks, self.chunks, -1).transpose(0, 1)

"""Dispatch by one all-to-all: experts are split evenly over the ranks of the `ep` axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pydantic.dataclasses
import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.permute import chunk_order, combine_rows, gather_rows
from moe_parallel.collectives import all_to_all_rows, exchange_counts
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.experts import Ticket
from moe_parallel.moe.routing import LayerContext, Routing


@pydantic.dataclasses.dataclass(kw_only=True)
class AllToAllConfig(DispatchConfig):
    """One exchange between all ranks of `ep`; there is nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class ExchangeTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    num_tokens: int
    sent: Sequence[int]
    """Rows to each rank."""
    received: Sequence[int]
    """Rows from each rank."""


class AllToAllDispatcher:
    """Sends each row to the rank of its expert and brings the result back.

    Rank p of the group owns experts p * L to (p + 1) * L - 1. Combine weights stay with the source, so their
    gradient needs no exchange.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[Tensor, ExchangeTicket]:
        """(T, D) -> rows (R, D) as they arrive, by source rank and expert, and the ticket for `combine`.

        An expert takes its rows in the order of source ranks, and of slots within a rank.
        """
        count_PL = routing.count_E.view(self.num_ranks, -1)
        arriving_PL, sent, arriving = context.once("sizes", lambda: self._sizes(count_PL, routing.uniform_count))
        received = [sum(counts) for counts in arriving]
        rows_ND = gather_rows(x_TD, routing.token_N, routing.slot_TK)
        rows_RD = all_to_all_rows(rows_ND, received, sent, self.group)
        order_R = context.once("order", lambda: chunk_order(arriving_PL, sum(received)))
        ticket = ExchangeTicket(
            num_tokens=x_TD.shape[0],
            sent=sent,
            received=received,
            arrived=Routing.of_rows(order_R, arriving_PL.sum(0)),
            host_counts=[sum(column) for column in zip(*arriving)],
        )
        return rows_RD, ticket

    def combine(
        self, rows_RD: Tensor, routing: Routing, ticket: ExchangeTicket, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Rows (R, D) back to their sources, then the weighted sum of each token's slots: (T, D)."""
        rows_ND = all_to_all_rows(rows_RD, ticket.sent, ticket.received, self.group)
        return combine_rows(rows_ND, routing.weights(), routing.token_N, routing.slot_TK, ticket.num_tokens, added)

    def _sizes(self, count_PL: Tensor, uniform_count: int | None) -> tuple[Tensor, list[int], list[list[int]]]:
        """Rows that arrive for each local expert from each rank, and rows to send, on the host."""
        num_ranks, num_local = count_PL.shape
        if uniform_count is not None:
            sent = [uniform_count * num_local] * num_ranks
            return count_PL, sent, [[uniform_count] * num_local for _ in range(num_ranks)]
        arriving_PL = exchange_counts(count_PL, self.group)
        # The one wait for the device: an all-to-all needs its sizes on the host.
        sent, arriving = torch.stack([count_PL, arriving_PL]).tolist()
        return arriving_PL, [sum(counts) for counts in sent], arriving

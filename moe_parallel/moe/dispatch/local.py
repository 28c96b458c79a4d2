"""Dispatch without communication: every expert is here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_kernels.permute import combine_rows, gather_rows
from moe_parallel.moe.dispatch.ticket import Ticket
from moe_parallel.moe.routing import LayerContext, Routing


@dataclass(frozen=True, kw_only=True)
class LocalTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    num_tokens: int


class LocalDispatcher:
    """Gathers rows into expert order and combines them back."""

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[Tensor, Tensor, LocalTicket]:
        """(T, D) -> rows (N, D) sorted by expert, their counts, and the ticket for `combine`."""
        rows_ND = gather_rows(x_TD, routing.token_N, routing.slot_TK)
        host_counts = None
        if routing.uniform_count is not None:
            host_counts = [routing.uniform_count] * routing.count_E.numel()
        return rows_ND, routing.count_E, LocalTicket(num_tokens=x_TD.shape[0], host_counts=host_counts)

    def combine(self, rows_ND: Tensor, routing: Routing, ticket: LocalTicket) -> Tensor:
        """Weighted sum of each token's expert outputs: (N, D) -> (T, D)."""
        return combine_rows(rows_ND, routing.weight_N, routing.token_N, routing.slot_TK, ticket.num_tokens)

"""Dispatch without communication: every expert is here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_parallel.moe.experts import LocalPart, Ticket
from moe_parallel.moe.routing import LayerContext, Routing


class LocalDispatcher:
    """Leaves the tokens where they are: the experts gather their rows and add up their results themselves."""

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], Ticket]:
        """The tokens (T, D) as they are, and their routing."""
        host_counts = None
        if routing.uniform_count is not None:
            host_counts = [routing.uniform_count] * routing.count_E.numel()
        return [x_TD], Ticket(parts=[LocalPart(arrived=routing, host_counts=host_counts)], sums_here=True)

    def combine(self, rows: Sequence[Tensor], routing: Routing, ticket: Ticket, added: Sequence[Tensor] = ()) -> Tensor:
        """What the experts made of the tokens (T, D) is the result."""
        return sum(added, rows[0])

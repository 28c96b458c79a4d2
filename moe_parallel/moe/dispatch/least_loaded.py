"""Dispatch that moves work from overloaded ranks to others, together with the experts' weights (LLEP).

The mathematics is that of plain expert parallelism: which rank computes a row is all that changes. Rows of one expert
may be computed on several ranks, each of which borrows the expert's weights for one pass and returns their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pydantic.dataclasses
import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.permute import combine_rows, gather_rows, invert_permutation
from moe_parallel.collectives import gather_over, lend_weights
from moe_parallel.moe.dispatch.all_to_all import ExchangePart
from moe_parallel.moe.dispatch.config import DispatchConfig, DispatchSetting
from moe_parallel.moe.dispatch.spill_plan import Integers, SpillPlan, plain_plan, plan_spill
from moe_parallel.moe.experts import Ticket
from moe_parallel.moe.routing import LayerContext, Routing
from moe_parallel.row_exchange import RowExchange


@pydantic.dataclasses.dataclass(kw_only=True)
class LeastLoadedConfig(DispatchConfig):
    threshold: float = 1.3
    """Rows of the busiest rank over the mean of all, below which no expert is spilled."""
    capacity_factor: float = 1.0
    """Rows that a rank takes before its experts are spilled, over the mean of all ranks."""
    min_chunk_rows: int = 1024
    """Fewest rows of an expert that are worth moving its weights for."""

    def __post_init__(self) -> None:
        if not self.threshold >= 1:
            raise ValueError(
                f"dispatch.threshold={self.threshold} must be at least 1: the busiest rank never has fewer rows than "
                "the mean; 1 always plans, 1.3 is the default"
            )
        if not (self.capacity_factor >= 1 and math.isfinite(self.capacity_factor)):
            raise ValueError(
                f"dispatch.capacity_factor={self.capacity_factor} must be finite and at least 1, or the ranks "
                "together cannot take all rows; 1 is the most even load"
            )
        if self.min_chunk_rows < 1:
            raise ValueError(
                f"dispatch.min_chunk_rows={self.min_chunk_rows} must be at least 1; raise dispatch.threshold to spill "
                "less often"
            )

    def check(self, setting: DispatchSetting) -> None:
        """Raises ValueError where there is nobody to lend to."""
        if setting.ep == 1:
            raise ValueError(
                "dispatch=least_loaded moves work between ranks of parallel.ep=1; raise it, or choose all_to_all"
            )


@dataclass(frozen=True, kw_only=True)
class Route:
    """One rank's part of a plan: what it sends, receives, computes and lends."""

    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    order_N: Tensor | None
    """Permutation from slots by expert to slots by the rank that computes them; None if that is the same."""
    inverse_N: Tensor | None
    arrived: Routing
    """Of the rows that arrive among the experts computed here: own ones, then borrowed ones."""
    host_counts: list[int]
    """Rows of each expert that is computed here."""
    transfer: Callable[[Tensor], Tensor] | None
    """See `Ticket.transfer`; None on all ranks, or on none."""


@dataclass(frozen=True, kw_only=True)
class LeastLoadedTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    num_tokens: int
    route: Route
    back: RowExchange


class LeastLoadedDispatcher:
    """Sends each row to the rank that the plan names, which is the owner of its expert unless that has too much.

    Rank p of the group owns experts p * L to (p + 1) * L - 1. Combine weights stay with the source.
    """

    def __init__(self, group: dist.ProcessGroup, config: LeastLoadedConfig, fused: bool = False) -> None:
        self.group = group
        self.config = config
        self.fused = fused
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], LeastLoadedTicket]:
        """Start the rows of (T, D) on their way. They arrive by source rank and expert.

        An expert takes its rows in the order of source ranks, and of slots within a rank.
        """
        # Once: a recomputed pass must find the same plan, and neither exchange counts nor plan again.
        route: Route = context.once("spill", lambda: self._route(routing))
        packed = routing.reordered(route.order_N, route.inverse_N)
        there = RowExchange([route.sent], [route.received], self.group)
        tokens = there.start_all(gather_rows(x_TD, packed.token_N, packed.slot_TK, self.fused))
        back = there.way_back()
        part = ExchangePart(
            index=0, there=there, back=back, arrived=lambda: route.arrived, host_counts=route.host_counts
        )
        ticket = LeastLoadedTicket(
            parts=[part], transfer=route.transfer, num_tokens=x_TD.shape[0], route=route, back=back
        )
        return tokens, ticket

    def combine(
        self, rows: Sequence[Tensor], routing: Routing, ticket: LeastLoadedTicket, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Wait for what the experts return, then the weighted sum of each token's slots: (T, D)."""
        rows_ND = ticket.back.wait_all(rows)
        packed = routing.reordered(ticket.route.order_N, ticket.route.inverse_N)
        weight_N, num_tokens = packed.weights(), ticket.num_tokens
        return combine_rows(rows_ND, weight_N, packed.token_N, packed.slot_TK, num_tokens, added, self.fused)

    def plan(self, count_PE: Integers) -> SpillPlan:
        """The plan for the rows (P, E) that each rank has for each expert."""
        config = self.config
        return plan_spill(
            count_PE.sum(0),
            self.num_ranks,
            threshold=config.threshold,
            capacity_factor=config.capacity_factor,
            min_chunk_rows=config.min_chunk_rows,
        )

    def _route(self, routing: Routing) -> Route:
        num_experts, device = routing.count_E.numel(), routing.count_E.device
        if routing.uniform_count is not None:  # equal loads: nothing to exchange, nothing to spill
            count_PE = np.full((self.num_ranks, num_experts), routing.uniform_count, dtype=np.int64)
            plan = plain_plan(count_PE.sum(0), self.num_ranks)
        else:
            # The one wait for the device: planning and an all-to-all need the counts on the host.
            count_PE = gather_over(self.group)(routing.count_E).cpu().numpy()
            plan = self.plan(count_PE)
        rows_PC = plan.rows_of(count_PE)
        is_here_C, is_foreign_C = plan.rank_C == self.rank, plan.foreign_C
        arriving_PL = rows_PC[:, is_here_C]
        # Pieces arrive by expert; borrowed experts are computed after one's own, as `lend_weights` stacks them.
        computed_L = np.argsort(is_foreign_C[is_here_C], kind="stable")
        order_R = _order(np.tile(np.argsort(computed_L), self.num_ranks), arriving_PL.reshape(-1), device)
        order_N = _order(plan.rank_C, rows_PC[self.rank], device) if plan.moves_weights else None
        host_counts = arriving_PL.sum(0)[computed_L].tolist()
        return Route(
            sent=self._sum_by_rank(plan.rank_C, rows_PC[self.rank]),
            received=arriving_PL.sum(1).tolist(),
            order_N=order_N,
            inverse_N=None if order_N is None else invert_permutation(order_N),
            arrived=Routing.of_rows(order_R, torch.tensor(host_counts, dtype=torch.int64, device=device)),
            host_counts=host_counts,
            transfer=self._transfer(plan) if plan.moves_weights else None,
        )

    def _transfer(self, plan: SpillPlan) -> Callable[[Tensor], Tensor]:
        """This rank's part in lending weights: one exchange for each weight tensor, whole experts only."""
        lends_C = plan.foreign_C & (plan.owner_C == self.rank)
        borrows_C = plan.foreign_C & (plan.rank_C == self.rank)
        by_rank = np.argsort(plan.rank_C[lends_C], kind="stable")
        return partial(
            lend_weights,
            lent=(plan.expert_C[lends_C] - self.rank * plan.num_local)[by_rank].tolist(),
            sent=self._sum_by_rank(plan.rank_C, lends_C),
            received=self._sum_by_rank(plan.owner_C, borrows_C),
            group=self.group,
        )

    def _sum_by_rank(self, rank_C: Integers, value_C: np.ndarray) -> list[int]:
        return np.bincount(rank_C, weights=value_C, minlength=self.num_ranks).astype(np.int64).tolist()


def _order(key_C: Integers, count_C: Integers, device: torch.device) -> Tensor:
    """Stable permutation that sorts rows, which lie in chunks of `count_C`, by the key of their chunk."""
    key, count = (torch.tensor(values.tolist(), dtype=torch.int64, device=device) for values in (key_C, count_C))
    return key.repeat_interleave(count, output_size=int(count_C.sum())).argsort(stable=True)

"""Dispatch in two hops: over the network to a node once for each token, then to its experts within the node.

The transport of SMILE (arXiv 2212.05191), for any router. Rank p of `ep` is rank p % m of node p // m. The first hop
keeps to rails: a rank talks only to ranks of its own place in the other nodes. Tokens with several experts in a node
cross the network once, and so do their results, which are summed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_kernels.permute import chunk_order, combine_rows, gather_rows, invert_permutation
from moe_parallel import launch
from moe_parallel.collectives import all_to_all_rows, exchange_counts
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher, ExchangeTicket
from moe_parallel.moe.dispatch.config import DispatchConfig, DispatchSetting
from moe_parallel.moe.experts import Part, Ticket
from moe_parallel.moe.routing import LayerContext, Routing
from moe_parallel.row_exchange import RowExchange


@dataclass(kw_only=True)
class TwoHopConfig(DispatchConfig):
    ranks_per_node: int | None = None
    """Ranks of one node; null takes what torchrun or srun says."""

    def __post_init__(self) -> None:
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ValueError(f"dispatch.ranks_per_node={self.ranks_per_node} must be at least 1")

    def check(self, setting: DispatchSetting) -> None:
        """Raises ValueError unless the ranks of `ep` are two or more whole nodes."""
        node_size(self, setting.ep)


def node_size(config: TwoHopConfig, ep: int) -> int:
    """Ranks of a node that the options or the launcher give, checked against `ep`. Needs no process group."""
    ranks_per_node, given = config.ranks_per_node, f"dispatch.ranks_per_node={config.ranks_per_node}"
    if ranks_per_node is None:
        ranks_per_node, given = launch.ranks_per_node(), "dispatch.ranks_per_node=null"
        if ranks_per_node is None:
            raise ValueError(f"{given} takes the ranks of each host, which this launcher does not say; give a number")
        given = f"{given} takes the {ranks_per_node} ranks that the launcher starts on each host, which"
    check_nodes(ep, ranks_per_node, given)
    return ranks_per_node


def check_nodes(ep: int, ranks_per_node: int, given: str | None = None) -> None:
    """Raises ValueError unless the ranks of `ep` are two or more whole nodes.

    Args:
        given: how the message names the number of ranks, where it is not simply the option.
    """
    if ranks_per_node >= 1 and ep % ranks_per_node == 0 and ep > ranks_per_node:
        return
    legal = [d for d in range(1, ep // 2 + 1) if ep % d == 0]
    remedy = f"legal values: {legal}" if legal else "choose dispatch=all_to_all, or raise parallel.ep"
    raise ValueError(
        f"{given or f'dispatch.ranks_per_node={ranks_per_node}'} does not divide parallel.ep={ep} into two or more "
        f"nodes; {remedy}"
    )


@plain_dataclass(frozen=True)
class _Plan:
    """What crosses the network: rows, one for each pair of token and node, and the slots that share them.

    Letters besides the usual: U rows to send, A rows that arrived, M slots that arrived, X experts of a node.
    """

    token_U: Tensor
    """int64: token of each row; rows are sorted by node, then by token."""
    row_TJ: Tensor | None
    """int64: places of each token's rows, when every token goes to exactly J nodes, else None."""
    index_N: Tensor
    """int64: each slot's row, counted from the first row for the same node."""
    sent_rows: Sequence[int]
    sent_slots: Sequence[int]
    """Rows and slots to each node."""
    received_rows: Sequence[int]
    received_slots: Sequence[int]
    """Rows and slots from each node."""
    arriving_GX: Tensor
    """int64: slots from each node for each expert of this one."""
    first_row_G: Tensor
    """int64: where the rows of each node start among those that arrived."""
    slots_per_row: int
    """Slots of every row that arrived, 0 if they differ."""
    order_M: Tensor
    """Permutation of the slots from arrival order to expert order."""


@plain_dataclass(frozen=True, kw_only=True)
class _NodePart(Part):
    """Rows that cross the network, and are dealt out in their node when they are asked for."""

    dispatcher: AllToAllDispatcher
    """Within the node."""
    there: RowExchange
    back: RowExchange
    at_node: Routing
    """Of the rows that crossed the network, among the experts of this node."""
    inner: ExchangeTicket

    @property
    def host_counts(self) -> Sequence[int] | None:  # type: ignore[override]
        return self.inner.parts[0].host_counts

    def receive(self, token: Tensor) -> tuple[Tensor, Routing]:
        rows_AD = self.there.wait(token, 0)
        (inner_token,) = self.dispatcher.start(rows_AD, self.at_node, self.inner)
        return self.inner.parts[0].receive(inner_token)

    def send(self, rows_RD: Tensor) -> Tensor:
        sum_AD = self.dispatcher.combine([self.inner.parts[0].send(rows_RD)], self.at_node, self.inner)
        return self.back.start(sum_AD, 0)


@plain_dataclass(frozen=True, kw_only=True)
class TwoHopTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    num_tokens: int
    plan: _Plan
    back: RowExchange


class TwoHopDispatcher:
    """Sends a token once to each node of its experts; there its row is dealt out, and the results summed.

    The sum needs the combine weights at the node: they travel with the slots, and their gradient comes back. Sums are
    made in a wider type but cross the network in that of the rows.

    Where the host knows that all experts get equally many slots (`Routing.uniform_count`: benchmarks, plans), every
    slot has a row of its own. Which tokens share a row depends on their values, and so does the number of rows.
    """

    def __init__(self, across: dist.ProcessGroup, within: dist.ProcessGroup, fused: bool = False) -> None:
        """The groups of this rank: `across` nodes, ranks of the same place in each; `within` its own node."""
        self.across = across
        self.num_nodes = dist.get_world_size(across)
        self.inner = AllToAllDispatcher(within, fused=fused)

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], TwoHopTicket]:
        """Start the rows of (T, D) on their way over the network.

        An expert takes its rows in the order of the source's place in its node, then of nodes, then of slots.
        """
        plan: _Plan = context.once("node_plan", lambda: self._plan(routing, x_TD.shape[0]))
        rows_UD = gather_rows(x_TD, plan.token_U, plan.row_TJ, self.inner.fused)
        at_node = self._send_slots(routing, plan)  # before the rows: it is small, and waited for at once
        there = RowExchange([plan.sent_rows], [plan.received_rows], self.across)
        tokens = there.start_all(rows_UD)
        inner = self.inner.prepare(at_node, sum(plan.received_rows), context)
        back = there.way_back()
        part = _NodePart(dispatcher=self.inner, there=there, back=back, at_node=at_node, inner=inner)
        return tokens, TwoHopTicket(parts=[part], num_tokens=x_TD.shape[0], plan=plan, back=back)

    def combine(
        self, rows: Sequence[Tensor], routing: Routing, ticket: TwoHopTicket, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Wait for the weighted sums of each node, then the sum over nodes: (T, D)."""
        plan, sum_UD = ticket.plan, ticket.back.wait_all(rows)
        one_U = torch.ones_like(plan.token_U, dtype=routing.weights().dtype)
        return combine_rows(sum_UD, one_U, plan.token_U, plan.row_TJ, ticket.num_tokens, added, self.inner.fused)

    def _send_slots(self, routing: Routing, plan: _Plan) -> Routing:
        """The slots for experts of this node, of the same rail in all nodes, as a routing of the arrived rows."""
        # One message instead of two: a number below 2^24 is exact in float32.
        weight_N = routing.weights()
        slot_N2 = torch.stack([plan.index_N.to(weight_N.dtype), weight_N], dim=1)
        slot_M2 = all_to_all_rows(slot_N2, plan.received_slots, plan.sent_slots, self.across)
        slot_M2 = gather_rows(slot_M2, plan.order_M, invert_permutation(plan.order_M).unsqueeze(1))
        total, uniform = sum(plan.received_slots), routing.uniform_count
        first_M = plan.first_row_G.repeat_interleave(plan.arriving_GX.sum(1), output_size=total)[plan.order_M]
        row_M = slot_M2[:, 0].detach().long() + first_M
        even = plan.slots_per_row > 0
        return Routing(
            token_N=row_M,
            weight_N=slot_M2[:, 1],
            count_E=plan.arriving_GX.sum(0),
            slot_TK=row_M.argsort(stable=True).view(-1, plan.slots_per_row) if even else None,
            uniform_count=None if uniform is None else uniform * self.num_nodes,
        )

    def _plan(self, routing: Routing, num_tokens: int) -> _Plan:
        """Which rows go where, and the sizes of what arrives, on the host."""
        num_slots, count_GX = routing.token_N.numel(), routing.count_E.view(self.num_nodes, -1)
        if max(num_tokens, num_slots) > _exact_below(routing.weights().dtype):
            raise ValueError(
                f"dispatch=two_hop numbers rows in {routing.weights().dtype}, which cannot tell {num_slots} slots of a "
                "rank's micro-batch apart; lower train.micro_batch_sequences"
            )
        slots_G = count_GX.sum(1)
        if routing.uniform_count is not None:
            return self._uniform_plan(routing, count_GX)
        node_N = torch.arange(self.num_nodes, device=slots_G.device).repeat_interleave(slots_G, output_size=num_slots)
        # Sorted by node, then by token.
        pair_N = node_N * num_tokens + routing.token_N
        pair_U, row_N, slots_U = torch.unique(pair_N, return_inverse=True, return_counts=True)
        token_U = pair_U % max(num_tokens, 1)
        rows_G = _histogram(pair_U // max(num_tokens, 1), self.num_nodes)
        first_G = rows_G.cumsum(0) - rows_G
        told_GX = torch.cat([rows_G[:, None], _equal(slots_U).expand(self.num_nodes, 1), count_GX], dim=1)
        arriving_GX = exchange_counts(told_GX, self.across)
        nodes_of_token = _equal(_histogram(token_U, num_tokens))
        sent, received, nodes = torch.stack([told_GX, arriving_GX, nodes_of_token.expand_as(told_GX)]).tolist()
        every = {from_node[1] for from_node in received if from_node[0] > 0}
        per_token, received_slots = nodes[0][0], [sum(from_node[2:]) for from_node in received]
        return _Plan(
            token_U=token_U,
            row_TJ=token_U.argsort(stable=True).view(-1, per_token) if per_token > 0 else None,
            index_N=row_N - first_G[node_N],
            sent_rows=[to_node[0] for to_node in sent],
            sent_slots=[sum(to_node[2:]) for to_node in sent],
            received_rows=[from_node[0] for from_node in received],
            received_slots=received_slots,
            arriving_GX=arriving_GX[:, 2:],
            first_row_G=arriving_GX[:, 0].cumsum(0) - arriving_GX[:, 0],
            slots_per_row=every.pop() if len(every) == 1 else 0,
            order_M=chunk_order(arriving_GX[:, 2:], sum(received_slots)),
        )

    def _uniform_plan(self, routing: Routing, count_GX: Tensor) -> _Plan:
        """A row for each slot, sizes from the host: exchanges nothing and waits for nothing."""
        assert routing.uniform_count is not None
        num_nodes, num_local = count_GX.shape
        each = routing.uniform_count * num_local
        place_N = torch.arange(routing.token_N.numel(), device=routing.token_N.device)
        return _Plan(
            token_U=routing.token_N,
            row_TJ=routing.slot_TK,
            index_N=place_N % each,
            sent_rows=[each] * num_nodes,
            sent_slots=[each] * num_nodes,
            received_rows=[each] * num_nodes,
            received_slots=[each] * num_nodes,
            arriving_GX=count_GX,
            first_row_G=torch.arange(num_nodes, device=place_N.device) * each,
            slots_per_row=1,
            order_M=chunk_order(count_GX, each * num_nodes),
        )


def _histogram(index_X: Tensor, size: int) -> Tensor:
    """int64 (size): how often each index occurs."""
    return index_X.new_zeros(size).scatter_add_(0, index_X, torch.ones_like(index_X))


def _equal(count_X: Tensor) -> Tensor:
    """int64 scalar: the value of all elements if they agree, else 0, as for none at all."""
    if count_X.numel() == 0:
        return count_X.new_zeros(())
    least, most = count_X.aminmax()
    return torch.where(least == most, least, 0)


def _exact_below(dtype: torch.dtype) -> int:
    """Whole numbers up to this one are exact in a floating-point type."""
    return int(2 / torch.finfo(dtype).eps)

"""Dispatch by DeepEP's kernels (github.com/deepseek-ai/DeepEP), where that library is installed.

A token is sent once to each rank that has some of its experts, together with its table of experts and weights, and each
rank returns one row for it, already summed. Within a node rows go over NVLink, between nodes over RDMA to one GPU of
the node and on from there.

The interface is that of `deep_ep.Buffer`: all of version 1, and kept by version 2 beside its `ElasticBuffer`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pydantic.dataclasses
import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.counting_sort import sort_slots
from moe_parallel.moe.dispatch.config import DispatchConfig, DispatchSetting
from moe_parallel.moe.experts import Part, Ticket
from moe_parallel.moe.routing import LayerContext, Routing

MOST_EXPERTS = 32
"""Columns of a token's table: one for each lane of a warp."""
COLUMNS = 256
"""Of bf16, that a warp moves at once between nodes."""


@pydantic.dataclasses.dataclass(kw_only=True)
class DeepEPConfig(DispatchConfig):
    num_sms: int = 20
    """Multiprocessors of the GPU that move rows; the rest computes meanwhile."""

    def __post_init__(self) -> None:
        if self.num_sms < 2 or self.num_sms % 2 != 0:
            raise ValueError(f"dispatch.num_sms={self.num_sms} must be even and at least 2; DeepEP's default is 20")

    def check(self, setting: DispatchSetting) -> None:
        """Raises ValueError where the library cannot be used. Does not load it; a plan needs none."""
        instead, device_type = "choose dispatch=all_to_all", setting.device_type
        if setting.ep == 1:
            raise ValueError(f"dispatch=deepep moves rows between ranks of parallel.ep=1; raise it, or {instead}")
        if device_type is not None and device_type != "cuda":
            raise ValueError(
                f"dispatch=deepep runs on CUDA devices only, and this run computes on {device_type}; {instead}"
            )
        if device_type is not None and importlib.util.find_spec("deep_ep") is None:
            raise ValueError(
                f"dispatch=deepep needs the library deep_ep, which is not installed; install it from "
                f"github.com/deepseek-ai/DeepEP, or {instead}"
            )
        if setting.dtype is not None and setting.dtype != torch.bfloat16:
            raise ValueError(f"dispatch=deepep adds up rows in bfloat16 only; set train.dtype=bfloat16, or {instead}")
        if setting.dim % COLUMNS != 0:
            raise ValueError(
                f"dispatch=deepep moves rows of a multiple of {COLUMNS}, not model.dim={setting.dim}; {instead}"
            )
        if setting.top_k > MOST_EXPERTS:
            raise ValueError(
                f"dispatch=deepep sends a token to at most {MOST_EXPERTS} experts, not router.top_k={setting.top_k}"
            )


@dataclass(frozen=True)
class _Layout:
    """How the tokens of a pass travel, and what came with them.

    Kept for a recomputed pass, whose rows must lie as those of the first: the gradient goes back by the first's handle.
    """

    handle: Any
    expert_RK: Tensor
    """int64: experts of each arrived row, counted from this rank's first; -1 for those of other ranks."""
    weight_RK: Tensor
    """float32: their combine weights; 0 for those of other ranks."""
    host_counts: list[int]
    """Slots of each expert here."""


class _Travel:
    """One dispatch and its combine. Holds what is under way, and its event, until it is waited for.

    A combine adds rows up, without weights, along the way that the dispatch came: each is the other's gradient.
    """

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.layout: _Layout | None = None
        self._under_way: tuple[Any, tuple[Tensor | None, ...], tuple[Tensor | None, ...]] | None = None

    def dispatch_first(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> None:
        """Find out how many tokens go where and send them. The host waits until it knows how many arrive."""
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(expert_TK, num_experts)
        rows, expert_RK, weight_RK, counts, handle, event = self.buffer.dispatch(
            x_TD,
            topk_idx=expert_TK,
            topk_weights=weight_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        self.layout = _Layout(handle, expert_RK, weight_RK, counts)
        self._under_way = (event, (rows, weight_RK), (x_TD, expert_TK, weight_TK))

    def dispatch_again(self, rows_TD: Tensor) -> None:
        """Send rows of tokens the way that is known."""
        assert self.layout is not None
        rows_TD = rows_TD.contiguous()
        rows, _, _, _, _, event = self.buffer.dispatch(rows_TD, handle=self.layout.handle, async_finish=True)
        self._under_way = (event, (rows, self.layout.weight_RK), (rows_TD,))

    def combine(self, rows_RD: Tensor, weight_RK: Tensor | None = None) -> None:
        """Send rows back and add up those of a token; the same for numbers that lie like the combine weights."""
        assert self.layout is not None
        rows_RD, weight_RK = rows_RD.contiguous(), None if weight_RK is None else weight_RK.contiguous()
        out, weight_TK, event = self.buffer.combine(
            rows_RD, self.layout.handle, topk_weights=weight_RK, async_finish=True
        )
        self._under_way = (event, (out, weight_TK), (rows_RD, weight_RK))

    def wait(self) -> tuple[Tensor, Any]:
        """What arrived: rows, and weights where they travelled too."""
        assert self._under_way is not None
        (event, (rows, weights), _), self._under_way = self._under_way, None
        event.current_stream_wait()
        assert rows is not None
        return rows, weights


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_TK, expert_TK, num_experts, travel):
        ctx.travel = travel
        if travel.layout is None:
            travel.dispatch_first(x_TD.contiguous(), expert_TK, weight_TK.contiguous(), num_experts)
        else:
            travel.dispatch_again(x_TD)
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx, token):
        grad_TD, grad_weight_TK = ctx.travel.wait()
        return grad_TD, grad_weight_TK, None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, travel):
        ctx.travel = travel
        rows_RD, weight_RK = travel.wait()
        return rows_RD, weight_RK.clone()  # of the layout, which a recomputed pass returns as well

    @staticmethod
    def backward(ctx, grad_RD, grad_weight_RK):
        ctx.travel.combine(grad_RD, grad_weight_RK)
        return grad_RD.new_empty(0), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, travel):
        ctx.travel = travel
        travel.combine(rows_RD)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx, token):
        return ctx.travel.wait()[0], None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, travel):
        ctx.travel = travel
        return travel.wait()[0]

    @staticmethod
    def backward(ctx, grad_TD):
        ctx.travel.dispatch_again(grad_TD)
        return grad_TD.new_empty(0), None


@dataclass(frozen=True, kw_only=True)
class _DeepEPPart(Part):
    """The tokens that have some of their experts here."""

    travel: _Travel

    @property
    def host_counts(self) -> Sequence[int] | None:  # type: ignore[override]
        assert self.travel.layout is not None
        return self.travel.layout.host_counts

    def receive(self, token: Tensor) -> tuple[Tensor, Routing]:
        layout = self.travel.layout
        assert layout is not None
        rows_RD, weight_RK = _Arrive.apply(token, self.travel)
        num_local, top_k = len(layout.host_counts), weight_RK.shape[1]
        expert_RK = torch.where(layout.expert_RK < 0, num_local, layout.expert_RK)
        order_N, count_L, _ = sort_slots(expert_RK, num_local)
        order_N = order_N[: sum(layout.host_counts)]
        return rows_RD, Routing(order_N // top_k, weight_RK.flatten()[order_N], count_L)

    def send(self, rows_RD: Tensor) -> Tensor:
        return _Leave.apply(rows_RD, self.travel)


@dataclass(frozen=True, kw_only=True)
class DeepEPTicket(Ticket):
    """What `combine` needs to know of the matching `dispatch`."""

    travel: _Travel


class DeepEPDispatcher:
    """Sends a token once to each rank of its experts; there its results are weighed and summed, and the sum returns.

    Rank p of the group owns experts p * L to (p + 1) * L - 1. Sums over a token's ranks are made by the library, from
    rows that were rounded to bf16. Combine weights travel as float32, and their gradient comes back.
    """

    def __init__(self, group: dist.ProcessGroup, config: DeepEPConfig) -> None:
        self.group = group
        library = importlib.import_module("deep_ep")
        self.buffer_type = library.Buffer
        self.index_type = getattr(library, "topk_idx_t", torch.int64)  # a choice at build time of later versions
        self.buffer_type.set_num_sms(config.num_sms)
        ranks = dist.get_world_size(group)
        try:
            self.tuned = self.buffer_type.get_dispatch_config(ranks), self.buffer_type.get_combine_config(ranks)
        except AssertionError as error:
            raise ValueError(f"dispatch=deepep has no settings for parallel.ep={ranks}: {error}") from error
        self._buffer: Any = None

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], DeepEPTicket]:
        """Start the tokens (T, D) on their way to the ranks of their experts."""
        travel = _Travel(self._buffer_for(x_TD))
        # A recomputed pass finds the first one's; the first run finds its own only after the exchange has begun.
        kept: list[_Layout] = context.once("deepep", list)
        travel.layout = kept[0] if kept else None
        expert_TK, weight_TK = self._table(routing, x_TD.shape[0])
        token = _Depart.apply(x_TD, weight_TK, expert_TK.to(self.index_type), routing.count_E.numel(), travel)
        if not kept:
            assert travel.layout is not None
            kept.append(travel.layout)
        return [token], DeepEPTicket(parts=[_DeepEPPart(travel=travel)], travel=travel)

    def combine(
        self, rows: Sequence[Tensor], routing: Routing, ticket: DeepEPTicket, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Wait for the sums of each rank, which the library adds up: (T, D)."""
        return sum(added, _Return.apply(rows[0], ticket.travel))

    def _buffer_for(self, x_TD: Tensor) -> Any:
        """Memory that all ranks write into; one for all layers, made when the width of rows is known."""
        if self._buffer is None:
            row_bytes, ranks = x_TD.shape[1] * max(x_TD.element_size(), 2), dist.get_world_size(self.group)
            nvl = max(tuned.get_nvl_buffer_size_hint(row_bytes, ranks) for tuned in self.tuned)
            rdma = max(tuned.get_rdma_buffer_size_hint(row_bytes, ranks) for tuned in self.tuned)
            self._buffer = self.buffer_type(self.group, nvl, rdma)
        return self._buffer

    def _table(self, routing: Routing, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Experts and float32 weights of each token, (T, K), with -1 and 0 where it has fewer than K.

        All ranks have the same K: their tables lie in each other's buffers.
        """
        num_slots, weight_N = routing.token_N.numel(), routing.weights().float()
        expert_E = torch.arange(routing.count_E.numel(), device=weight_N.device)
        expert_N = expert_E.repeat_interleave(routing.count_E, output_size=num_slots)
        if routing.slot_TK is not None:
            return expert_N[routing.slot_TK], weight_N[routing.slot_TK]
        order_N = routing.token_N.argsort(stable=True)
        token_N = routing.token_N[order_N]
        count_T = routing.token_N.new_zeros(num_tokens).scatter_add_(0, token_N, torch.ones_like(token_N))
        columns = routing.most_of_token
        if columns is None:
            most = count_T.max() if num_tokens else count_T.new_zeros(())
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            columns = max(int(most), 1)
        if columns > MOST_EXPERTS:
            raise ValueError(
                f"dispatch=deepep sends a token to at most {MOST_EXPERTS} experts, and this router chose {columns} for "
                "one; choose dispatch=all_to_all"
            )
        place_N = torch.arange(num_slots, device=token_N.device) - (count_T.cumsum(0) - count_T)[token_N]
        expert_TK = token_N.new_full((num_tokens, columns), -1).index_put((token_N, place_N), expert_N[order_N])
        weight_TK = weight_N.new_zeros(num_tokens, columns).index_put((token_N, place_N), weight_N[order_N])
        return expert_TK, weight_TK

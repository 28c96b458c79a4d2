"""Stands in for the library `deep_ep`, whose kernels need GPUs: the same calls, but rows move over gloo.

Written from the signatures, layouts and assertions of `deep_ep/buffers/legacy.py` and `csrc/legacy/buffer.hpp` (version
2.1.0, which keeps the interface of version 1). It shows that we call it as it wants to be called, wait for what it
returns, and send gradients by the right handles. It shows nothing of the library itself.

Results are NaN until their event is waited for. Rows may be float64, which the library refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


class Config(NamedTuple):
    num_sms: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class EventOverlap:
    def __init__(self, arrive: Callable[[], None] | None) -> None:
        self.arrive = arrive

    def current_stream_wait(self) -> None:
        assert self.arrive is not None, "waited twice, or for what was not asynchronous"
        self.arrive()
        self.arrive = None


class Handle(NamedTuple):
    is_token_in_rank: Tensor
    received: list[int]
    """Rows from each rank."""


def _late(values: list[Tensor]) -> tuple[list[Tensor], EventOverlap]:
    """Tensors that hold their values once the event was waited for."""
    outs = [torch.full_like(v, float("nan") if v.is_floating_point() else -99) for v in values]
    return outs, EventOverlap(lambda: [out.copy_(value) for out, value in zip(outs, values)] and None)


class Buffer:
    num_sms: int = 20
    made = 0

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        Buffer.made += 1

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int):
        assert topk_idx.ndim == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == topk_idx_t
        per_rank = num_experts // self.ranks
        used = topk_idx[topk_idx >= 0]
        in_rank = torch.zeros(len(topk_idx), self.ranks + 1, dtype=torch.bool)
        in_rank.scatter_(1, torch.where(topk_idx < 0, self.ranks, topk_idx // per_rank), True)
        in_rank = in_rank[:, :-1].contiguous()
        return in_rank.sum(0).int(), None, torch.bincount(used, minlength=num_experts).int(), in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ):
        assert x.ndim == 2
        assert x.is_contiguous()
        assert async_finish
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert len(x) == len(handle.is_token_in_rank)
            (out,), event = _late([self._send(x, handle)])
            return out, None, None, None, None, event
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert num_tokens_per_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_idx.shape == topk_weights.shape == (len(x), topk_idx.shape[1])
        columns: list[None] = [None] * self.ranks
        dist.all_gather_object(columns, topk_idx.shape[1], self.group)
        assert len(set(columns)) == 1, "tables of different widths share a buffer"
        received = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(received, num_tokens_per_rank, group=self.group)
        handle = Handle(is_token_in_rank, received.tolist())
        per_rank = len(num_tokens_per_expert) // self.ranks
        rows, index, weights = (self._send(t, handle) for t in (x, topk_idx, topk_weights))
        here = (index >= 0) & (index // per_rank == self.rank)
        index = torch.where(here, index - self.rank * per_rank, -1)
        counts = torch.bincount(index[here], minlength=per_rank).tolist()
        (rows, index, weights), event = _late([rows, index, torch.where(here, weights, 0.0)])
        return rows, index, weights, counts, handle, event

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, async_finish: bool = False):
        assert x.is_contiguous()
        assert len(x) == sum(handle.received)
        assert async_finish
        assert topk_weights is None or (topk_weights.dtype == torch.float32 and topk_weights.is_contiguous())
        sums = [self._return(t, handle) for t in (x, topk_weights) if t is not None]
        outs, event = _late(sums)
        return outs[0], outs[1] if topk_weights is not None else None, event

    def _send(self, x: Tensor, handle: Handle) -> Tensor:
        """A token once to each of its ranks, in the order of tokens; rows arrive by source rank."""
        rows = torch.cat([x[in_rank] for in_rank in handle.is_token_in_rank.T])
        out = x.new_empty(sum(handle.received), x.shape[1])
        sent = handle.is_token_in_rank.sum(0).tolist()
        dist.all_to_all_single(out, rows, handle.received, sent, group=self.group)
        return out

    def _return(self, rows: Tensor, handle: Handle) -> Tensor:
        sent = handle.is_token_in_rank.sum(0).tolist()
        back = rows.new_empty(sum(sent), rows.shape[1])
        dist.all_to_all_single(back, rows, sent, handle.received, group=self.group)
        out = rows.new_zeros(len(handle.is_token_in_rank), rows.shape[1])
        for piece, in_rank in zip(back.split(sent), handle.is_token_in_rank.T):
            out[in_rank] += piece
        return out

"""Causal attention that never crosses a document: the core, and grouped-query attention.

In names of this folder, d stands for the width of one head.
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from itertools import accumulate

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.rope import RopeConfig, Rotary, rotate_halves


class AttentionCore(str, Enum):
    auto = "auto"
    """per_document on a CPU, masked on an accelerator."""
    per_document = "per_document"
    """One causal kernel a document: no work across documents, one launch each."""
    masked = "masked"
    """One kernel with a document mask: one launch, work across documents is done and thrown away."""


def attend(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, batch: TokenBatch, scale: float, core: AttentionCore
) -> Tensor:
    """Causal softmax attention within each document.

    Args:
        q_BHSd, k_BHSd, v_BHSd: keys and values may have fewer heads, and values another width.
        batch: its documents. Padding attends to padding only, so that its rows are finite.
        scale: factor on the products of queries and keys.
    Returns:
        (B, H, S, width of the values).
    """
    value_dim = v_BHSd.shape[-1]
    if value_dim != q_BHSd.shape[-1] and q_BHSd.device.type == "cpu":
        # The fast kernel of CPUs takes one width only; zeros change neither products nor the columns that are kept.
        width = max(q_BHSd.shape[-1], value_dim)
        q_BHSd, k_BHSd, v_BHSd = (F.pad(x, (0, width - x.shape[-1])) for x in (q_BHSd, k_BHSd, v_BHSd))
    return _attend(q_BHSd, k_BHSd, v_BHSd, batch, scale, core)[..., :value_dim]


def _attend(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, batch: TokenBatch, scale: float, core: AttentionCore
) -> Tensor:
    if all(len(spans) == 1 for spans in batch.document_lengths):
        return _causal(q_BHSd, k_BHSd, v_BHSd, scale)
    if core is AttentionCore.auto:
        core = AttentionCore.per_document if q_BHSd.device.type == "cpu" else AttentionCore.masked
    if core is AttentionCore.per_document:
        return _attend_per_document(q_BHSd, k_BHSd, v_BHSd, batch.document_lengths, scale)
    return _attend_masked(q_BHSd, k_BHSd, v_BHSd, batch.document_lengths, scale)


def _causal(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, scale: float) -> Tensor:
    grouped = q_BHSd.shape[1] != k_BHSd.shape[1]
    return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True, scale=scale, enable_gqa=grouped)


def _attend_per_document(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, lengths: tuple[tuple[int, ...], ...], scale: float
) -> Tensor:
    inputs = (q_BHSd, k_BHSd, v_BHSd)
    rows: dict[int, Tensor] = {}
    # Most rows of long documents are one span: they share one call.
    whole = [row for row, spans in enumerate(lengths) if len(spans) == 1]
    if whole:
        index = torch.tensor(whole, device=q_BHSd.device)
        q, k, v = (x.index_select(0, index) for x in inputs)
        rows.update(zip(whole, _causal(q, k, v, scale).split(1)))
    for row, spans in enumerate(lengths):
        if row not in rows:
            pieces = zip(*(x[row : row + 1].split(spans, dim=2) for x in inputs))
            rows[row] = torch.cat([_causal(q, k, v, scale) for q, k, v in pieces], dim=2)
    return torch.cat([rows[row] for row in range(len(lengths))])


def _attend_masked(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, lengths: tuple[tuple[int, ...], ...], scale: float
) -> Tensor:
    # The kernels that take a mask know no grouped heads: without the copies the slow reference would run.
    groups = q_BHSd.shape[1] // k_BHSd.shape[1]
    if groups > 1:
        k_BHSd = k_BHSd.repeat_interleave(groups, dim=1)
        v_BHSd = v_BHSd.repeat_interleave(groups, dim=1)
    span_BS = _span_index(lengths, q_BHSd.shape[2], q_BHSd.device)
    same_BSS = span_BS.unsqueeze(2) == span_BS.unsqueeze(1)
    return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, attn_mask=same_BSS.tril_().unsqueeze(1), scale=scale)


def _span_index(lengths: tuple[tuple[int, ...], ...], num_tokens: int, device: torch.device) -> Tensor:
    """Index of each token's attention span within its sequence, int64 (B, S).

    Not document_BS: if boundaries are not kept, a span holds several documents. Only the ends of the spans are
    copied to the device.
    """
    most = max(len(spans) for spans in lengths)
    ends = [[*accumulate(spans), *[num_tokens] * (most - len(spans))] for spans in lengths]
    end_BM = torch.tensor(ends).to(device, non_blocking=True)
    offset_BS = torch.arange(num_tokens, device=device).expand(len(lengths), -1).contiguous()
    return torch.searchsorted(end_BM, offset_BS, right=True)


class QKNorm(str, Enum):
    none = "none"
    head = "head"
    """RMSNorm over each head of queries and keys, one weight for all heads (Qwen3)."""
    full = "full"
    """RMSNorm over the whole projection of queries, and of keys (OLMoE)."""


@dataclass(kw_only=True)
class AttentionConfig:
    """What all kinds of attention have in common; a choice of the group is one of the kinds."""

    num_heads: int = 4
    """Query heads."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions."""
    core: AttentionCore = AttentionCore.auto
    """How documents are kept apart."""

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"attention.num_heads={self.num_heads} must be at least 1")


@dataclass(kw_only=True)
class GroupedQueryConfig(AttentionConfig):
    num_kv_heads: int | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; null means num_heads of them."""
    head_dim: int | None = None
    """Width of a head; null means model.dim / num_heads."""
    qk_norm: QKNorm = QKNorm.none
    """Normalize queries and keys before the rotation."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        if self.key_heads < 1 or self.num_heads % self.key_heads != 0:
            raise ValueError(
                f"attention.num_kv_heads={self.num_kv_heads} must be a divisor of attention.num_heads={self.num_heads}"
            )
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2 != 0):
            raise ValueError(f"attention.head_dim={self.head_dim} must be even and positive: it is rotated in pairs")

    @property
    def key_heads(self) -> int:
        """Heads of keys and of values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_width(self, dim: int) -> int:
        """Width of a head in a model of width `dim`; ValueError if there is no such even width."""
        if self.head_dim is not None:
            return self.head_dim
        if dim % (2 * self.num_heads) != 0:
            raise ValueError(
                f"model.dim={dim} must be a multiple of 2 * attention.num_heads={2 * self.num_heads}: heads have "
                "equal even widths; change one of them or set attention.head_dim"
            )
        return dim // self.num_heads


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; multi-head with as many key heads."""

    def __init__(self, dim: int, config: GroupedQueryConfig, norm_epsilon: float) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width(dim)
        query_dim, key_dim = config.num_heads * self.head_dim, config.key_heads * self.head_dim
        self.query = nn.Linear(dim, query_dim, bias=False)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.value = nn.Linear(dim, key_dim, bias=False)
        self.output = nn.Linear(query_dim, dim, bias=False)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm is not QKNorm.none:
            per_head = config.qk_norm is QKNorm.head
            self.query_norm = nn.RMSNorm(self.head_dim if per_head else query_dim, eps=norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_dim if per_head else key_dim, eps=norm_epsilon)
        self.rotary = Rotary(config.rope, self.head_dim)

    def forward(self, x_BSD: Tensor, batch: TokenBatch) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        rotation = self.rotary(batch.position_BS)
        q_BHSd = rotate_halves(self._heads(self.query(x_BSD), self.query_norm), rotation)
        k_BHSd = rotate_halves(self._heads(self.key(x_BSD), self.key_norm), rotation)
        v_BHSd = self._heads(self.value(x_BSD), None)
        out_BHSd = attend(q_BHSd, k_BHSd, v_BHSd, batch, self.head_dim**-0.5, self.config.core)
        return self.output(out_BHSd.transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        if norm is not None and self.config.qk_norm is QKNorm.full:
            x_BSD = norm(x_BSD)
        x_BSHd = x_BSD.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.qk_norm is QKNorm.head:
            x_BSHd = norm(x_BSHd)
        return x_BSHd.transpose(1, 2)

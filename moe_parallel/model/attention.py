"""Options of attention, what its layers have in common, and grouped-query attention."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from moe_data.batch import TokenBatch
from moe_parallel.model.core import AttentionCore, attend, document_mask
from moe_parallel.model.dense import Split, SplitLinear, add_split, normalize_split
from moe_parallel.model.rope import RopeConfig, Rotary, rotate_halves
from moe_parallel.sequence_exchange import SequenceExchange


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What the attention of all layers has in common in one forward pass: made once, and not by each layer."""

    rotation: tuple[Tensor, Tensor]
    """Cosines and sines of the positions that queries and keys are projected at, float32 (B, S, rotated width / 2)."""
    document_lengths: tuple[tuple[int, ...], ...]
    """Of whole sequences, which softmax attention always sees."""
    mask: Tensor | BlockMask | None
    """See `document_mask`."""


def plan_attention(
    batch: TokenBatch, rotary: Rotary, core: AttentionCore, exchange: SequenceExchange | None
) -> AttentionPlan:
    """Work out what depends on the batch and on no weight."""
    if exchange is None:
        return AttentionPlan(rotary(batch.position_BS), batch.document_lengths, document_mask(batch, core))
    whole = batch if batch.whole is None else batch.whole
    position_BS = whole.position_BS.chunk(exchange.cp_ranks, dim=1)[exchange.cp_rank]
    return AttentionPlan(rotary(position_BS), whole.document_lengths, document_mask(whole, core))


def attend_whole(
    qkv: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan, scale: float, exchange: SequenceExchange | None
) -> Tensor:
    """Softmax attention of projected queries, keys and values, each on whole sequences: (B, H, S, d)."""
    q_BHSd, k_BHSd, v_BHSd = qkv if exchange is None else exchange.to_heads(*qkv)
    out_BHSd = attend(q_BHSd, k_BHSd, v_BHSd, plan.document_lengths, plan.mask, scale)
    return out_BHSd if exchange is None else exchange.to_tokens(out_BHSd)


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
    qkv_bias: bool = False
    """Add a learned bias to queries, keys and values (Qwen2)."""

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
        self.query = SplitLinear(dim, query_dim, Split.outputs)
        self.key = SplitLinear(dim, key_dim, Split.outputs)
        self.value = SplitLinear(dim, key_dim, Split.outputs)
        self.output = SplitLinear(query_dim, dim, Split.inputs)
        self.exchange: SequenceExchange | None = None
        """Set by the engine where ranks share sequences."""
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm is not QKNorm.none:
            per_head = config.qk_norm is QKNorm.head
            self.query_norm = nn.RMSNorm(self.head_dim if per_head else query_dim, eps=norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_dim if per_head else key_dim, eps=norm_epsilon)
        # Not of the linear layers: tensor parallelism cuts their weights, while each rank has these whole, like norms'.
        self.query_bias: nn.Parameter | None = None
        self.key_bias: nn.Parameter | None = None
        self.value_bias: nn.Parameter | None = None
        if config.qkv_bias:
            self.query_bias = nn.Parameter(torch.empty(query_dim))
            self.key_bias, self.value_bias = nn.Parameter(torch.empty(key_dim)), nn.Parameter(torch.empty(key_dim))
        self.rotary = Rotary(config.rope, self.head_dim)

    def plan(self, batch: TokenBatch) -> AttentionPlan:
        """For this layer and all of the same options."""
        return plan_attention(batch, self.rotary, self.config.core, self.exchange)

    def forward(self, x_BSD: Tensor, plan: AttentionPlan) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        scale, exchange = self.head_dim**-0.5, self.exchange
        if exchange is not None:
            (x_BSD,) = exchange.gather(x_BSD)
        out_BHSd = attend_whole(self.project(x_BSD, plan.rotation), plan, scale, exchange)
        out_BSD = self.output(out_BHSd.transpose(1, 2).flatten(2))
        return out_BSD if exchange is None else exchange.scatter(out_BSD)

    def project(self, x_BSD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, d) each, rotated."""
        q_BHSd = rotate_halves(self._heads(self.query(x_BSD), self.query_bias, self.query_norm), rotation)
        k_BHSd = rotate_halves(self._heads(self.key(x_BSD), self.key_bias, self.key_norm), rotation)
        return q_BHSd, k_BHSd, self._heads(self.value(x_BSD), self.value_bias, None)

    def _heads(self, x_BSD: Tensor, bias: Tensor | None, norm: nn.RMSNorm | None) -> Tensor:
        if bias is not None:
            x_BSD = x_BSD + bias if self.exchange is None else add_split(x_BSD, bias, self.exchange)
        if norm is not None and self.config.qk_norm is QKNorm.full:
            x_BSD = norm(x_BSD) if self.exchange is None else normalize_split(x_BSD, norm, self.exchange)
        x_BSHd = x_BSD.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.qk_norm is QKNorm.head:
            x_BSHd = norm(x_BSHd)
        return x_BSHd.transpose(1, 2)

"""Multi-head latent attention: keys and values are expanded from one small vector a token."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.attention import AttentionConfig, AttentionPlan, attend_whole, plan_attention
from moe_parallel.model.dense import Split, SplitLinear
from moe_parallel.model.rope import Rotary, latent_softmax_factor, rotate_pairs
from moe_parallel.sequence_exchange import SequenceExchange


@dataclass(kw_only=True)
class LatentConfig(AttentionConfig):
    q_rank: int | None = None
    """Width of the latent that queries are expanded from; null projects queries directly (V2-Lite)."""
    kv_rank: int = 64
    """Width of the latent that keys and values are expanded from: what a cache would hold for each token."""
    nope_head_dim: int = 32
    """Width of the part of a query or key head without positions."""
    rope_head_dim: int = 16
    """Width of the rotated part; all heads share one rotated key."""
    value_head_dim: int = 32
    """Width of a value head."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        for name in ("kv_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name}={getattr(self, name)} must be at least 1")
        if self.q_rank is not None and self.q_rank < 1:
            raise ValueError(f"attention.q_rank={self.q_rank} must be at least 1; null projects directly")
        if self.rope_head_dim % 2 != 0:
            raise ValueError(f"attention.rope_head_dim={self.rope_head_dim} must be even: it is rotated in pairs")

    @property
    def query_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.nope_head_dim + self.rope_head_dim


class LatentAttention(nn.Module):
    """Multi-head latent attention. Source: DeepSeek-V2, arXiv 2405.04434 section 2.1.

    Trains in the expanded form: the absorbed form saves cache, not training work.
    """

    def __init__(self, dim: int, config: LatentConfig, norm_epsilon: float) -> None:
        super().__init__()
        self.config = config
        query_dim = config.num_heads * config.query_head_dim
        if config.q_rank is None:
            self.query = SplitLinear(dim, query_dim, Split.outputs)
        else:
            self.query_down = nn.Linear(dim, config.q_rank, bias=False)
            self.query_norm = nn.RMSNorm(config.q_rank, eps=norm_epsilon)
            self.query_up = SplitLinear(config.q_rank, query_dim, Split.outputs)
        self.latent_down = nn.Linear(dim, config.kv_rank + config.rope_head_dim, bias=False)
        self.latent_norm = nn.RMSNorm(config.kv_rank, eps=norm_epsilon)
        expanded_dim = config.num_heads * (config.nope_head_dim + config.value_head_dim)
        self.latent_up = SplitLinear(config.kv_rank, expanded_dim, Split.outputs)
        self.output = SplitLinear(config.num_heads * config.value_head_dim, dim, Split.inputs)
        self.exchange: SequenceExchange | None = None
        """Set by the engine where ranks share sequences."""
        self.rotary = Rotary(config.rope, config.rope_head_dim)
        self.scale = config.query_head_dim**-0.5 * latent_softmax_factor(config.rope)

    def plan(self, batch: TokenBatch) -> AttentionPlan:
        """For this layer and all of the same options."""
        return plan_attention(batch, self.rotary, self.config.core, self.exchange)

    def forward(self, x_BSD: Tensor, plan: AttentionPlan) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        exchange = self.exchange
        query, latent, shared_key = self.compress(x_BSD)
        if exchange is not None:  # what travels is as narrow as the latents
            query, latent, shared_key = exchange.gather(query, latent, shared_key)
        qkv = self.project(query, latent, shared_key, plan.rotation)
        out_BHSd = attend_whole(qkv, plan, self.scale, exchange)
        out_BSD = self.output(out_BHSd.transpose(1, 2).flatten(2))
        return out_BSD if exchange is None else exchange.scatter(out_BSD)

    def compress(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each token is projected from: the queries' source, the latent of keys and values, the shared key."""
        config = self.config
        query = x_BSD if config.q_rank is None else self.query_norm(self.query_down(x_BSD))
        latent, shared_key = self.latent_down(x_BSD).split([config.kv_rank, config.rope_head_dim], dim=-1)
        return query, self.latent_norm(latent), shared_key

    def project(
        self, query: Tensor, latent: Tensor, shared_key: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, d) each, their parts with positions rotated."""
        config = self.config
        q_BSD = self.query(query) if config.q_rank is None else self.query_up(query)
        q_BHSd = q_BSD.unflatten(-1, (-1, config.query_head_dim)).transpose(1, 2)
        plain, rotated = q_BHSd.split([config.nope_head_dim, config.rope_head_dim], dim=-1)
        q_BHSd = torch.cat([plain, rotate_pairs(rotated, rotation)], dim=-1)
        width = config.nope_head_dim + config.value_head_dim
        expanded = self.latent_up(latent).unflatten(-1, (-1, width)).transpose(1, 2)
        plain, v_BHSd = expanded.split([config.nope_head_dim, config.value_head_dim], dim=-1)
        rotated = rotate_pairs(shared_key.unsqueeze(1), rotation).expand(-1, plain.shape[1], -1, -1)
        return q_BHSd, torch.cat([plain, rotated], dim=-1), v_BHSd

"""What a model is: everything that decides shapes and arithmetic, and nothing about how it is trained."""

from __future__ import annotations

import dataclasses

from pydantic.dataclasses import dataclass

from moe_parallel.model.attention import AttentionConfig, GroupedQueryConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.router import RouterConfig


@dataclass(kw_only=True)
class ModelConfig:
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Layers of attention and feed-forward network."""
    first_dense_layers: int = 0
    """How many of the first layers have a dense feed-forward network; num_layers makes a dense model."""
    ffn_dim: int = 1024
    """Hidden width of the dense layers' SwiGLU network."""
    vocab_size: int | None = None
    """Rows of the embedding and of the head; null takes the tokenizer's number of ids."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the head's."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    max_sequence_tokens: int | None = None
    """Longest sequence that the model accepts; null has no limit."""

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("vocab_size", "max_sequence_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1, or null")
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.first_dense_layers={self.first_dense_layers} must lie in 0..model.num_layers={self.num_layers}"
            )
        if self.norm_epsilon <= 0:
            raise ValueError(f"model.norm_epsilon={self.norm_epsilon} must be positive")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The option groups that make up a model, and the vocabulary that they meet."""

    model: ModelConfig
    attention: AttentionConfig
    moe: MoEConfig
    router: RouterConfig
    balance: BalanceConfig
    vocab_size: int
    """Rows of the embedding: model.vocab_size, or the tokenizer's number of ids."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if isinstance(self.attention, GroupedQueryConfig):
            self.attention.head_width(self.model.dim)
        if self.num_moe_layers > 0:
            self.router.check_experts(self.moe.num_experts)
            self.router.check_balance(self.balance)
            self.balance.check_experts(self.moe.num_experts)
            self.moe.check_router(self.router)

    @property
    def num_moe_layers(self) -> int:
        return self.model.num_layers - self.model.first_dense_layers

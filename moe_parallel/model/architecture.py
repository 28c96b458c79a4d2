"""What a model is: everything that decides shapes and arithmetic, and nothing about how it is trained."""

from __future__ import annotations

import dataclasses

from pydantic.dataclasses import dataclass
from torch import Tensor

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
    mtp_layers: int = 0
    """Modules of multi-token prediction, each of which trains to see one token further (1 in DeepSeek-V3); 0 has none.
    Generation does not use them."""
    mtp_coefficient: float = 0.3
    """Factor on the mean of their losses (DeepSeek-V3: 0.3, later 0.1)."""

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
        if self.mtp_layers < 0:
            raise ValueError(f"model.mtp_layers={self.mtp_layers} must not be negative; 0 has none")
        if self.mtp_coefficient <= 0:
            raise ValueError(
                f"model.mtp_coefficient={self.mtp_coefficient} must be positive; to train without multi-token "
                "prediction set model.mtp_layers=0"
            )

    def token_loss(self, cross_entropy: Tensor) -> Tensor:
        """What the losses of a model's tokens are in training: that of the next token, and the mean of those of
        multi-token prediction times its coefficient.

        Args:
            cross_entropy: (1 + mtp_layers), sums over tokens; a scalar will do where there is no such prediction.
        """
        losses = cross_entropy.flatten()
        assert len(losses) == 1 + self.mtp_layers, "a loss is missing"
        return losses[0] + self.mtp_coefficient * losses[1:].mean() if self.mtp_layers else losses[0]


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
            self.moe.check_dim(self.model.dim)

    @property
    def num_blocks(self) -> int:
        """Layers of the decoder, then those of multi-token prediction, which go on with their numbers."""
        return self.model.num_layers + self.model.mtp_layers

    @property
    def last_embeds(self) -> bool:
        """What follows the layers needs the embedding's weight as well."""
        return self.model.tie_embeddings or self.model.mtp_layers > 0

    @property
    def moe_layers(self) -> range:
        """Numbers of the layers with experts. Multi-token prediction has layers like the decoder's last one."""
        first = self.model.first_dense_layers
        return range(first, self.num_blocks if first < self.model.num_layers else first)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

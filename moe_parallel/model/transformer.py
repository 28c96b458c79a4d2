"""The decoder-only language model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.block import Block
from moe_parallel.moe.routing import ForwardContext, LayerStats


class Transformer(nn.Module):
    """Embedding, pre-norm layers, final norm, head.

    Build it under `torch.device("meta")` and give it numbers with `init_weights`, whatever its size.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        model: ModelConfig = architecture.model
        self.architecture = architecture
        self.embedding = nn.Embedding(architecture.vocab_size, model.dim)
        self.layers = nn.ModuleList(Block(architecture, layer) for layer in range(model.num_layers))
        self.norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
        self.head = nn.Linear(model.dim, architecture.vocab_size, bias=False)
        self._tie()

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(self, batch: TokenBatch, context: ForwardContext) -> tuple[Tensor, list[LayerStats]]:
        """Logits (B, S, V), and the statistics of all passes of mixture-of-experts layers in order."""
        limit = self.architecture.model.max_sequence_tokens
        if limit is not None and batch.token_BS.shape[1] > limit:
            raise ValueError(
                f"a sequence of {batch.token_BS.shape[1]} tokens is longer than model.max_sequence_tokens={limit}; "
                "shorten it, or raise the limit if the rotary positions reach that far"
            )
        x_BSD = self.embedding(batch.token_BS)
        layer_stats: list[LayerStats] = []
        for layer in self.layers:
            x_BSD, stats = layer(x_BSD, batch, context)
            layer_stats += stats
        return self.head(self.norm(x_BSD)), layer_stats

    def _tie(self) -> None:
        if self.architecture.model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> Transformer:
        # A move off the meta device makes a new parameter for each name, which would untie the two.
        super()._apply(fn, recurse)
        self._tie()
        return self

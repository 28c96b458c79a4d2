"""The decoder-only language model."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.block import Block
from moe_parallel.model.loss import Head
from moe_parallel.moe.routing import ForwardContext, LayerStats


class Output(Enum):
    """What a forward pass ends with."""

    logits = "logits"
    """(B, S, V): for generation and probes of few tokens."""
    loss = "loss"
    """Scalar: cross-entropy in nats, summed over all tokens that have a target, in float32 at least. The logits of the
    batch never exist at once."""
    hidden = "hidden"
    """(B, S, D): what the head would see, for passes that are after the statistics alone."""


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
        self.head = Head(model.dim, architecture.vocab_size)
        self._tie()

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(
        self, batch: TokenBatch, context: ForwardContext, output: Output = Output.logits
    ) -> tuple[Tensor, list[LayerStats]]:
        """The wanted output, and the statistics of all passes of mixture-of-experts layers in order.

        The loss is computed in here and not by the caller: weights that are split over ranks are whole in here only.
        """
        limit = self.architecture.model.max_sequence_tokens
        if limit is not None and batch.token_BS.shape[1] > limit:
            raise ValueError(
                f"a sequence of {batch.token_BS.shape[1]} tokens is longer than model.max_sequence_tokens={limit}; "
                "shorten it, or raise the limit if the rotary positions reach that far"
            )
        x_BSD = self.embedding(batch.token_BS)
        plan = self.blocks[0].attention.plan(batch)
        layer_stats: list[LayerStats] = []
        for layer in self.layers:
            x_BSD, stats = layer(x_BSD, batch, plan, context)
            layer_stats += stats
        x_BSD = self.norm(x_BSD)
        if output is Output.hidden:
            return x_BSD, layer_stats
        return self.head(x_BSD, batch.target_BS if output is Output.loss else None), layer_stats

    def _tie(self) -> None:
        if self.architecture.model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> Transformer:
        # A move off the meta device makes a new parameter for each name, which would untie the two.
        super()._apply(fn, recurse)
        self._tie()
        return self

"""The decoder-only language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import AttentionPlan
from moe_parallel.model.block import Block
from moe_parallel.model.loss import Head
from moe_parallel.model.mtp import PredictionBlock, embed_known, following_tokens
from moe_parallel.moe.routing import ForwardContext, LayerStats


class Output(Enum):
    """What a forward pass ends with."""

    logits = "logits"
    """(B, S, V): for generation and probes of few tokens."""
    loss = "loss"
    """(1 + model.mtp_layers): cross-entropy in nats of the next token, then of those that multi-token prediction sees
    further, each summed over all tokens that have such a target, in float32 at least. The logits of the batch never
    exist at once."""
    hidden = "hidden"
    """(B, S, D): what the head would see, for passes that are after the statistics alone, of all layers."""


def through(
    layers: Iterable[nn.Module], x_BSD: Tensor, batch: TokenBatch, plan: AttentionPlan, context: ForwardContext
) -> tuple[Tensor, list[LayerStats], ForwardContext]:
    """The stream after layers that follow each other, their statistics, and the context of the layer after them: with
    what their last router hands on."""
    layer_stats: list[LayerStats] = []
    for layer in layers:
        x_BSD, stats = layer(x_BSD, batch, plan, context)
        layer_stats += stats
        context = replace(context, carry=stats[-1].carry) if stats else context
    return x_BSD, layer_stats, context


@dataclass(frozen=True)
class Part:
    """What a rank of a pipeline has of a model."""

    layers: tuple[int, ...]
    first: bool
    """The model's first stage is among its stages: the embedding is here."""
    last: bool
    """The last one is: final norm, multi-token prediction and head are here."""


class Transformer(nn.Module):
    """Embedding, pre-norm layers, final norm, head.

    Build it under `torch.device("meta")` and give it numbers with `init_weights`, whatever its size.

    Args:
        part: what of it there is; parameters have the names that they have in the whole. Stages run a part; it cannot
            be called.
    """

    def __init__(self, architecture: Architecture, part: Part | None = None) -> None:
        super().__init__()
        model: ModelConfig = architecture.model
        self.architecture, self.part = architecture, part
        first, last = (True, True) if part is None else (part.first, part.last)
        if first or (last and architecture.last_embeds):
            self.embedding = nn.Embedding(architecture.vocab_size, model.dim)
        self.layers: nn.ModuleList | nn.ModuleDict
        if part is None:
            self.layers = nn.ModuleList(Block(architecture, layer) for layer in range(model.num_layers))
        else:
            self.layers = nn.ModuleDict({str(layer): Block(architecture, layer) for layer in part.layers})
        self.mtp = nn.ModuleList()
        if last:
            self.norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
            self.mtp.extend(
                PredictionBlock(architecture, layer) for layer in range(model.num_layers, architecture.num_blocks)
            )
            self.head = Head(model.dim, architecture.vocab_size)
        self._tie()

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type, those of multi-token prediction among them."""
        layers = (*self.layers.children(), *self.mtp.children())
        return [layer for layer in layers if isinstance(layer, Block)]

    def forward(
        self, batch: TokenBatch, context: ForwardContext, output: Output = Output.logits
    ) -> tuple[Tensor, list[LayerStats]]:
        """The wanted output, and the statistics of all passes of mixture-of-experts layers in order.

        The loss is computed in here and not by the caller: weights that are split over ranks are whole in here only.
        """
        self.check_length(batch)
        x_BSD, plan = self.embedding(batch.token_BS), self.blocks[0].attention.plan(batch)
        x_BSD, layer_stats, context = through(self.layers.children(), x_BSD, batch, plan, context)
        out, further = self.predict(x_BSD, batch, plan, context, output)
        return out, layer_stats + further

    def predict(
        self, x_BSD: Tensor, batch: TokenBatch, plan: AttentionPlan, context: ForwardContext, output: Output
    ) -> tuple[Tensor, list[LayerStats]]:
        """From the last layer to the wanted output; statistics of multi-token prediction."""
        hidden = [self.norm(x_BSD)]
        layer_stats: list[LayerStats] = []
        if output is Output.logits:
            return self.head(hidden[0]), layer_stats
        targets = following_tokens(batch, 1 + len(self.mtp))
        for module, token_BS in zip(self.mtp, targets):
            joined = torch.cat([hidden[-1], embed_known(self.embedding, token_BS)], dim=-1)
            x_BSD, stats, context = through([module], joined, batch, plan, context)
            hidden.append(x_BSD)
            layer_stats += stats
        if output is Output.hidden:
            return hidden[0], layer_stats
        return torch.stack([self.head(*pair) for pair in zip(hidden, targets)]), layer_stats

    def check_length(self, batch: TokenBatch) -> None:
        """ValueError if the sequences are longer than the model accepts."""
        limit = self.architecture.model.max_sequence_tokens
        if limit is not None and batch.sequence_tokens > limit:
            raise ValueError(
                f"a sequence of {batch.sequence_tokens} tokens is longer than model.max_sequence_tokens={limit}; "
                "shorten it, or raise the limit if the rotary positions reach that far"
            )

    def _tie(self) -> None:
        if self.architecture.model.tie_embeddings and hasattr(self, "head"):
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable, recurse: bool = True) -> Transformer:
        # A move off the meta device makes a new parameter for each name, which would untie the two.
        super()._apply(fn, recurse)
        self._tie()
        return self

"""One layer of the decoder: attention, then a dense or a mixture-of-experts feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import AttentionPlan, GroupedQueryAttention, GroupedQueryConfig
from moe_parallel.model.dense import DenseNetwork
from moe_parallel.model.latent_attention import LatentAttention, LatentConfig
from moe_parallel.moe.chain import ChainBlock, Renormalize, Residual
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routing import ForwardContext, LayerStats, Replay


def build_attention(architecture: Architecture) -> GroupedQueryAttention | LatentAttention:
    """The kind of attention that its options are of."""
    model, attention = architecture.model, architecture.attention
    if isinstance(attention, LatentConfig):
        return LatentAttention(model.dim, attention, model.norm_epsilon)
    assert isinstance(attention, GroupedQueryConfig)
    return GroupedQueryAttention(model.dim, attention, model.norm_epsilon)


class Block(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        model = architecture.model
        self.layer = layer
        self.recompute = False
        """Keep only the input and compute the rest again in the backward pass. Set by the engine."""
        self.attention_norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
        self.attention = build_attention(architecture)
        self.ffn_norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
        self.later_norms = nn.ModuleList()
        """Norms of later iterations of a chain of experts, if they have their own."""
        self.ffn: MoELayer | DenseNetwork
        if layer not in architecture.moe_layers:
            self.ffn = DenseNetwork(model.dim, model.ffn_dim)
        else:
            options = architecture.moe, architecture.router, architecture.balance
            self.ffn = MoELayer(model.dim, *options, layer, first=layer == architecture.moe_layers[0])
            chain = architecture.moe.chain
            if chain.renormalize is Renormalize.per_iteration:
                for _ in range(chain.iterations - 1):
                    self.later_norms.append(nn.RMSNorm(model.dim, eps=model.norm_epsilon))

    def forward(
        self, x_BSD: Tensor, batch: TokenBatch, plan: AttentionPlan, context: ForwardContext
    ) -> tuple[Tensor, list[LayerStats]]:
        """(B, S, D) -> (B, S, D), and the statistics of each pass of a mixture-of-experts layer."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(x_BSD, batch, plan, context)
        # The second run takes the experts of the first from the replay: it must not choose again.
        replaying = replace(context, replay=Replay())
        return checkpoint(self._forward, x_BSD, batch, plan, replaying, use_reentrant=False, preserve_rng_state=False)

    def _forward(
        self, x_BSD: Tensor, batch: TokenBatch, plan: AttentionPlan, context: ForwardContext
    ) -> tuple[Tensor, list[LayerStats]]:
        x_BSD, hidden_BSD = self.add(x_BSD, self.attention(self.enter(x_BSD), plan))
        if isinstance(self.ffn, DenseNetwork):
            return x_BSD + self.ffn(hidden_BSD), []
        stream_BSD = hidden_BSD if self.ffn.config.chain.block is ChainBlock.reference else x_BSD
        stream_TD, hidden_TD = stream_BSD.flatten(0, 1), hidden_BSD.flatten(0, 1)
        layer_context, renormalize = context.for_layer(self.layer, batch), self._renormalize(stream_TD)
        out_TD, stats = self.ffn(hidden_TD, layer_context, renormalize, stream_TD)
        return out_TD.view_as(x_BSD), stats

    def enter(self, x_BSD: Tensor) -> Tensor:
        """What attention sees of the stream."""
        return self.attention_norm(x_BSD)

    def add(self, x_BSD: Tensor, change_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The stream after attention, and what the feed-forward network sees of it."""
        x_BSD = x_BSD + change_BSD
        return x_BSD, self.ffn_norm(x_BSD)

    def compile_around_attention(self) -> None:
        """Fuse what surrounds the attention kernel: norms, projections, rotation, residual sum.

        Methods and not modules: hooks of FSDP and of recompute stay outside, and the kernel, whose documents differ
        from batch to batch, is no part of a graph. All layers share the compiled graphs.
        """
        for owner, name in ((self, "enter"), (self.attention, "compress"), (self.attention, "project"), (self, "add")):
            if hasattr(owner, name):  # only latent attention compresses
                setattr(owner, name, torch.compile(getattr(owner, name)))

    def _renormalize(self, stream_TD: Tensor) -> Callable[[int, Tensor], Tensor] | None:
        """What a later iteration of a chain of experts sees, from the sum of the outputs before it."""
        assert isinstance(self.ffn, MoELayer)
        chain = self.ffn.config.chain
        if chain.renormalize is Renormalize.none:
            return None
        base = 0 if chain.residual is Residual.outer else stream_TD
        norms = [self.ffn_norm, *(self.later_norms or [self.ffn_norm] * (chain.iterations - 1))]
        return lambda iteration, out_TD: norms[iteration](base + out_TD)

"""Multi-token prediction written out: token by token, with torch's own functions and none of the module's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.block import Block
from moe_parallel.model.mtp import PredictionBlock
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.routing import ForwardContext, LayerStats


def token_at(batch: TokenBatch, row: int, place: int, ahead: int) -> int | None:
    """The token so far ahead in the same document; None if there is none. For batches that keep documents apart."""
    if place + ahead >= batch.token_BS.shape[1]:
        return None
    documents = [int(batch.document_BS[row, p]) for p in (place, place + ahead)]
    return int(batch.token_BS[row, place + ahead]) if documents[0] == documents[1] >= 0 else None


def loss_sum(hidden_BSD: Tensor, weight_VD: Tensor, batch: TokenBatch, ahead: int) -> Tensor:
    """Cross-entropy of the tokens so far ahead, position by position."""
    total = hidden_BSD.new_zeros(())
    for row in range(hidden_BSD.shape[0]):
        for place in range(hidden_BSD.shape[1]):
            target = token_at(batch, row, place, ahead)
            if target is not None:
                total = total - torch.log_softmax(weight_VD @ hidden_BSD[row, place], 0)[target]
    return total


def next_embeddings(model: Transformer, batch: TokenBatch, ahead: int, unknown: float = 0.0) -> Tensor:
    """(B, S, D): the embedding of the token so far ahead, or a constant where there is none."""
    rows = []
    for row, place in torch.cartesian_prod(*(torch.arange(n) for n in batch.token_BS.shape)).tolist():
        token = token_at(batch, row, place, ahead)
        nothing = model.embedding.weight.new_full(model.embedding.weight.shape[1:], unknown)
        rows.append(nothing if token is None else model.embedding.weight[token])
    return torch.stack(rows).unflatten(0, batch.token_BS.shape)


def losses_and_stats(
    model: Transformer, batch: TokenBatch, context: ForwardContext, unknown: float = 0.0
) -> tuple[list[Tensor], list[LayerStats]]:
    """The loss of the next token, those of the modules, and the statistics of all passes."""
    plan = model.blocks[0].attention.plan(batch)
    all_stats: list[LayerStats] = []

    def layer(block: nn.Module, x_BSD: Tensor) -> Tensor:
        assert isinstance(block, Block)
        carry = all_stats[-1].carry if all_stats else None
        x_BSD, stats = Block._forward(block, x_BSD, batch, plan, replace(context, carry=carry))
        all_stats.extend(stats)
        return x_BSD

    x_BSD = model.embedding(batch.token_BS)
    for block in model.layers:
        x_BSD = layer(block, x_BSD)
    hidden_BSD = _norm(x_BSD, model.norm)
    losses = [loss_sum(hidden_BSD, model.head.weight, batch, 1)]
    for ahead, block in enumerate(model.mtp, start=1):
        assert isinstance(block, PredictionBlock)
        token_BSD = _norm(next_embeddings(model, batch, ahead, unknown), block.token_norm)
        from_hidden, from_token = block.projection.weight.chunk(2, dim=1)
        x_BSD = _norm(hidden_BSD, block.hidden_norm) @ from_hidden.T + token_BSD @ from_token.T
        hidden_BSD = _norm(layer(block, x_BSD), block.norm)
        losses.append(loss_sum(hidden_BSD, model.head.weight, batch, ahead + 1))
    return losses, all_stats


def _norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

"""Multi-token prediction: modules that each train the model to see one token further (DeepSeek-V3, arXiv 2412.19437,
section 2.2). They share embedding and head with the model; generation leaves them out.

    model     h_0 of token i  -> norm, head ->  token i + 1
    module k  h_k = layer(M_k [norm(h_(k-1)) ; norm(embedding of token i + k)]), norm, head ->  token i + k + 1

What is handed from one to the next is normed, as the head sees it; each module has a norm of its own for that, as in
the released weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_data.batch import IGNORE, TokenBatch
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import AttentionPlan
from moe_parallel.model.block import Block
from moe_parallel.moe.routing import ForwardContext, LayerStats


def following_tokens(batch: TokenBatch, count: int) -> list[Tensor]:
    """The next token of each position, the one after it, and so on: `count` tables, int64 (B, S).

    The first one is `target_BS`. IGNORE stands where a sequence has no such token, or where it lies behind the end of
    what is learned as one text: a target that is IGNORE ends it, at padding and, if boundaries are kept, at documents.
    Of parts of sequences the tokens beyond their end come from the whole ones.
    """
    whole = batch if batch.whole is None else batch.whole
    first, length = batch.first_token, batch.token_BS.shape[1]
    tables, next_BS = [], whole.target_BS
    for _ in range(count):
        tables.append(next_BS[:, first : first + length])
        one_later_BS = F.pad(next_BS[:, 1:], (0, 1), value=IGNORE)
        next_BS = torch.where(whole.target_BS == IGNORE, IGNORE, one_later_BS)
    return tables


def embed_known(embedding: nn.Module, token_BS: Tensor) -> Tensor:
    """(B, S, D): embeddings, and zeros for IGNORE. No target and no later token of the same text depends on those."""
    x_BSD: Tensor = embedding(token_BS.clamp(min=0))
    return x_BSD.masked_fill((token_BS == IGNORE).unsqueeze(-1), 0.0)


class PredictionBlock(Block):
    """One module: a layer of the decoder between a projection and a norm. Its router and experts are counted, balanced
    and moved as those of all layers are."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__(architecture, layer)
        model = architecture.model
        self.hidden_norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
        self.token_norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)
        self.projection = nn.Linear(2 * model.dim, model.dim, bias=False)
        self.norm = nn.RMSNorm(model.dim, eps=model.norm_epsilon)

    def _forward(
        self, x_BSD: Tensor, batch: TokenBatch, plan: AttentionPlan, context: ForwardContext
    ) -> tuple[Tensor, list[LayerStats]]:
        """From what the module before made of each token beside the next token's embedding, (B, S, 2 D)."""
        hidden_BSD, token_BSD = x_BSD.chunk(2, dim=-1)
        x_BSD = self.projection(torch.cat([self.hidden_norm(hidden_BSD), self.token_norm(token_BSD)], dim=-1))
        x_BSD, stats = super()._forward(x_BSD, batch, plan, context)
        return self.norm(x_BSD), stats

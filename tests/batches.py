"""Small random batches with documents and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_data.batch import IGNORE, TokenBatch


def make_batch(rows: Sequence[Sequence[int]], sequence_tokens: int, vocabulary: int, first: int = 0) -> TokenBatch:
    """Random tokens in documents of the given lengths; what is left of a row is padding.

    Row i is sequence `first + i` of the global order and its tokens depend on that index alone, so that any way to
    share rows among ranks sees the same data.
    """
    tokens, targets, positions, documents, spans = [], [], [], [], []
    for row, lengths in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 + first + row)
        token_S = torch.randint(0, vocabulary, (sequence_tokens,), generator=generator)
        target_S = torch.full((sequence_tokens,), IGNORE)
        position_S = torch.zeros(sequence_tokens, dtype=torch.int64)
        document_S = torch.full((sequence_tokens,), -1)
        start, begun = 0, set()
        for index, length in enumerate(lengths):
            end = start + length
            _begin_apart(token_S, start, length, vocabulary, begun)
            target_S[start : end - 1] = token_S[start + 1 : end]
            position_S[start:end] = torch.arange(length)
            document_S[start:end] = index
            start = end
        token_S[start:] = 0
        position_S[start:] = torch.arange(sequence_tokens - start)
        tokens.append(token_S), targets.append(target_S)
        positions.append(position_S), documents.append(document_S)
        spans.append((*lengths, sequence_tokens - start) if start < sequence_tokens else tuple(lengths))
    target_BS, document_BS = torch.stack(targets), torch.stack(documents)
    return TokenBatch(
        token_BS=torch.stack(tokens),
        target_BS=target_BS,
        position_BS=torch.stack(positions),
        document_BS=document_BS,
        sequence_B=torch.arange(first, first + len(rows)),
        source_B=torch.zeros(len(rows), dtype=torch.int64),
        document_lengths=tuple(spans),
        num_targets=int((target_BS != IGNORE).sum()),
        num_valid=int((document_BS >= 0).sum()),
    )


def _begin_apart(token_S: Tensor, start: int, length: int, vocabulary: int, begun: set[int]) -> None:
    """Make a document begin unlike the others of its row, and its second token unlike its first: else two tokens of a
    row had the same hidden states but for rounding, and any choice between them would hang on that."""
    while length and int(token_S[start]) in begun and len(begun) < vocabulary:
        token_S[start] = (token_S[start] + 1) % vocabulary
    if length > 1 and token_S[start + 1] == token_S[start]:
        token_S[start + 1] = (token_S[start + 1] + 1) % vocabulary
    if length:
        begun.add(int(token_S[start]))


def join_batches(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Several batches as one."""
    names = ("token_BS", "target_BS", "position_BS", "document_BS", "sequence_B", "source_B")
    return TokenBatch(
        **{name: torch.cat([getattr(b, name) for b in batches]) for name in names},
        document_lengths=tuple(spans for b in batches for spans in b.document_lengths),
        num_targets=sum(b.num_targets for b in batches),
        num_valid=sum(b.num_valid for b in batches),
    )


def plain_loss_sum(logits_BSV: Tensor, batch: TokenBatch) -> Tensor:
    """The loss by torch's own function, from all logits at once."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.target_BS.flatten(), ignore_index=IGNORE, reduction="sum")

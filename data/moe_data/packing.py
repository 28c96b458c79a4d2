"""Packs pieces of token streams into a TokenBatch: targets, positions, documents and attention spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_data.batch import IGNORE, TokenBatch


@dataclass(frozen=True)
class Piece:
    """What one sequence is made of: a run of tokens of one source."""

    tokens: np.ndarray
    """int64; up to S inputs and, when the stream goes on, the token after them (S+1 in all)."""
    begins: np.ndarray
    """int64; offsets in `tokens` at which documents begin, ascending; a continued document has none."""
    sequence: int
    """Index in the global order."""
    source: int
    """Index of the source."""


def pack(
    pieces: Sequence[Piece], sequence_tokens: int, *, keep_boundaries: bool, restart_positions: bool
) -> TokenBatch:
    """One batch of len(pieces) sequences.

    Every input token of a piece is an input once. Its target is the next token of the stream; there is none
    at the end of the stream and, with `keep_boundaries`, at the end of a document: those targets are IGNORE.

    Args:
        pieces: one per sequence; shorter ones are padded at the end with token 0.
        sequence_tokens: S.
        keep_boundaries: no attention and no loss from one document to the next. A document that began in an
            earlier sequence is a span of its own.
        restart_positions: positions count from 0 in each document, else through the whole sequence.
    """
    shape = (len(pieces), sequence_tokens)
    token_BS = np.zeros(shape, dtype=np.int64)
    target_BS = np.full(shape, IGNORE, dtype=np.int64)
    position_BS = np.tile(np.arange(sequence_tokens, dtype=np.int64), (len(pieces), 1))
    document_BS = np.full(shape, -1, dtype=np.int64)
    lengths: list[tuple[int, ...]] = []
    num_valid = 0
    for row, piece in enumerate(pieces):
        length = min(len(piece.tokens), sequence_tokens)
        follow = min(len(piece.tokens) - 1, length)
        begins = piece.begins[(piece.begins > 0) & (piece.begins < length)]
        edges = np.concatenate(([0], begins, [length], [sequence_tokens]))
        span_lengths = np.diff(edges)
        token_BS[row, :length] = piece.tokens[:length]
        if length:
            target_BS[row, :follow] = piece.tokens[1 : follow + 1]
            document_BS[row, :length] = np.repeat(np.arange(len(edges) - 2), span_lengths[:-1])
        if keep_boundaries:
            # The token before a beginning ends its document, also where that is the sequence's last token.
            last = piece.begins[(piece.begins > 0) & (piece.begins <= length)] - 1
            target_BS[row, last] = IGNORE
        if restart_positions:
            position_BS[row] -= np.repeat(edges[:-1], span_lengths)
        spans = span_lengths if keep_boundaries else np.diff([0, length, sequence_tokens])
        lengths.append(tuple(int(n) for n in spans if n))
        num_valid += length
    return TokenBatch(
        token_BS=torch.from_numpy(token_BS),
        target_BS=torch.from_numpy(target_BS),
        position_BS=torch.from_numpy(position_BS),
        document_BS=torch.from_numpy(document_BS),
        sequence_B=torch.tensor([piece.sequence for piece in pieces], dtype=torch.int64),
        source_B=torch.tensor([piece.source for piece in pieces], dtype=torch.int64),
        document_lengths=tuple(lengths),
        num_targets=int((target_BS != IGNORE).sum()),
        num_valid=num_valid,
    )

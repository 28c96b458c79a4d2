"""Packing against a loop over single tokens, written without looking at the packed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_data.batch import IGNORE
from moe_data.packing import Piece, pack


def pack_by_hand(
    tokens: list[int], begins: set[int], sequence_tokens: int, keep: bool, restart: bool
) -> dict[str, list[int]]:
    """One token at a time; `begins` are offsets at which a document begins."""
    out: dict[str, list[int]] = {"token": [], "target": [], "position": [], "document": [], "lengths": []}
    position = document = span = 0
    length = min(len(tokens), sequence_tokens)
    for t in range(sequence_tokens):
        new_document = 0 < t < length and t in begins
        if new_document:
            document += 1
        if (new_document and keep) or (t == length and t > 0):
            out["lengths"].append(span)
            span = 0
        if restart and (new_document or t == length):
            position = 0
        span += 1
        valid = t < length
        has_next = valid and t + 1 < len(tokens) and not (keep and t + 1 in begins)
        out["token"].append(tokens[t] if valid else 0)
        out["target"].append(tokens[t + 1] if has_next else IGNORE)
        out["position"].append(position)
        out["document"].append(document if valid else -1)
        position += 1
    out["lengths"].append(span)
    return out


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 9))), min_size=1, max_size=4),
    sequence_tokens=st.integers(1, 8),
    keep=st.booleans(),
    restart=st.booleans(),
)
def test_equals_loop_over_tokens(
    rows: list[tuple[int, set[int]]], sequence_tokens: int, keep: bool, restart: bool
) -> None:
    """Any slip by one: in targets across a boundary or the end of a sequence, in positions, spans or padding.

    Integers: exact."""
    pieces, by_hand = [], []
    for length, wanted in rows:
        length = min(length, sequence_tokens + 1)
        begins = {b for b in wanted if b < length}
        tokens = [10 + t for t in range(length)]
        pieces.append(Piece(np.array(tokens, dtype=np.int64), np.array(sorted(begins), dtype=np.int64), 5, 2))
        by_hand.append(pack_by_hand(tokens, begins, sequence_tokens, keep, restart))
    batch = pack(pieces, sequence_tokens, keep_boundaries=keep, restart_positions=restart)
    for name in ("token", "target", "position", "document"):
        assert getattr(batch, f"{name}_BS").tolist() == [row[name] for row in by_hand], name
    assert batch.document_lengths == tuple(tuple(row["lengths"]) for row in by_hand)
    assert batch.num_targets == int((batch.target_BS != IGNORE).sum())
    assert batch.num_valid == sum(min(length, sequence_tokens) for length, _ in rows)
    assert batch.has_padding == bool((batch.document_BS == -1).any())
    assert batch.sequence_B.tolist() == [5] * len(rows)
    assert batch.source_B.tolist() == [2] * len(rows)


def test_a_boundary_at_the_seam_of_two_sequences() -> None:
    """The last token of a sequence that is also the last of its document must not predict the next document."""
    piece = Piece(np.array([1, 2, 3, 9]), np.array([3]), 0, 0)
    kept = pack([piece], 3, keep_boundaries=True, restart_positions=True)
    assert kept.target_BS.tolist() == [[2, 3, IGNORE]]
    open_ = pack([piece], 3, keep_boundaries=False, restart_positions=True)
    assert open_.target_BS.tolist() == [[2, 3, 9]]


@pytest.mark.parametrize("keep", [True, False])
def test_tensors_are_int64_and_move_together(keep: bool) -> None:
    """An int32 target breaks the loss; a tensor that to() leaves behind breaks the first step on a GPU."""
    piece = Piece(np.arange(4), np.array([2]), 0, 0)
    batch = pack([piece], 3, keep_boundaries=keep, restart_positions=True).to("meta")
    for name in ("token_BS", "target_BS", "position_BS", "document_BS", "sequence_B", "source_B"):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64
        assert tensor.device.type == "meta"

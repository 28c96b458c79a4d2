"""Causal softmax attention that never crosses a document: three ways to compute the same.

In names of this folder, d stands for the width of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moe_data.batch import TokenBatch


class AttentionCore(str, Enum):
    auto = "auto"
    """per_document on a CPU, masked on an accelerator (until flex is measured to be faster there)."""
    per_document = "per_document"
    """One causal kernel a document: no work across documents, one launch each."""
    masked = "masked"
    """One kernel with a document mask: one launch, work across documents is done and thrown away."""
    flex = "flex"
    """torch's flex_attention, compiled: one launch that leaves out blocks of 128 x 128 tokens that share no document.
    Trains on accelerators only: torch has no backward pass of it for CPUs."""

    def check_training(self, device_type: str) -> None:
        """ValueError if nothing can be trained with it there."""
        if self is AttentionCore.flex and device_type == "cpu":
            raise ValueError(
                "attention.core=flex cannot train on a CPU: torch's flex_attention has a backward pass on accelerators "
                "only; choose attention.core=auto"
            )


def document_mask(batch: TokenBatch, core: AttentionCore) -> Tensor | BlockMask | None:
    """What a core must know of a batch's documents, once for all layers.

    Returns:
        bool (B, 1, S, S) for `masked`, blocks for `flex`; None where host lengths say it all: for `per_document`, and
        if each sequence is one document.
    """
    if all(len(spans) == 1 for spans in batch.document_lengths):
        return None
    device, num_tokens = batch.token_BS.device, batch.token_BS.shape[1]
    if core is AttentionCore.auto:
        core = AttentionCore.per_document if device.type == "cpu" else AttentionCore.masked
    if core is AttentionCore.per_document:
        return None
    span_BS = _span_index(batch.document_lengths, num_tokens, device)
    if core is AttentionCore.flex:
        return _block_mask(span_BS)
    return (span_BS.unsqueeze(2) == span_BS.unsqueeze(1)).tril_().unsqueeze(1)


def attend(
    q_BHSd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    lengths: tuple[tuple[int, ...], ...],
    mask: Tensor | BlockMask | None,
    scale: float,
) -> Tensor:
    """Causal softmax attention within each document.

    Args:
        q_BHSd, k_BHSd, v_BHSd: keys and values may have fewer heads, and values another width.
        lengths: `document_lengths` of the batch. Padding attends to padding only, so that its rows are finite.
        mask: `document_mask` of the batch.
        scale: factor on the products of queries and keys.
    Returns:
        (B, H, S, width of the values).
    """
    if isinstance(mask, BlockMask):
        return _attend_blocks(q_BHSd, k_BHSd, v_BHSd, mask, scale)
    value_dim = v_BHSd.shape[-1]
    if value_dim != q_BHSd.shape[-1] and q_BHSd.device.type == "cpu":
        # The fast kernel of CPUs takes one width only; zeros change neither products nor the columns that are kept.
        width = max(q_BHSd.shape[-1], value_dim)
        q_BHSd, k_BHSd, v_BHSd = (F.pad(x, (0, width - x.shape[-1])) for x in (q_BHSd, k_BHSd, v_BHSd))
    if mask is not None:
        out_BHSd = _attend_masked(q_BHSd, k_BHSd, v_BHSd, mask, scale)
    elif all(len(spans) == 1 for spans in lengths):
        out_BHSd = _causal(q_BHSd, k_BHSd, v_BHSd, scale)
    else:
        out_BHSd = _attend_per_document(q_BHSd, k_BHSd, v_BHSd, lengths, scale)
    return out_BHSd[..., :value_dim]


def _causal(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, scale: float) -> Tensor:
    grouped = q_BHSd.shape[1] != k_BHSd.shape[1]
    return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True, scale=scale, enable_gqa=grouped)


def _attend_per_document(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, lengths: tuple[tuple[int, ...], ...], scale: float
) -> Tensor:
    inputs = (q_BHSd, k_BHSd, v_BHSd)
    rows: dict[int, Tensor] = {}
    # Most rows of long documents are one span: they share one call.
    whole = [row for row, spans in enumerate(lengths) if len(spans) == 1]
    if whole:
        index = torch.tensor(whole, device=q_BHSd.device)
        q, k, v = (x.index_select(0, index) for x in inputs)
        rows.update(zip(whole, _causal(q, k, v, scale).split(1)))
    for row, spans in enumerate(lengths):
        if row not in rows:
            pieces = zip(*(x[row : row + 1].split(spans, dim=2) for x in inputs))
            rows[row] = torch.cat([_causal(q, k, v, scale) for q, k, v in pieces], dim=2)
    return torch.cat([rows[row] for row in range(len(lengths))])


def _attend_masked(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask_B1SS: Tensor, scale: float) -> Tensor:
    # The kernels that take a mask know no grouped heads: without the copies the slow reference would run.
    groups = q_BHSd.shape[1] // k_BHSd.shape[1]
    if groups > 1:
        k_BHSd = k_BHSd.repeat_interleave(groups, dim=1)
        v_BHSd = v_BHSd.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, attn_mask=mask_B1SS, scale=scale)


def _span_index(lengths: tuple[tuple[int, ...], ...], num_tokens: int, device: torch.device) -> Tensor:
    """Index of each token's attention span within its sequence, int64 (B, S).

    Not document_BS: if boundaries are not kept, a span holds several documents. Only the ends of the spans are
    copied to the device.
    """
    most = max(len(spans) for spans in lengths)
    ends = [[*accumulate(spans), *[num_tokens] * (most - len(spans))] for spans in lengths]
    end_BM = torch.tensor(ends).to(device, non_blocking=True)
    offset_BS = torch.arange(num_tokens, device=device).expand(len(lengths), -1).contiguous()
    return torch.searchsorted(end_BM, offset_BS, right=True)


# -- flex ----------------------------------------------------------------------------------------------------------

_BLOCK = 128
"""Tokens of one side of a block, the granularity of the compiled kernel."""


def _block_mask(span_BS: Tensor) -> BlockMask:
    """Which blocks of queries and keys share a document, from the spans at the blocks' ends.

    torch's own create_block_mask looks at all pairs of tokens: S^2 bytes a sequence and more.
    """
    num_tokens = span_BS.shape[1]
    first = torch.arange(0, num_tokens, _BLOCK, device=span_BS.device)
    is_whole = first + _BLOCK <= num_tokens
    last = (first + _BLOCK - 1).clamp(max=num_tokens - 1)
    first_BQ, last_BQ = span_BS[:, first], span_BS[:, last]
    # Spans follow each other: a block of earlier keys shares one with a block of queries if its last token's is the
    # queries' first, and all its pairs are of one span if its first token's is the queries' last.
    earlier_QK = torch.ones(len(first), len(first), dtype=torch.bool, device=span_BS.device).tril_(-1)
    some_BQK = (last_BQ.unsqueeze(1) == first_BQ.unsqueeze(2)) & earlier_QK
    full_BQK = (first_BQ.unsqueeze(1) == last_BQ.unsqueeze(2)) & earlier_QK & is_whole.unsqueeze(1)
    partial_BQK = (some_BQK & ~full_BQK) | torch.eye(len(first), dtype=torch.bool, device=span_BS.device)

    def may_see(sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (span_BS[sequence, query] == span_BS[sequence, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial_BQK), *_listed(full_BQK), _BLOCK, may_see, seq_lengths=(num_tokens, num_tokens)
    )


def _listed(block_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys that each block of queries has: their number, int32 (B, 1, Q), and places, int32 (B, 1, Q, K)."""
    number_BQ = block_BQK.sum(-1, dtype=torch.int32)
    place_BQK = block_BQK.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return number_BQ.unsqueeze(1), place_BQK.unsqueeze(1)


def _attend_blocks(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: BlockMask, scale: float) -> Tensor:
    grouped = q_BHSd.shape[1] != k_BHSd.shape[1]
    # Uncompiled, it computes all scores: slow, but a CPU only evaluates with it.
    kernel = _compiled_flex_attention() if q_BHSd.device.type != "cpu" else cast(Callable[..., Tensor], flex_attention)
    return kernel(q_BHSd, k_BHSd, v_BHSd, block_mask=mask, scale=scale, enable_gqa=grouped)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled at its first use, for all layers."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention))

"""The record that data hands to a model: packed sequences with their documents, positions and origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class TokenBatch:
    """B packed sequences of S tokens, and what the host must know of them without asking the device."""

    token_BS: Tensor
    """int64; padding holds token 0."""
    target_BS: Tensor
    """int64; the next token, or IGNORE where there is none: padding, the last token of a stream and,
    when boundaries are kept, the last token of a document."""
    position_BS: Tensor
    """int64; restarts at each document, or counts through the sequence if positions do not restart."""
    document_BS: Tensor
    """int64; index of the document within its sequence, 0.., -1 for padding."""
    sequence_B: Tensor
    """int64; index of the sequence in the global order: global token id = sequence * S + offset."""
    source_B: Tensor
    """int64; index of the source (domain)."""
    document_lengths: tuple[tuple[int, ...], ...]
    """Per sequence the lengths of the attention spans in order, padding as a last span; sums to S. Empty for parts."""
    num_targets: int
    """Positions whose target is not IGNORE."""
    num_valid: int
    """Tokens that are not padding."""
    whole: TokenBatch | None = None
    """The sequences that these are consecutive parts of, for attention; None if these are whole."""
    first_token: int = 0
    """Offset of the parts within the whole sequences."""

    @property
    def sequence_tokens(self) -> int:
        """Tokens of a whole sequence."""
        return (self if self.whole is None else self.whole).token_BS.shape[1]

    @property
    def has_padding(self) -> bool:
        """Known on the host: asking does not wait for the device."""
        return self.num_valid < self.token_BS.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`; the copy is asynchronous when the host memory is pinned."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in (*_TABLES, "sequence_B", "source_B")
        }
        return replace(self, **moved, whole=None if self.whole is None else self.whole.to(device))

    def part(self, index: int, count: int) -> TokenBatch:
        """One of `count` equal parts of every sequence. For batches on the host: it counts targets and valid tokens."""
        length = self.token_BS.shape[1]
        if length % count != 0:
            raise ValueError(f"sequences of {length} tokens cannot be cut into {count} equal parts")
        first, size = index * (length // count), length // count
        cut = {name: getattr(self, name)[:, first : first + size].contiguous() for name in _TABLES}
        return replace(
            self,
            **cut,
            document_lengths=(),
            num_targets=int((cut["target_BS"] != IGNORE).sum()),
            num_valid=int((cut["document_BS"] >= 0).sum()),
            whole=self,
            first_token=first,
        )


_TABLES = ("token_BS", "target_BS", "position_BS", "document_BS")


def padded(batch: TokenBatch, multiple: int) -> TokenBatch:
    """The same sequences, with padding at their ends up to a multiple of so many tokens."""
    more = -batch.token_BS.shape[1] % multiple
    if more == 0:
        return batch
    fill = {"token_BS": 0, "target_BS": IGNORE, "position_BS": 0, "document_BS": -1}
    longer: dict[str, Any] = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, more), value=value) for name, value in fill.items()
    }
    spans = tuple((*lengths, more) for lengths in batch.document_lengths)
    return replace(batch, document_lengths=spans, **longer)

"""The record that data hands to a model: packed sequences with their documents, positions and origin."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """Per sequence the lengths of the attention spans in order, padding as a last span; sums to S."""
    num_targets: int
    """Positions whose target is not IGNORE."""
    num_valid: int
    """Tokens that are not padding."""

    @property
    def has_padding(self) -> bool:
        """Known on the host: asking does not wait for the device."""
        return self.num_valid < self.token_BS.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`; the copy is asynchronous when the host memory is pinned."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("token_BS", "target_BS", "position_BS", "document_BS", "sequence_B", "source_B")
        }
        return replace(self, **moved)

"""What every dispatcher has: options, and a ticket that tells the experts what they need to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pydantic.dataclasses
from torch import Tensor


@pydantic.dataclasses.dataclass(kw_only=True)
class DispatchConfig:
    """How rows travel to the experts of other ranks. Each way has its options, and some have none."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Ties one `combine` to one `dispatch`; each dispatcher adds what it needs to know."""

    host_counts: Sequence[int] | None
    """Rows of each expert that is computed here, when the host knows them."""
    transfer: Callable[[Tensor], Tensor] | None = None
    """Stacked weights of this rank's own experts (L, ...) to those of all experts that it computes (L', ...), with
    gradient; None if they are the same."""

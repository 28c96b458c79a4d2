"""What the options of every dispatcher have in common."""

from __future__ import annotations

from pydantic.dataclasses import dataclass


@dataclass(kw_only=True)
class DispatchConfig:
    """How rows travel to the experts of other ranks. Each way has its options, and some have none."""

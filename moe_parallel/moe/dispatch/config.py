"""What the options of every dispatcher have in common."""

from __future__ import annotations

import dataclasses

import torch
from pydantic.dataclasses import dataclass


@dataclasses.dataclass(frozen=True)
class DispatchSetting:
    """What the relations between a dispatcher and the run depend on."""

    ep: int
    num_experts: int
    dim: int
    top_k: int
    device_type: str | None = None
    """What the ranks compute on; None if that is not known, in a plan."""
    dtype: torch.dtype | None = None
    """What they compute in; None likewise."""


@dataclass(kw_only=True)
class DispatchConfig:
    """How rows travel to the experts of other ranks. Each way has its options, and some have none."""

    def check(self, setting: DispatchSetting) -> None:
        """Raises ValueError where it cannot be used. Needs no process group."""

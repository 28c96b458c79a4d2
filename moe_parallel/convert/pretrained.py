"""A model that exists already: what it is, and its weights as they can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_parallel.convert.lazy import Lazy
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer


@dataclass(frozen=True)
class Pretrained:
    """A model on a disk."""

    path: Path
    architecture: Architecture
    weights: Mapping[str, Lazy]
    """Parameters and buffers by the names that they have in a `Transformer`; float32. Their moments are what its
    optimizer knew, or zeros."""
    steps: float | None = None
    """Steps that its optimizer has counted; None if it comes without one."""


def shapes_of(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers of a model by name; a tied head is the embedding."""
    with torch.device("meta"):
        state = Transformer(architecture).state_dict()
    if architecture.model.tie_embeddings:
        del state["head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def buffers_of(architecture: Architecture) -> dict[str, torch.Tensor]:
    """What routers keep and no gradient moves, without memory, by name."""
    with torch.device("meta"):
        return dict(Transformer(architecture).named_buffers())

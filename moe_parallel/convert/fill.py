"""Puts lazy tensors into what a rank holds of a model, in whatever layout an engine keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_parallel.checkpoint.pieces import Box, Pieces
from moe_parallel.checkpoint.state import TorchState, TrainingState
from moe_parallel.convert.lazy import Lazy, row_boxes, slices
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer

_CHUNK_BYTES = 1 << 24
"""Read at once, so that a layer of experts never lies in memory a second time."""


def load(state: TrainingState, weights: Mapping[str, Lazy], moments: Mapping[str, Lazy] | None = None) -> None:
    """Fill what this rank holds of a model, and of its optimizer if there are moments. No rank waits for another.

    Args:
        weights: all parameters and buffers of the whole model, by name.
        moments: all `<parameter>.<moment>` of the optimizer that are to be taken over; others start at zero.
    """
    named = {f"model.{name}": lazy for name, lazy in weights.items()}
    named |= {f"optimizer.{name}": lazy for name, lazy in (moments or {}).items()}
    entries = state.empty(_index(named))
    wanted = {name: entry for name, entry in entries.items() if moments or name.startswith("model.")}
    absent = sorted(name for name in wanted if name not in named)
    if absent:
        raise ValueError(f"the plan has no {', '.join(absent[:4])}")
    with torch.no_grad():
        for name, entry in wanted.items():
            fill(entry, named[name])
    state.load(wanted)


def build_model(
    architecture: Architecture,
    weights: Mapping[str, Lazy],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The whole model in this process, without parallelism: for tests, measurements and conversions of small ones."""
    with torch.device("meta"):
        model = Transformer(architecture)
    model.to_empty(device=device).to(dtype)
    load(TorchState(model, None), weights)
    return model


def fill(entry: Tensor | Pieces, lazy: Lazy) -> None:
    """Read what a rank holds of one tensor."""
    if tuple(entry.shape) != lazy.shape:
        raise ValueError(f"{lazy} has shape {lazy.shape}, the model {tuple(entry.shape)}")
    for (offsets, sizes), target in _held(entry):
        for box in row_boxes(sizes, target.dtype, _CHUNK_BYTES):
            place = tuple(offset + within for offset, within in zip(offsets, box[0], strict=True))
            target[slices(box)].copy_(lazy.read((place, box[1])))


def _held(entry: Tensor | Pieces) -> Iterator[tuple[Box, Tensor]]:
    """Boxes of the whole that are here, with the memory of each."""
    if isinstance(entry, Pieces):
        yield from ((((*place,), (*part.shape,)), part) for place, part in entry.parts.items())
    elif isinstance(entry, DTensor):
        assert all(p.is_replicate() or type(p) is Shard for p in entry.placements), entry.placements
        sizes, offsets = compute_local_shape_and_global_offset(entry.shape, entry.device_mesh, entry.placements)
        local = entry.to_local()
        assert tuple(local.shape) == tuple(sizes)
        yield (tuple(offsets), tuple(sizes)), local
    else:
        yield ((0,) * entry.ndim, tuple(entry.shape)), entry


def _index(named: Mapping[str, Lazy]) -> Metadata:
    """What a checkpoint of these tensors would say of itself."""
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, lazy in named.items():
        size = torch.Size(lazy.shape)
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        stored[name] = TensorStorageMetadata(TensorProperties(dtype=lazy.dtype), size, [chunk])
    return Metadata(stored)

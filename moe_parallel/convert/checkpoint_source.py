"""Weights and moments of a checkpoint, read by boxes, without a process group."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.pieces import Box
from moe_parallel.checkpoint.reader import SafeReader
from moe_parallel.convert.lazy import Constant, Lazy

MOMENTS = {1: "exp_avg", 2: "exp_avg_sq"}
"""Names of AdamW's moments by their order."""


class _Files:
    """The files of one checkpoint. Keeps the stored part that was read last: its neighbors are often wanted next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = folders.read_meta(folder)
        reader = SafeReader(folder, set(meta["files"]))
        self.index = reader.read_metadata()
        self._last: tuple[Any, Tensor] | None = None

    def part(self, index: MetadataIndex) -> Tensor:
        stored = self.index.storage_data[index]
        place = stored.relative_path, stored.offset
        if self._last is None or self._last[0] != place:
            with (self.folder / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                content = io.BytesIO(file.read(stored.length))
            self._last = place, torch.load(content, map_location="cpu", weights_only=True)
        return self._last[1]


class CheckpointTensor(Lazy):
    """A tensor of a checkpoint."""

    def __init__(self, files: _Files, name: str) -> None:
        entry = files.index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), name
        self.name, self._files, self._chunks = name, files, entry.chunks
        self.shape, self.dtype = tuple(entry.size), entry.properties.dtype

    def read(self, box: Box) -> Tensor:
        if not self.shape:
            return self._files.part(MetadataIndex(self.name, torch.Size([])))
        out = torch.empty(box[1], dtype=self.dtype)
        for chunk in self._chunks:
            common = _common(box, (tuple(chunk.offsets), tuple(chunk.sizes)))
            if common is not None:
                into, there = common
                out[into] = self._files.part(MetadataIndex(self.name, chunk.offsets))[there]
        return out

    def moment(self, order: int) -> Lazy:
        name = f"optimizer.{self.name.removeprefix('model.')}.{MOMENTS[order]}"
        if name not in self._files.index.state_dict_metadata:
            return Constant(self.shape)
        return CheckpointTensor(self._files, name)

    def __str__(self) -> str:
        return self.name.removeprefix("model.")


def weights_of_checkpoint(folder: Path) -> dict[str, Lazy]:
    """Parameters and buffers by name, and what the optimizer knows of them as their moments.

    Raises:
        UnusableCheckpointError: not a whole checkpoint, or one with an unsafe index. Checksums are not compared.
    """
    files = _Files(folder)
    names = [name for name in files.index.state_dict_metadata if name.startswith("model.")]
    return {name.removeprefix("model."): CheckpointTensor(files, name) for name in names}


def steps_of_optimizer(folder: Path) -> float | None:
    """Steps that AdamW has counted in a checkpoint; None if it has no optimizer."""
    files = _Files(folder)
    names = [name for name in files.index.state_dict_metadata if name.endswith(".step")]
    return float(CheckpointTensor(files, names[0]).read(((), ()))) if names else None


def _common(box: Box, chunk: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes overlap: as slices of the first and of the second."""
    ours: list[slice] = []
    theirs: list[slice] = []
    for (a, n), (b, m) in zip(_ranges(box), _ranges(chunk), strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        ours.append(slice(low - a, high - a))
        theirs.append(slice(low - b, high - b))
    return tuple(ours), tuple(theirs)


def _ranges(box: Box) -> Sequence[tuple[int, int]]:
    return list(zip(*box, strict=True))

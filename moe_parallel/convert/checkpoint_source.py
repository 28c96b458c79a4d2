"""Weights and moments of a checkpoint, read by boxes, without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.pieces import Box
from moe_parallel.checkpoint.reader import SafeReader
from moe_parallel.convert.lazy import Constant, Lazy, whole
from moe_parallel.convert.raw import read_box

MOMENTS = {1: "exp_avg", 2: "exp_avg_sq"}
"""Names of AdamW's moments by their order."""


class _Files:
    """The files of one checkpoint. Stored parts are described once and their elements read box by box, so that any
    number of threads may read, in any order, and a part never lies in memory as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = folders.read_meta(folder)
        reader = SafeReader(folder, set(meta["files"]))
        self.index = reader.read_metadata()
        self._parts: dict[MetadataIndex, tuple[int, Tensor]] = {}

    def read(self, index: MetadataIndex, box: Box) -> Tensor:
        """Elements of a stored part."""
        stored = self.index.storage_data[index]
        file = self.folder / stored.relative_path
        start, part = self._described(index, file, stored.offset, stored.length)
        if part.is_contiguous():
            return read_box(file, start, part.shape, part.dtype, box)
        with file.open("rb") as stream:  # a weight that was transposed when it was saved
            view = _create_file_view(stream, stored.offset, stored.length)
            whole = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        return whole[tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))]

    def _described(self, index: MetadataIndex, file: Path, offset: int, length: int) -> tuple[int, Tensor]:
        """Where a part's elements begin in the file, and the part without elements."""
        if index not in self._parts:
            with file.open("rb") as stream:
                view = _create_file_view(stream, offset, length)
                part = torch.load(view, map_location="meta", weights_only=True)  # type: ignore[arg-type]
            begin = part.untyped_storage()._checkpoint_offset + part.storage_offset() * part.element_size()
            self._parts[index] = offset + begin, part
        return self._parts[index]


class CheckpointTensor(Lazy):
    """A tensor of a checkpoint."""

    def __init__(self, files: _Files, name: str) -> None:
        entry = files.index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), name
        self.name, self._files, self._chunks = name, files, entry.chunks
        self.shape, self.dtype = tuple(entry.size), entry.properties.dtype

    def read(self, box: Box) -> Tensor:
        if not self.shape:
            return self._files.read(MetadataIndex(self.name, torch.Size([])), box)
        out = torch.empty(box[1], dtype=self.dtype)
        for chunk in self._chunks:
            common = _common(box, (tuple(chunk.offsets), tuple(chunk.sizes)))
            if common is not None:
                into, there = common
                part = self._files.read(MetadataIndex(self.name, chunk.offsets), there)
                if there[1] == tuple(box[1]):
                    return part
                out[into] = part
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
    """Steps that AdamW has counted in a checkpoint, of the weights that it knows longest; None without an optimizer."""
    files = _Files(folder)
    names = [name for name in files.index.state_dict_metadata if name.endswith(".step")]
    return max((float(CheckpointTensor(files, name).read(((), ()))) for name in names), default=None)


def counts_of_last_step(folder: Path) -> Tensor | None:
    """Slots of each expert in the last step that led to a checkpoint, as the trainer kept them; None if it did not."""
    files, name = _Files(folder), "trainer.previous_count"
    return whole(CheckpointTensor(files, name)) if name in files.index.state_dict_metadata else None


def _common(box: Box, chunk: Box) -> tuple[tuple[slice, ...], Box] | None:
    """Where two boxes overlap: as slices of the first, as a box of the second."""
    ours: list[slice] = []
    offsets: list[int] = []
    sizes: list[int] = []
    for (a, n), (b, m) in zip(_ranges(box), _ranges(chunk), strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        ours.append(slice(low - a, high - a))
        offsets.append(low - b)
        sizes.append(high - low)
    return tuple(ours), (tuple(offsets), tuple(sizes))


def _ranges(box: Box) -> Sequence[tuple[int, int]]:
    return list(zip(*box, strict=True))

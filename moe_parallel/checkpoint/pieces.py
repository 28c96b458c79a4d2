"""Parts of a tensor as engines hold them that cut flat buffers (ZeRO, Megatron's distributed optimizer).

Such a part is a contiguous range of a flattened tensor, or of a flattened box of it where tensor parallelism has cut
first. torch's distributed checkpoint knows boxes only, but any range is a few of them: the end of a row, whole rows,
the beginning of a row, and so on for each dimension. So a rank writes and reads its part without gathering anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) within a tensor."""


def boxes(start: int, stop: int, sizes: Sequence[int]) -> list[Box]:
    """The fewest boxes that tile elements [start, stop) of a flattened tensor, in the order of its elements.

    Each is contiguous in the flattened tensor. There are at most 2 * dimensions - 1 of them.
    """
    if start >= stop:
        return []
    if not sizes:
        return [((), ())]
    row = math.prod(sizes[1:])
    first, last = start // row, (stop - 1) // row

    def within(index: int, begin: int, end: int) -> list[Box]:
        return [((index, *o), (1, *s)) for o, s in boxes(begin, end, sizes[1:])]

    if first == last and stop - start < row:
        return within(first, start - first * row, stop - first * row)
    head = within(first, start % row, row) if start % row else []
    tail = within(last, 0, stop % row) if stop % row else []
    begin, end = math.ceil(start / row), stop // row
    rows = [((begin, *(0 for _ in sizes[1:])), (end - begin, *sizes[1:]))] if end > begin else []
    return head + rows + tail


@dataclass(frozen=True)
class FlatRange:
    """Consecutive elements of a flattened tensor or of a flattened box of it.

    Args:
        values: 1-D, on any device; may be a view of a larger buffer.
        start: place of its first element in the flattened box.
        box: the part of the tensor that was flattened; None is all of it.
    """

    values: Tensor
    start: int
    box: Box | None = None


class Pieces:
    """What one rank holds of a tensor, as flat ranges: none, one or several.

    Args:
        shape, dtype: of the whole tensor.
        ranges: must not overlap those of other ranks, unless they are the same.
    Raises:
        ValueError: a range of another type, or beyond the tensor.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, ranges: Sequence[FlatRange]) -> None:
        self.shape, self.dtype, self.ranges = torch.Size(shape), dtype, tuple(ranges)
        self._parts: dict[torch.Size, Tensor] = {}
        if self.shape.numel() == 0:  # no range reaches it, and yet it must appear in the checkpoint
            self._parts[torch.Size([0] * len(shape))] = torch.empty(self.shape, dtype=dtype)
        for flat in self.ranges:
            offsets, sizes = flat.box or ((0,) * len(self.shape), tuple(self.shape))
            stop = flat.start + flat.values.numel()
            outside = any(o < 0 or o + s > n for o, s, n in zip(offsets, sizes, self.shape, strict=True))
            if flat.values.dim() != 1 or flat.values.dtype != dtype or outside or not 0 <= flat.start <= stop:
                raise ValueError(
                    f"a {flat.values.dtype} range of shape {tuple(flat.values.shape)} from element {flat.start} of the "
                    f"box at {offsets} with sizes {sizes} is no part of a {dtype} tensor of shape {tuple(self.shape)}"
                )
            if stop > math.prod(sizes):
                raise ValueError(f"elements {flat.start} to {stop} are beyond a box with sizes {sizes}")
            taken = 0
            for at, size in boxes(flat.start, stop, sizes):
                place = torch.Size(o + a for o, a in zip(offsets, at, strict=True))
                part = flat.values.detach()[taken : taken + math.prod(size)]
                self._parts[place], taken = part.view(size), taken + part.numel()

    def size(self) -> torch.Size:
        """Shape of the whole tensor, under the name that torch's planners ask for."""
        return self.shape

    @property
    def parts(self) -> dict[torch.Size, Tensor]:
        """The boxes that they are: offset -> a view of the elements there, in the sizes of the box."""
        return self._parts

    def on_host(self) -> Pieces:
        """A copy in host memory, of these elements and not of the buffers that they lie in."""
        copies = [replace(flat, values=flat.values.detach().to("cpu", copy=True)) for flat in self.ranges]
        return Pieces(self.shape, self.dtype, copies)

    # What follows is torch's protocol for tensors that are held in parts (torch.distributed._checkpointable).

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=place, sizes=part.shape) for place, part in self._parts.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[index.offset]

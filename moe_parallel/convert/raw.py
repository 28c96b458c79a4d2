"""Boxes of tensors that lie row after row in a file: what is not wanted is not read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box

_ROW_BYTES = 1 << 16
"""Rows up to this size are read whole where a part of each is wanted: a call for each part would cost more."""
_BLOCK_BYTES = 1 << 22
"""Of such rows at once; stays in a core's cache."""


def read_box(file: Path, start: int, shape: Sequence[int], dtype: torch.dtype, box: Box) -> Tensor:
    """Elements of a tensor, with plain reads: a map of the file would count as memory of the process, and end it
    if the file shrinks.

    Args:
        start: where the tensor begins, in bytes.
    Raises:
        ValueError: the file ends before.
    """
    out = torch.empty(box[1], dtype=dtype)
    if out.numel() == 0:
        return out
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # A scalar is a row of one.
        _read(descriptor, start, tuple(shape) or (1,), box[0] or (0,), out if out.ndim else out.view(1))
    except EOFError:
        raise ValueError(f"{file} is truncated: a tensor is said to go on where the file ends") from None
    finally:
        os.close(descriptor)
    return out


def _read(descriptor: int, start: int, shape: tuple[int, ...], offsets: Sequence[int], out: Tensor) -> None:
    """Fill `out`, of the box's sizes, from the box at `offsets`."""
    row_bytes = math.prod(shape[1:]) * out.element_size()
    first = start + offsets[0] * row_bytes
    if tuple(out.shape[1:]) == shape[1:]:
        _fill(descriptor, first, out)
    elif row_bytes <= _ROW_BYTES:
        inner = tuple(slice(o, o + s) for o, s in zip(offsets[1:], out.shape[1:], strict=True))
        rows = max(1, _BLOCK_BYTES // row_bytes)
        block = torch.empty((min(rows, len(out)), *shape[1:]), dtype=out.dtype)
        for begin in range(0, len(out), rows):
            some = block[: len(out) - begin]
            _fill(descriptor, first + begin * row_bytes, some)
            out[begin : begin + rows] = some[(slice(None), *inner)]
    else:
        for index, row in enumerate(out):
            _read(descriptor, first + index * row_bytes, shape[1:], offsets[1:], row)


def _fill(descriptor: int, start: int, out: Tensor) -> None:
    """Consecutive bytes of the file into a contiguous tensor."""
    left = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while left:
        count = os.preadv(descriptor, [left], start)  # at most 2 GiB a call
        if count == 0:
            raise EOFError
        left, start = left[count:], start + count

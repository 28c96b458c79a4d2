"""Tensors that are described before they are read: what conversions between models are made of.

A plan is a dict of these by name. It is made without reading what it is made of, so it can be printed and checked
first; then each rank reads the boxes that it holds, from wherever their elements come, and nobody ever has the whole
model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box


class Lazy(ABC):
    """A tensor that is read box by box, on the CPU. `str` says where it comes from."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, box: Box) -> Tensor:
        """The elements of a box, in its sizes. May be a view of something larger; nobody writes into it."""

    @abstractmethod
    def moment(self, order: int) -> Lazy:
        """What AdamW would know of this weight, from what it knows of those that the weight is made of.

        A weight that is s times another one has 1/s of its gradient. What is new or computed has no past: zeros.

        Args:
            order: 1 for the mean of gradients, 2 for that of their squares.
        """


def whole(lazy: Lazy) -> Tensor:
    """All of it."""
    return lazy.read(((0,) * len(lazy.shape), lazy.shape))


def size_bytes(lazy: Lazy) -> int:
    """Of all of it."""
    return math.prod(lazy.shape) * lazy.dtype.itemsize


def row_boxes(shape: Sequence[int], dtype: torch.dtype, most_bytes: int) -> Iterator[Box]:
    """Boxes of whole rows that make up a tensor, none of them larger than this, but for a single row."""
    if not shape or math.prod(shape) == 0:
        yield (0,) * len(shape), tuple(shape)
        return
    rows = max(1, most_bytes // (math.prod(shape[1:]) * dtype.itemsize))
    for first in range(0, shape[0], rows):
        yield (first, *(0 for _ in shape[1:])), (min(rows, shape[0] - first), *shape[1:])


class Constant(Lazy):
    """One number everywhere."""

    def __init__(self, shape: Sequence[int], value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self.value = tuple(shape), dtype, value

    def read(self, box: Box) -> Tensor:
        return torch.full(box[1], self.value, dtype=self.dtype)

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return f"{self.value:g}"


class Given(Lazy):
    """A tensor that is in memory: a small one, such as a router's."""

    def __init__(self, value: Tensor, text: str) -> None:
        self.value, self.text = value, text
        self.shape, self.dtype = tuple(value.shape), value.dtype

    def read(self, box: Box) -> Tensor:
        return self.value[slices(box)]

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return self.text


class Computed(Lazy):
    """What only the whole of it can be computed of: nothing is kept between two reads.

    Args:
        compute: gives the tensor, of this shape and type.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, compute: Callable[[], Tensor], text: str) -> None:
        self.shape, self.dtype, self.compute, self.text = tuple(shape), dtype, compute, text

    def read(self, box: Box) -> Tensor:
        value = self.compute()
        assert (tuple(value.shape), value.dtype) == (self.shape, self.dtype), self.text
        return value[slices(box)]

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return self.text


class Kept(Lazy):
    """A tensor that stays in memory until another one of the shelf is read, for what is costly and read in parts."""

    def __init__(self, inner: Lazy, shelf: list[Kept]) -> None:
        self.inner, self.shape, self.dtype = inner, inner.shape, inner.dtype
        self._shelf = shelf
        self._value: Tensor | None = None

    def read(self, box: Box) -> Tensor:
        if self._value is None:
            for other in self._shelf:
                other._value = None
            self._shelf[:] = [self]
            self._value = whole(self.inner)
        return self._value[slices(box)]

    def moment(self, order: int) -> Lazy:
        return self.inner.moment(order)

    def __str__(self) -> str:
        return str(self.inner)


class Part(Lazy):
    """A box of another tensor; `drop` removes dimensions of size 1, by which an expert is taken from a stack."""

    def __init__(self, inner: Lazy, box: Box, drop: Sequence[int] = ()) -> None:
        for offset, size, length in zip(*box, inner.shape, strict=True):
            if not 0 <= offset <= offset + size <= length:
                raise ValueError(f"the box {box} is not within {inner} of shape {inner.shape}")
        assert all(box[1][dim] == 1 for dim in drop)
        self.inner, self.box, self.drop = inner, box, tuple(drop)
        self.shape = tuple(size for dim, size in enumerate(box[1]) if dim not in drop)
        self.dtype = inner.dtype

    def read(self, box: Box) -> Tensor:
        offsets, sizes = list(self.box[0]), list(self.box[1])
        kept = [dim for dim in range(len(offsets)) if dim not in self.drop]
        for dim, offset, size in zip(kept, *box, strict=True):
            offsets[dim] += offset
            sizes[dim] = size
        return self.inner.read((tuple(offsets), tuple(sizes))).reshape(box[1])

    def moment(self, order: int) -> Lazy:
        return Part(self.inner.moment(order), self.box, self.drop)

    def __str__(self) -> str:
        ranges = [
            str(o) if dim in self.drop else ":" if (o, s) == (0, n) else f"{o}:{o + s}"
            for dim, (o, s, n) in enumerate(zip(*self.box, self.inner.shape, strict=True))
        ]
        while len(ranges) > 1 and ranges[-1] == ":":
            ranges.pop()
        return f"{self.inner}[{', '.join(ranges)}]"


class Stacked(Lazy):
    """Tensors of one shape along a new first dimension."""

    def __init__(self, parts: Sequence[Lazy]) -> None:
        first = parts[0]
        _alike(parts)
        self.parts, self.dtype = list(parts), first.dtype
        self.shape = (len(parts), *first.shape)

    def read(self, box: Box) -> Tensor:
        (first, *offsets), (count, *sizes) = box
        out = torch.empty(box[1], dtype=self.dtype)
        for row, part in zip(out, self.parts[first : first + count]):
            row.copy_(part.read((tuple(offsets), tuple(sizes))))
        return out

    def moment(self, order: int) -> Lazy:
        return Stacked([part.moment(order) for part in self.parts])

    def __str__(self) -> str:
        return _runs(self.parts, "stack")


class Joined(Lazy):
    """Tensors one after the other along a dimension that they have."""

    def __init__(self, parts: Sequence[Lazy], dim: int = 0) -> None:
        self.parts, self.dim, self.dtype = list(parts), dim, parts[0].dtype
        shape = list(parts[0].shape)
        for part in parts:
            rest = [size for d, size in enumerate(part.shape) if d != dim]
            if rest != [size for d, size in enumerate(shape) if d != dim] or part.dtype != self.dtype:
                raise ValueError(f"{part} of shape {part.shape} and {part.dtype} does not continue {parts[0]}")
        shape[dim] = sum(part.shape[dim] for part in parts)
        self.shape = tuple(shape)

    def read(self, box: Box) -> Tensor:
        offsets, sizes = box
        begin, end = offsets[self.dim], offsets[self.dim] + sizes[self.dim]
        out, start = torch.empty(sizes, dtype=self.dtype), 0
        for part in self.parts:
            low, high = max(begin, start), min(end, start + part.shape[self.dim])
            if low < high:
                inner = _replaced(offsets, self.dim, low - start), _replaced(sizes, self.dim, high - low)
                out.narrow(self.dim, low - begin, high - low).copy_(part.read(inner))
            start += part.shape[self.dim]
        return out

    def moment(self, order: int) -> Lazy:
        return Joined([part.moment(order) for part in self.parts], self.dim)

    def __str__(self) -> str:
        return _runs(self.parts, f"join along {self.dim}" if self.dim else "join")


class Scaled(Lazy):
    """A number times a tensor, rounded once to its type."""

    def __init__(self, inner: Lazy, factor: float) -> None:
        self.inner, self.factor, self.shape, self.dtype = inner, factor, inner.shape, inner.dtype

    def read(self, box: Box) -> Tensor:
        return (self.inner.read(box).to(_wide(self.dtype)) * self.factor).to(self.dtype)

    def moment(self, order: int) -> Lazy:
        # Where the factor is 0 the gradient has no limit, and the weight no past that would count.
        if self.factor == 0:
            return Constant(self.shape)
        return Scaled(self.inner.moment(order), self.factor**-order)

    def __str__(self) -> str:
        return f"{self.factor:.6g} * {self.inner}"


class Sum(Lazy):
    """A weighted sum of tensors of one shape, added up in float64."""

    def __init__(self, parts: Sequence[Lazy], factors: Sequence[float]) -> None:
        _alike(parts)
        self.parts, self.factors = list(parts), list(factors)
        self.shape, self.dtype = parts[0].shape, parts[0].dtype
        assert len(self.parts) == len(self.factors)

    def read(self, box: Box) -> Tensor:
        total = torch.zeros(box[1], dtype=torch.float64)
        for part, factor in zip(self.parts, self.factors):
            total.add_(part.read(box).double(), alpha=factor)
        return total.to(self.dtype)

    def moment(self, order: int) -> Lazy:
        """The same mean of theirs: each of them has been trained as a whole."""
        return Sum([part.moment(order) for part in self.parts], self.factors)

    def __str__(self) -> str:
        return " + ".join(f"{factor:.4g} * {part}" for factor, part in zip(self.factors, self.parts))


class Cast(Lazy):
    """A tensor in another type."""

    def __init__(self, inner: Lazy, dtype: torch.dtype) -> None:
        self.inner, self.dtype, self.shape = inner, dtype, inner.shape

    def read(self, box: Box) -> Tensor:
        return self.inner.read(box).to(self.dtype)

    def moment(self, order: int) -> Lazy:
        return Cast(self.inner.moment(order), self.dtype)

    def __str__(self) -> str:
        return str(self.inner)


class Repeated(Lazy):
    """Each row `times` times, one after the other."""

    def __init__(self, inner: Lazy, times: int) -> None:
        self.inner, self.times, self.dtype = inner, times, inner.dtype
        self.shape = (inner.shape[0] * times, *inner.shape[1:])

    def read(self, box: Box) -> Tensor:
        (offset, *offsets), (count, *sizes) = box
        first, last = offset // self.times, math.ceil((offset + count) / self.times)
        rows = self.inner.read(((first, *offsets), (last - first, *sizes)))
        return rows.repeat_interleave(self.times, dim=0).narrow(0, offset - first * self.times, count)

    def moment(self, order: int) -> Lazy:
        return Repeated(self.inner.moment(order), self.times)

    def __str__(self) -> str:
        return f"each row {self.times} times of {self.inner}"


def is_zero(lazy: Lazy) -> bool:
    """It is known without a read that nothing but zeros is in it."""
    if isinstance(lazy, Constant):
        return lazy.value == 0
    if isinstance(lazy, Stacked | Joined | Sum):
        return all(is_zero(part) for part in lazy.parts)
    return isinstance(lazy, Part | Scaled | Cast | Repeated) and is_zero(lazy.inner)


def expert_of(stack: Lazy, expert: int) -> Part:
    """One expert of stacked weights, without the dimension of experts."""
    rest = stack.shape[1:]
    return Part(stack, ((expert, *(0 for _ in rest)), (1, *rest)), drop=(0,))


def rows_of(inner: Lazy, first: int, count: int) -> Part:
    """Consecutive rows."""
    rest = inner.shape[1:]
    return Part(inner, ((first, *(0 for _ in rest)), (count, *rest)))


def columns_of(inner: Lazy, first: int, count: int) -> Part:
    """Consecutive elements of the last dimension."""
    before = inner.shape[:-1]
    return Part(inner, ((*(0 for _ in before), first), (*before, count)))


def slices(box: Box) -> tuple[slice, ...]:
    """What indexes a box of a tensor."""
    return tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))


def _replaced(values: Sequence[int], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _alike(parts: Sequence[Lazy]) -> None:
    for part in parts:
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            raise ValueError(
                f"{part} is {part.dtype} {part.shape}, {parts[0]} is {parts[0].dtype} {parts[0].shape}; they must be "
                "alike"
            )


def _runs(parts: Sequence[Lazy], verb: str) -> str:
    """Parts in words: equal neighbors once, with their number."""
    found: list[tuple[str, int]] = []
    for text in map(str, parts):
        if found and found[-1][0] == text:
            found[-1] = text, found[-1][1] + 1
        else:
            found.append((text, 1))
    return f"{verb}({', '.join(text if n == 1 else f'{n} x {text}' for text, n in found)})"

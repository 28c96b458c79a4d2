"""What is alive on a rank while it runs: every storage as it comes and goes, and what kind of thing it was.

The same eyes watch a real run and one on fake tensors. Views count once. What allocators, libraries and kernels take
for themselves is not seen.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator


class Kind(str, Enum):
    """What a storage was for."""

    weights = "weights"
    gradients = "gradients"
    """Those that the optimizer takes, and whole ones that wait for later micro-batches."""
    optimizer = "optimizer"
    activations = "activations"
    """Made in a forward pass and alive at its end."""
    gathered = "gathered"
    """Whole weights and gradients of a layer, and buffers of the collectives that gather and reduce them."""
    exchanged = "exchanged"
    """Buffers of other collectives that do not outlive the pass."""
    temporary = "temporary"


@dataclass(eq=False)
class Piece:
    """One storage."""

    birth: int
    kind: Kind | None = None
    """None until it is known."""
    exchanged: bool = False
    now: int = 0
    changes: list[tuple[int, int]] = field(default_factory=list)
    """When its bytes changed, and by how much. The last one is its end, if it had one."""


@dataclass(frozen=True)
class Timeline:
    """Bytes of each kind while a step ran; time counts operations."""

    time: list[int]
    bytes_by_kind: dict[str, list[int]]
    phases: list[tuple[str, int]]
    """Names, and when they began."""
    peak_bytes: int
    peak_by_kind: dict[str, int]
    peak_time: int


class LiveBytes:
    """Keeps account of the storages that it is shown."""

    def __init__(self) -> None:
        self.now = self.time = 0
        self.in_fsdp = False
        """FSDP gathers weights or reduces gradients."""
        self.in_theory = False
        """DTensor works out the shape of a result, on tensors that are not there in a real run."""
        self.phases: list[tuple[str, int]] = []
        self._start = 0
        self._pieces: list[Piece] = []
        self._of: weakref.WeakKeyDictionary[Any, Piece] = weakref.WeakKeyDictionary()

    def phase(self, name: str) -> None:
        """What follows belongs to it."""
        self.phases.append((name, self.time))

    def see(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is a new one."""
        storage = local(tensor).untyped_storage()
        if storage in self._of:
            return False
        piece = self._of[storage] = Piece(self.time)
        self._pieces.append(piece)
        weakref.finalize(storage, self._set, piece, 0)
        self._set(piece, storage.nbytes())
        return True

    def tag(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a storage is for. What was said first stays."""
        self.see(tensor)
        piece = self._of[local(tensor).untyped_storage()]
        piece.kind = piece.kind or kind

    def mark_exchanged(self, tensor: Tensor) -> None:
        """A buffer of a collective."""
        self.see(tensor)
        self._of[local(tensor).untyped_storage()].exchanged = True

    @contextmanager
    def with_fsdp(self) -> Iterator[None]:
        """Also see FSDP empty and fill storages, which no operator tells of; forget what was there before."""
        self._pieces = [piece for piece in self._pieces if piece.now]
        for piece in self._pieces:
            piece.birth, piece.changes = self.time, [(self.time, piece.now)]
        self._start, self.phases = self.time, []
        with ExitStack() as stack:
            for module in (_fsdp_param, _fsdp_param_group):
                for name in ("free_storage", "alloc_storage"):
                    if hasattr(module, name):
                        stack.enter_context(replaced(module, name, self._resizing(getattr(module, name))))
            for name in ("foreach_all_gather", "foreach_reduce"):
                entering = self._entering("in_fsdp", getattr(_fsdp_param_group, name))
                stack.enter_context(replaced(_fsdp_param_group, name, entering))
            name = "_propagate_tensor_meta_non_cached"
            entering = self._entering("in_theory", getattr(ShardingPropagator, name))
            stack.enter_context(replaced(ShardingPropagator, name, entering))
            yield

    def _resizing(self, resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def call(tensor: Tensor) -> None:
            resize(tensor)
            self.time += 1
            self.tag(tensor, Kind.gathered)
            storage = tensor.untyped_storage()
            self._set(self._of[storage], storage.nbytes())

        return call

    def _entering(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(self, place, True)
            try:
                return function(*args, **kwargs)
            finally:
                setattr(self, place, False)

        return call

    def _set(self, piece: Piece, value: int) -> None:
        if value != piece.now:
            piece.changes.append((self.time, value - piece.now))
            self.now += value - piece.now
            piece.now = value

    def timeline(self, points: int = 800) -> Timeline:
        """What was alive since `with_fsdp` began, at the fullest moments of so many equal spans of time."""
        ends = [start for _, start in self.phases[1:]] + [self.time]
        starts = [start for _, start in self.phases]
        kinds = list(Kind)
        total = np.zeros((len(kinds), self.time - self._start + 2), dtype=np.int64)
        for piece in (piece for piece in self._pieces if piece.changes):
            kind = kinds.index(self._kind(piece, starts, ends))
            # A storage that is replaced within one operation frees nothing before it: births count first.
            for when, change in piece.changes:
                total[kind, when - self._start + (change < 0)] += change
        total = total.cumsum(axis=1)
        whole = total.sum(axis=0)
        peak = int(whole.argmax())
        cuts = np.unique(np.linspace(0, len(whole), points + 1, dtype=np.int64))
        chosen = np.array([a + int(whole[a:b].argmax()) for a, b in pairwise(cuts)])
        return Timeline(
            time=chosen.tolist(),
            bytes_by_kind={kind.value: total[i, chosen].tolist() for i, kind in enumerate(kinds)},
            phases=[(name, start - self._start) for name, start in self.phases],
            peak_bytes=int(whole[peak]),
            peak_by_kind={kind.value: int(total[i, peak]) for i, kind in enumerate(kinds)},
            peak_time=peak,
        )

    def kept_bytes(self) -> int:
        """What passes of micro-batches left behind at the beginning of the phase "end", and buffers made for them, but
        for weights and gradients."""
        end = next(start for name, start in self.phases if name == "end")
        ends = [start for _, start in self.phases[1:]] + [self.time]
        starts = [start for _, start in self.phases]
        kept = 0
        for piece in (piece for piece in self._pieces if piece.changes):
            index = bisect_right(starts, piece.birth) - 1
            forward = self.phases[index][0].startswith(("start", "forward"))
            if forward and self._kind(piece, starts, ends) in (Kind.activations, Kind.exchanged, Kind.temporary):
                kept += sum(change for when, change in piece.changes if when < end)
        return kept

    def _kind(self, piece: Piece, starts: list[int], ends: list[int]) -> Kind:
        if piece.kind is not None:
            return piece.kind
        index = bisect_right(starts, piece.birth) - 1
        if index >= 0 and self.phases[index][0].startswith("forward"):
            died = piece.changes[-1][0] if piece.now == 0 else self.time + 1
            if died > ends[index]:
                return Kind.activations
        elif index >= 0 and self.phases[index][0].startswith("backward") and not piece.exchanged:
            died = piece.changes[-1][0] if piece.now == 0 else self.time + 1
            if died > ends[index]:
                return Kind.gradients
        return Kind.exchanged if piece.exchanged else Kind.temporary


def local(tensor: Tensor) -> Tensor:
    """What a rank holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Of nested lists and tuples, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def storage_bytes(tensor: Tensor) -> int:
    """Bytes that an operator touches: an expanded tensor has less memory than elements."""
    return min(tensor.numel() * tensor.element_size(), local(tensor).untyped_storage().nbytes())

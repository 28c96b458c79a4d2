"""What differs between a GPU and the CPU of a dry run: clocks, caches, memory, and how fresh memory is poisoned."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20
"""Written before each timed part: more than the cache of any present GPU, so that nothing is found in it."""
RESERVE_BYTES = 2 * 2**30
"""Left free when the rest of the memory is poisoned."""


class Device:
    """The device of a run. On a CPU the clock is the host's, and memory peaks are unknown."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"
        self._flush = torch.zeros(FLUSH_BYTES // 4 if self.is_gpu else 1024, dtype=torch.int32, device=self.device)

    def name(self) -> str:
        """Of the hardware."""
        if self.is_gpu:
            return torch.cuda.get_device_name()
        from benchmarks.report import processor

        return processor()

    def synchronize(self) -> None:
        """Wait; raises what an earlier kernel did wrong."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give unused memory back."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def flush(self) -> None:
        """Push everything out of the cache."""
        self._flush.zero_()

    def stamp(self) -> Stamp:
        """The present moment on the device's own clock."""
        return Stamp(self.is_gpu)

    def seconds(self, work: Callable[[], object]) -> float:
        """Time of one call by the host's clock, waiting for its end: what a user waits for a first call."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    @contextmanager
    def peak(self, into: dict[str, int | None]) -> Iterator[None]:
        """Highest allocation above what was allocated at the start, in bytes, as `into["peak"]`."""
        into["peak"] = None
        if not self.is_gpu:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        into["peak"] = torch.cuda.max_memory_allocated() - before

    @contextmanager
    def poisoned(self, size: int | None) -> Iterator[None]:
        """Memory that is allocated inside holds NaN (all bits set, in any floating type; -1 as an integer).

        On a GPU the allocator hands out the block again that is filled and freed here. On a CPU torch fills new
        tensors itself, which it does only with deterministic algorithms: where it has a choice, not the code timed.

        Args:
            size: bytes that the work will need, if known.
        """
        if self.is_gpu:
            self._poison_free_memory(size)
            yield
            return
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    def _poison_free_memory(self, size: int | None) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        room = max(free - RESERVE_BYTES, 0)
        wanted = room if size is None else min(int(size * 1.25) + 2**28, room)
        # Small tensors live in a pool of their own, in blocks of 2 MiB.
        blocks = [torch.full((2**19,), -1, dtype=torch.int8, device=self.device) for _ in range(256)]
        if wanted:
            blocks.append(torch.full((wanted,), -1, dtype=torch.int8, device=self.device))
        torch.cuda.synchronize()

    def state(self) -> str | None:
        """Clock, power and temperature, from nvidia-smi."""
        if not (self.is_gpu and shutil.which("nvidia-smi")):
            return None
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


class Stamp:
    """A moment on a device: an event in its stream, or the host's time."""

    def __init__(self, is_gpu: bool) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if is_gpu else None
        if self.event is not None:
            self.event.record()
        self.host = time.perf_counter()

    def until(self, later: Stamp) -> float:
        """Seconds between two moments; on a GPU both must have passed (synchronize first)."""
        if self.event is not None:
            assert later.event is not None
            return self.event.elapsed_time(later.event) / 1e3
        return later.host - self.host


def saved_bytes(work: Callable[[], Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The result of `work`, and how many bytes autograd keeps for its backward pass.

    Storages are counted once and whole, since a view keeps all of its storage; those of `parameters` are left out.
    """
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return result, sum(storages.values())

"""The process that computes, and the handle to it: it may run out of memory, crash or hang without ending the run."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu_train.models import Model
from benchmarks.gpu_train.sides import PARALLEL, Side, build
from moe_parallel import launch
from moe_parallel.mesh import ParallelMesh, make_layout
from moe_parallel.meter import peak_flops_per_second

LEFT_OVER_BYTES = 2**30
"""More than this after everything was let go, and the process is replaced: the next side must not pay for the last."""


@dataclasses.dataclass
class Turn:
    """Some steps of one side."""

    seconds: list[float]
    losses: list[float]
    busiest: float | None
    peak_bytes: int | None
    """Highest allocation during these steps, weights and optimizer included; None on a CPU."""
    held_bytes: int | None
    """Allocated between steps: weights and optimizer."""


class Bench:
    """What the process can be asked for. Sides live here, by name."""

    def __init__(self) -> None:
        here = launch.start(timeout_seconds=600)
        self.device = here.device
        self.is_gpu = here.device.type == "cuda"
        self.mesh = ParallelMesh(make_layout(PARALLEL, 1, 1), here.device.type)
        self.sides: dict[str, Side] = {}

    def machine(self, dry: bool) -> dict[str, Any]:
        """What it is, and what it reaches at best."""
        import transformers

        device = Device(self.device.type)
        return {
            "device": device.name(),
            "memory_bytes": torch.cuda.get_device_properties(self.device).total_memory if self.is_gpu else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "published_flops": peak_flops_per_second(self.device, torch.bfloat16),
            "ceilings": ceilings(device, dry),
        }

    def build(self, name: str, model: Model) -> None:
        """Make a side."""
        self.sides[name] = build(name, model, self.mesh, self.device)

    def steps(self, name: str, model: Model, first: int, count: int) -> Turn:
        """Train on the batches `first` and following. The batch is on the device before the clock starts."""
        side = self.sides[name]
        seconds, losses = [], []
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        for index in range(first, first + count):
            batch = model.batch(index, self.device)
            self.synchronize()
            began = time.perf_counter()
            losses.append(side.step(batch, index))
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        peak, held = None, None
        if self.is_gpu:
            peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Turn(seconds, losses, side.busiest, peak, held)

    def free(self, name: str) -> bool:
        """Let a side go; False if something of it stays."""
        side = self.sides.pop(name, None)
        gone = weakref.ref(side) if side is not None else None
        del side
        gc.collect()
        left = 0
        if self.is_gpu:
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated()
        return (gone is None or gone() is None) and (bool(self.sides) or left < LEFT_OVER_BYTES)

    def synchronize(self) -> None:
        """Wait for the device; raises what a kernel did wrong."""
        if self.is_gpu:
            torch.cuda.synchronize()


def serve(connection: Connection) -> None:
    """Answer until the other end closes: (value, error, whether this process can go on)."""
    bench = Bench()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        value, error, sound = None, None, True
        try:
            value = getattr(bench, method)(**arguments)
        except Exception as raised:  # whatever a side does wrong is a line of the table
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised).strip() else ''}"
        if error is not None:
            try:
                sound = bench.free(arguments.get("name", ""))
                bench.synchronize()
            except Exception:
                sound = False
        connection.send((value, error, sound))
    launch.finish()


class SideFailed(Exception):
    """A side cannot do what was asked; the reason."""


class OutOfTime(Exception):
    """The time of the run is up."""


class Worker:
    """The process, started when it is first needed and again after it was lost, its sides with it."""

    def __init__(self, deadline: float) -> None:
        """
        Args:
            deadline: as `time.time` counts; answers are not awaited for longer.
        """
        self.deadline = deadline
        self.built: set[str] = set()
        self._process: Any = None
        self._connection: Any = None

    def ask(self, method: str, **arguments: Any) -> Any:
        """The answer of `Bench.method`.

        Raises:
            SideFailed: it raised, or ended the process.
            OutOfTime: it took longer than there is time.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(max(0.0, self.deadline - time.time())):
                self.close(kill=True)
                raise OutOfTime
            value, error, sound = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as gone:
            self._process.join(10)
            code = self._process.exitcode
            self.close(kill=True)
            raise SideFailed(f"ended its process (exit code {code})") from gone
        if not sound:
            self.close(kill=True)
        if error is not None:
            self.built.discard(arguments.get("name", ""))
            raise SideFailed(error)
        return value

    def build(self, name: str, model: Model) -> None:
        """Unless it is there already."""
        if name not in self.built:
            self.ask("build", name=name, model=model)
            self.built.add(name)

    def steps(self, name: str, model: Model, first: int, count: int) -> Turn:
        """See `Bench.steps`."""
        turn: Turn = self.ask("steps", name=name, model=model, first=first, count=count)
        return turn

    def free(self, name: str) -> None:
        """With the whole process, if something of it stays."""
        if name in self.built:
            self.built.discard(name)
            if not self.ask("free", name=name):
                self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def close(self, kill: bool = False) -> None:
        """End the process."""
        if self._process is None:
            return
        self._connection.close()
        if kill:
            self._process.kill()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process, self._connection, self.built = None, None, set()

"""Run a function on several ranks: as processes on gloo, or as threads of one process.

Processes are the real thing. Importing torch takes them seconds, so they are forked from one that has imported it. They
have one seed of the hashes of strings, which processes of torchrun have not (tests/test_train.py starts some).
Threads share one interpreter; they cover collectives and FSDP, but no point-to-point operations.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def forked() -> ForkServerContext:
    """Makes processes that are forked from one that has imported what most of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.loaded"])
    return context


class RankFailed(AssertionError):
    """A rank raised, hung or died; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `fn(*args)` in `world` processes with a gloo process group. Returns each rank's result.

    `fn` must be importable; its arguments and its result are pickled. Rendezvous is a file: no ports.
    """
    return _start(_process_rank, world, world, fn, args, timeout)


def run_threads(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `fn(*args)` in `world` threads of one fresh process with a threaded process group.

    The process is fresh because installing that process group changes torch for the rest of its life.
    """
    return _start(_threaded_process, 1, world, fn, args, timeout)[0]


def _start(target: Callable[..., None], processes: int, world: int, fn: Any, args: Any, timeout: float) -> list[Any]:
    context = forked()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_in, args=(environment, target, rank, world, folder, fn, args, timeout), daemon=True)
            for rank in range(processes)
        ]
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(timeout)
        finally:
            for process in started:
                if process.is_alive():
                    process.kill()
        return _results(Path(folder), [process.exitcode for process in started])


def _in(environment: dict[str, str], target: Callable[..., None], *args: Any) -> None:
    os.environ.clear()  # a fork has that of the time when the first one was made
    os.environ.update(environment)
    target(*args)


def _results(folder: Path, exit_codes: list[int | None]) -> list[Any]:
    values, problems = [], []
    for rank, exit_code in enumerate(exit_codes):
        path = folder / f"result_{rank}"
        if not path.exists():
            problems.append(f"rank {rank} left no result (exit code {exit_code}; None means it hung)")
            continue
        ok, value = pickle.loads(path.read_bytes())
        values.append(value)
        if not ok:
            problems.append(f"rank {rank} failed:\n{value}")
    if problems:  # all of them: the first to fail takes the others' connections down
        raise RankFailed("\n".join(problems))
    return values


def _report(folder: str, rank: int, call: Callable[[], Any]) -> None:
    try:
        answer = (True, call())
    except BaseException:
        answer = (False, traceback.format_exc())
    partial = Path(folder) / f".result_{rank}"
    partial.write_bytes(pickle.dumps(answer))
    partial.rename(Path(folder) / f"result_{rank}")


def _process_rank(rank: int, world: int, folder: str, fn: Any, args: Any, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)

    def call() -> Any:
        store = dist.FileStore(os.path.join(folder, "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        value = fn(*args)
        dist.barrier()
        dist.destroy_process_group()
        return value

    _report(folder, rank, call)


def _threaded_process(_: int, world: int, folder: str, fn: Any, args: Any, timeout: float) -> None:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    torch.set_num_threads(1)
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store, results, errors = dist.HashStore(), [None] * world, []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = fn(*args)
        except BaseException:
            errors.append(f"thread of rank {rank}:\n{traceback.format_exc()}")

    def call() -> Any:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        while any(thread.is_alive() for thread in threads):
            if errors:
                time.sleep(1.0)  # others may fail of themselves and say more; else they wait for the dead one
                raise RankFailed("\n".join(errors))
            if time.monotonic() > deadline:
                raise RankFailed("a rank hangs")
            threads[0].join(0.01) if threads[0].is_alive() else time.sleep(0.01)
        if errors:
            raise RankFailed("\n".join(errors))
        return results

    _report(folder, 0, call)
    os._exit(0)  # threads of a failed run may wait for ever

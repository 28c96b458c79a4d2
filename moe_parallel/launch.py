"""Who am I among the ranks: torchrun, Slurm or a single process; meeting, failing and leaving together."""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_parallel.stop import Stopped

T = TypeVar("T")

_PATIENCE_SECONDS = 15.0
"""How much later than others rank 0 may find the same mistake."""


@dataclass(frozen=True)
class Launch:
    """This process's place, read from the launcher's environment."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    store: dist.Store
    """Shared by all ranks; takes no part in collectives."""

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes and speaks."""
        return self.rank == 0

    def report(self, error: BaseException) -> None:
        """Print an error once: rank 0 speaks for all that have it, a rank that is alone with it for itself."""
        if self.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
            self.store.set("reported", "")
            return
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            while not self.store.check(["reported"]):
                if time.monotonic() > deadline:  # rank 0 has no error: it waits for this rank in some collective
                    print(f"error on rank {self.rank}: {error}", file=sys.stderr, flush=True)
                    return
                time.sleep(0.1)
        except RuntimeError:
            return  # rank 0 kept the store, and has left


def read_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) from torchrun's variables, else from srun's, else a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # srun sets these for every task; MASTER_ADDR tells a job that was launched for training from an
    # interactive shell inside an allocation, where a plain `python train.py` means one process.
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def ranks_per_node() -> int | None:
    """Ranks on each host, from torchrun or srun; None where neither says, or where hosts have different numbers."""
    if local := os.environ.get("LOCAL_WORLD_SIZE"):
        return int(local)
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x16); 8(x2),4 if hosts differ
    found = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    return int(found.group(1)) if found and "MASTER_ADDR" in os.environ else None


def say(text: str) -> None:
    """A line on standard error, from rank 0 alone."""
    if read_environment()[0] == 0:
        print(text, file=sys.stderr, flush=True)


def refuse(error: Exception) -> None:
    """Report a mistake that every rank finds by itself before the ranks have met."""
    say(f"error: {error}")
    if read_environment()[0] != 0:
        time.sleep(_PATIENCE_SECONDS)  # a launcher that saw this rank end first would end rank 0 before it has spoken


def device_type() -> str:
    """What a run computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start(timeout_seconds: float, job: int = 0) -> Launch:
    """Join the process group (NCCL for CUDA tensors, gloo for CPU tensors) and choose the device.

    Args:
        job: number of the run within this process; a sweep has several.
    """
    rank, world, local_rank = read_environment()
    if device_type() == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # CPU collectives stay available: stop flags and checkpoints must not queue behind the GPU's work.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # torchrun reuses its store over restarts, and a sweep over its jobs; without a prefix for each the ranks read
    # the addresses of dead ones and cannot meet.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}/job_{job}", _store(world, timeout))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Launch(rank, world, local_rank, device, store)


def _store(world: int, timeout: datetime.timedelta) -> dist.Store:
    if world == 1:
        return dist.HashStore()  # no port, no network
    if "RANK" not in os.environ:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return store


def together(action: Callable[[], T]) -> T:
    """Do it on every rank; what goes wrong on one goes wrong on all.

    Without this the other ranks would wait for the failed one in their next collective, and blame the network.

    Raises:
        Stopped: some rank was told to stop.
        ValueError: some rank could not use its input; the text of the first one.
    """
    value: list[T] = []
    failure: BaseException | None = None
    try:
        value.append(action())
    except (Stopped, ValueError, OSError) as error:
        failure = error
    if any(_gather(isinstance(failure, Stopped))):
        raise Stopped
    if (text := first_text(failure)) is not None:
        raise ValueError(text) from failure
    return value[0]


def first_text(error: BaseException | None) -> str | None:
    """The words of the first rank that has an error, on all ranks; None if none has."""
    return next((text for text in _gather(None if error is None else str(error)) if text is not None), None)


def _gather(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def on_first(action: Callable[[], T]) -> T:
    """Do it on rank 0 and give all ranks the result, which must pickle: other hosts may see an older file system."""
    found: list[Any] = [None]

    def act() -> None:
        if dist.get_rank() == 0:
            found[0] = action()

    together(act)
    dist.broadcast_object_list(found)
    return found[0]


def finish(together: bool = True) -> None:
    """Leave the process group.

    Args:
        together: wait for all: a rank that exits early takes the launcher down while others still save.
    """
    if not dist.is_initialized():
        return
    if together:
        dist.barrier()
    dist.destroy_process_group()

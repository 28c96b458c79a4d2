"""Who am I among the ranks: torchrun, Slurm or a single process; process group and device."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Launch:
    """This process's place, read from the launcher's environment."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes and speaks."""
        return self.rank == 0


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


def start(timeout_seconds: float) -> Launch:
    """Join the process group (NCCL for CUDA tensors, gloo for CPU tensors) and choose the device."""
    rank, world, local_rank = read_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # CPU collectives stay available: stop flags and checkpoints must not queue behind the GPU's work.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = _store(world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Launch(rank, world, local_rank, device)


def _store(world: int, timeout: datetime.timedelta) -> dist.Store:
    if world == 1:
        return dist.HashStore()  # no port, no network
    if "RANK" not in os.environ:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun reuses its store over restarts; without a prefix per attempt the new ranks read the addresses of
    # dead ones and the restart fails.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store)


def finish() -> None:
    """Leave together: a rank that exits early takes the launcher down while others still save."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

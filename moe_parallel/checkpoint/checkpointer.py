"""Saves and loads training state: atomic, in the background, for any number of ranks and any layout."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError
from moe_parallel.checkpoint.reader import SafeReader
from moe_parallel.checkpoint.state import (
    check_entries,
    common_entries,
    empty_extra,
    empty_optimizer_state,
    join_extra,
    model_state,
    optimizer_state,
    set_optimizer_state,
    size_bytes,
    split_extra,
)

T = TypeVar("T")
GIB = 2**30
# Ranks wait for the slowest disk; the default of half an hour is not enough for terabytes.
_TIMEOUT = timedelta(hours=3)


@dataclass(kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Optimizer steps between checkpoints; 0 = only at the end of the run and when it is told to stop."""
    keep_last: int = 2
    """Complete checkpoints to keep. The disk must hold one more while a new one is written."""
    asynchronous: bool = True
    """Write in the background from a copy in host memory, while training goes on."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"checkpoint.every_steps={self.every_steps} must be at least 0 (0 = only at the end)")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last} must be at least 1")


@plain_dataclass(frozen=True)
class _Job:
    """One save: what is written where. All but `tensors` matters on rank 0 only."""

    step: int
    partial: Path
    final: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


class Checkpointer:
    """The checkpoints of one run. Every method but `due` must be called by all ranks, in the same order.

    Args:
        folder: where checkpoints lie; a file system that all hosts share.
        config: how often, how many, in the background or not.
        process_group: all ranks of the run, or None for a single process. Collectives of saving run on gloo
            groups of their own: in the training's group they would mix with those of the step (it hung).
        about: plain facts to record and never compare, such as mesh degrees and the git revision.
        warn: called on rank 0 with one line of text.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        process_group: dist.ProcessGroup | None = None,
        *,
        about: dict[str, Any] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if process_group is None and initialized and dist.get_world_size() > 1:
            raise ValueError(
                f"process_group=None with {dist.get_world_size()} ranks; pass the group of all ranks, "
                "else each rank would save alone"
            )
        self.folder, self.config, self.about, self.warn = folder, config, about or {}, warn
        self._group = self._control = None
        self._rank = 0
        if process_group is not None:
            ranks = dist.get_process_group_ranks(process_group)
            self._group = dist.new_group(ranks, backend="gloo", timeout=_TIMEOUT)  # the saving thread's
            self._control = dist.new_group(ranks, backend="gloo")  # poll's, while that thread is busy
            self._rank = dist.get_rank(self._group)
        else:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._pending: Future[Path] | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after this optimizer step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | None,
        extra: dict[str, Any],
        identity: dict[str, Any],
        *,
        tokens: int = 0,
    ) -> Path:
        """Write `step_<step>`; waits for an earlier background save first.

        Args:
            step: optimizer steps done.
            model: parameters and persistent buffers; plain tensors or DTensors on any meshes.
            optimizer: its moments and step counts; hyper-parameters come from the configuration instead.
            extra: plain data and tensors of the trainer, the same on all ranks (rank 0's is kept).
            identity: what makes this model another model (the architecture); compared by `load`.
            tokens: tokens trained on so far, recorded.
        Returns:
            Where the checkpoint will be: at once if synchronous, else when `poll` or `wait` say so.
        Raises:
            CheckpointError: on all ranks; too little space (before any tensor is written), failure to write,
                or a failure of the earlier background save.
        """
        self.wait()
        model_tensors = model_state(model)
        tensors = dict(model_tensors)
        if optimizer is not None:
            tensors |= optimizer_state(optimizer, model_tensors)
        plain_extra, extra_tensors = split_extra(extra)
        tensors |= extra_tensors
        meta = {
            "step": step,
            "tokens": tokens,
            "identity": json.loads(json.dumps(identity)),
            "about": self.about,
            "torch": torch.__version__,
            "tensor_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        }
        partial = folders.partial_path(self.folder, step)
        meta["sequence"] = self._first(lambda: self._prepare(partial, size_bytes(tensors), plain_extra))
        job = _Job(step, partial, folders.final_path(self.folder, step), meta, tensors)
        if not self.config.asynchronous:
            return self._write(job)
        # Without its options the stager makes a plain copy in host memory before it returns.
        copy = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
        assert isinstance(copy, dict)
        self._pending = _in_background(self._write, replace(job, tensors=copy))
        return job.final

    def poll(self) -> Path | None:
        """Call after each step: the checkpoint that the background has finished by now, if any. Never waits.

        All ranks get the same answer at the same step (a small all-reduce while a save is under way), so
        an error stops all of them together.

        Raises:
            CheckpointError: the background save failed.
        """
        if self._pending is None:
            return None
        done = torch.tensor(self._pending.done(), dtype=torch.int32)
        if self._control is not None:
            dist.all_reduce(done, dist.ReduceOp.MIN, group=self._control)
        return self.wait() if done.item() else None

    def wait(self) -> Path | None:
        """Wait for a background save, if there is one. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        try:
            return None if pending is None else pending.result()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"a background save to {self.folder} failed: {error!r}") from error

    def latest(self) -> Path | None:
        """The newest complete checkpoint; incomplete and damaged ones are skipped with a warning."""
        self.wait()
        # Rank 0 decides: a file system may show the other hosts an older state of the folder.
        found = self._first(lambda: folders.complete(self.folder, self.warn))
        return found[-1] if found else None

    def load(
        self, path: Path, model: nn.Module, optimizer: Optimizer | None, identity: dict[str, Any]
    ) -> dict[str, Any]:
        """Fill model and optimizer, in whatever layout they are, from a checkpoint of any layout.

        Args:
            path: a checkpoint folder.
            model: built and sharded for this run; its tensors are overwritten in place.
            optimizer: gets moments and step counts; None = load the model only. Learning rate and other
                hyper-parameters keep their configured values.
            identity: must equal the saved one.
        Returns:
            The `extra` that was saved; tensors in it are on the CPU.
        Raises:
            UnusableCheckpointError: damaged, of another model, not fitting, or with an unsafe index.
        """
        self.wait()
        meta = folders.read_meta(path)
        if different := folders.differences(meta["identity"], identity):
            raise UnusableCheckpointError(
                f"{path} is a checkpoint of another model: " + "; ".join(different) + ". "
                "Set these options as in the checkpoint, or start a new run with another run.name"
            )
        reader = SafeReader(path, set(meta["files"]))
        index = reader.read_metadata()
        model_tensors = model_state(model)
        moments = empty_optimizer_state(optimizer, model_tensors, index) if optimizer is not None else {}
        check_entries(model_tensors | moments, index, with_optimizer=optimizer is not None)
        extra_tensors = empty_extra(index)
        self._read(path, reader, model_tensors | moments | extra_tensors)
        if optimizer is not None:
            set_optimizer_state(optimizer, model_tensors, moments)
        return join_extra(json.loads((path / folders.EXTRA).read_text()), extra_tensors)

    def load_weights(self, path: Path, model: nn.Module) -> list[str]:
        """Fill a model from a checkpoint of it or of one with fewer parts; what that does not have is left as it is.

        Returns:
            Names of the parameters and buffers that were left.
        Raises:
            UnusableCheckpointError: damaged, with weights that this model does not have or of other shapes.
        """
        self.wait()
        reader = SafeReader(path, set(folders.read_meta(path)["files"]))
        index = reader.read_metadata()
        wanted = model_state(model)
        common = common_entries(wanted, index)
        self._read(path, reader, common)
        return sorted(key.removeprefix("model.") for key in wanted.keys() - common.keys())

    def close(self) -> None:
        """Wait for a background save and leave the process groups."""
        try:
            self.wait()
        finally:
            for group in (self._group, self._control):
                if group is not None:
                    dist.destroy_process_group(group)
            self._group = self._control = None

    def _prepare(self, partial: Path, needed: int, plain_extra: Any) -> int:
        """On rank 0, before tensors are written: the new checkpoint's place in the order of writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.remove_leftovers(self.folder)
        extra = json.dumps(plain_extra)
        free = shutil.disk_usage(self.folder).free
        needed += 2 * len(extra) + 2**16
        if free < needed:
            raise CheckpointError(
                f"not enough disk space for a checkpoint in {self.folder}: needed {needed / GIB:.3f} GiB, "
                f"free {free / GIB:.3f} GiB; free some space, or lower checkpoint.keep_last="
                f"{self.config.keep_last} and remove the oldest checkpoint by hand. Nothing was written"
            )
        before = folders.complete(self.folder, self.warn)
        sequence = 1 + (folders.read_meta(before[-1])["sequence"] if before else 0)
        partial.mkdir()
        folders.write_json(partial / folders.EXTRA, plain_extra)
        return sequence

    def _write(self, job: _Job) -> Path:
        """Tensors, then the name, then the pruning. Runs in the background thread if asynchronous."""
        try:
            index = dcp.save(
                job.tensors,
                storage_writer=_Writer(job.partial),
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:  # a BaseException in torch, the same one on all ranks
            self._first(lambda: shutil.rmtree(job.partial, ignore_errors=True))
            raise CheckpointError(self._explain(job.step, error)) from error
        return self._first(lambda: self._publish(job, index))

    def _publish(self, job: _Job, index: Metadata) -> Path:
        """On rank 0, after all ranks have written."""
        try:
            expected = {info.relative_path for info in index.storage_data.values()}
            absent = expected - {file.name for file in job.partial.iterdir()}
            if absent:
                raise CheckpointError(
                    f"{sorted(absent)} were written by other hosts and are not in {job.partial}; "
                    "run.dir must be on a file system that all hosts share"
                )
            folders.finish(job.partial, job.final, job.meta)
        except Exception:
            shutil.rmtree(job.partial, ignore_errors=True)
            raise
        folders.prune(self.folder, self.config.keep_last)
        return job.final

    def _read(self, path: Path, reader: SafeReader, tensors: dict[str, Tensor]) -> None:
        try:
            dcp.load(
                tensors,
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UnusableCheckpointError(f"{path} could not be loaded on rank {rank}: {cause!r}") from error

    def _explain(self, step: int, error: CheckpointException) -> str:
        rank, (cause, _) = next(iter(error.failures.items()))
        full = [e for e, _ in error.failures.values() if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT)]
        free = shutil.disk_usage(self.folder).free
        if full:
            return (
                f"no space left while writing the checkpoint of step {step} to {self.folder} "
                f"({free / GIB:.3f} GiB free now; a quota may be lower): free some space, or lower "
                f"checkpoint.keep_last={self.config.keep_last}. Earlier checkpoints are intact"
            )
        return (
            f"the checkpoint of step {step} could not be written to {self.folder} on rank {rank}: {cause!r}. "
            "Earlier checkpoints are intact"
        )

    def _first(self, action: Callable[[], T]) -> T:
        """Do it on rank 0 only; its result, or its error, on all ranks."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:  # the others wait for an answer, whatever happened
                outcome[1] = str(error) if isinstance(error, CheckpointError) else repr(error)
        if self._group is not None:
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
        return outcome[0]


class _Writer(dcp.FileSystemWriter):
    """Reports the operating system's error ("no space left"), which torch's archive writer hides."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


def _in_background(work: Callable[[_Job], Path], job: _Job) -> Future[Path]:
    """Run in a daemon thread: an executor's threads would keep a crashed run alive until the save ends."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(work(job))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future

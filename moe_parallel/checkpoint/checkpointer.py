"""Saves and loads training state: atomic, in the background, for any number of ranks and any layout."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic.dataclasses import dataclass
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.agreement import Agreement
from moe_parallel.checkpoint.fit import check_fit
from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError
from moe_parallel.checkpoint.reader import ReadPlanner, SafeReader
from moe_parallel.checkpoint.state import Entries, TrainingState, empty_extra, host_copy, join_extra, split_extra
from moe_parallel.checkpoint.writer import WritePlanner, Writer, explain

# Ranks wait for the slowest disk; the default of half an hour is not enough for terabytes.
_TIMEOUT = timedelta(hours=3)


@dataclass(kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Optimizer steps between checkpoints; 0 = only at the end of the run and when it is told to stop."""
    keep_last: int = 2
    """Newest checkpoints to keep. The disk must hold one more while a new one is written."""
    keep_every_steps: int = 0
    """Keep all checkpoints of steps that are multiples of this, besides the others; 0 = none."""
    keep_best: int = 0
    """Checkpoints with the lowest validation loss to keep, besides the others; 0 = none."""
    asynchronous: bool = True
    """Write in the background from a copy in host memory, while training goes on."""
    verify: bool = True
    """Compare checksums of all files before anything is loaded; each rank reads a share of them."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"checkpoint.every_steps={self.every_steps} must be at least 0 (0 = only at the end)")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last} must be at least 1")
        if self.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best={self.keep_best} must be at least 0 (0 = none)")
        every, keep = self.every_steps, self.keep_every_steps
        if keep < 0 or (keep > 0 and (every == 0 or keep % every != 0)):
            remedy = f"{max(1, keep // every) * every}, or 0 to keep none" if every else "0: no step is saved regularly"
            raise ValueError(
                f"checkpoint.keep_every_steps={keep} must be a multiple of checkpoint.every_steps={every}; use {remedy}"
            )

    def check_evaluation(self, every_steps: int, validation_sequences: int) -> None:
        """That every regular checkpoint has a validation loss, if they are to be compared by it.

        Args:
            every_steps: evaluation.every_steps.
            validation_sequences: data.validation_sequences.
        Raises:
            ValueError: some or all would have none.
        """
        if self.keep_best == 0:
            return
        rule = f"checkpoint.keep_best={self.keep_best} compares validation losses, but"
        if validation_sequences == 0:
            raise ValueError(f"{rule} data.validation_sequences=0 holds nothing out; raise it, or keep no best ones")
        if every_steps == 0 or self.every_steps == 0 or self.every_steps % every_steps != 0:
            raise ValueError(
                f"{rule} checkpoint.every_steps={self.every_steps} is not a multiple of "
                f"evaluation.every_steps={every_steps}, so some checkpoints have none; use equal numbers"
            )

    @property
    def retention(self) -> folders.Retention:
        return folders.Retention(self.keep_last, self.keep_every_steps, self.keep_best)


@plain_dataclass(frozen=True)
class _Job:
    """One save: what is written where. All but `tensors` matters on rank 0 only."""

    partial: Path
    final: Path
    meta: dict[str, Any]
    tensors: Entries = field(repr=False)


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
        if process_group is not None:
            ranks = dist.get_process_group_ranks(process_group)
            self._group = dist.new_group(ranks, backend="gloo", timeout=_TIMEOUT)  # the saving thread's
            self._control = dist.new_group(ranks, backend="gloo")  # poll's, while that thread is busy
        else:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._all = Agreement(self._group)
        self._pending: Future[Path] | None = None
        self._current: Path | None = None
        """The checkpoint of the present weights, which was saved or loaded last."""
        self._losses: dict[int, float] = {}
        """Validation losses by step that no checkpoint has got yet."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after this optimizer step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def save(
        self,
        step: int,
        state: TrainingState,
        extra: dict[str, Any],
        identity: dict[str, Any],
        *,
        progress: dict[str, Any] | None = None,
    ) -> Path:
        """Write `step_<step>`; waits for an earlier background save first.

        Args:
            step: optimizer steps done.
            state: what this rank holds of model and optimizer.
            extra: plain data and tensors of the trainer, the same on all ranks.
            identity: what makes this model another model (the architecture); compared by `load`.
            progress: how far the training is, in plain numbers (tokens, place in the data); recorded for people.
        Returns:
            Where the checkpoint will be: at once if synchronous, else when `poll` or `wait` say so.
        Raises:
            CheckpointError: on all ranks; too little space (before any tensor is written), failure to write,
                or a failure of the earlier background save. What the background finds comes from `poll` or `wait`.
        """
        self.wait()
        plain_extra, extra_tensors = split_extra(extra)
        tensors = self._all.together(lambda: {**state.tensors(), **extra_tensors})
        partial, final = folders.partial_path(self.folder, step), folders.final_path(self.folder, step)
        meta = {
            "step": step,
            **(progress or {}),
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "about": self.about,
            "identity": json.loads(json.dumps(identity)),
            "ranks": self._all.ranks,
            "torch": torch.__version__,
        }
        loss = self._losses.get(step)
        meta["sequence"] = self._all.first(lambda: self._prepare(partial, plain_extra, loss))
        self._losses, self._current = {}, final
        job = _Job(partial, final, meta, tensors)
        if not self.config.asynchronous:
            return self._write(job)
        self._pending = _in_background(self._write, replace(job, tensors=host_copy(tensors)))
        return final

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
        if pending is None:
            return None
        try:
            path = pending.result()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"a background save to {self.folder} failed: {error!r}") from error
        self._note_loss()
        return path

    def evaluated(self, step: int, loss: float) -> None:
        """Note the validation loss of a step, for `keep_best`: before, while or after its checkpoint is written."""
        self._losses[step] = loss
        if self._pending is None:
            self._note_loss()

    def latest(self) -> Path | None:
        """The newest complete checkpoint; incomplete and damaged ones are skipped with a warning."""
        self.wait()
        # Rank 0 decides: a file system may show the other hosts an older state of the folder.
        found = self._all.first(lambda: folders.complete(self.folder, self.warn))
        return found[-1] if found else None

    def load(self, path: Path, state: TrainingState, identity: dict[str, Any]) -> dict[str, Any]:
        """Fill model and optimizer, in whatever layout they are, from a checkpoint of any layout.

        Args:
            path: a checkpoint folder.
            state: of a model that is built and sharded for this run.
            identity: must equal the saved one.
        Returns:
            The `extra` that was saved; tensors in it are on the CPU.
        Raises:
            UnusableCheckpointError: on all ranks; damaged, of another model, not fitting, or with an unsafe index.
        """
        reader, index = self._open(path, identity)
        tensors = self._all.together(lambda: state.empty(index))
        check_fit(tensors, index, state.prefixes, self._group)
        extra_tensors = empty_extra(index)
        self._read(path, reader, {**tensors, **extra_tensors})
        state.load(tensors)
        self._current = path
        return join_extra(self._all.together(lambda: json.loads((path / folders.EXTRA).read_text())), extra_tensors)

    def verify(self, path: Path) -> None:
        """Compare the checksums of a checkpoint that is read by other means, if `checkpoint.verify` wants it.

        Raises:
            UnusableCheckpointError: on all ranks; names what is damaged.
        """
        self._verify(path, self._all.together(lambda: folders.read_meta(path))["files"])

    def close(self) -> None:
        """Wait for a background save and leave the process groups."""
        try:
            self.wait()
        finally:
            for group in (self._group, self._control):
                if group is not None:
                    dist.destroy_process_group(group)
            self._group = self._control = None

    # -- writing -------------------------------------------------------------------------------------------------

    def _prepare(self, partial: Path, plain_extra: Any, loss: float | None) -> int:
        """On rank 0, before tensors are written: the new checkpoint's place in the order of writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.remove_leftovers(self.folder)
        before = folders.complete(self.folder, self.warn)
        sequence = 1 + (folders.read_meta(before[-1])["sequence"] if before else 0)
        partial.mkdir()
        folders.write_json(partial / folders.EXTRA, plain_extra)
        if loss is not None:
            folders.write_loss(partial, loss)
        return sequence

    def _write(self, job: _Job) -> Path:
        """Tensors, then the name, then the pruning. Runs in the background thread if asynchronous."""
        writer = Writer(job.partial)
        try:
            index = dcp.save(
                job.tensors,
                storage_writer=writer,
                planner=WritePlanner(self.folder, self.config.keep_last),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:  # a BaseException in torch, the same one on all ranks
            self._all.first(lambda: shutil.rmtree(job.partial, ignore_errors=True))
            raise CheckpointError(explain(error, job.final, self.config.keep_last)) from error
        checksums = {name: sum for part in self._all.gather(writer.checksums) for name, sum in part.items()}
        return self._all.first(lambda: self._publish(job, index, checksums))

    def _publish(self, job: _Job, index: Metadata, checksums: dict[str, str]) -> Path:
        """On rank 0, after all ranks have written."""
        try:
            expected = {info.relative_path for info in index.storage_data.values()}
            absent = expected - {file.name for file in job.partial.iterdir()}
            if absent:
                raise CheckpointError(
                    f"{sorted(absent)} were written by other hosts and are not in {job.partial}; "
                    "run.dir must be on a file system that all hosts share"
                )
            folders.finish(job.partial, job.final, job.meta, checksums)
        except Exception:
            shutil.rmtree(job.partial, ignore_errors=True)
            raise
        folders.prune(self.folder, self.config.retention)
        return job.final

    def _note_loss(self) -> None:
        """Put the loss of the present weights into their checkpoint, if both are there. Nothing may be pending."""
        path = self._current
        if path is None or path.parent.resolve() != self.folder.resolve():  # of another run
            return
        step = folders.step_of(path)
        if step is None or (loss := self._losses.pop(step, None)) is None:
            return

        def note() -> None:
            folders.write_loss(path, loss)
            folders.prune(self.folder, self.config.retention)

        self._all.first(note)

    # -- reading -------------------------------------------------------------------------------------------------

    def _open(self, path: Path, identity: dict[str, Any]) -> tuple[SafeReader, Metadata]:
        """The checked checkpoint and its index."""
        self.wait()

        def read() -> dict[str, Any]:
            meta = folders.read_meta(path)
            if different := folders.differences(meta["identity"], identity):
                raise UnusableCheckpointError(
                    f"{path} is a checkpoint of another model: " + "; ".join(different) + ". "
                    "Set these options as in the checkpoint, or start a new run with another run.name"
                )
            return meta

        files = self._all.together(read)["files"]
        self._verify(path, files)
        reader = SafeReader(path, set(files))
        return reader, self._all.together(reader.read_metadata)

    def _verify(self, path: Path, files: dict[str, Any]) -> None:
        if not self.config.verify:
            return
        names = sorted(files, key=lambda name: (files[name]["bytes"], name))[self._all.rank :: self._all.ranks]
        found = self._all.gather(self._all.together(lambda: folders.damaged(path, files, names)))
        if wrong := sorted(name for part in found for name in part):
            raise UnusableCheckpointError(
                f"{path} is damaged: {', '.join(wrong)} differ from what was written, by their checksums; "
                "take another checkpoint, or remove this one so that resume=auto takes the one before"
            )

    def _read(self, path: Path, reader: SafeReader, tensors: Entries) -> None:
        try:
            dcp.load(
                tensors,
                storage_reader=reader,
                planner=ReadPlanner(),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UnusableCheckpointError(f"{path} could not be loaded on rank {rank}: {cause!r}") from error


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

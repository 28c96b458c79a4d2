"""Batches of the next steps, prepared by a background thread while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from moe_data.batch import TokenBatch
from moe_data.loader import TrainingData


class Prefetcher:
    """Prepares this rank's micro-batches of the next steps in one background thread.

    A thread and not processes: forked workers die of the scheduler's signals and take the last checkpoint
    along. While it lives, it alone draws from `data`; ask it, not `data`, for the state.

    Args:
        data: what to draw from.
        start_step: first step that next() returns.
        end_step: one past the last, or None for no end.
        rank, world, micro_batch_sequences: as in TrainingData.batch.
        num_micro_batches: per step and rank.
        depth: steps ahead.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        start_step: int,
        rank: int,
        world: int,
        micro_batch_sequences: int,
        num_micro_batches: int,
        end_step: int | None = None,
        depth: int = 2,
    ) -> None:
        self._data = data
        self._ready: queue.Queue[tuple[list[TokenBatch], dict[str, Any]] | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._failed: BaseException | None = None
        self._state = data.state_dict()
        self._steps = (start_step, end_step)
        self._place = (rank, world, micro_batch_sequences)
        self._num_micro_batches = num_micro_batches
        # A daemon: a source that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def next(self, stop: Callable[[], bool] = lambda: False) -> list[TokenBatch] | None:
        """Micro-batches of the next step; None if `stop()` became true while waiting for them.

        Raises:
            whatever the thread raised, at the step where it did; EOFError after end_step.
        """
        while self._failed is None:
            try:
                found = self._ready.get(timeout=0.05)
            except queue.Empty:
                if stop():
                    return None
                continue
            if not isinstance(found, BaseException):
                batches, self._state = found
                return batches
            self._failed = found
        raise self._failed

    def state_dict(self) -> dict[str, Any]:
        """State of the data before the step that next() returns next, however far ahead the thread is."""
        return self._state

    def close(self) -> None:
        """End the thread; waits a second at most, for a source may hang."""
        self._closed.set()
        self._thread.join(timeout=1.0)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        step, end = self._steps
        try:
            while end is None or step < end:
                batches = []
                for micro_batch in range(self._num_micro_batches):
                    if self._closed.is_set():
                        return
                    batches.append(self._data.batch(step, micro_batch, *self._place))
                if not self._offer((batches, self._data.state_dict())):
                    return
                step += 1
            self._offer(EOFError(f"no step after {step - 1}: the prefetcher was made with end_step={end}"))
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: tuple[list[TokenBatch], dict[str, Any]] | BaseException) -> bool:
        """Put unless closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

"""The prefetcher: same batches, the trainer's state and not the thread's, and it never holds anyone up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from moe_data.batch import TokenBatch
from moe_data.loader import DataConfig, TrainingData
from moe_data.prefetch import Prefetcher
from tests.data.counting import CountingTokenizer
from tests.data.test_loader import rows_of
from tests.data.test_streams import config_of

LAYOUT = {"rank": 1, "world": 2, "micro_batch_sequences": 2, "num_micro_batches": 2}


def data_of(config: DataConfig) -> TrainingData:
    return TrainingData(config, CountingTokenizer(), 16, 8, 1, 100_000)


@pytest.mark.parametrize("streaming", [False, True])
def test_same_batches_and_state_of_the_trainer(tmp_path: Path, streaming: bool) -> None:
    """The thread is steps ahead: its state, saved, would skip those steps on resume."""
    config = config_of(tmp_path, streaming=streaming)
    straight = data_of(config)
    expected, states = [], []
    for step in range(12):
        states.append(straight.state_dict())
        expected.append([rows_of(straight.batch(step, m, 1, 2, 2)) for m in range(2)])
    with Prefetcher(data_of(config), start_step=0, depth=3, **LAYOUT) as prefetcher:
        for step in range(12):
            time.sleep(0.01)  # lets the thread run ahead
            assert without_marks(prefetcher.state_dict()) == without_marks(states[step])
            batches = prefetcher.next()
            assert batches is not None
            assert [rows_of(batch) for batch in batches] == expected[step]


def without_marks(state: dict) -> dict:
    return {**state, "streams": {name: stream["lanes"] for name, stream in state["streams"].items()}}


def test_starts_at_any_step(tmp_path: Path) -> None:
    """Resuming at step 1,000 must not draw the steps before it."""
    config = config_of(tmp_path, streaming=False)
    with Prefetcher(data_of(config), start_step=1000, end_step=1001, **LAYOUT) as prefetcher:
        batches = prefetcher.next()
        assert batches is not None
        assert batches[0].sequence_B.tolist() == [1000 * 8 + 2, 1000 * 8 + 3]
        with pytest.raises(EOFError, match=r"no step after 1000: .* end_step=1001"):
            prefetcher.next()


class Slow:
    """Data that hangs at one step until it is released, or fails there."""

    def __init__(self, config: DataConfig, at: int, error: Exception | None = None) -> None:
        self.inner, self.at, self.error = data_of(config), at, error
        self.release = threading.Event()

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def batch(self, step: int, *place: int) -> TokenBatch:
        if step == self.at:
            if self.error is not None:
                raise self.error
            self.release.wait(30)
        return self.inner.batch(step, *place)


def test_stop_while_waiting(tmp_path: Path) -> None:
    """A signal during a slow read must be seen at once: the scheduler kills when its grace is over."""
    data = Slow(config_of(tmp_path, streaming=False), at=1)
    prefetcher = Prefetcher(data, start_step=0, **LAYOUT)  # type: ignore[arg-type]
    assert prefetcher.next() is not None
    began = time.monotonic()
    assert prefetcher.next(lambda: time.monotonic() - began > 0.1) is None
    prefetcher.close()
    assert time.monotonic() - began < 5
    data.release.set()


def test_the_threads_exception_reaches_the_caller_in_its_place(tmp_path: Path) -> None:
    """An error that dies with the thread leaves the trainer waiting for ever; asked again, it comes again."""
    data = Slow(config_of(tmp_path, streaming=False), at=2, error=ValueError("bad row 7"))
    with Prefetcher(data, start_step=0, **LAYOUT) as prefetcher:  # type: ignore[arg-type]
        assert prefetcher.next() is not None
        assert prefetcher.next() is not None
        for _ in range(2):
            with pytest.raises(ValueError, match="bad row 7"):
                prefetcher.next()


def test_close_ends_the_thread(tmp_path: Path) -> None:
    """A thread that waits for room in the queue after the trainer is gone keeps the process alive."""
    config = config_of(tmp_path, streaming=False)
    before = threading.active_count()
    for _ in range(3):
        prefetcher = Prefetcher(data_of(config), start_step=0, **LAYOUT)
        time.sleep(0.02)
        prefetcher.close()
    assert threading.active_count() == before

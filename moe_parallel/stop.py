"""Leaving when a scheduler says so: at once where nothing would be lost, else after a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """The run leaves because it was told to. No Exception: libraries that wrap errors must let it pass."""


class StopSignal:
    """SIGTERM and SIGUSR1 mean the same: finish the step, save, leave. They may come several times."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._seen = False
        self._raise = False

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._seen

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handle the signals inside the block; outside of `at_once` the handler only sets a flag."""
        before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside the block a signal raises Stopped where it arrives: for long work with nothing to save."""
        self._raise = True
        try:
            self._check()  # it may have come before the block,
            yield
            self._check()  # or at a place that no exception gets out of
        finally:
            self._raise = False

    def _check(self) -> None:
        if self._seen:
            raise Stopped

    def _handle(self, signum: int, frame: object) -> None:
        self._seen = True
        if self._raise:
            self._raise = False  # a second signal must not interrupt the cleaning up
            raise Stopped

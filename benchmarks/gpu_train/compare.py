"""The order of one comparison: each side alone, then all in turns."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu_train.models import Model
from benchmarks.gpu_train.sides import OURS, THEIRS, TITAN
from benchmarks.gpu_train.worker import OutOfTime, SideFailed, Turn, Worker

ALONE_STEPS = 4
"""Of each side by itself: the first ones compile, tune and make the optimizer's state."""
WARM_STEPS = 2
"""Not timed, after a side was built anew."""
ROOM = 0.9
"""Part of the device's memory that sides may fill together."""
GIBIBYTE = 2**30


@dataclass
class Row:
    """What is known of one side of one model."""

    model: str
    side: str
    tokens: int
    flops: float
    """Of a step."""
    refused: str | None = None
    """Why there are no times."""
    alone_seconds: float | None = None
    """Of its fastest step alone."""
    losses: list[float] = field(default_factory=list)
    """Of the first steps, on equal batches from equal weights."""
    last_loss: float | None = None
    turns: list[list[float]] = field(default_factory=list)
    """Seconds of timed steps, by turn; the turns of all sides of a model alternate."""
    peak_bytes: int | None = None
    held_bytes: int | None = None
    busiest: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of a step, median."""
        return statistics.median(s for turn in self.turns for s in turn) if self.turns else None

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "median_seconds": self.seconds}


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    steps: int
    """Timed, of each side."""
    rounds: int
    """Turns they are split into where memory does not hold all sides."""
    apart: bool = False
    """Never more than one side in memory."""


def alone(worker: Worker, model: Model, side: str) -> Row:
    """A side by itself: can it train, what memory it takes, how fast it is about, its first losses."""
    row = Row(model.preset, side, model.tokens, model.flops())
    try:
        worker.build(side, model)
        turn = worker.steps(side, model, 0, ALONE_STEPS)
        worker.free(side)
    except SideFailed as failed:
        row.refused = str(failed)
        return row
    row.alone_seconds, row.losses, row.busiest = min(turn.seconds), turn.losses, turn.busiest
    row.peak_bytes, row.held_bytes = turn.peak_bytes, turn.held_bytes
    return row


def exact_losses(worker: Worker, model: Model) -> list[Row]:
    """One side of each kind in fp32, a few steps: what differs here is not rounding. On a CPU: CUDA has no grouped
    product of fp32."""
    exact = replace(model, precision="float32")
    return [alone(worker, exact, side) for side in (OURS[0], TITAN, THEIRS[0])]


def fastest_of_theirs(rows: list[Row]) -> Row | None:
    """The implementation of transformers that is timed in turns; the others keep their time alone."""
    able = [row for row in rows if row.side in THEIRS and row.alone_seconds is not None]
    best = min(able, key=lambda row: row.alone_seconds or 0.0, default=None)
    for row in able:
        if row is not best and best is not None:
            row.refused = f"slower: {(row.alone_seconds or 0) * 1e3:.0f} ms alone, {best.side} took "
            row.refused += f"{(best.alone_seconds or 0) * 1e3:.0f} ms"
    return best


def fit_together(rows: list[Row], memory_bytes: int | None) -> bool:
    """All models stay in memory while one of them computes. On a CPU they do: it is for tiny ones."""
    if memory_bytes is None:
        return True
    held = sum(row.held_bytes or 0 for row in rows)
    return held + max((row.peak_bytes or 0) - (row.held_bytes or 0) for row in rows) < ROOM * memory_bytes


def compare(worker: Worker, model: Model, effort: Effort, memory_bytes: int | None, until: float) -> list[Row]:
    """All sides of one model, as far as the time reaches.

    Where memory holds all of them, single steps of the sides alternate. Otherwise each is built for a turn of several
    steps and let go after it, there and back (A B C, C B A), so that a drift of the clock hits all.

    Args:
        until: as `time.time` counts; no turn begins that would probably end later.
    """
    rows = [Row(model.preset, side, model.tokens, model.flops()) for side in (*OURS, TITAN, *THEIRS)]
    try:
        for position, row in enumerate(rows):
            if time.time() > until:
                break
            rows[position] = alone(worker, model, row.side)
        fastest_of_theirs(rows)
        racing = [row for row in rows if row.alone_seconds is not None and row.refused is None]
        if racing:
            together = not effort.apart and fit_together(racing, memory_bytes)
            take_turns(worker, model, racing, effort, together, until)
        for name in list(worker.built):
            worker.free(name)
    except (OutOfTime, SideFailed):  # of a side that cannot even be let go
        worker.close(kill=True)
    for row in rows:
        if row.refused is None and not row.turns:
            row.refused = "not reached: the time was up"
    return rows


def take_turns(worker: Worker, model: Model, rows: list[Row], effort: Effort, together: bool, until: float) -> None:
    """Fill in the turns of the rows."""
    size = 1 if together else -(-effort.steps // effort.rounds)
    next_index = {row.side: ALONE_STEPS for row in rows}

    def advance(row: Row, count: int) -> Turn:
        turn = worker.steps(row.side, model, next_index[row.side], count)
        next_index[row.side] += count
        return turn

    longest = 0.0
    order = list(rows)
    for _ in range(effort.steps if together else effort.rounds):
        began = time.time()
        if began + longest > until:
            return
        for row in [row for row in order if row.refused is None]:
            try:
                if row.side not in worker.built:
                    worker.build(row.side, model)
                    advance(row, WARM_STEPS)
                turn = advance(row, size)
            except SideFailed as failed:
                row.refused, row.turns = f"in its turn: {failed}", []
                continue
            row.turns.append(turn.seconds)
            row.last_loss, row.busiest = turn.losses[-1], turn.busiest or row.busiest
            if not together:
                worker.free(row.side)
        longest = max(longest, time.time() - began)
        order.reverse()

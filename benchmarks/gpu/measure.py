"""One case: every side is checked, then all are timed in turns, there and back, together with the bound."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import BmmChain
from benchmarks.gpu.correctness import Reference, Result, check, check_added
from benchmarks.gpu.device import Device, Stamp, saved_bytes
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers import PEERS, Peer, Refused, load

BOUND = "bmm_bound"
ROUNDS = 2
"""There and back: A B C, then C B A, so that a drift of the clock hits all sides alike."""
FEWEST, MOST = 2, 10
"""Timed repetitions of a side in a round."""
START = 0.25
"""What the buffers of gradient accumulation hold before."""


class DeviceLost(Exception):
    """The device does not work any more in this process, because of the side that is named."""


class Arm(Protocol):
    """What can be timed: a side, or the bound."""

    def forward(self) -> Any: ...
    def backward(self, out: Any) -> Any: ...


@dataclass
class Row:
    """What is known of one side in one case; JSON."""

    case: str
    shape: str
    tokens: int
    routing: str
    dtype: str
    peer: str
    label: str
    ours: bool = False
    tuned: bool | None = None
    refused: str | None = None
    first_call_s: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    repeatable: bool | None = None
    """Two runs agree to the last bit."""
    saved_bytes: int | None = None
    saved_lean: int | None = None
    peak_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Median of forward, backward, both."""
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest median of a round."""
    repetitions: int = 0
    accumulate_s: float | None = None
    accumulate_refused: str | None = None


@dataclass
class Times:
    """Of one side: a list of (forward, backward) seconds a round."""

    rounds: list[list[tuple[float, float]]] = field(default_factory=list)

    def into(self, row: Row) -> None:
        """Medians over all repetitions, and over those of each round."""
        for name, value in (("forward", lambda t: t[0]), ("backward", lambda t: t[1]), ("both", sum)):
            row.seconds[name] = statistics.median(value(t) for part in self.rounds for t in part)
            medians = [statistics.median(map(value, part)) for part in self.rounds]
            row.spread[name] = (min(medians), max(medians))
        row.repetitions = sum(map(len, self.rounds))


def time_round(arm: Arm, device: Device, repetitions: int) -> list[tuple[float, float]]:
    """Forward and backward apart, each with a cold cache; the first repetition after another side is not counted."""
    stamps: list[tuple[Stamp, ...]] = []
    for _ in range(repetitions + 1):
        device.flush()
        start = device.stamp()
        out = arm.forward()
        middle = device.stamp()
        device.flush()
        again = device.stamp()
        arm.backward(out)
        stamps.append((start, middle, again, device.stamp()))
        del out
    device.synchronize()
    return [(a.until(b), c.until(d)) for a, b, c, d in stamps[1:]]


@contextmanager
def reasons(row: Row, device: Device, field_name: str = "refused") -> Iterator[None]:
    """What goes wrong with a side becomes the reason in its row, and the run goes on.

    Raises:
        DeviceLost: the device does not answer after it.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except torch.OutOfMemoryError:
        setattr(row, field_name, "out of memory")
    except Refused as refusal:
        setattr(row, field_name, str(refusal))
    except ImportError as error:
        setattr(row, field_name, f"not installed here: {error}")
    except Exception as error:  # peers may raise anything; nobody is left out silently
        setattr(row, field_name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    why = getattr(row, field_name)
    if why is None:
        return
    try:
        device.release()
        device.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"{why}; the device was lost with it") from error


@dataclass
class CaseRun:
    """Measures one case. `progress` is told what is about to happen, in case it never ends."""

    inputs: Inputs
    device: Device
    deadline: float
    progress: Callable[[str, str], None]
    tune: tuple[str, ...] = ()
    accumulate: bool = False

    def rows(self, names: list[str], seconds: float) -> Iterator[Row]:
        """Check and time the sides.

        Args:
            names: of the sides.
            seconds: to be spent on timing all of them, about.
        """
        reference = Reference(self.inputs)
        rows: list[Row] = []
        arms: dict[str, Any] = {}
        for name in names:
            row = self.row(name)
            rows.append(row)
            if time.time() > self.deadline:
                row.refused = "not reached: the time of this run was up"
                continue
            self.progress(name, "first call and check")
            with reasons(row, self.device):
                arms[name] = self._checked(row, name, reference)
            if self.accumulate and name in arms:
                self._check_accumulation(row, arms[name], reference)
        del reference
        self.progress(BOUND, "first call")
        bound = self.row(BOUND)
        with reasons(bound, self.device):
            arms[BOUND] = BmmChain(self.inputs)
        self._time([bound, *rows], arms, seconds)
        yield from (bound, *rows)

    def row(self, name: str) -> Row:
        """An empty one."""
        case = self.inputs.case
        dtype = str(self.inputs.dtype).removeprefix("torch.")
        label, ours = PEERS[name][0] if name in PEERS else "balanced torch.bmm", name.startswith("ours")
        return Row(case.key, case.shape.name, case.tokens, case.routing, dtype, name, label, ours)

    def _checked(self, row: Row, name: str, reference: Reference) -> Peer:
        """Build a side, and hold its results against the reference.

        Raises:
            Refused: it does not pass.
        """
        cls = load(name)
        row.tuned = name in self.tune if cls.tunes else None
        peer = cls(self.inputs, tuned=bool(row.tuned))
        row.first_call_s = self.device.seconds(lambda: peer.backward(peer.forward()))
        memory: dict[str, int | None] = {}
        with self.device.peak(memory):
            self._result(peer)
        row.peak_bytes, row.saved_lean = memory["peak"], self.inputs.work.saved_lean
        with self.device.poisoned(row.peak_bytes):
            first = self._result(peer)
        verdict = check(first, reference)
        row.errors = verdict.errors
        if verdict.refused:
            raise Refused(f"wrong: {verdict.refused}")
        kept: tuple[Tensor, ...] = (first.out_TD, first.grad_x_TD, first.grad_weight_TK)
        kept += tuple(part.clone() for e in reference.experts for part in first.of_expert(first.grad_weights, e))
        del first  # its weight gradients, which may be a third of the memory
        weights = (*self.inputs.weights.all, *peer.weights)
        out_TD, row.saved_bytes = saved_bytes(peer.forward, weights)
        again = self._result(peer, out_TD)
        parts: tuple[Tensor, ...] = (again.out_TD, again.grad_x_TD, again.grad_weight_TK)
        parts += tuple(part for e in reference.experts for part in again.of_expert(again.grad_weights, e))
        row.repeatable = all(map(torch.equal, kept, parts))
        return peer

    def _result(self, peer: Peer, out_TD: Tensor | None = None) -> Result:
        out_TD = peer.forward() if out_TD is None else out_TD
        grad_x_TD, grad_weight_TK, *grads = peer.backward(out_TD)
        return Result(out_TD.detach(), grad_x_TD, grad_weight_TK, grads, peer.of_expert)

    def _check_accumulation(self, row: Row, peer: Peer, reference: Reference) -> None:
        """A side that cannot accumulate (too little memory) still counts in the rest."""
        self.progress(row.peer, "gradient accumulation")
        with reasons(row, self.device, "accumulate_refused"):
            main = self._buffers(peer)
            out_TD, grad_x_TD, grad_weight_TK = peer.accumulate(main)
            result = Result(out_TD, grad_x_TD, grad_weight_TK, main, peer.of_expert)
            verdict = check_added(result, START, reference)
            if verdict.refused:
                raise Refused(f"wrong: {verdict.refused}")
            row.errors.update({f"added {name}": error for name, error in verdict.errors.items()})

    def _buffers(self, peer: Peer) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(weight.detach(), START, dtype=torch.float32) for weight in peer.weights)

    def _time(self, rows: list[Row], arms: dict[str, Any], seconds: float) -> None:
        """Rounds there and back; after the deadline no new round begins, but every side has been in equally many."""
        times = {name: Times() for name in arms}
        by_name = {row.peer: row for row in rows}
        share = seconds / max(1, len(arms) * ROUNDS)
        order = [BOUND, *(name for name in arms if name != BOUND)] if BOUND in arms else list(arms)
        for turn in range(ROUNDS):
            if turn and time.time() > self.deadline:
                break
            for name in order if turn % 2 == 0 else reversed(order):
                if by_name[name].refused:
                    continue
                self.progress(name, "timing")
                with reasons(by_name[name], self.device):
                    if not times[name].rounds:
                        once = self.device.seconds(lambda arm=arms[name]: arm.backward(arm.forward()))  # type: ignore[misc]
                        repetitions = min(MOST, max(FEWEST, int(share / max(once, 1e-6))))
                    else:
                        repetitions = len(times[name].rounds[0])
                    times[name].rounds.append(time_round(arms[name], self.device, repetitions))
        for name, measured in times.items():
            if not by_name[name].refused:
                measured.into(by_name[name])
        if self.accumulate:
            counted = {name: len(t.rounds[0]) for name, t in times.items() if t.rounds and name != BOUND}
            self._time_accumulation(by_name, arms, counted)

    def _time_accumulation(self, rows: dict[str, Row], arms: dict[str, Any], repetitions: dict[str, int]) -> None:
        """Forward, backward and the sum into float32 buffers, as one."""
        rounds: dict[str, list[float]] = {}
        order = [name for name in repetitions if not (rows[name].refused or rows[name].accumulate_refused)]
        for turn in range(ROUNDS):
            for name in order if turn % 2 == 0 else reversed(order):
                if time.time() > self.deadline or rows[name].accumulate_refused:
                    continue
                self.progress(name, "timing of gradient accumulation")
                with reasons(rows[name], self.device, "accumulate_refused"):
                    stamps, main = [], self._buffers(arms[name])
                    for _ in range(repetitions[name] + 1):
                        self.device.flush()
                        start = self.device.stamp()
                        arms[name].accumulate(main)
                        stamps.append((start, self.device.stamp()))
                    self.device.synchronize()
                    rounds.setdefault(name, []).extend(a.until(b) for a, b in stamps[1:])
                    del main
        for name, measured in rounds.items():
            rows[name].accumulate_s = statistics.median(measured)

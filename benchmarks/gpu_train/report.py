"""The tables. A speed of 1.2 over another side means 1.2 times its tokens per second, in the same turns."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from benchmarks.gpu.report import markdown, number
from benchmarks.gpu_train.compare import GIBIBYTE, Row
from benchmarks.gpu_train.models import Model
from benchmarks.gpu_train.sides import OURS, THEIRS, TITAN

BEGIN, END = "<!-- gpu train: begin -->", "<!-- gpu train: end -->"
LOSS_TOLERANCE = 5e-3
"""Relative difference between losses of the first steps that bf16 may cause: up to 1.8e-3 was seen with 64 tokens, and
9e-3 or more with combine weights that were wrong by a factor."""
EXACT_TOLERANCE = 1e-5
"""The same in fp32: 2e-7 was seen, and 1e-3 or more with a gradient cut off."""

HEAD = [
    "side", "tokens/s", "ms a step", "MFU %", "of measured %", "peak GiB", "of it held GiB", "over transformers",
    "over torchtitan-equivalent", "loss, first and last",
]  # fmt: skip


def speed(row: Row, other: Row | None) -> tuple[float, float, float] | None:
    """How many times the other's speed: median over turns, lowest, highest."""
    if other is None or other is row or not row.turns or not other.turns:
        return None
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(row.turns, other.turns)]
    return statistics.median(ratios), min(ratios), max(ratios)


def raced(rows: list[Row], sides: tuple[str, ...]) -> Row | None:
    """The fastest of these sides that was timed in turns."""
    timed = [row for row in rows if row.side in sides and row.turns]
    return min(timed, key=lambda row: row.seconds or 0.0, default=None)


def disagreement(rows: list[Row]) -> float:
    """Largest relative difference between the sides' losses of the first steps; infinite if one is not finite."""
    able = [row.losses for row in rows if row.losses]
    worst = 0.0
    for at_step in zip(*able):
        if not all(map(math.isfinite, at_step)):
            return math.inf
        worst = max(worst, (max(at_step) - min(at_step)) / abs(at_step[0]))
    return worst


def table(rows: list[Row], machine: dict[str, Any]) -> str:
    """The sides of one model; one without times has its reason."""
    theirs, titan = raced(rows, THEIRS), raced(rows, (TITAN,))
    published, measured = machine["published_flops"], machine["ceilings"]["sustained_tflops"] * 1e12
    lines = []
    for row in rows:
        if not row.seconds:
            lines.append([row.side, row.refused or "", *[""] * (len(HEAD) - 2)])
            continue
        rate = row.flops / row.seconds
        ratios = []
        for other in (theirs, titan):
            triple = speed(row, other)
            ratios.append("" if triple is None else f"**{triple[0]:.2f}** ({triple[1]:.2f}-{triple[2]:.2f})")
        lines.append([
            row.side, f"{row.tokens / row.seconds:,.0f}", f"{row.seconds * 1e3:.1f}",
            number(100 * rate / published if published else None, 1), f"{100 * rate / measured:.1f}",
            *(number(size / GIBIBYTE if size else None, 1) for size in (row.peak_bytes, row.held_bytes)),
            *ratios, f"{row.losses[0]:.3f}, {row.last_loss:.3f}",
        ])  # fmt: skip
    return markdown(HEAD, lines)


def section(model: Model, rows: list[Row], machine: dict[str, Any]) -> str:
    """One model."""
    busiest = next((row.busiest for row in rows if row.side in OURS and row.busiest), None)
    notes = [f"Losses of the first steps differ by at most {100 * disagreement(rows):.2g} %."]
    if busiest:
        notes.append(f"The busiest expert has {busiest:.2f} times the mean load.")
    turns = max((len(row.turns) for row in rows), default=0)
    steps = max((sum(map(len, row.turns)) for row in rows), default=0)
    notes.append(f"{steps} steps of each side, in {turns} turns.")
    return f"{model.facts()}\n\n{table(rows, machine)}\n\n{' '.join(notes)}"


def report(models: list[Model], rows: list[Row], machine: dict[str, Any], not_reached: list[str]) -> str:
    """All of it."""
    ceilings, published = machine["ceilings"], machine["published_flops"]
    peak = f"the published {published / 1e12:.0f} TFLOP/s of dense bf16" if published else "a published peak, unknown"
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {machine['device']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; `make bench-gpu-train`. Ratios: medians over turns, lowest and highest.",
        f"MFU: FLOPs of the model, backward twice forward, over {peak}; beside it over "
        f"{ceilings['sustained_tflops']:.4g} TFLOP/s, which products of {ceilings['matmul_size']}³ reached in this run "
        "when they went on.",
    ]
    if not_reached:
        lines.append(f"Not reached in the time given: {', '.join(not_reached)}.")
    parts = [
        section(model, mine, machine) for model in models if (mine := [r for r in rows if r.model == model.preset])
    ]
    return "\n\n".join(["\n".join(lines), *parts])

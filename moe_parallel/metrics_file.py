"""metrics.jsonl: one JSON object a line, `step` and `tokens` first, each step once.

A float is written by its repr, so it reads back bit for bit. JSON has no infinities: these are the strings
"NaN", "Infinity" and "-Infinity", which read_metrics turns back into floats.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moe_parallel.run_folder import write_text_atomic

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """Appends to a metrics.jsonl; a line is on its way to the disk when `write` returns.

    Args:
        path: the file.
        resume_step: lines of later steps, left by a run that was killed after its checkpoint, are cut off
            (the file is replaced in one go), and so is a torn line; None = a new run, which moves an existing
            file aside to metrics.<n>.jsonl.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._last_step = -1
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if resume_step is None:
                _move_aside(path)
            else:
                self._last_step = _cut(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Append one line.

        Args:
            step: optimizer steps done; larger than that of the last line.
            tokens: tokens trained on so far.
            metrics: values by name; numbers or anything that float() takes.
        Raises:
            ValueError: the step has a line already, or a metric is called step or tokens.
        """
        if step <= self._last_step:
            raise ValueError(f"step={step} after step {self._last_step}: log all metrics of a step at once")
        if taken := metrics.keys() & {"step", "tokens"}:
            raise ValueError(f"metrics named {sorted(taken)}: these names are taken")
        row = {"step": step, "tokens": tokens} | {name: _encode(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl in order. A torn last line (of a run that was killed) is left out.

    Raises:
        ValueError: another line is damaged; says which.
    """
    rows: list[dict[str, float]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON") from None
        rows.append({name: _NOT_FINITE[v] if isinstance(v, str) else v for name, v in row.items()})
    return rows


def _encode(value: Any) -> int | float | str:
    if type(value) is int:
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _cut(path: Path, resume_step: int) -> int:
    """Keep the lines up to resume_step; the last step kept, or -1."""
    kept, last = [], -1
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            continue  # torn: its step is written again
        if step <= resume_step:
            kept.append(line + "\n")
            last = step
    write_text_atomic(path, "".join(kept))
    return last


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)

"""What a person sees of a run: a live panel on a terminal, else one line per log interval.

    step 120/600 | tokens 1966080 | loss 2.3456 nats | lr 3.000e-04 | speed 20513 tokens/s | left 0:12:33

Fields are separated by ` | `; each is a name, a value and, where it has one, a unit. A field whose metric was
not measured is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table


class ConsoleMode(str, Enum):
    auto = "auto"
    """The panel on a terminal, lines elsewhere."""
    panel = "panel"
    """One live panel."""
    lines = "lines"
    """One line per log interval."""
    quiet = "quiet"
    """Warnings only."""


# Field name, metric, and how to show it. The names are those of metrics.jsonl.
_FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss/cross_entropy_nats", lambda value: f"{value:.4f} nats"),
    ("validation", "validation/cross_entropy_nats", lambda value: f"{value:.4f} nats"),
    ("lr", "optim/learning_rate", lambda value: f"{value:.3e}"),
    ("grad", "grad/norm", lambda value: f"{value:.3f}"),
    ("speed", "speed/tokens_per_second", lambda value: f"{value:.0f} tokens/s"),
    ("mfu", "speed/model_flops_utilization_percent", lambda value: f"{value:.1f} %"),
    ("balance", "experts/max_over_mean", lambda value: f"{value:.2f} max/mean"),
    ("dropped", "experts/dropped_percent", lambda value: f"{value:.2f} %"),
)


class Console:
    """Shows progress and messages of rank 0.

    Args:
        mode: see ConsoleMode.
        total_steps: the step at which the run ends.
        label: put into every line, for runs whose numbers must not be mistaken for training (forced balance).
        stream: where to write; None = standard output.
    """

    def __init__(
        self, mode: ConsoleMode, total_steps: int, label: str | None = None, stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        if mode is ConsoleMode.auto:
            mode = ConsoleMode.panel if self._stream.isatty() else ConsoleMode.lines
        self._mode, self._total, self._label = mode, total_steps, label
        self._first: tuple[int, float] | None = None
        self._live: Live | None = None
        if mode is ConsoleMode.panel:
            rich = RichConsole(file=self._stream, force_terminal=True)
            self._live = Live(console=rich, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False)
            self._live.start()

    def update(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Show where the run is. `metrics` by their names in metrics.jsonl; units as these names say."""
        fields = self._fields(step, tokens, metrics)
        if self._live is not None:
            self._live.update(self._panel(step, fields))
        elif self._mode is ConsoleMode.lines:
            self._print(" | ".join(f"{name} {value}" for name, value in fields))

    def info(self, text: str) -> None:
        """One line above the panel or between the lines; not shown when quiet."""
        if self._mode is not ConsoleMode.quiet:
            self._print(text)

    def warning(self, text: str) -> None:
        """One line, shown in every mode."""
        self._print(f"warning: {text}")

    def close(self) -> None:
        """Leave the panel as it is and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _fields(self, step: int, tokens: int, metrics: dict[str, float]) -> list[tuple[str, str]]:
        fields = [("step", f"{step}/{self._total}"), ("tokens", str(tokens))]
        if self._label is not None:
            fields.append(("mode", self._label))
        fields += [(name, show(metrics[key])) for name, key, show in _FIELDS if key in metrics]
        left = self._seconds_left(step)
        if left is not None:
            fields.append(("left", str(timedelta(seconds=round(left)))))
        return fields

    def _seconds_left(self, step: int) -> float | None:
        """From the mean pace since the first update: the steps before it include compilation and warm-up."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first_step, since = self._first
        return (now - since) / (step - first_step) * max(self._total - step, 0)

    def _panel(self, step: int, fields: list[tuple[str, str]]) -> Panel:
        table = Table.grid(padding=(0, 2))
        for name, value in fields:
            table.add_row(name, value)
        table.add_row("", ProgressBar(total=max(self._total, 1), completed=step, width=40))
        return Panel(table, title="moe-parallel", expand=False)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

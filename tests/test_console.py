"""Lines that a script can parse, and a panel that messages do not break."""

from __future__ import annotations

import io
import re

import pytest

from moe_parallel.console import Console, ConsoleMode

METRICS = {
    "loss/cross_entropy_nats": 2.34567,
    "optim/learning_rate": 3e-4,
    "speed/tokens_per_second": 20513.4,
    "speed/model_flops_utilization_percent": 41.26,
    "experts/max_over_mean": 1.5,
    "experts/dropped_percent": 0.25,
    "experts/layer_0/max_over_mean": 9.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_parse() -> None:
    """Would catch: a field without its name, a unit glued to a number, a value under another one's name."""
    stream = io.StringIO()
    console = Console(ConsoleMode.auto, 600, label="forced balance", stream=stream)
    console.update(110, 1000, METRICS)
    console.info("saved step_00000110")
    console.update(120, 2000, METRICS)
    console.close()
    first, message, second = stream.getvalue().splitlines()
    assert message == "saved step_00000110"
    assert "left" not in first, "one update tells nothing about the pace"
    fields = dict(field.split(" ", 1) for field in second.split(" | "))
    assert re.fullmatch(r"0:0\d:\d\d", fields.pop("left"))
    assert fields == {
        "step": "120/600",
        "tokens": "2000",
        "mode": "forced balance",
        "loss": "2.3457 nats",
        "lr": "3.000e-04",
        "speed": "20513 tokens/s",
        "mfu": "41.3 %",
        "balance": "1.50 max/mean",
        "dropped": "0.25 %",
    }


def test_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a time left that counts compilation, or steps before a resume at step 100."""
    now = [1000.0]
    monkeypatch.setattr("moe_parallel.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(ConsoleMode.lines, 600, stream=stream)
    for step in (101, 110, 200):
        console.update(step, 1, {})
        now[0] += 2.0 * {101: 9, 110: 90, 200: 0}[step]
    lines = [line.split(" | ")[-1] for line in stream.getvalue().splitlines()]
    assert lines == ["tokens 1", "left 0:16:20", "left 0:13:20"]  # 2 s a step: 490 and 400 steps


def test_quiet_shows_warnings_only() -> None:
    """Would catch: a warning that nobody sees, or lines that were switched off."""
    stream = io.StringIO()
    console = Console(ConsoleMode.quiet, 10, stream=stream)
    console.update(1, 1, METRICS)
    console.info("hidden")
    console.warning("disk is nearly full")
    console.close()
    assert stream.getvalue() == "warning: disk is nearly full\n"


def test_panel_shows_values_and_messages() -> None:
    """Would catch: no panel on a terminal, a message that it overwrites, brackets eaten as markup."""
    stream = Terminal()
    console = Console(ConsoleMode.auto, 600, stream=stream)
    console.update(120, 2000, METRICS)
    console.warning("slow disk [red]/data[/red]")
    console.update(130, 2000, METRICS)
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "warning: slow disk [red]/data[/red]\n" in text
    after = text.rpartition("warning")[2]
    assert "130/600" in after
    assert "2.3457 nats" in after
    assert "41.3 %" in after
    console.close()  # twice does no harm: finish may run after an error


def test_lines_have_no_escape_codes() -> None:
    """Would catch: control characters in the log file of a batch job."""
    stream = io.StringIO()
    console = Console(ConsoleMode.auto, 600, stream=stream)
    console.update(1, 1, METRICS)
    console.warning("x")
    assert "\x1b" not in stream.getvalue()

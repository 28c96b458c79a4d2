"""Metrics, resuming, Weights & Biases with and without a server, pictures, samples.

Cheapest first. Values are compared bit for bit: reporting computes nothing. Runs with a server are processes
of their own, because wandb reads its address once per process.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.image
import pytest

from moe_parallel.console import ConsoleMode
from moe_parallel.heatmap import MARGINS_PIXELS, cell_pixels, write_heatmap
from moe_parallel.metrics_file import MetricsFile, read_metrics
from moe_parallel.tracking import Tracker, TrackingConfig, WandbMode
from tests.wandb_stand_in import StandInServer, history

T = TypeVar("T")
FLOATS = [0.1, 1 / 3, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, -0.0, 2.0**53 + 2, 1e16, 123.0]


def same_bits(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or left.hex() == right.hex()


def tracker(folder: Path, resume: dict[str, Any] | None = None, **options: Any) -> Tracker:
    config = TrackingConfig(**({"console": ConsoleMode.quiet} | options))
    return Tracker(folder, config, resume, name="test", total_steps=600, stream=io.StringIO())


def eventually(read: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """What another process (wandb's) has written, once it is there; after 40 s as it is."""
    deadline = time.monotonic() + 40
    while not enough(value := read()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def test_metrics_read_back_bit_for_bit(tmp_path: Path) -> None:
    """Would catch: floats cut to some digits, infinities that are no JSON, integers that become text."""
    numbers = random.Random(0)
    values = FLOATS + [math.nan, math.inf, -math.inf] + [numbers.lognormvariate(0, 200) for _ in range(500)]
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    for step, value in enumerate(values):
        file.write(step, 10 * step, {"loss/cross_entropy_nats": value, "experts/dead": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: every line is flushed

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert [list(json.loads(line, parse_constant=refuse))[:2] for line in lines] == [["step", "tokens"]] * len(values)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(values)))
    assert all(type(row["experts/dead"]) is int for row in rows)
    assert all(same_bits(row["loss/cross_entropy_nats"], v) for row, v in zip(rows, values, strict=True))


def test_resuming_cuts_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    """Would catch: steps that appear twice after a kill, a torn line that stays, a cut too deep."""
    first = tracker(tmp_path)
    for step in range(1, 8):
        first.log(step, step, {"loss/z": float(step)})
        if step == 4:
            state = json.loads(json.dumps(first.state(step)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')
    second = tracker(tmp_path, state)
    for step in (5, 6):
        second.log(step, step, {"loss/z": -float(step)})
    rows = [(row["step"], row["loss/z"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, -5.0), (6, -6.0)]
    assert second.state(6)["wandb_run_id"] == first.state(4)["wandb_run_id"]


def test_a_new_run_keeps_the_record_of_an_older_one(tmp_path: Path) -> None:
    """Would catch: a second start in the same folder that appends to, or destroys, older metrics."""
    for loss in (1.0, 2.0, 3.0):
        run = tracker(tmp_path)
        run.log(1, 1, {"loss/z": loss})
        run.finish(0)
    found = {path.name: read_metrics(path)[0]["loss/z"] for path in tmp_path.glob("*.jsonl")}
    assert found == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_a_step_is_written_once(tmp_path: Path) -> None:
    """Would catch: metrics of one step on two lines, which every reader would have to join."""
    run = tracker(tmp_path)
    run.log(3, 1, {"loss/z": 1.0})
    with pytest.raises(ValueError, match="step=3 after step 3"):
        run.log(3, 1, {"validation/cross_entropy_nats": 1.0})
    with pytest.raises(ValueError, match="tokens"):
        run.log(4, 1, {"tokens": 1.0})


def test_damage_in_the_middle_is_reported(tmp_path: Path) -> None:
    """Would catch: a reader that silently skips lines; only a torn last line is normal."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 1}\n{"step"\n')
    assert len(read_metrics(path)) == 1
    path.write_text('{"step"\n{"step": 2, "tokens": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_options_are_checked() -> None:
    """Would catch: 0 seconds, which W&B takes for waiting without limit; intervals that divide by zero."""
    for name, wrong in (
        ("log_every_steps", 0),
        ("heatmap_every_steps", -1),
        ("init_timeout_seconds", 0),
        ("finish_timeout_seconds", 0),
    ):
        with pytest.raises(ValueError, match=f"tracking.{name}={wrong}"):
            TrackingConfig(**{name: wrong})
    config = TrackingConfig(log_every_steps=10, heatmap_every_steps=20)
    assert [step for step in range(1, 36) if config.log_due(step, 35)] == [1, 10, 20, 30, 35]
    assert [step for step in range(1, 50) if config.heatmap_due(step)] == [20, 40]
    assert not TrackingConfig(heatmap_every_steps=0).heatmap_due(20)


def test_the_fullest_expert_is_the_brightest_cell(tmp_path: Path) -> None:
    """Would catch: rows and columns exchanged, an axis upside down, a colour scale that is not monotonic."""
    matrix = [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 40.0], [5.5] * 7]
    path = tmp_path / "images" / "load.png"
    write_heatmap(path, matrix, title="load", row_label="layer", column_label="expert")
    pixels = matplotlib.image.imread(path)[:, :, :3]
    cell = cell_pixels(7)
    margins = MARGINS_PIXELS
    assert pixels.shape[0] == margins["top"] + 3 * cell + margins["bottom"]
    assert pixels.shape[1] == margins["left"] + 7 * cell + margins["right"]
    seen = {}
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            y, x = margins["top"] + row * cell + cell // 2, margins["left"] + column * cell + cell // 2
            seen[value] = float(pixels[y, x] @ [0.2126, 0.7152, 0.0722])
    brightness = [seen[value] for value in sorted(seen)]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == len(brightness)


def test_a_large_model_gives_a_picture_of_readable_size(tmp_path: Path) -> None:
    """Would catch: a picture of ten thousand pixels for 60 layers of 512 experts, or cells below a pixel."""
    write_heatmap(tmp_path / "x.png", [[1.0] * 512] * 60, title="", row_label="", column_label="")
    height, width = matplotlib.image.imread(tmp_path / "x.png").shape[:2]
    assert 512 * 2 < width < 2300
    assert 60 * 2 < height < 2300


def test_without_wandb_nothing_of_it_is_imported(tmp_path: Path) -> None:
    """Would catch: a second of start-up, and a failure where wandb is absent, for runs that do not use it."""
    code = f"""
import sys
from pathlib import Path
from moe_parallel.tracking import Tracker, TrackingConfig
run = Tracker(Path({str(tmp_path)!r}), TrackingConfig(), name="x", total_steps=1)
run.log(1, 1, {{"loss/z": 1.0}})
run.finish(0)
assert not [name for name in sys.modules if name.split(".")[0] in ("wandb", "matplotlib", "torch")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_offline_run_equals_metrics_jsonl(tmp_path: Path) -> None:
    """Would catch: a value that W&B shows and metrics.jsonl does not, a picture or samples that are lost.

    Equal floats are equal bits here, but for the sign of zero, which W&B drops.
    """
    run = tracker(tmp_path, wandb=WandbMode.offline, tags=["a"])
    for step, value in enumerate(FLOATS, start=1):
        run.log(step, 100 * step, {"loss/cross_entropy_nats": value, "experts/layer_0/max_over_mean": 1.5})
    picture = run.image(9, "experts/load", [[1.0, 2.0], [3.0, 0.0]])
    run.text(9, ["To be", "def f(x):\n    return x"])
    run.finish(0)
    logged = eventually(lambda: history(tmp_path), lambda rows: len(rows) == len(FLOATS) + 2)
    rows = [row for row in logged if "tokens" in row]
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert picture == tmp_path / "images" / "experts_load_00000009.png"
    assert picture.is_file()
    assert [row["step"] for row in logged if "experts/load/_type" in row] == [9]
    assert [row["step"] for row in logged if "samples/_type" in row] == [9]
    assert (tmp_path / "samples.txt").read_text() == (
        "=== step 9, sample 0\nTo be\n=== step 9, sample 1\ndef f(x):\n    return x\n"
    )


def test_an_error_of_wandb_never_reaches_the_training(tmp_path: Path) -> None:
    """Would catch: a run lost to its own reporting; a warning a step instead of one."""
    stream = io.StringIO()
    config = TrackingConfig(console=ConsoleMode.quiet, wandb=WandbMode.offline)
    run = Tracker(tmp_path, config, name="test", total_steps=600, stream=stream)
    assert run._wandb is not None
    real = run._wandb._run

    class Broken:
        def log(self, values: dict[str, Any]) -> None:
            raise RuntimeError("broken pipe\nand more")

        def finish(self, exit_code: int) -> None:
            raise RuntimeError("broken too")

    run._wandb._run = Broken()
    for step in (1, 2, 3):
        run.log(step, 1, {"loss/z": 1.0})
    run.image(3, "experts/load", [[1.0]])
    run.text(3, ["x"])
    run.finish(0)
    real.finish()
    assert stream.getvalue().splitlines() == [
        "warning: W&B failed, training goes on and metrics.jsonl has everything: RuntimeError: broken pipe"
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


ONLINE = """
import os, sys, time
from pathlib import Path
from moe_parallel.tracking import Tracker, TrackingConfig
start = time.monotonic()
config = TrackingConfig(wandb="online", console="lines", init_timeout_seconds=2, finish_timeout_seconds=2)
run = Tracker(Path(sys.argv[1]), config, name="test", total_steps=3)
print("init_seconds", time.monotonic() - start)
for step in (1, 2, 3):
    run.log(step, step, {"loss/z": 0.1 * step})
print("logged", flush=True)
sys.stdin.readline()
start = time.monotonic()
run.finish(0)
print("finish_seconds", time.monotonic() - start)
"""


def online(folder: Path, address: str, key: str | None = "0" * 40) -> subprocess.Popen[str]:
    # A run in this process leaves the address of its service in the environment; the child must have its own.
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environment |= {"WANDB_BASE_URL": address, "HOME": str(folder), "NETRC": str(folder / "none")}
    if key is not None:
        environment["WANDB_API_KEY"] = key
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", ONLINE, str(folder)]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def seconds(output: str, name: str) -> float:
    found = re.search(rf"{name} ([\d.]+)", output)
    assert found is not None, output
    return float(found[1])


@pytest.mark.parametrize(
    ("key", "reason"), [("0" * 40, "CommError"), (None, "no API key")], ids=["refused port", "no key"]
)
def test_without_a_server_the_run_goes_offline(tmp_path: Path, key: str | None, reason: str) -> None:
    """Would catch: a start that hangs or fails for want of a network or a key. Limit: 2 s + wandb's start."""
    start = time.monotonic()
    process = online(tmp_path, "http://127.0.0.1:9", key)
    output, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert seconds(output, "init_seconds") < 12
    assert time.monotonic() - start < 30
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "offline" in warnings[0]
    assert reason in warnings[0]
    offline = tmp_path / "wandb" / "latest-run"
    assert offline.resolve().name.startswith("offline-run")
    (tmp_path / "copy" / "wandb").mkdir(parents=True)
    offline.resolve().rename(tmp_path / "copy" / "wandb" / offline.resolve().name)
    logged = eventually(lambda: history(tmp_path / "copy"), lambda rows: len(rows) == 3)
    assert logged == read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("dies", [False, True], ids=["server stays", "server dies"])
def test_online_run_sends_its_values_and_survives_a_dead_server(tmp_path: Path, dies: bool) -> None:
    """Would catch: an online mode that sends nothing; an end that waits for a dead server without limit."""
    server = StandInServer()
    process = online(tmp_path, server.address)
    assert process.stdout is not None
    seen = ""
    while "logged" not in seen:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        seen += line
    if dies:
        server.stop()
    output, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert "warning" not in seen + output
    assert seconds(output, "finish_seconds") < 12
    assert any("loss/z" in body for body in server.streamed) is not dies
    logged = eventually(lambda: history(tmp_path), lambda rows: len(rows) == 3)
    assert [row["loss/z"] for row in logged] == [0.1 * step for step in (1, 2, 3)]
    if not dies:
        server.stop()

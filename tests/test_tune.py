"""The tuner as a command, and a run that takes what it stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, Runner

COMMAND = [sys.executable, "scripts/tune_kernels.py"]
SHAPE = ["model=tiny", "train.sequence_tokens=32", "train.global_batch_tokens=256", "train.dtype=float32"]


def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_what_is_tuned_is_what_runs(tmp_path: Path, runner: Runner) -> None:
    """A table written for another shape than the one that trains would be ignored without a word: the run must say that
    it was taken. A second call for more rows adds to the table and keeps what was there; the same one replaces."""
    table = tmp_path / "tuned.json"
    for _ in range(2):
        done = tune("--out", str(table), *SHAPE)
        assert done.returncode == 0, done.stderr
        (first,) = json.loads(table.read_text())["entries"]
    assert set(first["milliseconds"]) == {"loop", "grouped_mm"}
    assert min(first["milliseconds"].values()) > 0
    assert first["how"] == min(first["milliseconds"], key=first["milliseconds"].get)
    assert tune("--out", str(table), "--rows", "8,16", *SHAPE).returncode == 0
    entries = json.loads(table.read_text())["entries"]
    assert [entry["rows_per_expert"] for entry in entries] == [first["rows_per_expert"], 8, 16]
    run = runner.start("tuned", f"moe.kernel_table={table}", "train.steps=1")
    assert run.finish() == [0], run.err
    said = f"experts are computed by {first['how']}: measured with {first['rows_per_expert']} rows an expert"
    assert said in run.out + run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe.num_expert=4"], "unknown option moe.num_expert"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["parallel.ep=3"], "parallel.ep=3"),
    ],
)
def test_mistakes_end_with_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    """A wrong option must not tune another model than was meant."""
    done = tune("--out", str(tmp_path / "tuned.json"), "model=tiny", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_table_is_kept(tmp_path: Path) -> None:
    """Somebody's file by that name must not be overwritten."""
    file = tmp_path / "notes.json"
    file.write_text("{}")
    done = tune("--out", str(file), *SHAPE)
    assert done.returncode == 2
    assert "notes.json is no table of kernels" in done.stderr
    assert file.read_text() == "{}"

"""The run folder: what describes a run, and files that are never half there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_parallel.run_folder import RunFolder, describe_environment, git_revision, write_text_atomic


def test_environment_is_json_and_names_what_matters(tmp_path: Path) -> None:
    """Would catch: an object that JSON cannot take; a fact that is missing when a run must be repeated."""
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.write_environment(describe_environment("cpu", ["a", "b"]) | {"world": 2})
    facts = json.loads(folder.environment.read_text())
    assert facts["hosts"] == ["a", "b"]
    assert facts["device"] == "cpu"
    assert facts["world"] == 2
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "pydantic"} <= facts["versions"].keys()
    assert facts["command"][0] == sys.executable


def test_git_revision_tells_a_changed_checkout(tmp_path: Path) -> None:
    """Would catch: a revision recorded as clean although the code was edited; a crash outside of git."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path / "absent") is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    """Would catch: a configuration that is empty because the disk filled up while it was replaced."""
    path = tmp_path / "config.yaml"
    write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new \ud800")  # a character that no file can take
    assert path.read_text() == "old"
    write_text_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "new"

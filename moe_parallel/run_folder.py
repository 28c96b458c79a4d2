"""The folder of one run: where everything lies, and who and what wrote it. Rank 0 writes, all may read.

runs/NAME/
  config.yaml        the resolved configuration        environment.json   versions, revision, hosts, command
  model.json         sizes, FLOPs, memory              metrics.jsonl      one object a line
  samples.txt        generated text                    images/            heat maps
  checkpoints/       step_00001000/ ...                wandb/             Weights & Biases' own files
  result.json        final losses; a run that has it is finished
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = [
    *("torch", "numpy", "hydra-core", "omegaconf", "pydantic", "wandb", "datasets", "tokenizers"),
    *("transformers", "safetensors", "triton", "deepspeed", "megatron-core"),
]


@dataclass(frozen=True)
class RunFolder:
    """Paths below one run's folder; creates nothing until something is written."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def model(self) -> Path:
        return self.path / "model.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def write_config(self, yaml: str) -> None:
        write_text_atomic(self.config, yaml)

    def write_model(self, facts: dict[str, Any]) -> None:
        write_text_atomic(self.model, json.dumps(facts, indent=1) + "\n")

    def write_result(self, facts: dict[str, Any]) -> None:
        """Marks the run as finished: final losses, and where the checkpoint lies."""
        write_text_atomic(self.result, json.dumps(facts, indent=1) + "\n")

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Facts as describe_environment gives them, with what the caller adds."""
        write_text_atomic(self.environment, json.dumps(facts, indent=1) + "\n")


def describe_environment(device: str, hosts: list[str] | None = None) -> dict[str, Any]:
    """What one needs to repeat a run: versions, revision, hosts, command.

    Args:
        device: as people call it, such as "cpu" or "NVIDIA H200".
        hosts: host names by rank; None = this host alone.
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "hosts": hosts if hosts is not None else [socket.gethostname()],
        "git": git_revision(),
        "versions": versions,
    }


def git_revision(folder: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """`{"revision": ..., "dirty": ...}` of the checkout that this code runs from; None outside of one.

    `dirty`: files differ from the revision (untracked files do not count).
    """
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None:
        return None
    return {
        "revision": revision,
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def write_text_atomic(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part; a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()

"""What checkpoints are, for people: read from meta.json alone, without torch and without any tensor."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.folder import UnusableCheckpointError


def find(path: Path) -> list[Path]:
    """Checkpoints of a run, of a folder of checkpoints, or the one that a path is; those being written last.

    Raises:
        UnusableCheckpointError: there is none.
    """
    if (path / folders.META).is_file():
        return [path]
    inner = path / "checkpoints"
    place = inner if inner.is_dir() else path
    found = [*folders.named(place), *sorted(place.glob(".step_*.partial"))]
    if not found:
        raise UnusableCheckpointError(f"{path} is no checkpoint and has none")
    return found


def describe(path: Path, verify: bool = False) -> dict[str, Any]:
    """The facts of one checkpoint, as plain values.

    Args:
        verify: read all files and compare their checksums.
    Returns:
        `path`, `state` (complete, damaged or partial), `problem` (None or text); if meta.json can be read: `step`,
        `tokens`, `next_sequence`, `saved_at`, `age_seconds`, `bytes`, `files`, `validation_loss_nats`, `about` (engine,
        layout, parameters), `model` (layers, experts), `ranks`, `torch`.
    """
    facts: dict[str, Any] = {"path": str(path), "state": "complete", "problem": None}
    if path.name.endswith(".partial"):
        return facts | {"state": "partial", "problem": "being written, or left by a run that was killed"}
    try:
        meta = folders.read_meta(path)
    except UnusableCheckpointError as error:
        return facts | {"state": "damaged", "problem": str(error)}
    if verify and (wrong := folders.damaged(path, meta["files"], meta["files"])):
        facts |= {"state": "damaged", "problem": f"{', '.join(wrong)}: not what was written, by the checksum"}
    names = ("step", "tokens", "next_sequence", "saved_at", "about", "ranks", "torch")
    facts |= {name: meta.get(name) for name in names}
    facts["age_seconds"] = (datetime.now(UTC) - datetime.fromisoformat(meta["saved_at"])).total_seconds()
    facts["bytes"] = sum(file["bytes"] for file in meta["files"].values())
    facts["files"] = len(meta["files"])
    facts["validation_loss_nats"] = folders.read_loss(path)
    model, moe = (meta["identity"].get(section, {}) for section in ("model", "moe"))
    facts["model"] = {"layers": model.get("num_layers"), "experts": moe.get("num_experts")}
    return facts


def text(facts: dict[str, Any]) -> str:
    """A few lines on one checkpoint."""
    head = f"{os.path.basename(facts['path'])}  {facts['state']}"
    if facts.get("step") is None:
        return f"{head}: {facts['problem']}"
    about, model = facts["about"], facts["model"]
    loss = facts["validation_loss_nats"]
    degrees = [f"{name} {degree}" for name, degree in about.get("layout", {}).items() if degree > 1 and name != "ranks"]
    lines = [
        f"{head}, {facts['bytes'] / 2**30:.3f} GiB in {facts['files']} files, {_age(facts['age_seconds'])} old",
        f"  step {facts['step']:,}, {_number(facts['tokens'])} tokens, next sequence {_number(facts['next_sequence'])}"
        + (f", validation loss {loss:.4f} nats" if loss is not None else ""),
        f"  {_number(about.get('parameters_total'))} parameters, {_number(about.get('parameters_active'))} active, "
        f"{_number(model['layers'])} layers, {_number(model['experts'])} experts",
        f"  written by engine {about.get('engine', 'unknown')}, torch {facts['torch']}, on {facts['ranks']} ranks"
        + (f": {', '.join(degrees)}" if degrees else ""),
    ]
    return "\n".join(lines if facts["problem"] is None else [*lines, f"  {facts['problem']}"])


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _age(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))

"""Checkpoints as folders on a disk: names, completeness, replacement, pruning. Imports no torch.

    checkpoints/
      step_00001000/            complete, because the rename is the last thing that happens to it
        meta.json               what it is, and every other file with its size
        extra.json              the trainer's plain state
        .metadata, __0_0.distcp tensors, as torch.distributed.checkpoint writes them
      .step_00002000.partial/   being written, or left by a run that was killed; removed by the next save

The newest checkpoint is the one written last, not the one with the highest step: a run that went back to an
older checkpoint goes on from what it wrote itself, not from the branch that it left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1
META, EXTRA = "meta.json", "extra.json"
# A second save of the same step moves the first one aside before it takes its name; a crash between these two
# renames leaves a complete checkpoint under the second form.
_NAME = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class UnusableCheckpointError(CheckpointError, ValueError):
    """A checkpoint does not suit this run: damaged, of another model, or not a checkpoint. An input error."""


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def partial_path(folder: Path, step: int) -> Path:
    return folder / f".step_{step:08d}.partial"


def read_meta(path: Path) -> dict[str, Any]:
    """Contents of meta.json, after checking that every file it lists is there with its size.

    Raises:
        UnusableCheckpointError: says what is missing, truncated or of an unknown format.
    """
    try:
        meta = json.loads((path / META).read_text())
        version, files = meta["format"], dict(meta["files"])
    except FileNotFoundError:
        raise UnusableCheckpointError(f"{path} is not a checkpoint: it has no {META}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnusableCheckpointError(f"{path / META} cannot be read: {error!r}") from None
    if version != FORMAT:
        raise UnusableCheckpointError(
            f"{path} has checkpoint format {version!r}, this version reads format {FORMAT}; "
            "load it with the version that wrote it"
        )
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise UnusableCheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != size:
            raise UnusableCheckpointError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, {size} were written"
            )
    return meta


def complete(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """Complete checkpoints in the order in which they were written; others are named in a warning each."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _NAME.fullmatch(path.name) is None:
            continue
        try:
            found.append((read_meta(path)["sequence"], path))
        except UnusableCheckpointError as error:
            warn(f"skipping a checkpoint: {error}")
    return [path for _, path in sorted(found)]


def finish(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Write meta.json with the list of files, then give the folder its name. Durable when it returns."""
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    write_json(partial / META, meta | {"format": FORMAT, "files": files})
    _sync(partial)
    if final.exists():
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        shutil.rmtree(aside)
    else:
        partial.rename(final)
    _sync(final.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left: partial folders, and replaced ones whose successor has the name."""
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path)
    for path in folder.glob(".step_*.replaced"):
        if path.with_name(path.name[1 : -len(".replaced")]).exists():
            shutil.rmtree(path)


def prune(folder: Path, keep_last: int) -> None:
    """Remove complete checkpoints but the keep_last newest. Damaged ones are left for a person to judge."""
    for path in complete(folder, warn=lambda text: None)[:-keep_last]:
        # Out of sight first: a kill during the removal must not leave half a checkpoint with a name.
        doomed = path.with_name(f".{path.name.strip('.')}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed)


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Each option in which two identities differ, with both values."""
    old, new = _flatten(saved), _flatten(json.loads(json.dumps(current)))
    absent = "(absent)"
    return [
        f"{name}: {old.get(name, absent)} in the checkpoint, {new.get(name, absent)} in this run"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _sync(folder: Path) -> None:
    """Make names in a folder durable; without it a power cut may undo the rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

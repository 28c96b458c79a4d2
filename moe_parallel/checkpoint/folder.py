"""Checkpoints as folders on a disk: names, completeness, replacement, pruning. Imports no torch.

    checkpoints/
      step_00001000/            complete, because the rename is the last thing that happens to it
        meta.json               what it is, and every other file with its size and checksum
        extra.json              the trainer's plain state
        .metadata, __0_0.distcp tensors, as torch.distributed.checkpoint writes them
        validation.json         the validation loss of this step, if it is known; may come later than the rest
      .step_00002000.partial/   being written, or left by a run that was killed; removed by the next save

The newest checkpoint is the one written last, not the one with the highest step: a run that went back to an
older checkpoint goes on from what it wrote itself, not from the branch that it left.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 2
META, EXTRA, VALIDATION = "meta.json", "extra.json", "validation.json"
# A second save of the same step moves the first one aside before it takes its name; a crash between these two
# renames leaves a complete checkpoint under the second form.
_NAME = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class UnusableCheckpointError(CheckpointError, ValueError):
    """A checkpoint does not suit this run: damaged, of another model, or not a checkpoint. An input error."""


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint on the disk."""

    path: Path
    step: int
    loss: float | None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay. One stays if any of the rules wants it."""

    last: int
    every_steps: int
    best: int

    def kept(self, found: Sequence[Stored]) -> set[Path]:
        """Those of `found`, which are in the order in which they were written, that stay."""
        newest = {stored.path for stored in found[-self.last :]}
        milestones = {stored.path for stored in found if self.every_steps and stored.step % self.every_steps == 0}
        rated = sorted((stored.loss, -place) for place, stored in enumerate(found) if stored.loss is not None)
        best = {found[-negative].path for _, negative in rated[: self.best]}  # of equal ones the one written last
        return newest | milestones | best


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def partial_path(folder: Path, step: int) -> Path:
    return folder / f".step_{step:08d}.partial"


def step_of(path: Path) -> int | None:
    """The step that a folder has in its name, None if it is not named as a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1] or match[2])


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
    for name, written in files.items():
        file, size = path / name, written["bytes"]
        if not file.is_file():
            raise UnusableCheckpointError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != size:
            raise UnusableCheckpointError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, {size} were written"
            )
    return meta


def damaged(path: Path, files: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the files whose content is not what was written.

    Args:
        files: as meta.json has them.
        names: the files to read.
    """
    return [name for name in names if checksum(path / name) != files[name]["xxh3_128"]]


def checksum(file: Path) -> str:
    """128 bits of XXH3: the fastest of those with 64 bits or more, an order of magnitude above disks."""
    found = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            found.update(block)
    return found.hexdigest()


def named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, complete or damaged, by step."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def complete(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """Complete checkpoints in the order in which they were written; others are named in a warning each."""
    return [stored.path for stored in _stored(folder, warn)]


def _stored(folder: Path, warn: Callable[[str], None]) -> list[Stored]:
    found = []
    for path in named(folder):
        try:
            meta = read_meta(path)
            found.append((meta["sequence"], Stored(path, meta["step"], read_loss(path))))
        except UnusableCheckpointError as error:
            warn(f"skipping a checkpoint: {error}")
    return [stored for _, stored in sorted(found, key=lambda pair: pair[0])]


def finish(partial: Path, final: Path, meta: dict[str, Any], checksums: dict[str, str]) -> None:
    """Write meta.json with the list of files, then give the folder its name. Durable when it returns.

    Args:
        checksums: by name; those that are not in it are computed here.
    """
    files = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": checksums.get(file.name) or checksum(file)}
        for file in sorted(partial.iterdir())
        if file.name != VALIDATION
    }
    write_json(partial / META, meta | {"format": FORMAT, "files": files})
    sync(partial)
    if final.exists():
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        shutil.rmtree(aside)
    else:
        partial.rename(final)
    sync(final.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left: partial folders, and replaced ones whose successor has the name."""
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path)
    for path in folder.glob(".step_*.replaced"):
        if path.with_name(path.name[1 : -len(".replaced")]).exists():
            shutil.rmtree(path)


def prune(folder: Path, retention: Retention) -> None:
    """Remove complete checkpoints that no rule keeps. Damaged ones are left for a person to judge."""
    found = _stored(folder, warn=lambda text: None)
    kept = retention.kept(found)
    for path in [stored.path for stored in found if stored.path not in kept]:
        # Out of sight first: a kill during the removal must not leave half a checkpoint with a name.
        doomed = path.with_name(f".{path.name.strip('.')}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed)


def write_loss(path: Path, loss: float) -> None:
    """Add the validation loss to a checkpoint, complete or being written; whole or not at all."""
    partial = path / f".{VALIDATION}.partial"
    write_json(partial, {"cross_entropy_nats": loss})
    partial.rename(path / VALIDATION)
    sync(path)


def read_loss(path: Path) -> float | None:
    """The validation loss of a checkpoint's step, if it is known and a number."""
    try:
        loss = json.loads((path / VALIDATION).read_text())["cross_entropy_nats"]
        return float(loss) if math.isfinite(loss) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


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


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder; without it a power cut may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints of several ranks: any layout loads any other, background saves, errors on all ranks.

One launch of two ranks writes, one of four and one of two read: launching costs more than all the checks.
Every comparison is bit for bit: a checkpoint computes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_parallel.checkpoint import writer
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError
from moe_parallel.checkpoint.state import TorchState
from tests.checkpoint.toy import IDENTITY, differing, flip, make, train, whole
from tests.ranks import run_ranks

SYNCHRONOUS = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=False)
ASYNCHRONOUS = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=True)


healthy = writer._HashedFile.write


def write_to_a_full_disk(file: writer._HashedFile, data: Any) -> int:
    """There is room for 1500 bytes."""
    if file.tell() + len(data) > 1500:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return healthy(file, data)


def write_on_two(folder: Path) -> dict[str, Any]:
    """Steps 1 to 3 saved at once, step 4 in the background while training goes on, then saves that fail."""
    seen: dict[str, Any] = {}
    rank = dist.get_rank()
    model, optimizer = make(seed=1, ep=2)
    saver = Checkpointer(folder, SYNCHRONOUS, dist.group.WORLD, about={"ep": 2})
    saver.save(0, TorchState(model, optimizer), {}, IDENTITY)
    seen["state after saving step 0"] = len(optimizer.state)
    for step in (1, 2, 3):
        train(model, optimizer, step)
    extra = {"loader": {"next": 7, "rate": 0.1}, "count": torch.arange(6) + 2**40}
    saver.save(3, TorchState(model, optimizer), extra, IDENTITY, progress={"tokens": 300})
    reference = {"step_00000003": whole(model, optimizer)}
    saver.close()

    saver = Checkpointer(folder, ASYNCHRONOUS, dist.group.WORLD)
    train(model, optimizer, 4)
    reference["step_00000004"] = whole(model, optimizer)
    seen["finished before"] = saver.poll()
    saver.save(4, TorchState(model, optimizer), {}, IDENTITY)
    for _ in range(3):  # the training that goes on: every tensor is overwritten in place
        train(model, optimizer, 5)
    polls = 0
    while (finished := saver.poll()) is None:
        polls += 1
        time.sleep(0.01 * (1 + rank))
    seen["finished"], seen["polls"] = finished.name, polls
    seen["finished again"] = saver.poll()

    if rank == 1:
        writer._HashedFile.write = write_to_a_full_disk
    saver.save(5, TorchState(model, optimizer), {}, IDENTITY)
    try:
        while True:
            saver.poll()
            time.sleep(0.01)
    except CheckpointError as error:
        seen["background error"] = str(error)
    saver.close()
    saver = Checkpointer(folder, SYNCHRONOUS, dist.group.WORLD)
    try:
        saver.save(6, TorchState(model, optimizer), {}, IDENTITY)
    except CheckpointError as error:
        seen["error"] = str(error)
    writer._HashedFile.write = healthy
    if rank == 0:
        shutil.copytree(folder / "step_00000003", folder.parent / "flipped")
        flip(folder.parent / "flipped" / "__1_0.distcp")
    dist.barrier()
    try:
        saver.load(folder.parent / "flipped", TorchState(model, optimizer), IDENTITY)
    except UnusableCheckpointError as error:
        seen["flipped"] = str(error)
    latest = saver.latest()
    assert latest is not None
    seen["latest"] = latest.name
    dist.barrier()
    seen["folders"] = sorted(path.name for path in folder.iterdir())
    saver.close()
    if rank == 0:
        torch.save(reference, folder.parent / "reference.pt")
    return seen


def read_on_many(folder: Path, ep: int) -> list[str]:
    """Names of tensors that differ from the saved ones after loading in this layout, which is saved again."""
    reference = torch.load(folder.parent / "reference.pt", weights_only=True)
    loader = Checkpointer(folder, SYNCHRONOUS, dist.group.WORLD)
    wrong = []
    for name, expected in reference.items():
        model, optimizer = make(seed=2, ep=ep)
        train(model, optimizer, 9)  # other moments, which must be replaced
        loader.load(folder / name, TorchState(model, optimizer), IDENTITY)
        wrong += [f"{name} {key}" for key in differing(whole(model, optimizer), expected)]
    again = Checkpointer(folder.parent / f"again_{dist.get_world_size()}_{ep}", SYNCHRONOUS, dist.group.WORLD)
    again.save(4, TorchState(model, optimizer), {}, IDENTITY)
    again.close()
    loader.close()
    return wrong


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, run_ranks(write_on_two, 2, folder)


def read_alone(path: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    model, optimizer = make(seed=3)
    Checkpointer(path.parent, SYNCHRONOUS).load(path, TorchState(model, optimizer), IDENTITY)
    return differing(whole(model, optimizer), expected)


def test_one_process_reads_what_two_ranks_wrote(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: a shard missing or in the wrong place; a background copy that training changed."""
    folder, _ = written
    reference = torch.load(folder.parent / "reference.pt", weights_only=True)
    assert {name: read_alone(folder / name, expected) for name, expected in reference.items()} == {
        "step_00000003": [],
        "step_00000004": [],
    }


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_other_layouts_read_it_and_write_it_back(
    written: tuple[Path, list[dict[str, Any]]], world: int, ep: int
) -> None:
    """Would catch: a layout that leaks into keys or optimizer state; 2-D shards put back wrongly."""
    folder, _ = written
    assert run_ranks(read_on_many, world, folder, ep) == [[]] * world
    reference = torch.load(folder.parent / "reference.pt", weights_only=True)
    again = folder.parent / f"again_{world}_{ep}" / "step_00000004"
    assert read_alone(again, reference["step_00000004"]) == []


def test_extra_state_returns_with_its_tensors(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: counts beyond 2^31 or floats that lose bits on the way through the files."""
    folder, _ = written
    model, optimizer = make(seed=3)
    extra = Checkpointer(folder, SYNCHRONOUS).load(folder / "step_00000003", TorchState(model, optimizer), IDENTITY)
    assert torch.equal(extra.pop("count"), torch.arange(6) + 2**40)
    assert extra == {"loader": {"next": 7, "rate": 0.1}}


def test_background_save_ends_at_the_same_poll_on_all_ranks(
    written: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Would catch: ranks that learn of the end at different steps and then wait for each other."""
    first, second = written[1]
    assert first["polls"] == second["polls"]
    for seen in (first, second):
        assert seen["finished before"] is None
        assert seen["finished"] == "step_00000004"
        assert seen["finished again"] is None


@pytest.mark.parametrize("kind", ["error", "background error"])
def test_a_full_disk_on_one_rank_is_an_error_on_all(written: tuple[Path, list[dict[str, Any]]], kind: str) -> None:
    """Would catch: a rank that goes on alone; a failed save that takes the earlier checkpoint with it."""
    for seen in written[1]:
        assert "no space left" in seen[kind]
        assert "checkpoint.keep_last=9" in seen[kind]
        assert seen["latest"] == "step_00000004"
        assert seen["folders"] == ["step_00000000", "step_00000003", "step_00000004"]


def test_a_flipped_bit_is_told_to_all_ranks(written: tuple[Path, list[dict[str, Any]]]) -> None:
    """Would catch: a share of the files that no rank reads; one that has read its own and goes on alone."""
    for seen in written[1]:
        assert "flipped is damaged: __1_0.distcp differ from what was written" in seen["flipped"]


def test_saving_leaves_an_untouched_optimizer_untouched(
    written: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Would catch: state that a save makes up, such as a step count of 1 before the first step."""
    folder, seen = written
    assert [s["state after saving step 0"] for s in seen] == [0, 0]
    model, optimizer = make(seed=3)
    train(model, optimizer, 1)
    Checkpointer(folder, SYNCHRONOUS).load(folder / "step_00000000", TorchState(model, optimizer), IDENTITY)
    assert len(optimizer.state) == 0

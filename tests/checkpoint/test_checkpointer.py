"""One process without a process group: atomicity, damage, pruning, disk space, and what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.checkpoint.writer import WritePlanner
from tests.checkpoint.toy import IDENTITY, differing, make, train, whole


def saver(folder: Path, warnings: list[str] | None = None, **options: Any) -> Checkpointer:
    config = CheckpointConfig(**({"every_steps": 0, "keep_last": 9, "asynchronous": False} | options))
    return Checkpointer(folder, config, warn=[].append if warnings is None else warnings.append)


def save(folder: Path, *steps: int, **options: Any) -> None:
    model, optimizer = make(seed=1)
    train(model, optimizer, 1)
    with_folder = saver(folder, **options)
    for step in steps:
        with_folder.save(step, TorchState(model, optimizer), {}, IDENTITY, progress={"tokens": 10 * step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path, warnings: list[str] | None = None) -> str | None:
    path = saver(folder, warnings).latest()
    return None if path is None else path.name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_without_a_process_group(tmp_path: Path, asynchronous: bool) -> None:
    """Would catch: a need for torchrun on a laptop; lost bits. Exact: nothing is computed."""
    model, optimizer = make(seed=1)
    for step in (1, 2):
        train(model, optimizer, step)
    expected = whole(model, optimizer)
    first = saver(tmp_path, asynchronous=asynchronous)
    first.save(2, TorchState(model, optimizer), {"seen": 0.1, "none": None, "list": [1, "x"]}, IDENTITY)
    train(model, optimizer, 3)
    path = first.wait() or first.latest()
    assert path is not None
    other, other_optimizer = make(seed=2)
    extra = first.load(path, TorchState(other, other_optimizer), IDENTITY)
    first.close()
    assert differing(whole(other, other_optimizer), expected) == []
    assert extra == {"seen": 0.1, "none": None, "list": [1, "x"]}


def test_hyper_parameters_come_from_the_configuration(tmp_path: Path) -> None:
    """Would catch: a changed learning rate or decay that resuming silently sets back."""
    save(tmp_path, 1)
    model, optimizer = make(seed=2)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["weight_decay"] = 5e-5, 0.3
    saver(tmp_path).load(tmp_path / "step_00000001", TorchState(model, optimizer), IDENTITY)
    assert optimizer.param_groups[0]["lr"] == 5e-5
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    assert optimizer.state[model.embedding]["step"] == 1


def test_only_the_model_when_there_is_no_optimizer(tmp_path: Path) -> None:
    """Would catch: evaluation that needs an optimizer, or trips over its entries in the file."""
    save(tmp_path, 1)
    expected, trained = make(seed=1)
    train(expected, trained, 1)
    model, _ = make(seed=2)
    saver(tmp_path).load(tmp_path / "step_00000001", TorchState(model, None), IDENTITY)
    assert torch.equal(model.experts, expected.experts)


def test_names_do_not_depend_on_wrappers(tmp_path: Path) -> None:
    """Would catch: a checkpoint that only loads with the same recompute and compile options."""

    def model(seed: int, wrapped: bool) -> nn.Module:
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        return nn.Sequential(*[checkpoint_wrapper(layer) for layer in inner]) if wrapped else inner

    saver(tmp_path).save(1, TorchState(model(0, wrapped=True), None), {}, {})
    plain = model(1, wrapped=False)
    saver(tmp_path).load(tmp_path / "step_00000001", TorchState(plain, None), {})
    assert torch.equal(plain[1].weight, model(0, wrapped=False)[1].weight)  # type: ignore[index,union-attr]


KILLED_SAVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch.distributed.checkpoint.filesystem as filesystem
from tests.checkpoint.toy import IDENTITY, make, train
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.state import TorchState
folder, stage = Path(sys.argv[1]), sys.argv[3]
saver = Checkpointer(folder, CheckpointConfig(every_steps=0, keep_last=1, asynchronous=True))
model, optimizer = make(seed=1)
train(model, optimizer, 1)
saver.save(1, TorchState(model, optimizer), {}, IDENTITY)
saver.wait()
def stuck(*args, **kwargs):
    (folder.parent / "stuck").touch()
    time.sleep(60)
if stage == "tensors":
    filesystem._write_item = stuck
elif stage == "rename":
    folders.sync = stuck
else:
    folders.shutil.rmtree = stuck
saver.save(2, TorchState(model, optimizer), {}, IDENTITY)
saver.wait()
"""


@pytest.mark.parametrize(("stage", "survivor"), [("tensors", 1), ("rename", 1), ("pruning", 2)])
def test_a_kill_leaves_a_complete_checkpoint(tmp_path: Path, stage: str, survivor: int) -> None:
    """Would catch: half a folder taken as the newest; an old one removed before the new one is whole."""
    folder = tmp_path / "checkpoints"
    here = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", KILLED_SAVE, str(folder), here, stage])
    deadline = time.monotonic() + 60
    while not (tmp_path / "stuck").exists():
        assert time.monotonic() < deadline, "the save never reached the stage"
        assert process.poll() is None, "the save ended by itself"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(names(folder)) == 2, "the kill must have come in the middle"
    warnings: list[str] = []
    assert newest(folder, warnings) == f"step_{survivor:08d}"
    assert warnings == []
    save(folder, 3)
    assert names(folder) == [f"step_{survivor:08d}", "step_00000003"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path / "__0_0.distcp", 1000), "__0_0.distcp has 1000 bytes"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
        (lambda path: (path / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda path: (path / "meta.json").unlink(), "has no meta.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path: Path, damage: Any, said: str) -> None:
    """Would catch: resuming from a file that was cut short, or going back without a word."""
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002")
    warnings: list[str] = []
    assert newest(tmp_path, warnings) == "step_00000001"
    assert len(warnings) == 1
    assert str(tmp_path / "step_00000002") in warnings[0]
    assert said in warnings[0]
    with pytest.raises(UnusableCheckpointError, match="step_00000002"):
        saver(tmp_path).load(tmp_path / "step_00000002", TorchState(*make(seed=1)), IDENTITY)


def test_nothing_there(tmp_path: Path) -> None:
    """Would catch: a first start that fails for want of a folder, and a wrong path that loads nothing."""
    assert newest(tmp_path / "absent") is None
    with pytest.raises(ValueError, match="is not a checkpoint"):
        saver(tmp_path).load(tmp_path, TorchState(*make(seed=1)), IDENTITY)


def test_pruning_keeps_the_newest_and_never_the_damaged_in_their_place(tmp_path: Path) -> None:
    """Would catch: keep_last that counts a damaged checkpoint and so removes the last good one."""
    save(tmp_path, 1, 2, 3, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    os.truncate(tmp_path / "step_00000003" / "__0_0.distcp", 10)
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_newest_is_the_one_written_last(tmp_path: Path) -> None:
    """Would catch: a run that went back to step 1 and is then resumed from the branch that it had left."""
    save(tmp_path, 1, 5)
    save(tmp_path, 2, keep_last=1)
    assert newest(tmp_path) == "step_00000002"
    assert names(tmp_path) == ["step_00000002"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    """Would catch: a run that stops where it was resumed and cannot give its checkpoint a name."""
    save(tmp_path, 3, 3)
    assert names(tmp_path) == ["step_00000003"]
    # What a kill between the two renames leaves: the first one aside, and nothing under the name.
    (tmp_path / "step_00000003").rename(tmp_path / ".step_00000003.replaced")
    assert newest(tmp_path) == ".step_00000003.replaced"
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["step_00000004"]


def test_no_disk_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a disk filled to the brim by a checkpoint that cannot fit."""
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needed 0\.000 GiB, free 0\.000 GiB.*keep_last=9") as error:
        save(tmp_path, 2)
    assert str(tmp_path) in str(error.value)
    assert names(tmp_path) == ["step_00000001"]


def test_the_estimate_of_the_size_covers_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an estimate below the truth, or (4 KiB an entry) so far above that saves are refused."""
    seen: list[int] = []
    monkeypatch.setattr(WritePlanner, "_check_space", lambda planner, needed: seen.append(needed))
    tensors = {f"model.{i}": torch.zeros(50, 100) for i in range(40)}
    saver(tmp_path).save(1, TorchState(nn.Module(), None), dict(tensors), {})
    written = sum(file.stat().st_size for file in (tmp_path / "step_00000001").iterdir())
    assert written <= seen[0] <= written + 40 * 4096


def test_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    """Would catch: weights of another architecture loaded because the shapes happen to fit."""
    save(tmp_path, 1)
    other = {"model": {"dim": 12, "num_layers": 1}, "moe": {"num_experts": 16, "shared": 1}}
    with pytest.raises(UnusableCheckpointError) as error:
        saver(tmp_path).load(tmp_path / "step_00000001", TorchState(*make(seed=1)), other)
    for part in (
        "model.dim: 6 in the checkpoint, 12 in this run",
        "moe.num_experts: 8 in the checkpoint, 16 in this run",
        "moe.shared: (absent) in the checkpoint, 1 in this run",
        "run.name",
    ):
        assert part in str(error.value)
    assert "num_layers" not in str(error.value)


def test_entries_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Would catch: a tensor that the checkpoint lacks left at its initial value, or one cast silently."""
    save(tmp_path, 1)
    model, optimizer = make(seed=2)
    before = model.experts.clone()
    model.extra = nn.Parameter(torch.zeros(2))
    model.bias = torch.zeros(9)
    model.frozen = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer.param_groups[0]["params"] = [model.embedding]
    with pytest.raises(UnusableCheckpointError, match=r"unknown to this run: optimizer\.experts\.exp_avg"):
        saver(tmp_path).load(tmp_path / "step_00000001", TorchState(model, optimizer), IDENTITY)
    del model.router
    with pytest.raises(UnusableCheckpointError) as error:
        saver(tmp_path).load(tmp_path / "step_00000001", TorchState(model, None), IDENTITY)
    for part in (
        "missing from the checkpoint: model.extra",
        "unknown to this run: model.router",
        "model.bias is torch.float32 (8,) in the checkpoint, torch.float32 (9,) in this run",
        "model.frozen is torch.float32 (3,) in the checkpoint, torch.bfloat16 (3,) in this run",
    ):
        assert part in str(error.value)
    assert torch.equal(model.experts, before), "a refused checkpoint must not touch the model"


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MALICIOUS_FOLDER"],)


def replace_index(path: Path, content: bytes) -> None:
    """Put another index into a checkpoint, with a list of files that agrees: as an attacker would."""
    (path / ".metadata").write_bytes(content)
    meta = json.loads((path / "meta.json").read_text())
    meta["files"][".metadata"] = {"bytes": len(content), "xxh3_128": folders.checksum(path / ".metadata")}
    (path / "meta.json").write_text(json.dumps(meta))


def test_a_malicious_index_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: pickle.load on the index (what torch does), which runs whatever a stranger put into it."""
    folder, proof = tmp_path / "checkpoints", tmp_path / "proof"
    monkeypatch.setenv("MALICIOUS_FOLDER", str(proof))
    save(folder, 1)
    path = folder / "step_00000001"
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = Malicious()
    attack = pickle.dumps(index)
    pickle.loads(attack)
    assert proof.is_dir(), "the attack must work on an unprotected reader, else this test proves nothing"
    proof.rmdir()
    replace_index(path, attack)
    with pytest.raises(UnusableCheckpointError, match=r"refused.*mkdir"):
        saver(folder).load(path, TorchState(*make(seed=1)), IDENTITY)
    assert not proof.exists()


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    """Would catch: reading files outside the checkpoint because its index says so."""
    save(tmp_path, 1)
    path = tmp_path / "step_00000001"
    index = pickle.loads((path / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../secret"
    replace_index(path, pickle.dumps(index))
    with pytest.raises(UnusableCheckpointError, match=r"\.\./secret"):
        saver(tmp_path).load(path, TorchState(*make(seed=1)), IDENTITY)


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": object()}, {"__tensor__": "x"}])
def test_extra_state_that_would_change_is_refused(tmp_path: Path, value: Any) -> None:
    """Would catch: a tuple that comes back as a list, an integer key that comes back as text."""
    with pytest.raises(CheckpointError, match="extra state"):
        saver(tmp_path).save(1, TorchState(make(seed=1)[0], None), {"value": value}, {})


def test_options_are_checked_and_due_follows_them() -> None:
    """Would catch: options that do nothing, or that fail only when the first checkpoint is due."""
    every = saver(Path("unused"), every_steps=10)
    assert [step for step in range(1, 31) if every.due(step)] == [10, 20, 30]
    assert not saver(Path("unused"), every_steps=0).due(10)
    for wrong in ({"every_steps": -1}, {"keep_last": 0}):
        with pytest.raises(ValueError, match=f"checkpoint.{next(iter(wrong))}={next(iter(wrong.values()))}"):
            CheckpointConfig(**wrong)

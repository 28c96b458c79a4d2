"""What a checkpoint is can be said without torch, and a flipped byte is found and named, there and when loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import UnusableCheckpointError
from moe_parallel.checkpoint.state import TorchState
from tests.checkpoint.toy import IDENTITY, flip, make, train

SCRIPT = Path(__file__).parents[2] / "scripts" / "checkpoints.py"
WITHOUT_TORCH = """
import importlib.abc, runpy, sys
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch was imported")
sys.meta_path.insert(0, NoTorch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with two checkpoints and one that was killed."""
    place = tmp_path / "checkpoints"
    about = {"engine": "native", "layout": {"ranks": 4, "ep": 2, "shard": 4, "pp": 1}, "parameters_total": 1234}
    config = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=False)
    saver = Checkpointer(place, config, about=about)
    model, optimizer = make(seed=1)
    for step in (7, 1400):
        train(model, optimizer, step)
        saver.evaluated(step, 7 / step)
        progress = {"tokens": 1000 * step, "next_sequence": 8 * step}
        saver.save(step, TorchState(model, optimizer), {}, IDENTITY, progress=progress)
    (place / ".step_00001500.partial").mkdir()
    return place


def test_a_run_is_listed(folder: Path) -> None:
    """Would catch: a look from a log-in node that loads torch, or that leaves out what is asked for."""
    done = run(folder.parent, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step_00000007  complete" in done.stdout
    assert ".step_00001500.partial  partial: being written" in done.stdout
    newest = done.stdout[done.stdout.index("step_00001400") :]
    for part in (
        "step 1,400, 1,400,000 tokens, next sequence 11,200, validation loss 0.0050 nats",
        "1,234 parameters, unknown active, 1 layers, 8 experts",
        f"written by engine native, torch {torch.__version__}, on 1 ranks: ep 2, shard 4\n",
    ):
        assert part in newest
    facts = [json.loads(line) for line in run(folder, "--json").stdout.splitlines()]
    assert [fact["state"] for fact in facts] == ["complete", "complete", "partial"]
    assert facts[1]["step"] == 1400
    assert facts[1]["about"]["layout"]["ep"] == 2
    assert 0 <= facts[1]["age_seconds"] < 600
    path = folder / "step_00001400"
    assert facts[1]["bytes"] == sum(
        file.stat().st_size for file in path.iterdir() if file.name not in ("meta.json", "validation.json")
    )
    assert run(path).stdout.startswith("step_00001400  complete")
    nothing = run(folder.parent / "absent")
    assert nothing.returncode == 2
    assert "absent is no checkpoint and has none" in nothing.stderr


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra.json"])
def test_a_flipped_bit_is_found_and_named(folder: Path, name: str) -> None:
    """Would catch: weights that a disk has changed, which train on as if nothing were."""
    path = folder / "step_00001400"
    flip(path / name, -2)
    assert run(path).returncode == 0, "sizes alone do not show it"
    done = run(folder, "--verify")
    assert done.returncode == 1
    assert "step_00000007  complete" in done.stdout
    assert "step_00001400  damaged" in done.stdout
    assert f"  {name}: not what was written" in done.stdout
    model, optimizer = make(seed=2)
    before = model.experts.clone()
    loader = Checkpointer(folder, CheckpointConfig())
    with pytest.raises(UnusableCheckpointError, match=f"step_00001400 is damaged: {name} differ"):
        loader.load(path, TorchState(model, optimizer), IDENTITY)
    with pytest.raises(UnusableCheckpointError, match=f"step_00001400 is damaged: {name} differ"):
        loader.verify(path)
    assert torch.equal(model.experts, before)


def test_verification_can_be_left_out(folder: Path) -> None:
    """Would catch: an option that does nothing. The flipped bit lies in a tensor, where only a checksum sees it."""
    path = folder / "step_00001400"
    content = (path / "__0_0.distcp").read_bytes()
    model, optimizer = make(seed=1)
    for step in (7, 1400):
        train(model, optimizer, step)
    flip(path / "__0_0.distcp", content.index(model.frozen.detach().numpy().tobytes()))
    other, other_optimizer = make(seed=2)
    Checkpointer(folder, CheckpointConfig(verify=False)).load(path, TorchState(other, other_optimizer), IDENTITY)
    assert (other.frozen != model.frozen).sum() == 1
    assert torch.equal(other.experts, model.experts)

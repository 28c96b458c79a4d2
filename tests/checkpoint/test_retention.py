"""Which checkpoints stay: the newest, milestones, the best; that a kill costs none of them; losses that come late."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import Retention, Stored
from moe_parallel.checkpoint.listing import describe, find
from moe_parallel.checkpoint.state import TorchState
from tests.checkpoint.toy import IDENTITY, make
from tests.runs import Runner, rows


def stored(*pairs: tuple[int, float | None]) -> list[Stored]:
    return [Stored(Path(f"{place}"), step, loss) for place, (step, loss) in enumerate(pairs)]


def steps_kept(found: list[Stored], **rules: int) -> list[int]:
    kept = Retention(**({"last": 1, "every_steps": 0, "best": 0} | rules)).kept(found)
    return [one.step for one in found if one.path in kept]


FOUND = stored((100, 3.0), (200, 2.0), (300, 2.5), (400, None), (500, 2.2), (600, 2.0))


@pytest.mark.parametrize(
    ("rules", "steps"),
    [
        ({}, [600]),
        ({"last": 2}, [500, 600]),
        ({"last": 9}, [100, 200, 300, 400, 500, 600]),
        ({"every_steps": 300}, [300, 600]),
        ({"every_steps": 200}, [200, 400, 600]),
        ({"best": 1}, [600]),  # of two equal ones the later
        ({"best": 2}, [200, 600]),
        ({"best": 3}, [200, 500, 600]),
        ({"best": 9}, [100, 200, 300, 500, 600]),  # never one without a loss
        ({"last": 2, "every_steps": 100 * 3, "best": 2}, [200, 300, 500, 600]),
    ],
)
def test_rules_add_up(rules: dict[str, int], steps: list[int]) -> None:
    """Would catch: a rule that takes from another what it keeps, or an order by step where writing counts."""
    assert steps_kept(FOUND, **rules) == steps


def test_newest_means_written_last() -> None:
    """Would catch: a run that went back to step 100 and whose own checkpoint 200 is pruned for the old 600."""
    assert steps_kept(stored((600, 1.0), (100, 3.0), (200, 2.9)), last=2) == [100, 200]
    assert steps_kept(stored((600, 1.0), (100, 3.0), (200, 2.9)), last=1, best=1) == [600, 200]


def saver(folder: Path, **options: Any) -> Checkpointer:
    config = CheckpointConfig(**({"every_steps": 1, "keep_last": 1, "asynchronous": False} | options))
    return Checkpointer(folder, config, warn=[].append)


def names(folder: Path) -> list[int]:
    return sorted(step for path in folder.iterdir() if (step := folders.step_of(path)) is not None)


def fill(folder: Path, losses: dict[int, float | None], **options: Any) -> None:
    with_rules = saver(folder, **options)
    state = TorchState(make(seed=1)[0], None)
    for step, loss in losses.items():
        if loss is not None:
            with_rules.evaluated(step, loss)
        with_rules.save(step, state, {}, IDENTITY)
    with_rules.close()


LOSSES = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 4.0}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_leaves_what_its_options_say(tmp_path: Path, asynchronous: bool) -> None:
    """Would catch: an option that does nothing; a loss of NaN that is the best of all."""
    fill(tmp_path, LOSSES, keep_best=2, keep_every_steps=3, asynchronous=asynchronous)
    assert names(tmp_path) == [2, 3, 5, 6]
    assert [folders.read_loss(path) for path in sorted(tmp_path.iterdir())] == [1.0, None, 2.0, 4.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_loss_that_comes_after_the_save(tmp_path: Path, asynchronous: bool) -> None:
    """Would catch: the last step, which is evaluated after it is saved; a loss given to another step's checkpoint."""
    fill(tmp_path, {1: 3.0, 2: 2.0}, keep_best=1, keep_last=2)
    late = saver(tmp_path, keep_best=1, keep_last=2, asynchronous=asynchronous)
    late.save(3, TorchState(make(seed=1)[0], None), {}, IDENTITY)
    late.evaluated(3, 1.5)
    late.evaluated(4, 0.5)  # a step that is not saved
    late.close()
    assert folders.read_loss(tmp_path / "step_00000003") == 1.5
    assert names(tmp_path) == [2, 3]
    # A run that ended between save and evaluation evaluates again when it resumes, before it saves anything.
    (tmp_path / "step_00000003" / "validation.json").unlink()
    resumed = saver(tmp_path, keep_best=1, keep_last=2)
    path = resumed.latest()
    assert path is not None
    resumed.load(path, TorchState(make(seed=1)[0], None), IDENTITY)
    resumed.evaluated(3, 1.25)
    assert folders.read_loss(tmp_path / "step_00000003") == 1.25
    assert folders.read_loss(tmp_path / "step_00000002") == 2.0
    # A file that was cut short is no loss, and no reason to fail.
    (tmp_path / "step_00000003" / "validation.json").write_text('{"cross_')
    assert folders.read_loss(tmp_path / "step_00000003") is None


def test_a_loss_is_not_written_into_another_runs_checkpoint(tmp_path: Path) -> None:
    """Would catch: resume=PATH of another run, whose folder is only read."""
    fill(tmp_path / "theirs", {5: None})
    mine = saver(tmp_path / "mine", keep_best=1)
    mine.load(tmp_path / "theirs" / "step_00000005", TorchState(make(seed=1)[0], None), IDENTITY)
    mine.evaluated(5, 1.0)
    assert folders.read_loss(tmp_path / "theirs" / "step_00000005") is None


class Killed(BaseException):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """End at the next rename or removal after so many, the removal halfway."""
    left: Iterator[int] = itertools.count(calls, -1)
    rename, rmtree = Path.rename, shutil.rmtree

    def maybe_rename(path: Path, target: Path) -> Path:
        if next(left) <= 0:
            raise Killed
        return rename(path, target)

    def maybe_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if next(left) <= 0:
            next(iter(sorted(Path(path).iterdir()))).unlink()
            raise Killed
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(Path, "rename", maybe_rename)
    monkeypatch.setattr(folders.shutil, "rmtree", maybe_rmtree)


def test_a_kill_at_any_step_of_pruning_costs_nothing_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: half of a checkpoint under its name; one removed before the rule says so; leftovers for ever."""
    template = tmp_path / "template"
    fill(template, LOSSES, keep_last=9)
    rules = Retention(last=1, every_steps=3, best=2)
    for calls in range(5):  # two go, each by a rename and a removal; the fifth time nothing interrupts
        folder = tmp_path / f"killed_after_{calls}"
        shutil.copytree(template, folder)
        with monkeypatch.context() as patch:
            killed_after(patch, calls)
            if calls < 4:
                with pytest.raises(Killed):
                    folders.prune(folder, rules)
            else:
                folders.prune(folder, rules)
        warnings: list[str] = []
        whole = [folders.step_of(path) for path in folders.complete(folder, warnings.append)]
        assert warnings == []
        assert {2, 3, 5, 6} <= set(whole)
        folders.remove_leftovers(folder)
        folders.prune(folder, rules)
        assert sorted(path.name for path in folder.iterdir()) == [f"step_0000000{step}" for step in (2, 3, 5, 6)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"keep_every_steps": 1500},
            "keep_every_steps=1500 must be a multiple of checkpoint.every_steps=1000; use 1000",
        ),
        ({"keep_every_steps": 3, "every_steps": 0}, "checkpoint.every_steps=0; use 0: no step is saved regularly"),
        ({"keep_every_steps": -1000}, "keep_every_steps=-1000 must be"),
        ({"keep_best": -1}, "checkpoint.keep_best=-1 must be at least 0"),
    ],
)
def test_rules_that_would_keep_nothing_are_refused(options: dict[str, int], said: str) -> None:
    """Would catch: milestones that are never saved, found out when the disk is looked at weeks later."""
    with pytest.raises(ValueError, match=said):
        CheckpointConfig(**options)


def test_keep_best_needs_a_loss_for_every_checkpoint() -> None:
    """Would catch: a best that is the best of the few checkpoints that happened to be evaluated."""
    config = CheckpointConfig(every_steps=100, keep_best=1)
    config.check_evaluation(50, 8)
    config.check_evaluation(100, 8)
    CheckpointConfig(every_steps=100).check_evaluation(0, 0)
    for every, sequences, said in (
        (30, 8, "evaluation.every_steps=30"),
        (0, 8, "every_steps=0"),
        (50, 0, "sequences=0"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint.keep_best=1 .*{said}"):
            config.check_evaluation(every, sequences)


def test_a_real_run_keeps_its_best(runner: Runner) -> None:
    """Would catch: losses of training steps, or of another step, taken for those of the checkpoints; facts that a run
    does not hand on. The learning rate is so high that the last checkpoint is not the best."""
    every = ("checkpoint.every_steps=2", "evaluation.every_steps=1", "checkpoint.keep_last=1")
    options = (*every, "checkpoint.keep_best=2", "checkpoint.keep_every_steps=8", "optim.learning_rate=3")
    run = runner.run("best", *options, "parallel.ep=2", ranks=2)
    losses = {row["step"]: row["validation/cross_entropy_nats"] for row in rows(run.folder)}
    ranking = sorted((step for step in losses if step % 2 == 0), key=losses.__getitem__)
    assert ranking[0] != 12, "a test of something else than keep_last"
    assert names(run.folder / "checkpoints") == sorted({12, 8, *ranking[:2]})
    for path in find(run.folder):
        facts = describe(path, verify=True)
        assert facts["problem"] is None
        assert facts["validation_loss_nats"] == losses[facts["step"]]
        assert (facts["tokens"], facts["next_sequence"]) == (256 * facts["step"], 8 * facts["step"])
        assert facts["about"]["engine"] == "native"
        assert facts["about"]["layout"]["ep"] == 2
        assert facts["about"]["parameters_total"] > facts["about"]["parameters_active"] > 0
        assert facts["model"]["experts"] > 1

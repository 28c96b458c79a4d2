"""Schedulers send SIGTERM or SIGUSR1 at any time, to any process, more than once: a run always ends in good order.

Exit code 75 means: told to stop, a checkpoint is written, please start me again. torchrun does not pass it on. Measured
with torch 2.13: it ends with 1 whenever a worker ends with anything but 0, and with 1 after a SIGTERM of its own
although every worker has saved; SIGUSR1 kills it (-10) and leaves its workers running without it. So
scripts read REQUEUE_MARK, which rank 0 writes, and ignore SIGUSR1 for torchrun.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import TORCHRUN, Runner, Running, checkpoints, curve

SLOW_STEPS = """
import time
from moe_parallel.trainer import Trainer
train_step = Trainer.train_step
def slow(self, *arguments):
    time.sleep(0.05)
    return train_step(self, *arguments)
Trainer.train_step = slow
"""

SLOW_EVALUATION = """
import time
from moe_parallel.engines.native import NativeEngine
evaluate = NativeEngine.evaluate
def slow(self, batch):
    print("evaluating", flush=True)
    time.sleep(0.2)
    return evaluate(self, batch)
NativeEngine.evaluate = slow
"""

SLOW_DRY_BATCH = """
import time
from moe_parallel.trainer import Trainer
dry_batch = Trainer._dry_batch
def slow(self, batch):
    print("dry batch", flush=True)
    time.sleep(0.5)
    dry_batch(self, batch)
Trainer._dry_batch = slow
"""

SLOW_READER = """
import shutil, time
from moe_data.sources import DocumentReader
open_file, rmtree = DocumentReader._open, shutil.rmtree
def slow(self, path):
    for row in open_file(self, path):
        print("reading", flush=True)
        time.sleep(100)
        yield row
def slow_rmtree(*arguments, **options):
    print("cleaning", flush=True)
    time.sleep(0.5)
    rmtree(*arguments, **options)
DocumentReader._open, shutil.rmtree = slow, slow_rmtree
"""

SLOW_SOURCE = """
import time
from moe_data.loader import TrainingData
batch = TrainingData.batch
def slow(self, step, *arguments):
    if step >= 3:
        time.sleep(100)
    return batch(self, step, *arguments)
TrainingData.batch = slow
"""

SLOW_SAVE = """
import time
from moe_parallel.checkpoint import folder
finish = folder.finish
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(0.5)
    finish(*arguments)
folder.finish = slow
"""


def stopped_at(running: Running) -> int:
    """The step of the only checkpoint that the end of the run has written, after checking that all agree on it."""
    assert set(running.finish()) == {75}, running.err
    name = checkpoints(running.folder)[-1]
    step = int(name.removeprefix("step_"))
    assert f"stopped by a signal at step {step}; the checkpoint is written" in running.out
    assert "Traceback" not in running.err
    assert not list(running.folder.glob("checkpoints/.step*")), "nothing half-written"
    if step:
        assert max(curve(running.folder)) == step
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_single_process_saves_and_asks_for_a_requeue(runner: Runner, number: signal.Signals, tmp_path: Path) -> None:
    """Would catch: a signal that kills, or that is seen only at the end; a mark that names another step."""
    mark = tmp_path / "job" / "mark"
    options = ("train.steps=1000", "checkpoint.every_steps=0")
    running = runner.start("run", *options, patch=SLOW_STEPS, env={"REQUEUE_MARK": str(mark)})
    running.wait_for("step 3/1000")
    running.signal(0, number)
    step = stopped_at(running)
    assert 3 <= step < 1000
    assert mark.read_text() == f"step {step}\n"


def test_a_signal_to_one_rank_stops_all_at_the_same_step(runner: Runner) -> None:
    """Would catch: a rank that leaves alone while the others wait for it until their time is up. A checkpoint can
    only be complete if all ranks wrote it at one step. Signals come twice, and while the checkpoint is written.
    """
    options = ("train.steps=1000", "checkpoint.every_steps=0", "parallel.ep=2")
    running = runner.start("run", *options, ranks=2, patch=SLOW_STEPS + SLOW_SAVE)
    running.wait_for("step 3/1000")
    running.signal(1, signal.SIGTERM)
    running.wait_for("saving")
    for rank in (0, 1):
        running.signal(rank, signal.SIGUSR1)
        running.signal(rank, signal.SIGTERM)
    assert 3 <= stopped_at(running) < 1000


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_is_interrupted_and_done_again(runner: Runner, ranks: int) -> None:
    """Would catch: a stop that waits for a long validation to end, or that loses the line of the step whose
    validation was interrupted. No tolerance: after resuming, the curve is that of a run without a stop.
    """
    options = ("evaluation.every_steps=4", "train.micro_batch_sequences=1", f"parallel.ep={ranks}", "train.steps=6")
    running = runner.start("run", *options, ranks=ranks, patch=SLOW_EVALUATION)
    running.wait_for("evaluating")
    running.signal(ranks - 1, signal.SIGTERM)
    assert set(running.finish()) == {75}
    assert running.out.count("evaluating") <= 2 * ranks, "of 8 / ranks batches on each rank"
    assert checkpoints(running.folder) == ["step_00000004"]
    assert 4 not in curve(running.folder)
    runner.run("run", *options, "resume=auto", ranks=ranks)
    runner.run("whole", *options, ranks=ranks)
    assert curve(running.folder) == curve(runner.runs / "whole")


def test_before_the_first_step(runner: Runner) -> None:
    """Would catch: a signal during the dry batch that is forgotten, or that ends in a state from which one cannot
    resume. No tolerance: the resumed run is the whole run.
    """
    running = runner.start("run", patch=SLOW_DRY_BATCH)
    running.wait_for("dry batch")
    running.signal(0, signal.SIGTERM)
    assert stopped_at(running) == 0
    runner.run("run", "resume=auto")
    runner.run("whole")
    assert curve(running.folder) == curve(runner.runs / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokenizing_ends_at_once(runner: Runner, ranks: int, tmp_path: Path) -> None:
    """Would catch: a signal that waits for hours of tokenizing, while the scheduler's patience is half a minute; a
    library that takes the interruption for an error of the data; leftovers in the cache after a second signal.
    """
    cache, mark = tmp_path / "cache", tmp_path / "mark"
    options = (f"data.cache_dir={cache}", f"parallel.ep={ranks}")
    running = runner.start("run", *options, ranks=ranks, patch=SLOW_READER, env={"REQUEUE_MARK": str(mark)})
    for number, text in ((signal.SIGTERM, "reading"), (signal.SIGUSR1, "cleaning")):
        running.wait_for(text)
        for rank in range(ranks):
            running.signal(rank, number)
    assert set(running.finish(timeout=30)) == {75}, running.err
    assert "stopped by a signal while the data was prepared" in running.err
    assert "Traceback" not in running.err
    assert mark.read_text() == "before training\n"
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_source_that_hangs(runner: Runner, ranks: int) -> None:
    """Would catch: a stop that is only looked for between steps, while the data of the next step does not come."""
    running = runner.start("run", f"parallel.ep={ranks}", "data.prefetch_steps=1", ranks=ranks, patch=SLOW_SOURCE)
    running.wait_for("step 3/12")
    for rank in range(ranks):
        running.signal(rank, signal.SIGUSR1)
    assert stopped_at(running) == 3


def test_waiting_for_the_other_ranks(runner: Runner) -> None:
    """Would catch: a rank that ignores the scheduler while it waits, for up to parallel.timeout_seconds, for ranks
    that never come. There is nothing to save: the signal has its usual effect.
    """
    alone = "import os, time\nif RANK: os._exit(3)\nprint('here', flush=True)"
    running = runner.start("run", "parallel.ep=2", ranks=2, patch=alone)
    running.wait_for("here")
    time.sleep(2)  # past composing, into the rendezvous
    running.signal(0, signal.SIGTERM)
    assert running.finish(timeout=20) == [-signal.SIGTERM, 3]


@pytest.mark.parametrize("target", ["torchrun", "worker"])
def test_under_torchrun(runner: Runner, target: str, tmp_path: Path) -> None:
    """Would catch: torchrun that ends ranks before their checkpoint is complete. It answers 1 in both cases (see the
    top of this file), so REQUEUE_MARK has to tell. No tolerance: one process resumes to the curve of one process,
    up to the step of the stop within rounding, which the test of topologies covers.
    """
    mark = tmp_path / "mark"
    overrides = ["train.steps=2000", "checkpoint.every_steps=0", "parallel.ep=2", "tracking.log_every_steps=1"]
    command = runner.command(*TORCHRUN, "2", name="run", overrides=overrides, env={"REQUEUE_MARK": str(mark)})
    assert command.stdout is not None
    while "step 3/2000" not in (line := command.stdout.readline()):
        assert line, command.communicate()[1]
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    subprocess.run(["kill", "-TERM", str(command.pid) if target == "torchrun" else children[-1]], check=True)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 1
    step = int(mark.read_text().removeprefix("step "))
    assert f"stopped by a signal at step {step}; the checkpoint is written" in out
    assert checkpoints(runner.runs / "run") == [f"step_{step:08d}"]
    runner.run("run", "resume=auto", f"train.steps={step + 1}")
    assert max(curve(runner.runs / "run")) == step + 1

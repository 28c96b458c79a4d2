"""A whole run over pipelines: data, dry batch, evaluation, stop, checkpoints, another layout, the last sample."""

from __future__ import annotations

import pytest

from tests.runs import TERM, Runner, at_step, curve

OPTIONS = ("model.num_layers=4", "balance=global", "train.micro_batch_sequences=2", "evaluation.every_steps=4")
DUAL = ("parallel.pp=2", "parallel.schedule=dual_pipe_v")
ZERO_BUBBLE = ("parallel.pp=2", "parallel.schedule=interleaved_zero_bubble", "evaluation.sample_tokens=4")
COMPARED = ("loss/cross_entropy_nats", "loss/total_nats", "grad/norm", "balance/global_estimate_error")


def test_a_run_that_changes_its_pipeline(runner: Runner) -> None:
    """Would catch: a loop that forgets that only some ranks have losses or experts, a resume that loses moments or
    counts of other stages. Stopped twice, on 2, 1 and 2 ranks; within float32 roundings of 12 steps."""
    runner.run("whole", *OPTIONS)
    runner.run("parts", *OPTIONS, *DUAL, ranks=2, patch=at_step(4, TERM), codes=75)
    runner.run("parts", *OPTIONS, "resume=auto", patch=at_step(8, TERM), codes=75)
    runner.run("parts", *OPTIONS, *ZERO_BUBBLE, "resume=auto", ranks=2)
    parts, whole = curve(runner.runs / "parts"), curve(runner.runs / "whole")
    assert parts.keys() == whole.keys() == set(range(1, 13))
    for step, metrics in whole.items():
        assert parts[step].keys() == metrics.keys()
        for name in (*COMPARED, *(name for name in metrics if name.startswith("validation/"))):
            assert parts[step][name] == pytest.approx(metrics[name], rel=1e-4), f"step {step}: {name}"


def test_refused_before_ranks_meet(runner: Runner) -> None:
    """Would catch: a pipeline whose mistake shows only in its first step."""
    running = runner.run("refused", *OPTIONS[:2], *DUAL, "train.micro_batch_sequences=4", ranks=2, codes=2)
    assert "cannot order the 2 micro-batches" in running.err
    assert "legal values of train.micro_batch_sequences: [1, 2]" in running.err

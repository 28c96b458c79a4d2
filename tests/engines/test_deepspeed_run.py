"""The same command under the native engine and under DeepSpeed."""

from __future__ import annotations

import pytest

from tests.runs import curve

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

SAME = ["parallel.ep=2", "balance=loss_free", "train.micro_batch_sequences=2", "checkpoint.every_steps=6"]


def test_same_curve(runner):
    """A run that differs from the native engine's in anything that is logged, or after a change of engine in its midst:
    a learning rate, decay, clip or bias that is not passed on, a dry batch that leaves something behind."""
    native = runner.run("native", *SAME, ranks=2)
    three = ["engine=deepspeed", "engine.stage=3", "engine.keep_elements=0"]
    runner.run("changed", *SAME, *three, "train.steps=6", "optim.schedule=constant", ranks=2)
    changed = runner.run("changed", *SAME, "engine=deepspeed", "optim.schedule=constant", "resume=auto", ranks=2)
    wanted, found = curve(native.folder), curve(changed.folder)
    assert wanted.keys() == found.keys()
    for step, metrics in wanted.items():
        for name in ("loss/cross_entropy_nats", "grad/norm", "experts/max_over_mean", "loss/balance"):
            # float32 in another order of sums; Adam and the bias' sign pass differences on for twelve steps.
            assert found[step][name] == pytest.approx(metrics[name], rel=1e-4), f"step {step}: {name}"

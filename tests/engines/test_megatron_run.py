"""Whole runs with engine=megatron: the same curve as with the native engine; one goes on where the other stopped."""

from __future__ import annotations

from tests.runs import ROOT, TERM, Runner, at_step, curve
from tests.test_resume import worst_difference

ON_CPU = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.engines.megatron_on_cpu"
OPTIONS = ("balance=global", "balance.z_coefficient=0.001", "model.vocab_size=260")
ALONE = "train.micro_batch_sequences=4"
"""Two micro-batches a step, in all three parts: what the look-ahead of the balance loss knows depends on it."""
NATIVE = ("parallel.ep=2", "train.micro_batch_sequences=2")
MEGATRON = ("engine=megatron", "parallel.tp=2", "parallel.ep=2", ALONE)


def test_a_run_changes_engines_and_goes_on(runner: Runner) -> None:
    """Moments, step counts or look-ahead counts that one engine does not take over from the other; float32 weights that
    Megatron takes for those that compute; a sample or an evaluation that differs.

    Sums in another order: losses and norms of twelve steps differ by 3e-7 of their value, as between layouts of the
    native engine (see test_resume). Lost moments change them by 1e-3.
    """
    runner.run("whole", *OPTIONS, ALONE)
    runner.run("parts", *OPTIONS, *NATIVE, ranks=2, patch=at_step(3, TERM), codes=75)
    runner.run("parts", *OPTIONS, *MEGATRON, "resume=auto", ranks=2, patch=ON_CPU + at_step(7, TERM), codes=75)
    resumed = runner.run("parts", *OPTIONS, ALONE, "resume=auto")
    assert max(curve(resumed.folder)) == 12
    assert worst_difference(curve(runner.runs / "parts"), curve(runner.runs / "whole")) < 5e-6


def test_an_option_that_megatron_does_not_have_ends_the_start(runner: Runner) -> None:
    """A refusal that comes as a traceback, or after the model was built."""
    refused = runner.run("odd", "engine=megatron", "attention=mla", "parallel.compile=blocks", codes=2)
    assert "choose attention=gqa" in refused.err
    assert "parallel.compile=blocks fuses our own blocks" in refused.err
    assert "Traceback" not in refused.err

"""What learns when: frozen weights, routers first, a schedule that goes on. Gradients are in tests/parity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.lazy import whole
from moe_parallel.learning import learning_problems
from moe_parallel.optim import OptimConfig, Schedule, learning_rate
from tests.convert.models import DENSE, with_experts
from tests.runs import TERM, Runner, at_step, curve, rows


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_schedule_that_goes_on(schedule: Schedule) -> None:
    """Would catch: a second warm-up, an end that comes too late or too early, a step that is counted twice."""
    config = OptimConfig(schedule=schedule, warmup_steps=7)
    later = replace(config, schedule_start_step=30)
    assert [learning_rate(later, step, 70) for step in range(70)] == [
        learning_rate(config, step, 100) for step in range(30, 100)
    ]


def state(folder: Path, step: int) -> dict[str, Tensor]:
    """All weights and buffers of a run's checkpoint."""
    weights = weights_of_checkpoint(folder / f"checkpoints/step_{step:08}")
    return {name: whole(lazy) for name, lazy in weights.items()}


def with_moments(folder: Path, step: int) -> set[str]:
    """Names of what the optimizer has a state of."""
    weights = weights_of_checkpoint(folder / f"checkpoints/step_{step:08}")
    return {name for name, lazy in weights.items() if str(lazy.moment(1)) != "0"}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


EVERY = ("checkpoint.every_steps=1", "checkpoint.keep_last=20", "balance=none")


def test_frozen_weights(runner: Runner) -> None:
    """Would catch: decay or updates of what is frozen, moments that are kept for it, a resume that looks for them, and
    weights that cannot learn again later. No tolerance: what is absent does not change by a bit."""
    frozen = "optim.frozen=[embedding.*,'layers.*.ffn.experts.*']"
    whole_run = runner.run("whole", *EVERY, frozen, "train.steps=4", "parallel.ep=2", ranks=2)
    first, last = state(whole_run.folder, 1), state(whole_run.folder, 4)
    learning = {name for name in first if not name.startswith("embedding.") and ".experts." not in name}
    learning = {name for name in learning if not name.endswith("router.bias")}
    assert changed(first, last) == learning == with_moments(whole_run.folder, 4)
    stop = at_step(2, TERM)
    runner.run("parts", *EVERY, frozen, "train.steps=4", "parallel.ep=2", ranks=2, patch=stop, codes=75)
    resumed = runner.run("parts", *EVERY, frozen, "train.steps=4", "parallel.ep=2", "resume=auto", ranks=2)
    assert curve(resumed.folder) == curve(whole_run.folder)
    thawed = runner.run("parts", *EVERY, "train.steps=6", "resume=auto")
    assert changed(last, state(thawed.folder, 6)) == learning | {n for n in first if "experts" in n or "embed" in n}


def test_routers_first(runner: Runner) -> None:
    """Would catch: decay of what waits, moments or a count of steps that begin before it learns, a resume in the
    middle that counts the steps from its own start. No tolerance."""
    options = (*EVERY, "optim.router_only_steps=3", "train.steps=6", "model.num_layers=3")
    run = runner.run("whole", *options)
    states = {step: state(run.folder, step) for step in range(1, 7)}
    routers = {name for name in states[1] if name.endswith("router.weight")}
    assert len(routers) == 2
    assert changed(states[1], states[3]) == routers == with_moments(run.folder, 3)
    assert len(changed(states[3], states[4])) == len(with_moments(run.folder, 4)) > len(routers)
    runner.run("parts", *options, patch=at_step(1, TERM), codes=75)
    resumed = runner.run("parts", *options, "resume=auto", "parallel.ep=2", ranks=2, patch=at_step(4, TERM), codes=75)
    assert curve(resumed.folder)[2]["grad/norm"] == pytest.approx(curve(run.folder)[2]["grad/norm"], rel=1e-5)
    again = runner.run("one", *options, patch=at_step(1, TERM), codes=75)
    again = runner.run("one", *options, "resume=auto")
    assert curve(again.folder) == curve(run.folder)


def test_evaluation_at_the_start(runner: Runner) -> None:
    """Would catch: a loss after the first step that is taken for that of the weights a run starts from, a line that a
    resumed run writes again. The weights are those of the other run's end, evaluated by the same operations."""
    first = runner.run("first", "train.steps=3", "balance=none")
    path = first.folder / "checkpoints/step_00000003"
    options = ("balance=none", f"init.weights={path}", "evaluation.at_start=true", "checkpoint.every_steps=2")
    runner.run("second", *options, "train.steps=4", patch=at_step(2, TERM), codes=75)
    second = runner.run("second", *options, "train.steps=4", "resume=auto")
    name = "validation/cross_entropy_nats"
    assert curve(second.folder)[0][name] == curve(first.folder)[3][name]
    assert [row["step"] for row in rows(second.folder)] == [0, 1, 2, 3, 4]


MODEL = with_experts(4, 48, 2)


@pytest.mark.parametrize(
    ("config", "architecture", "text"),
    [
        (
            OptimConfig(frozen=["*.router.weight", "layers.*.ffn.shard.*"]),
            with_experts(4, 48, 2, num_shared_experts=1),
            r"optim.frozen: layers\.\*\.ffn\.shard\.\* matches no weight.*layers\.\*\.ffn\.shared\.",
        ),
        (OptimConfig(frozen=["*.router.bias"]), MODEL, "matches no weight"),
        (OptimConfig(frozen=["*"]), MODEL, "leaves nothing that learns"),
        (OptimConfig(router_only_steps=2), DENSE, "router_only_steps=2, but this model has no router with weights"),
        (OptimConfig(router_only_steps=2, frozen=["*router*"]), MODEL, "optim.frozen freezes all routers"),
    ],
)
def test_options_without_effect_are_refused(config: OptimConfig, architecture, text: str) -> None:
    """Would catch: a misspelled pattern, which would train what was to stay."""
    (problem,) = learning_problems(config, architecture)
    with pytest.raises(ValueError, match=text):
        raise ValueError(problem)


def test_other_engines_refuse(runner: Runner) -> None:
    """Would catch: an engine that trains all the same. Their packages are not asked before."""
    for engine in ("deepspeed", "megatron"):
        options = (f"engine={engine}", "optim.frozen=[embedding.*]", "optim.router_only_steps=2")
        refused = runner.run(engine, *options, codes=2)
        for name in ("frozen=['embedding.*']", "router_only_steps=2"):
            assert f"optim.{name} is of engine=native; leave it out with engine={engine}" in refused.err

"""A run that was interrupted goes on as if nothing had happened: the same losses, bit for bit.

Curves are compared by what metrics.jsonl holds of every step: losses, gradient norms, expert loads, validation. A
float there reads back bit for bit, so equal dictionaries mean equal bits.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.runs import KILL, TERM, Runner, at_step, checkpoints, curve, rows

LOOK_AHEAD = ("balance=global", "train.micro_batch_sequences=2")
"""Four micro-batches in a process, two on each of two ranks: counts of the step before are part of the state."""
LOSS_FREE = ("balance=loss_free", "balance.bias_rate=0.05", "data.sources.0.streaming=true")
"""A bias that moves routing within these few steps, and a source whose place is a state of its own."""
CUTOFFS = ("router=threshold", "moe=chain_of_experts", "dispatch=two_hop", "dispatch.ranks_per_node=1")
"""Running cutoffs of each iteration of a chain, which training itself goes by."""
SCHEDULE = ("evaluation.every_steps=4", "checkpoint.every_steps=3")


@pytest.mark.parametrize(
    ("state", "ranks", "ep"),
    [(LOOK_AHEAD, 1, 1), (LOSS_FREE, 1, 1), (LOOK_AHEAD, 2, 2), (LOSS_FREE, 2, 2), (CUTOFFS, 2, 2)],
)
def test_stopped_and_resumed_is_the_same_run(runner: Runner, state: tuple[str, ...], ranks: int, ep: int) -> None:
    """Would catch: any state that a checkpoint lacks or that is restored late: moments, their step counts, the place
    in the data, the bias or cutoffs of routers, the look-ahead counts, the schedule; a line of metrics.jsonl that is
    lost or doubled.

    No tolerance: the same arithmetic in the same order.
    """
    options = (*state, *SCHEDULE, f"parallel.ep={ep}")
    runner.run("whole", *options, ranks=ranks)
    runner.run("parts", *options, ranks=ranks, patch=at_step(6, TERM), codes=75)
    assert max(curve(runner.runs / "parts")) == 7, "the step in which the signal came is finished"
    assert checkpoints(runner.runs / "parts")[-1] == "step_00000007"
    resumed = runner.run("parts", *options, "resume=auto", ranks=ranks)
    assert resumed.err.count("resuming from") == 1
    assert curve(resumed.folder) == curve(runner.runs / "whole")


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 2)])
def test_killed_and_resumed_is_the_same_run(runner: Runner, ranks: int, ep: int) -> None:
    """Would catch: a half-written checkpoint that is taken for a whole one; lines of steps after the checkpoint that
    stay in metrics.jsonl. The kill comes while a background save may be under way; which checkpoint is the last
    one does not matter for the curve. No tolerance.
    """
    options = (*LOOK_AHEAD, *SCHEDULE, f"parallel.ep={ep}")
    runner.run("whole", *options, ranks=ranks)
    runner.run("killed", *options, ranks=ranks, patch=at_step(9, KILL), codes=-9)
    assert max(curve(runner.runs / "killed")) >= 8
    resumed = runner.run("killed", *options, "resume=auto", ranks=ranks)
    assert curve(resumed.folder) == curve(runner.runs / "whole")
    assert [row["step"] for row in rows(resumed.folder)] == list(range(1, 13))
    assert not list(resumed.folder.glob("checkpoints/.step*")), "what the kill left behind is gone"


def test_restarted_by_the_launcher(runner: Runner) -> None:
    """Would catch: ranks that torchrun starts again after a crash (--max-restarts), with the store of the first
    attempt, and that look for each other under the addresses of the dead. No tolerance: the run goes on.
    """
    options = ("checkpoint.every_steps=3", "checkpoint.asynchronous=false", "parallel.ep=2", "resume=auto")
    crash = at_step(7, f"if RANK: {KILL}")
    first = runner.start("run", *options, ranks=2, patch=crash, env={"TORCHELASTIC_RESTART_COUNT": "0"})
    assert first.finish()[1] == -9
    again = runner.run("run", *options, ranks=2, env={"TORCHELASTIC_RESTART_COUNT": "1"}, store=first.store)
    assert "step_00000006 at step 6" in again.err
    runner.run("whole", *options, ranks=2)
    assert curve(again.folder) == curve(runner.runs / "whole")


def worst_difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> float:
    """Relative, of losses, balance and gradient norms of all steps."""
    assert one.keys() == other.keys()
    names = ("loss/cross_entropy_nats", "loss/balance", "grad/norm", "experts/max_over_mean")
    return max(abs(one[step][name] / other[step][name] - 1) for step in one for name in names)


ONE = (1, "parallel.ep=1", "train.micro_batch_sequences=4")
REPLICATED = (2, "parallel.ep=1", "parallel.shard=1", "train.micro_batch_sequences=2")
FOUR = (4, "parallel.ep=4", "train.micro_batch_sequences=1")
FOUR_SHARDED = (4, "parallel.ep=2", "parallel.shard=4", "train.micro_batch_sequences=1")


@pytest.mark.parametrize(("balance", "layouts"), [("global", (ONE, FOUR)), ("loss_free", (REPLICATED, FOUR_SHARDED))])
def test_resumed_on_another_topology_is_the_same_curve(runner: Runner, balance: str, layouts: Any) -> None:
    """Would catch: weights, moments, counts or data that land on the wrong rank when the layout changes.

    Two micro-batches of four sequences everywhere: the look-ahead estimate depends on how often it is renewed.
    Tolerance: sums of float32 in another order differ by some 1e-7 relative, which a few steps do not amplify (worst
    measured: 2.2e-7, of a norm). Data in another order or lost moments change losses by 1e-3.
    """
    streaming = f"data.sources.0.streaming={str(balance == 'loss_free').lower()}"
    options = (f"balance={balance}", *SCHEDULE, "balance.z_coefficient=0.001", streaming)
    runner.run("whole", *options, *ONE[1:])
    runner.run("cut", *options, "parallel.ep=2", *REPLICATED[3:], ranks=2, patch=at_step(5, TERM), codes=75)
    for number, (ranks, *layout) in enumerate(layouts):
        name = f"resumed_{number}"
        shutil.copytree(runner.runs / "cut", runner.runs / name)
        runner.run(name, *options, *layout, "resume=auto", ranks=ranks)
        assert worst_difference(curve(runner.runs / name), curve(runner.runs / "whole")) < 5e-6, layout


def test_finished_run_and_more_steps(runner: Runner) -> None:
    """Would catch: a finished run that trains, evaluates or writes again when a scheduler starts it once more; a run
    whose steps were raised and that does not go on from its end. No tolerance: the rate is constant.
    """
    options = ("optim.schedule=constant", "checkpoint.every_steps=0")
    runner.run("whole", *options)
    first = runner.run("more", *options, "train.steps=6")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    again = runner.run("more", *options, "train.steps=6", "resume=auto")
    assert "is finished at step 6; raise train.steps to go on" in again.err
    assert again.out == ""
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()} == before
    runner.run("more", *options, "resume=auto")
    assert curve(first.folder)[6].pop("validation/cross_entropy_nats") > 0, "the end of the first part is evaluated"
    for step, row in curve(first.folder).items():
        common = row.keys() & curve(runner.runs / "whole")[step].keys()
        assert "loss/cross_entropy_nats" in common
        assert {name: row[name] for name in common} == {
            name: curve(runner.runs / "whole")[step][name] for name in common
        }


def test_resume_from_a_path_branches_off(runner: Runner) -> None:
    """Would catch: resume=PATH that starts from new weights, or writes into the folder that it read from."""
    options = ("checkpoint.every_steps=4", "optim.schedule=constant", "checkpoint.keep_last=9")
    runner.run("trunk", *options)
    before = sorted((runner.runs / "trunk").rglob("*"))
    path = runner.runs / "trunk/checkpoints/step_00000004"
    runner.run("branch", *options, f"resume={path}")
    assert curve(runner.runs / "branch") == {s: row for s, row in curve(runner.runs / "trunk").items() if s > 4}
    assert sorted((runner.runs / "trunk").rglob("*")) == before
    assert checkpoints(runner.runs / "branch") == ["step_00000008", "step_00000012"]

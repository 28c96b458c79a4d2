"""scripts/plan.py from command line to files."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_parallel import options
from moe_parallel.relations import check
from scripts.plan import CONFIGS, main, question_of

TINY = ["model=tiny", "plan.sequence_tokens=64", "plan.sequences_per_rank=4"]


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that cannot be trained: its file and its command line must compose to what train.py accepts, with the
    layout of the first line. And a plan that does not say what it assumed, or draws nothing."""
    assert main([*TINY, "cluster=laptop", "cluster.ranks_per_node=4", "balance=loss_free", f"run.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "plan.txt").read_text() == printed
    for needed in ("assumed", "limits", "memory  ", "cluster.*_efficiency", "all_gather"):
        assert needed in printed
    command = next(line for line in printed.splitlines() if line.startswith("train with"))
    by_command = options.composed(command.split("train.py ")[1].split(), CONFIGS)
    by_file = composed_from(folder)
    assert by_command.parallel == by_file.parallel
    assert by_command.train == by_file.train
    assert by_file.balance.bias_rate > 0
    assert by_file.train.global_batch_tokens == 4 * 4 * 64
    check(by_file, 4, "cpu")


def composed_from(folder: Path) -> options.Config:
    """What `--config-dir FOLDER experiment=plan` makes."""
    from hydra import compose, initialize_config_dir

    options.register()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return options.to_config(compose("train", overrides=[f"hydra.searchpath=[file://{folder}]", "experiment=plan"]))


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that proposes what does not fit, or gives up without a reason."""
    arguments = [*TINY, "cluster=laptop", "cluster.memory_GB=0.001", f"run.dir={tmp_path}"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "none fits" in printed
    assert "weights" in printed


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("cluster=laptob", "there is no such choice"),
        ("cluster.nodes=0", "cluster.nodes=0 must be at least 1"),
        ("plan.expert_imbalance=0.5", "plan.expert_imbalance=0.5 must be at least 1"),
        ("parallel.epp=2", "parallel.epp"),
    ],
)
def test_mistakes(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback where a line would do, or a mistake that is taken for a choice."""
    assert main([*TINY, argument]) == 2
    assert words in capsys.readouterr().err


def test_every_cluster_composes() -> None:
    """A preset with a misspelled or impossible number."""
    for path in (CONFIGS / "cluster").glob("*.yaml"):
        question, _ = question_of([*TINY, f"cluster={path.stem}"])
        assert question.cluster.ranks == int(path.stem.rpartition("x")[2]) if "_x" in path.stem else 2


def test_an_experiment_keeps_its_batch() -> None:
    """A published batch that the planner's own default replaces."""
    question, added = question_of(["experiment=pretrain_olmoe_1b_7b", "cluster=h200_x64"])
    assert added == []
    assert question.config.train.global_batch_tokens == 4_194_304

"""`train.py` as a whole: what a run leaves behind, and that every place it can be started from gives the same run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe_parallel.run_folder import git_revision
from tests.runs import TORCHRUN, TRAIN, Runner, checkpoints, curve, rows

# The names of design and documentation; dashboards and scripts rely on them.
EVERY_LINE = {
    *("step", "tokens", "loss/cross_entropy_nats", "loss/total_nats", "loss/balance", "loss/z", "grad/norm"),
    *("optim/learning_rate", "experts/max_over_mean", "experts/dead", "experts/dropped_percent"),
    *("experts/per_token", "experts/tokens_without_percent"),
    *("experts/entropy_nats", "experts/layer_1/max_over_mean", "speed/tokens_per_second", "time/step_seconds"),
    *("memory/peak_GiB", "balance/global_estimate_error"),
}
EVALUATED = {
    "validation/cross_entropy_nats",
    "validation/text/cross_entropy_nats",
    "validation/more/cross_entropy_nats",
}


def two_domains(runner: Runner) -> str:
    """Of very different size."""
    sources = [
        f"{{name: {name}, kind: text, paths: ['{runner.corpus}/texts/{files}'], validation_fraction: 0.3}}"
        for name, files in (("text", "[123]*.txt"), ("more", "0*.txt"))
    ]
    return f"data.sources=[{','.join(sources)}]"


def test_what_a_run_leaves_behind(runner: Runner) -> None:
    """Would catch: a metric or a file that is gone or renamed, tokens counted twice or with padding, numbers in words
    that disagree with those in the files, a balance loss that is not 1 at perfect balance.
    """
    overrides = ("evaluation.every_steps=6", "tracking.log_every_steps=5", "checkpoint.every_steps=6")
    sample = ("evaluation.sample_tokens=5", "evaluation.sample_prompt='ab '", "tracking.heatmap_every_steps=12")
    running = runner.run("run", *overrides, *sample, two_domains(runner))
    folder, lines = running.folder, rows(running.folder)

    assert [row["step"] for row in lines] == [1, 5, 6, 10, 12], "first, every fifth, evaluated, last"
    for row in lines:
        assert row.keys() == EVERY_LINE | (EVALUATED if row["step"] in (6, 12) else set())
        assert row["tokens"] == row["step"] * 256, "no source is padded"
        assert row["loss/balance"] == pytest.approx(1, abs=0.2), "near 1 with a router that has learned little"
        assert row["loss/cross_entropy_nats"] < row["loss/total_nats"] < row["loss/cross_entropy_nats"] + 0.02
    assert lines[0]["loss/cross_entropy_nats"] == pytest.approx(math.log(257), abs=0.05), "an untrained model"
    assert lines[0]["optim/learning_rate"] == pytest.approx(1e-3 / 20), "the first of 20 warm-up steps"

    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("config.yaml", "environment.json", "model.json", "metrics.jsonl", "result.json", "samples.txt"),
        *("checkpoints", "images"),
    }
    assert checkpoints(folder) == ["step_00000006", "step_00000012"]
    assert [path.name for path in (folder / "images").iterdir()] == ["experts_load_00000012.png"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["git"] == git_revision()
    assert environment["command"][1] == str(TRAIN)
    assert environment["layout"]["ranks"] == 1
    result = json.loads((folder / "result.json").read_text())
    assert {name: lines[-1][name] for name in EVALUATED} == {name: result[name] for name in EVALUATED}
    assert (result["step"], result["tokens"]) == (12, 12 * 256)
    assert Path(result["checkpoint"]) == folder / "checkpoints/step_00000012"
    model = json.loads((folder / "model.json").read_text())
    assert model["parameters_total"] > model["parameters_active"] > 0
    assert (folder / "samples.txt").read_text().startswith("=== step 12, sample 0\nab ")

    for text in (
        f"{model['parameters_total']:,} parameters, {model['parameters_active']:,} of them active",
        f"step 12/12 | tokens 3072 | loss {lines[-1]['loss/cross_entropy_nats']:.4f} nats | validation ",
        "finished at step 12, 3,072 tokens",
        f"validation/cross_entropy_nats                 {result['validation/cross_entropy_nats']:.4f}",
        "\nsample:\n  ab ",
        f"checkpoint  {folder / 'checkpoints/step_00000012'}",
        "the same command with resume=auto train.steps=24",
    ):
        assert text in running.out, text


def test_validation_is_the_mean_over_all_targets(runner: Runner) -> None:
    """Would catch: a mean of the domains' means, or of the ranks'. Tolerance: float32 sums in another order."""
    options = (two_domains(runner), "train.steps=1", "train.micro_batch_sequences=1")
    one = runner.run("one", *options, "data.validation_sequences=3")
    three = runner.run("three", *options, "parallel.ep=2", "data.validation_sequences=3", ranks=2)
    for name in EVALUATED:
        assert curve(three.folder)[1][name] == pytest.approx(curve(one.folder)[1][name], rel=1e-6)
    parts = [curve(one.folder)[1][f"validation/{name}/cross_entropy_nats"] for name in ("text", "more")]
    whole = curve(one.folder)[1]["validation/cross_entropy_nats"]
    assert min(parts) < whole < max(parts)


def test_real_commands(runner: Runner, tmp_path: Path) -> None:
    """Would catch: what forked processes cannot show: imports of a fresh interpreter, exit at its end, another
    working directory, torchrun's environment; output of ranks that should be silent. Default tracking, W&B offline.

    Tolerance between one and two processes: float32 sums in another order.
    """
    offline = ["tracking=offline", "train.steps=6"]
    command = runner.command(name="one", overrides=offline, cwd=tmp_path)
    two = runner.command(*TORCHRUN, "2", name="two", overrides=["parallel.ep=2", "train.steps=6"])
    for process in (command, two):
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        assert out.count("finished at step 6") == 1
        assert out.count("step 6/6 |") == 1
        assert "Traceback" not in err
    assert [path.name for path in (runner.runs / "one/wandb").glob("offline-run-*")]
    for step in range(1, 7):
        losses = [curve(runner.runs / name)[step]["loss/cross_entropy_nats"] for name in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_srun_is_understood(runner: Runner) -> None:
    """Would catch: ranks under srun, without torchrun, that take themselves for single processes, or that need
    variables which only torchrun sets.
    """
    ranks = [
        {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank)}
        | dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "")
        for rank in range(2)
    ]
    running = runner.start("run", "parallel.ep=2", "train.steps=2", ranks=2, patch=_as_srun(ranks))
    assert running.finish() == [0, 0], running.err
    assert json.loads((running.folder / "environment.json").read_text())["layout"]["ranks"] == 2
    assert running.out.count("finished at step 2") == 1


def _as_srun(ranks: list[dict[str, str]]) -> str:
    return f"""
import os
for name, value in {ranks!r}[RANK].items():
    os.environ.pop(name, None)
    if value:
        os.environ[name] = value
"""


def test_multi_token_prediction(runner: Runner) -> None:
    """Would catch: losses of the modules that are not logged, or logged and not learned; a checkpoint that refuses a
    lower coefficient, which DeepSeek-V3 sets on the way. Without balance losses the total is that of tokens alone;
    floats of one line are computed from the same sums, 1e-6 is rounding in the loss."""
    options = ("model.mtp_layers=2", "router.logit_residual=true", "balance=none", "evaluation.every_steps=6")
    folder = runner.run("further", *options, "train.steps=6").folder
    runner.run("further", *options, "resume=auto", "model.mtp_coefficient=0.1")
    lines = rows(folder)
    assert [row["step"] for row in lines][-1] == 12
    for row in lines:
        coefficient = 0.3 if row["step"] <= 6 else 0.1
        further = [row[f"loss/mtp_{k}_nats"] for k in (1, 2)]
        total = row["loss/cross_entropy_nats"] + coefficient * sum(further) / 2
        assert row["loss/total_nats"] == pytest.approx(total, rel=1e-6)
        assert further[1] < further[0], "the last place of a sequence has one target less"
        assert "experts/layer_3/max_over_mean" in row, "of a module: tiny has two layers"
    first, last = lines[0], lines[-1]
    assert last["loss/mtp_1_nats"] < first["loss/mtp_1_nats"] - 0.05, "it learns"
    assert math.log(257) * 30 / 32 == pytest.approx(first["loss/mtp_2_nats"], abs=0.1), "2 of 32 targets are unknown"
    assert {"validation/mtp_1_cross_entropy_nats", "validation/mtp_2_cross_entropy_nats"} <= last.keys()


def test_an_uninstalled_checkout_says_so(tmp_path: Path) -> None:
    """Would catch: a traceback as the first thing that a new user sees."""
    code = "import sys, runpy; sys.modules['moe_parallel'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(TRAIN)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "run `make install` first" in done.stderr
    assert "Traceback" not in done.stderr

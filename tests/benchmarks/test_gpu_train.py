"""The benchmark of training steps, as far as a CPU can hold it to account: equal sides, equal work, a whole table.

Cheapest first: torchtitan's sequence as a function; every side's training in fp32; the command itself.
"""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_train.compare import GIBIBYTE, Row, fit_together
from benchmarks.gpu_train.models import dry_models, models
from benchmarks.gpu_train.report import EXACT_TOLERANCE, disagreement, speed, table
from benchmarks.gpu_train.run import main
from benchmarks.gpu_train.sides import OURS, THEIRS, TITAN
from benchmarks.gpu_train.titan import TitanExperts
from benchmarks.gpu_train.worker import Bench
from moe_kernels.moe_mlp import moe_mlp
from moe_parallel import launch
from moe_parallel.model.counts import count_parameters
from moe_parallel.moe.routing import Choice, Routing


def test_the_sequence_of_torchtitan_computes_our_experts():
    """Catches gate and up that are swapped, a combine weight that is left out or detached, and rows added to the wrong
    token: output and all gradients against our operation in fp32, with uneven loads and an expert that is never chosen.
    Sums of at most 48 products of numbers of order 1 round by some 1e-6; wrong parts differ by more than 1e-1."""
    torch.manual_seed(0)
    experts, dim, width = 4, 16, 48
    choice = Choice(torch.tensor([[0, 1], [0, 3], [3, 0], [0, 1], [0, 3], [1, 0]]))
    titan = TitanExperts(experts, dim, width)
    with torch.no_grad():
        for parameter in titan.parameters():
            parameter.normal_()
    grads = []
    for compute in ("titan", "ours"):
        x_TD = torch.linspace(-1, 1, 6 * dim).view(6, dim).requires_grad_()
        weight_TK = torch.linspace(0.1, 0.9, 12).view(6, 2).requires_grad_()
        routing = Routing.of(choice, weight_TK, experts)
        assert routing.count_E[2] == 0
        gate_up = torch.cat((titan.gate, titan.up), dim=1).detach().requires_grad_()
        down = titan.down.detach().requires_grad_()
        if compute == "titan":
            out_TD = titan(x_TD, routing)
            inputs = (x_TD, weight_TK, titan.gate, titan.up, titan.down)
        else:
            out_TD = moe_mlp(x_TD, gate_up, down, routing.token_N, routing.count_E, routing.weight_N, routing.slot_TK)
            inputs = (x_TD, weight_TK, gate_up, down)
        found = torch.autograd.grad(out_TD, inputs, torch.linspace(-1, 1, 6 * dim).view(6, dim).cos())
        if compute == "titan":
            found = (*found[:2], torch.cat(found[2:4], dim=1), found[4])
        grads.append((out_TD.detach(), *found))
    for name, ours, theirs in zip(("out", "x", "combine weights", "gate_up", "down"), *grads):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


DRY_RUN = "deepseekmoe_2b"
"""The model of the dry run below, which compares the sides in fp32 by itself."""


@pytest.fixture(scope="module")
def bench():
    """What else has a process of its own, in this one."""
    yield Bench()
    launch.finish()


@pytest.mark.parametrize("model", [m for m in dry_models() if m.preset != DRY_RUN], ids=lambda model: model.preset)
def test_all_sides_train_the_same_model(model, bench):
    """Catches weights under a wrong name, options that say something else to transformers, another rotation, clipping
    or optimizer: a comparison of speeds would then be one of different work. Losses of four steps in fp32, so that the
    last ones have passed through three updates; 2e-7 was seen, and 1e-3 or more with a gradient cut off.

    A side that outlives its turn would be in the memory of the next: each is gone once it was freed."""
    exact = replace(model, precision="float32")
    rows = []
    for side in (OURS[0], TITAN, THEIRS[0]):
        bench.build(side, exact)
        alive = weakref.ref(bench.sides[side])
        rows.append(Row(model.preset, side, 0, 0.0, losses=bench.steps(side, exact, 0, 4).losses))
        assert bench.free(side)
        assert alive() is None
    assert abs(rows[0].losses[0] - rows[0].losses[3]) > 1e-2, "nothing was learned: updates are not compared"
    assert disagreement(rows) < EXACT_TOLERANCE


def test_a_dry_run_has_every_side_and_a_reason_for_each_that_is_missing(tmp_path, capsys):
    """Catches a side that falls out of the table without a word, turns of unequal number, and times of a side that was
    refused; with one side in memory at a time, as the large models are measured."""
    options = ["--dry-run", "--models", DRY_RUN, "--steps", "3", "--rounds", "2", "--apart"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["side"]: row for row in results["rows"]}
    assert list(rows) == [*OURS, TITAN, *THEIRS]
    raced = [name for name, row in rows.items() if row["turns"]]
    assert {OURS[0], TITAN} <= set(raced)
    assert len([name for name in raced if name in THEIRS]) == 1, "the fastest of theirs, and only that"
    for name, row in rows.items():
        assert bool(row["turns"]) == (row["refused"] is None), name
        assert all(map(math.isfinite, row["losses"])), name
    assert {tuple(map(len, rows[name]["turns"])) for name in raced} == {(2, 2)}
    assert "Triton" in rows["ours/triton"]["refused"]
    assert [row["losses"] != [] for row in results["exact"][DRY_RUN]] == [True] * 3, "the sides compared in fp32"
    assert results["not_reached"] == []
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in rows)
    assert "Losses of the first steps differ by at most" in shown


def test_time_that_is_too_short_ends_the_run_at_once(tmp_path):
    """Catches a wait for the computing process that has no end; it is killed."""
    with pytest.raises(SystemExit, match="--seconds=1 is too short"):
        main(["--dry-run", "--seconds", "1", "--out", str(tmp_path)])


def test_options_that_contradict_are_refused(capsys):
    """Catches times of a dry run in the documentation."""
    with pytest.raises(SystemExit):
        main(["--dry-run", "--write"])
    assert "--write with --dry-run" in capsys.readouterr().err


def row(side: str, turns: list[list[float]], peak: float = 0.0, held: float = 0.0) -> Row:
    """100 tokens and 1e12 FLOPs a step."""
    sizes = {"peak_bytes": int(peak * GIBIBYTE), "held_bytes": int(held * GIBIBYTE)}
    return Row("m", side, 100, 1e12, turns=turns, losses=[2.0], last_loss=1.0, **sizes)


def test_numbers_of_the_table():
    """Catches a ratio that is upside down, one between turns that did not alternate, and MFU over the wrong peak.
    Ours takes 0.5 s where theirs takes 1 s: twice the speed; 1e12 FLOPs in 0.5 s are 20 % of 10 TFLOP/s."""
    ours, theirs = row(OURS[0], [[0.5, 0.5], [0.5, 0.4]], 3.0, 2.0), row(THEIRS[0], [[1.0, 1.0], [0.9]], 5.0, 2.0)
    assert speed(ours, theirs) == pytest.approx((2.0, 2.0, 2.0))
    assert speed(theirs, ours) == pytest.approx((0.5, 0.5, 0.5))
    assert speed(ours, ours) is None
    text = table([ours, theirs], {"published_flops": 10e12, "ceilings": {"sustained_tflops": 5.0}})
    first = text.splitlines()[2]
    for cell in (
        "| 200 |",
        "| 500.0 |",
        "| 20.0 |",
        "| 40.0 |",
        "| 3.0 | 2.0 |",
        "**2.00** (2.00-2.00)",
        "2.000, 1.000",
    ):
        assert cell in first, cell


def test_sides_share_the_memory_only_if_the_hungriest_fits_beside_the_others():
    """Catches a sum of what is held alone, which leaves no room for activations: 2 + 2 held, 3 more for the steps of
    the second, against nine tenths of the memory."""
    rows = [row(OURS[0], [], 3.0, 2.0), row(THEIRS[0], [], 5.0, 2.0)]
    assert fit_together(rows, 8 * GIBIBYTE)
    assert not fit_together(rows, int(7.5 * GIBIBYTE))


def test_the_models_are_what_their_names_say():
    """Catches an override that changes the published shape. Parameters of OLMoE-1B-7B (6.9B, 1.3B active) and
    DeepSeekMoE 2B (2.0B, 0.3B active) from their papers; a slice of Qwen3 has the layers asked for."""
    olmoe, deepseek, qwen = models(qwen_layers=6)
    for model, total, active in ((olmoe, 6.9e9, 1.3e9), (deepseek, 2.0e9, 0.3e9)):
        counts = count_parameters(model.shape())
        assert counts.total == pytest.approx(total, rel=0.02)
        assert counts.active == pytest.approx(active, rel=0.06)
    assert qwen.shape().model.num_layers == 6
    assert qwen.shape().moe.num_experts == 128
    assert olmoe.with_tokens(16384).tokens == 16384

"""The benchmark of a GPU, as far as a CPU can hold it to account: inputs, formulas, the gate, and a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.correctness import Reference, Result, check
from benchmarks.gpu.device import Device, saved_bytes
from benchmarks.gpu.inputs import Case, Inputs, Weights
from benchmarks.gpu.peers import load
from benchmarks.gpu.routing_sets import ROUTINGS, SKEW, loads
from benchmarks.gpu.shapes import DRY_SHAPES, SHAPES, Work

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(params=[(512, 64, 8), (512, 8, 2), (512, 32, 1)], ids=["fine", "coarse", "one slot"])
def chosen(request):
    """Call with a routing: its choice and the number of experts."""
    tokens, experts, top_k = request.param

    def choose(routing: str) -> tuple[torch.Tensor, int]:
        return ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(3)), experts

    return choose


@pytest.mark.parametrize("routing", ROUTINGS)
def test_no_token_chooses_an_expert_twice(routing, chosen):
    """Catches a balanced set that repeats an expert in a token: kernels that index by (token, expert) would differ."""
    expert_TK, experts = chosen(routing)
    assert int(expert_TK.min()) >= 0
    assert int(expert_TK.max()) < experts
    ordered = expert_TK.sort(dim=1).values
    assert not (ordered[:, 1:] == ordered[:, :-1]).any()


def test_loads_of_the_routing_sets_are_as_promised(chosen):
    """Catches a routing that is measured under a wrong name. Equal loads are exact here, since slots divide by experts;
    the busiest expert may miss three times the mean by one row of the search's last step."""
    count = {name: loads(*chosen(name)).double() for name in ROUTINGS}
    assert int(count["balanced"].max()) == int(count["balanced"].min())
    assert float(count["skewed"].max() / count["skewed"].mean()) == pytest.approx(
        SKEW, abs=2 / float(count["skewed"].mean())
    )
    assert int((count["one_empty"] == 0).sum()) == 1
    assert int(count["multinomial"].min()) > 0
    assert float(count["multinomial"].max() / count["multinomial"].mean()) < SKEW


def test_a_skew_out_of_reach_is_refused():
    """Catches a search that ends at some other skew without a word: an expert gets at most one row of a token."""
    with pytest.raises(ValueError, match="at least 12 experts, and there are 8"):
        ROUTINGS["skewed"](64, 8, 4, torch.Generator())


# Of the design notes' table at 8,192 tokens: TFLOP of forward, ideal GB of both parts, milliseconds of eight kernels at
# 790 TFLOP/s and 4.3 TB/s, and saved GB at the least and naively.
TABLE = {
    "deepseekmoe_16b": (0.85, 1.45, 2.59, 1.13, 2.21, 0.31, 0.85),
    "qwen3_30b_a3b": (0.62, 1.48, 2.72, 0.85, 1.64, 0.24, 0.87),
    "olmoe_1b_7b": (0.82, 1.14, 1.98, 1.11, 2.16, 0.30, 0.97),
    "mixtral_8x7b": (5.77, 3.89, 6.78, 7.35, 14.66, 1.01, 1.74),
    "deepseek_v3": (5.77, 23.32, 45.99, 7.55, 14.86, 0.66, 2.80),
    "deepseek_v3_ep8": (0.72, 3.12, 6.06, 0.97, 1.88, 0.18, 0.45),
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_operations_and_bytes_agree_with_the_table_made_by_hand(shape):
    """Catches a factor or a tensor lost in the formulas. The table is rounded to two digits after the point."""
    work = Work(shape, 8192)
    roof = work.roof_seconds(790e12, 4.3e12)
    found = (
        work.flops["forward"] / 1e12, work.ideal_bytes["forward"] / 1e9, work.ideal_bytes["backward"] / 1e9,
        roof["forward"] * 1e3, roof["backward"] * 1e3, work.saved_lean / 1e9, work.saved_naive / 1e9,
    )  # fmt: skip
    assert found == pytest.approx(TABLE[shape.name], abs=0.0051)
    assert work.flops["both"] == 3 * work.flops["forward"]


def tiny_inputs(dtype: torch.dtype, routing: str = "multinomial") -> Inputs:
    return Inputs(Case(DRY_SHAPES[0], 64, routing), Weights.random(DRY_SHAPES[0], CPU, dtype), dtype, CPU)


def result_of(inputs: Inputs, name: str = "torch_grouped_mm") -> Result:
    peer = load(name)(inputs, tuned=False)
    out_TD = peer.forward()
    grad_x_TD, grad_weight_TK, *grads = peer.backward(out_TD)
    return Result(out_TD.detach(), grad_x_TD, grad_weight_TK, grads, peer.of_expert)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["torch_grouped_mm", "torchtitan_equivalent", "transformers", "ours_loop"])
def test_the_gate_passes_what_is_right(name, dtype, routing):
    """Catches a reference or an adapter that has gate and up, or two slots, the wrong way round."""
    inputs = tiny_inputs(dtype, routing)
    verdict = check(result_of(inputs, name), Reference(inputs))
    assert verdict.refused is None
    assert len(verdict.errors) == 5


def _swapped(result: Result) -> Result:
    """Gate and up exchanged in one gradient: an adapter's likely mistake."""
    up_first = result.grad_weights[0].roll(result.grad_weights[0].shape[1] // 2, dims=1)
    return replace(result, grad_weights=[up_first, *result.grad_weights[1:]])


def _row_of(tensor: torch.Tensor, row: int, value: float) -> torch.Tensor:
    """A copy with one row (or expert) filled."""
    return tensor.index_fill(0, torch.tensor([row]), value)


WRONG = {
    "out": (lambda r: replace(r, out_TD=r.out_TD * 1.05), "out is off"),
    "rows of x": (lambda r: replace(r, grad_x_TD=r.grad_x_TD.roll(1, dims=0)), "grad_x is off"),
    "no weight gradient": (lambda r: replace(r, grad_weight_TK=r.grad_weight_TK * 0), "grad_weight is off"),
    "gate and up": (_swapped, "grad_gate_up is off"),
    "nan in a token": (lambda r: replace(r, out_TD=_row_of(r.out_TD, 5, torch.nan)), "out has 64 of 4096 numbers"),
    "nan in an expert": (
        lambda r: replace(r, grad_weights=[r.grad_weights[0], _row_of(r.grad_weights[1], 3, torch.nan)]),
        "gradient 1 of the weights has 2048 of 16384 numbers that are not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_gate_refuses(case):
    """Catches a gate that lets a fast wrong result be timed; each is wrong in one place only."""
    inputs = tiny_inputs(torch.float32)
    spoil, why = WRONG[case]
    verdict = check(spoil(result_of(inputs)), Reference(inputs))
    assert verdict.refused is not None
    assert why in verdict.refused


def test_an_expert_without_rows_must_have_zero_gradients():
    """Catches gradients of an empty expert that were never written: relative to zero any number is infinitely wrong."""
    inputs = tiny_inputs(torch.float32, "one_empty")
    result = result_of(inputs)
    empty = int(loads(inputs.expert_TK, DRY_SHAPES[0].experts).argmin())
    result.grad_weights[1][empty, 0, 0] = 1e-6
    assert "grad_down is off by inf" in str(check(result, Reference(inputs)).refused)


def test_memory_that_nobody_writes_is_found():
    """Catches a poison that does not reach new tensors: then an unwritten output would look like an old right one."""
    device = Device("cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    with device.poisoned(None):
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    """Catches double counting of a tensor that two operations keep, and of views. x is 4 KiB; sin keeps it, and the
    product keeps both of its factors: x again, through a view, and the sine."""
    x = torch.randn(32, 32, requires_grad=True)
    parameter = torch.randn(32, 32, requires_grad=True)
    _, size = saved_bytes(lambda: (x.view(-1) * x.sin().view(-1)).sum() + (parameter * parameter).sum(), (parameter,))
    assert size == 2 * 32 * 32 * 4


def test_the_harness_runs_dry_and_accounts_for_every_side(tmp_path):
    """Catches a path of the harness that breaks only on a machine where it counts, and a side that is left out
    silently: every side of every case has times, or a reason."""
    environment = {**os.environ, "PEERS": "", "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    peers = ["ours_loop", "sonic", "torch_grouped_mm", "transformers", "torchtitan_equivalent"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.run",
        "--dry-run",
        "--routing",
        "one_empty",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--peers", *peers],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["not_reached"] == []
    assert results["ceilings"]["sustained_tflops"] > 0
    assert results["ceilings"]["copy_tb_per_s"] > 0
    rows = {(row["dtype"], row["shape"], row["peer"]): row for row in results["rows"]}
    assert set(rows) == {
        (dtype, shape.name, peer)
        for dtype in ("float32", "bfloat16") for shape in DRY_SHAPES for peer in (*peers, "bmm_bound")
    }  # fmt: skip
    for (_, _, peer), row in rows.items():
        if peer == "sonic":
            assert "quack" in row["refused"]
            continue
        assert row["refused"] is None
        assert set(row["seconds"]) == {"forward", "backward", "both"}
        if peer != "bmm_bound":
            assert row["accumulate_s"] > 0
            assert row["saved_bytes"] > 0
            assert row["repeatable"] is True
    table = (tmp_path / "table.md").read_text()
    full = table[table.index("| case | type | side | configuration |") :].splitlines()
    assert len(full) == 2 + len(rows)
    assert len({line.count("|") for line in full}) == 1


def test_a_side_that_ends_the_process_is_left_out_and_named(tmp_path):
    """Catches a harness that loses all results with the first illegal access: the side that was at work when the
    process ended gets the reason, and the others are measured."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'benchmarks.gpu.worker' in ' '.join(sys.orig_argv):\n"
        "    import torch\n"
        "    torch.histc = lambda *_, **__: os._exit(139)\n"  # what torchtitan's sequence calls, and transformers'
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    environment = {**os.environ, "PEERS": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--dry-run", "--routing", "balanced"]
    command += ["--peers", "torch_grouped_mm", "torchtitan_equivalent", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    for row in rows:
        if row["peer"] == "torchtitan_equivalent":
            assert "ended the process (exit code 139), during first call" in row["refused"]
        else:
            assert row["seconds"]
    assert len(rows) == 2 * 2 * 3

"""Blocks that torch.compile fuses compute what plain ones compute: in one process, and under FSDP on two ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import Compile, ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.initialize import InitConfig
from moe_parallel.model.transformer import Output
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import ARCHITECTURES, VOCABULARY, build
from tests.parity.cases import OPTIM, Case, run_engine, run_reference
from tests.parity.test_parity import check
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")

GRAPHS = {"grouped": 3, "latent": 4}
"""Before the projections, (latents,) projections, after attention."""


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_one_process(name: str) -> None:
    """A rotation, norm or residual sum that is lost or done twice; layers that each compile their own graphs, which
    ends at torch's limit of 8; a pass of other shapes that does not compile. Float32: gradients are sums over some
    dozen tokens through ten layers, in another order: 2e-6 of their norm is seen, 1e-4 allowed."""
    torch._dynamo.reset()
    counters.clear()
    architecture = replace(ARCHITECTURES[name], model=replace(ARCHITECTURES[name].model, num_layers=10))
    plain, fused = build(architecture), build(architecture)
    for block in fused.blocks:
        block.compile_around_attention()
        block.recompute = True
    for rows, length in (([[7, 1, 12], [20]], 24), ([[30], [9, 9], [4]], 31)):
        batch = make_batch(rows, length, VOCABULARY)
        losses = [model(batch, ForwardContext(), Output.loss)[0] for model in (plain, fused)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        wanted, got = (torch.autograd.grad(x, list(m.parameters())) for x, m in zip(losses, (plain, fused)))
        for (parameter, _), a, b in zip(plain.named_parameters(), wanted, got):
            assert (a - b).norm() <= 1e-4 * a.norm(), parameter
        assert graphs() <= 2 * GRAPHS[name]  # the second time of shapes that may vary
    with torch.no_grad():
        evaluated = [model(batch, ForwardContext(training=False))[0] for model in (plain, fused)]
    torch.testing.assert_close(evaluated[1], evaluated[0], rtol=1e-4, atol=1e-4)


CASES = [
    Case("compiled, ep 2", 2, ep=2, micro_batches=2, balance={"global_coefficient": 0.3}, compile="blocks"),
    Case("compiled, sharded, latent attention, tied, full recompute", 2, latent_attention=True, tied=True,
         recompute="full", micro_batches=2, compile="blocks"),
    Case("compiled, frozen layers below and attention", 2, ep=2, frozen=["embedding.*", "layers.0.*", "*.attention.*"],
         recompute="full", compile="blocks"),
    Case("compiled, tp 2", 2, tp=2, ep=2, attention={"qk_norm": "head"}, compile="blocks"),
]  # fmt: skip


def run_compiled() -> list[Any]:
    """All cases on this rank, and the number of graphs that they compiled; with tp the hooks of FSDP cut them."""
    return [(run_engine(case), graphs() if case.tp == 1 else None) for case in CASES]


def test_two_ranks(parity_table) -> None:
    """Hooks of FSDP that a graph swallows, weights that a graph keeps although FSDP let them go, gradients of the
    first micro-batch in the second. float64, so the bounds are those of the parity suite."""
    everyone = run_ranks(run_compiled, 2)
    for index, case in enumerate(CASES):
        wanted = run_reference(case)
        for got, compiled in (results[index] for results in everyone):
            check(case, got, wanted, "processes", parity_table)
            assert compiled is None or compiled >= min(GRAPHS.values())


def test_a_module_that_is_not_finite_is_found_in_compiled_blocks() -> None:
    """Hooks inside of graphs do not run: the report after a NaN would name the wrong module, or none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        case = Case("one", 1)
        parallel = ParallelConfig(compile=Compile.blocks)
        mesh = ParallelMesh(make_layout(parallel, 1, case.num_experts), "cpu")
        engine = NativeEngine(
            case.architecture(), mesh, parallel, OPTIM, torch.device("cpu"), torch.float64, torch.float64
        )
        engine.init_weights(InitConfig(), seed=0)
        batch = case.batch(0, 0, 0)
        assert engine.first_nonfinite_module(batch) is None
        engine.model.blocks[1].attention.key.weight.data.fill_(float("nan"))
        assert engine.first_nonfinite_module(batch) == "layers.1.attention.key"
    finally:
        dist.destroy_process_group()


def test_a_missing_compiler_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits in a queue and dies in its first step."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"parallel\.compile=blocks needs the C\+\+ compiler no-such-compiler.*=none"):
        ParallelConfig(compile=Compile.blocks).check_compiler("cpu")
    ParallelConfig().check_compiler("cpu")

"""`dispatch=deepep` against `dispatch=all_to_all`, with a stand-in for the library; and what is refused at start-up.

The library's kernels need GPUs. `deep_ep_stand_in` has its calls: what is tested is our use of them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.config import DispatchSetting
from moe_parallel.moe.dispatch.deepep import DeepEPConfig, DeepEPDispatcher
from moe_parallel.moe.experts import RoutedExperts
from moe_parallel.moe.routing import Choice, ForwardContext, LayerContext, Replay, Routing
from tests.moe.test_two_hop import CASES, EXPERTS, HERE, WIDTH, Case, inputs
from tests.ranks import run_ranks

SUMMED, SINGLE = 1e-12, 1e-6
"""Rows are float64: only sums of a few products may be made in another order. Combine weights travel in float32, and so
do their gradients, which are rounded to 2^-24; they are drawn so that they are exact in it."""
NAMES = ("output", "x", "combine weights", "gate and up", "down")


def through(dispatcher, case: Case, context: LayerContext, recompute: bool) -> list[Tensor]:
    """Output, and gradients of tokens, combine weights and this rank's experts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x_TD, weight, choice = inputs(case, rank)
    weight = (weight.detach() * 1024).round().div(1024).requires_grad_()
    experts = RoutedExperts(EXPERTS // world, WIDTH, 5).double()
    generator = torch.Generator().manual_seed(3 + rank)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def layer(x_TD: Tensor, weight: Tensor) -> Tensor:
        routing = Routing.of(choice, weight, EXPERTS)
        rows, ticket = dispatcher.dispatch(x_TD, routing, context)
        return dispatcher.combine(experts(rows, ticket), routing, ticket, [x_TD])

    out_TD = checkpoint(layer, x_TD, weight, use_reentrant=False) if recompute else layer(x_TD, weight)
    (out_TD * torch.sin(torch.arange(out_TD.numel(), dtype=out_TD.dtype)).view_as(out_TD)).sum().backward()
    return [out_TD.detach(), x_TD.grad, weight.grad, experts.gate_up.grad, experts.down.grad]


def compare() -> None:
    from tests.moe import deep_ep_stand_in

    sys.modules["deep_ep"] = deep_ep_stand_in
    flat, ours = AllToAllDispatcher(dist.group.WORLD), DeepEPDispatcher(dist.group.WORLD, DeepEPConfig(num_sms=24))
    assert deep_ep_stand_in.Buffer.num_sms == 24
    for case in CASES:
        if case.dtype is not torch.float64:
            continue
        wanted = through(flat, case, HERE, recompute=False)
        for recompute in (False, True):
            context = replace(HERE, forward=ForwardContext(replay=Replay() if recompute else None))
            for name, got, right in zip(NAMES, through(ours, case, context, recompute), wanted, strict=True):
                tolerance = SINGLE if name == "combine weights" else SUMMED
                scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
                error = float((got - right).abs().max()) / scale if right.numel() else 0.0
                assert error <= tolerance, f"{case.name}, recompute {recompute}: {name} is off by {error:.1e}"
    assert deep_ep_stand_in.Buffer.made == 1  # for all layers and passes
    check_limit(ours)


def check_limit(dispatcher: DeepEPDispatcher) -> None:
    expert_N, token_N = torch.zeros(33, dtype=torch.int64), torch.zeros(33, dtype=torch.int64)
    routing = Routing.of(Choice(expert_N, token_N), torch.ones(33), EXPERTS)
    with pytest.raises(ValueError, match="at most 32 experts, and this router chose 33"):
        dispatcher.dispatch(torch.ones(1, WIDTH, dtype=torch.float64), routing, HERE)


@pytest.mark.parametrize("world", [2, 4])
def test_equals_all_to_all(world):
    """A slot that takes another token's row or weight; a token without slots, or with fewer than others; tables of
    other widths on other ranks; a result that is read before its event (it is NaN then); a gradient that goes by the
    wrong handle, is summed twice, or does not come back; a recomputed pass that asks for another layout."""
    run_ranks(compare, world)


GPU = DispatchSetting(ep=8, num_experts=64, dim=2048, top_k=8, device_type="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ep": 1}, r"parallel.ep=1; raise it"),
        ({"device_type": "cpu"}, "CUDA devices only, and this run computes on cpu; choose dispatch=all_to_all"),
        ({}, "deep_ep, which is not installed; install it from .* or choose dispatch=all_to_all"),
        ({"device_type": None, "dtype": torch.float32}, "set train.dtype=bfloat16"),
        ({"device_type": None, "dim": 100}, "multiple of 256, not model.dim=100"),
        ({"device_type": None, "top_k": 33}, "at most 32 experts, not router.top_k=33"),
    ],
)
def test_refused_at_start(changed, message):
    """What would fail within the library's kernels on all ranks, after the start, without a word of options."""
    with pytest.raises(ValueError, match=message):
        DeepEPConfig().check(replace(GPU, **changed))


def test_plans_need_no_library():
    """A dry run on a laptop for a cluster that has the library."""
    DeepEPConfig().check(replace(GPU, device_type=None))
    with pytest.raises(ValueError, match=r"dispatch.num_sms=21 must be even"):
        DeepEPConfig(num_sms=21)

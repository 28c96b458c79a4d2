"""Adjugates of experts against their definition, term by term, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.mesh import ParallelConfig, Recompute, make_layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import Bytes, count_parameters, forward_flops_per_token, memory_per_rank
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe import adjugate
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routing import ForwardContext, Routing
from moe_parallel.optim import OptimConfig
from tests.batches import make_batch
from tests.model.examples import GROUPED, VOCABULARY, build
from tests.model.test_counts import saved_bytes
from tests.moe.test_layer import context, make_layer, tokens

SCALE = 0.3
SHARED = {"num_experts": 6, "adjugate_groups": 2, "adjugate_dim": 4, "adjugate_scale": SCALE}


def by_definition(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Each token's sum over its experts of weight * (expert + scale * adjugate of its group), nothing merged."""
    routed = layer.router.route(layer.router(x_TD, context(len(x_TD))), context(len(x_TD)))
    size = layer.config.num_experts // layer.config.adjugate_groups
    assert layer.shared is not None
    assert layer.experts.adjugates is not None

    def network(bank: Any, index: int, x: Tensor) -> Tensor:
        gate, up = (bank.gate_up[index] @ x).chunk(2)
        return bank.down[index] @ (F.silu(gate) * up)

    out = []
    for x, experts, weights in zip(x_TD, routed.choice.expert.tolist(), routed.weight):
        terms = [
            w * (network(layer.experts, e, x) + SCALE * network(layer.experts.adjugates, e // size, x))
            for e, w in zip(experts, weights)
        ]
        out.append(sum(terms) + layer.shared(x[None])[0])
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_the_definition_with_all_gradients(top_k, monkeypatch):
    """Would catch: the weight of one slot instead of the group's sum, a group of other experts, the factor twice.

    Slots of a token that share a group are computed once, which the counts show; so is the result of both ways of
    computing it. float64; 1e-12 is the rounding of sums of some tens of terms.
    """
    counts: list[int] = []

    def counted(routing: Routing, count_G: Tensor, merged=adjugate._merged) -> Routing:
        result = merged(routing, count_G)
        counts.append(int(result.count_E.sum()))
        return result

    monkeypatch.setattr(adjugate, "_merged", counted)
    layer, x_TD = make_layer(SHARED, {"top_k": top_k}), tokens(20).requires_grad_()
    out_TD, _ = layer(x_TD, context(20))
    wanted_TD = by_definition(layer, x_TD)
    torch.testing.assert_close(out_TD, wanted_TD, rtol=1e-12, atol=1e-12)
    inputs, gradient_TD = [x_TD, *layer.parameters()], tokens(20, seed=5)
    theirs = torch.autograd.grad(wanted_TD, inputs, gradient_TD)
    for mine, their in zip(torch.autograd.grad(out_TD, inputs, gradient_TD), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-12, atol=1e-12)
    expert_TK = layer.router.route(layer.router(x_TD, context(20)), context(20)).choice.expert
    distinct = sum(len({e // 3 for e in experts}) for experts in expert_TK.tolist())
    assert counts == ([distinct] if top_k > 1 else [])
    assert top_k == 1 or distinct < 20 * top_k


def test_padding_computes_the_same():
    """Would catch: rows that are merged, or not, where tokens have different numbers of slots."""
    layer, x_TD = make_layer(SHARED, {"top_k": 3}), tokens(20)
    valid_T = torch.arange(20) < 13
    out_TD, _ = layer(x_TD, context(20, valid_T=valid_T))
    torch.testing.assert_close(out_TD[:13], by_definition(layer, x_TD)[:13], rtol=1e-12, atol=1e-12)


def test_nothing_is_added_at_first():
    """A new model, or one that gets adjugates, must be the same as without them: the last product starts at zero."""
    layer, x_TD = make_layer(SHARED), tokens()
    with torch.no_grad():
        layer.experts.adjugates.down.zero_()
    bare = make_layer({"num_experts": 6})
    bare.load_state_dict({n: w for n, w in layer.state_dict().items() if "adjugates" not in n})
    assert torch.equal(layer(x_TD, context())[0], bare(x_TD, context())[0])
    model = Transformer(with_adjugates(8, 2))
    init_weights(model, InitConfig(), 0)
    assert not model.blocks[1].ffn.experts.adjugates.down.any()
    assert model.blocks[1].ffn.experts.adjugates.gate_up.std() > 0.01


def with_adjugates(groups: int, top_k: int) -> Architecture:
    """GROUPED with adjugates of half of the experts' width."""
    moe = replace(GROUPED.moe, adjugate_groups=groups, adjugate_dim=12, adjugate_scale=0.1)
    return replace(GROUPED, moe=moe, router=replace(GROUPED.router, top_k=top_k))


def test_counts():
    """Would catch: adjugates that plans forget, or count for each expert. Torch counts what runs: with a group for each
    expert nothing is merged, and the FLOPs are exact."""
    for groups in (2, 8):
        shape = with_adjugates(groups, 3)
        with torch.device("meta"):
            model = Transformer(shape)
        counts, without = count_parameters(shape), count_parameters(GROUPED)
        assert counts.total == sum(p.numel() for p in model.parameters())
        assert counts.routed == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        assert counts.active - without.active == 2 * min(3, groups) * 3 * 32 * 12
    flops = []
    for shape in (with_adjugates(8, 3), GROUPED):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build(shape)(make_batch([[24]], 24, VOCABULARY), ForwardContext(training=False), Output.loss)
        flops.append((counter.get_total_flops() / 24, forward_flops_per_token(shape, 24)))
    assert flops[0][0] - flops[1][0] == flops[0][1] - flops[1][1]


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective])
def test_activations(recompute):
    """Would catch: plans that run out of memory by the adjugates' hidden state. What is small in a real model, such as
    indices, is not estimated: 2 percent."""
    kept = []
    for shape in (with_adjugates(8, 3), GROUPED):
        shape = replace(shape, model=replace(shape.model, dim=128), moe=replace(shape.moe, expert_dim=96))
        if shape.moe.adjugate_groups:
            shape = replace(shape, moe=replace(shape.moe, adjugate_dim=200))
        model, batch = build(shape), make_batch([[64]] * 4, 64, VOCABULARY)
        for layer in (block.ffn for block in model.blocks[1:]):
            layer.experts.recompute = recompute is Recompute.selective
        estimate = memory_per_rank(shape, 256, recompute=recompute, size=Bytes(compute=4)).activations
        run = lambda: model(batch, ForwardContext(), Output.loss)  # noqa: B023, E731
        kept.append((saved_bytes(model, run), estimate))
    assert kept[0][0] - kept[1][0] == pytest.approx(kept[0][1] - kept[1][1], rel=0.02, abs=0.02 * kept[1][0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"adjugate_groups": 4},
            "moe.adjugate_groups=4 does not divide moe.num_experts=6; legal values: .0, 1, 2, 3, 6",
        ),
        ({"adjugate_groups": -2}, "moe.adjugate_groups=-2 does not divide"),
        ({"adjugate_groups": 2, "adjugate_dim": 0}, "moe.adjugate_dim=0 must be at least 1"),
        ({"adjugate_groups": 2, "adjugate_scale": 0.4}, "at most moe.adjugate_groups=2 / moe.num_experts=6 = 0.333333"),
        ({"adjugate_groups": 2, "adjugate_scale": 0.0}, "moe.adjugate_scale=0.0 must be positive"),
        ({"adjugate_dim": 64}, "moe.adjugate_dim=64 is of adjugates, but moe.adjugate_groups=0"),
    ],
)
def test_bad_options(options, text):
    """Would catch: groups that cut an expert in two, options that do nothing."""
    with pytest.raises(ValueError, match=text):
        MoEConfig(num_experts=6, **options)


def test_deepspeed_is_refused():
    """Would catch: adjugates that DeepSpeed's checkpoints forget."""
    parallel = ParallelConfig()
    setting = EngineSetting(
        with_adjugates(4, 2), make_layout(parallel, 1, 8), parallel, AllToAllConfig(), OptimConfig(), None, None
    )
    assert any("moe.adjugate_groups=4: DeepSpeed" in problem for problem in DeepSpeedConfig().problems(setting))

"""Back to dense: cases in which the gathered network is the experts' function, by hand otherwise, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_parallel.convert.lazy import Given, whole
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.densify import DensifyConfig, Gather
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.expert_forms import ExpertForm
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts

WIDTH, EXPERTS, LAYERS = 48, 4, (1, 2)


def dense(width: int = WIDTH, **model: Any) -> Architecture:
    """What the result is."""
    return replace(DENSE, model=replace(DENSE.model, ffn_dim=width, **model))


def experts(num_experts: int = EXPERTS, width: int = WIDTH, top_k: int = 2, **options: Any) -> Pretrained:
    """A model without dense layers: its networks' width is free."""
    return pretrained(with_experts(num_experts, width, top_k, first_dense_layers=0, **options))


def changed(source: Pretrained, **weights: Any) -> Pretrained:
    """The same with other weights in each layer: functions of the old ones by the end of their names."""
    stored = dict(source.weights)
    for name, lazy in source.weights.items():
        for end, change in weights.items():
            if name.endswith(end.replace("__", ".")):
                stored[name] = Given(change(whole(lazy)), name)
    return replace(source, weights=stored)


def difference(config: DensifyConfig, source: Pretrained, target: Architecture) -> float:
    """Of logits, relative."""
    plan = make_plan(config, [source], target, SEED)
    return relative(logits(target, plan), logits(source.architecture, source.weights))


def all_as_the_first(stack: Tensor) -> Tensor:
    return stack[:1].expand_as(stack).clone()


@pytest.mark.parametrize("shared", [0, 2])
def test_mean_of_equal_experts_is_their_function(shared: int) -> None:
    """Would catch: gate and up that are swapped, shared experts that are lost, doubled or put before the wrong rows.
    Means of equal numbers and float64 after that: rounding."""
    source = changed(
        experts(num_shared_experts=shared), experts__gate_up=all_as_the_first, experts__down=all_as_the_first
    )
    assert DensifyConfig().preserves([source.architecture], dense()) is Preserves.none
    assert difference(DensifyConfig(), source, dense(WIDTH * (1 + shared))) < 1e-13
    assert difference(DensifyConfig(), experts(), dense()) > 1e-2, "experts hardly matter: nothing is shown"


def test_dense_layers_are_taken_along() -> None:
    """Would catch: a dense layer of the source that is drawn, or the layer after it in its place."""
    source = pretrained(with_experts(EXPERTS, WIDTH, 2))
    source = changed(source, experts__gate_up=all_as_the_first, experts__down=all_as_the_first)
    assert difference(DensifyConfig(), source, dense()) < 1e-13


def test_experts_side_by_side_are_their_sum() -> None:
    """With a router that prefers nobody and takes all, the layer is the mean of its experts: all neurons side by side,
    with 1/E of what they give. Would catch: a factor on the gate, neurons of gate and down that differ."""
    source = changed(experts(top_k=EXPERTS), router__weight=torch.zeros_like)
    config = DensifyConfig(gather=Gather.top_k, gather_scale=1 / EXPERTS)
    assert difference(config, source, dense(EXPERTS * WIDTH)) < 1e-13


@pytest.mark.parametrize("gather", [Gather.top_k, Gather.sum])
def test_what_is_zero_is_left_out(gather: Gather) -> None:
    """An expert of which half of the neurons are zero is the function of the other half. Would catch: the smallest
    neurons taken for the largest, those of gate where those of down are, ties of one expert for another."""
    kept = torch.arange(WIDTH) % 3 > 0

    def halved(gate_up: Tensor) -> Tensor:
        return gate_up * torch.cat([kept, kept])[:, None]

    source = experts(2, top_k=2)
    source = changed(
        source, experts__gate_up=halved, experts__down=lambda down: down * kept, router__weight=torch.zeros_like
    )
    if gather is Gather.top_k:
        config = DensifyConfig(gather=gather, gather_scale=0.5)
        assert difference(config, source, dense(2 * WIDTH * 2 // 3)) < 1e-13
        assert difference(config, source, dense(2 * WIDTH // 2)) > 1e-2
        return
    only = torch.tensor([1.0, 0.0])[:, None, None]  # the sum with an expert of zeros
    source = changed(source, experts__gate_up=lambda w: w * only, experts__down=lambda w: w * only)
    assert difference(DensifyConfig(gather=gather, gather_scale=0.5), source, dense()) < 1e-13


def test_singular_values() -> None:
    """At full rank the sum of all matrices; below, the best sum of low rank: against torch's own on each matrix, and
    by Eckart-Young on one. Would catch: factors that do not belong together, a rank for all instead of each."""
    source = experts(width=20)
    full = make_plan(DensifyConfig(gather=Gather.svd, gather_rank=20), [source], dense(20), SEED)
    summed = make_plan(DensifyConfig(gather=Gather.sum), [source], dense(20), SEED)
    low = make_plan(DensifyConfig(gather=Gather.svd), [source], dense(20), SEED)
    for name in ("gate", "up", "down"):
        name = f"layers.2.ffn.{name}.weight"
        # Rounded to float32 once, from float64.
        torch.testing.assert_close(whole(full[name]), whole(summed[name]), rtol=1e-6, atol=1e-7)
    down = whole(source.weights["layers.2.ffn.experts.down"]).double()
    wanted = sum(u[:, :5] @ torch.diag(s[:5]) @ v[:5] for u, s, v in map(torch.linalg.svd, down))
    ours = whole(low["layers.2.ffn.down.weight"])  # 20 / 4 experts
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    one = experts(1, 20, 1, router_normalize=False)
    plan = make_plan(DensifyConfig(gather=Gather.svd, gather_rank=7), [one], dense(20), SEED)
    theirs = whole(one.weights["layers.0.ffn.experts.down"])[0].double()
    error = (whole(plan["layers.0.ffn.down.weight"]).double() - theirs).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(theirs)[7:].square().sum(), rtol=1e-5, atol=0)


def test_parts_are_those_of_the_whole() -> None:
    """Would catch: a rank that reads other neurons than its own of a network that is put together."""
    source = experts(num_shared_experts=1)
    plan = make_plan(DensifyConfig(gather=Gather.top_k), [source], dense(2 * WIDTH), SEED)
    for name, box in (("gate", ((40, 3), (30, 9))), ("down", ((3, 40), (9, 30)))):
        lazy = plan[f"layers.0.ffn.{name}.weight"]
        (a, b), (n, m) = box
        assert torch.equal(lazy.read(box), whole(lazy)[a : a + n, b : b + m])


def test_singular_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: all decompositions again for each part of a matrix that is read: hours at real sizes."""
    source, calls, svd = experts(width=20), [], torch.linalg.svd

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return svd(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    plan = make_plan(DensifyConfig(gather=Gather.svd), [source], dense(20), SEED)
    parts = [plan["layers.0.ffn.up.weight"].read(((first, 0), (5, 32))) for first in range(0, 20, 5)]
    assert len(calls) == EXPERTS
    whole(plan["layers.1.ffn.up.weight"])
    assert torch.equal(whole(plan["layers.0.ffn.up.weight"]), torch.cat(parts))
    assert len(calls) == 3 * EXPERTS, "more than one matrix is kept"


TOP_K, SVD = DensifyConfig(gather=Gather.top_k), DensifyConfig(gather=Gather.svd, gather_rank=33)
MEAN = DensifyConfig()


@pytest.mark.parametrize(
    ("config", "source", "target", "text"),
    [
        (MEAN, {}, dense(64), "model.ffn_dim=64 must be 48: the width of one expert"),
        (MEAN, {"num_shared_experts": 1}, dense(), "ffn_dim=48 must be 96: .* and 48 of the shared ones"),
        (MEAN, {"first_dense_layers": 1, "expert_dim": 24}, dense(), "dense layers have 48, .* only top_k fits"),
        (TOP_K, {}, dense(50), "ffn_dim=50 must be a multiple .* nearest below: 48"),
        (TOP_K, {}, dense(196), "at most 4 times moe.expert_dim=48.* below: 192"),
        (SVD, {}, dense(), "init.gather_rank=33 .* must lie in 1..32"),
        (MEAN, {}, with_experts(4, 48, 2), "model.first_dense_layers=1 leaves layers with experts"),
        (MEAN, {"first_dense_layers": 3}, dense(), "is dense, but init=densify starts from a model with experts"),
        (MEAN, {"num_shared_experts": 1, "shared_expert_gate": True}, dense(96), "has moe.shared_expert_gate"),
        (MEAN, {"chain": ChainConfig(iterations=2)}, dense(), "moe.chain.iterations=2"),
        (MEAN, {"expert_form": ExpertForm.ternary}, dense(), "moe.expert_form=ternary"),
        (MEAN, {"adjugate_groups": 2}, dense(), "moe.adjugate_groups=2"),
    ],
)
def test_refused(config: DensifyConfig, source: dict[str, Any], target: Architecture, text: str) -> None:
    """Would catch: parts of a layer that are dropped in silence, widths that end in an assertion."""
    shape = with_experts(**{"num_experts": 4, "expert_dim": 48, "top_k": 2, "first_dense_layers": 0, **source})
    with pytest.raises(ValueError, match=text):
        config.check([shape], target)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gather_scale": 0.0}, "init.gather_scale=0.0"),
        ({"gather_rank": 3}, "init.gather_rank=3 is of init.gather=svd"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    """Would catch: options that do nothing."""
    with pytest.raises(ValueError, match=text):
        DensifyConfig(**options)

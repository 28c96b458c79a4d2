"""Granular upcycling: slices of copies, virtual groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_parallel.convert.lazy import Lazy, whole
from moe_parallel.convert.upcycle.granular import GranularConfig, Layout, ScaleMode
from moe_parallel.convert.upcycle.map import Preserves, drawing, make_plan
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.token_choice import Score
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import Trained, dense, experts, layer_pass, losses, swiglu

CHAIN = ChainConfig(iterations=2, learned_scale=True)
PAPER = ScaleMode.paper
LAYOUTS = list(Layout)


def plan_of(target: Architecture, source=None, **options: Any) -> dict[str, Lazy]:
    return make_plan(GranularConfig(**{"std": 0.2, **options}), [source or pretrained()], target, SEED)


def own_rows(target: Architecture, layer: int) -> Lazy:
    """A router's weight as it would be drawn without groups."""
    name = f"layers.{layer}.ffn.router.weight"
    return drawing(target, GranularConfig(std=0.2), SEED)(name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("num_experts", "expert_dim", "top_k", "options"),
    [
        (8, 12, 4, {}),
        (16, 12, 8, {"first_dense_layers": 0}),
        (12, 12, 8, {"router_score": Score.sigmoid, "first_dense_layers": 2}),
        (8, 12, 4, {"router_route_scale": 4.0}),
        (8, 12, 4, {"router_logit_residual": True, "first_dense_layers": 0}),
        (8, 12, 4, {"chain": CHAIN}),
        (8, 48, 2, {}),
    ],
)
def test_same_function(layout: Layout, num_experts: int, expert_dim: int, top_k: int, options: Any) -> None:
    """Would catch: gate and up cut as one, slices of one copy chosen twice or not at all, router rows in another order
    than the experts, routers of a chain or residuals of logits that break the groups, a wrong factor.

    With 4 slices the square root is exact, so what rounds is float64. Sums of 4 or 8 weights may be an ulp off 1.
    """
    source, target = pretrained(), with_experts(num_experts, expert_dim, top_k, **options)
    config = GranularConfig(layout=layout)
    assert config.preserves([source.architecture], target) is Preserves.exact
    plan = plan_of(target, source, layout=layout)
    assert relative(logits(target, plan), logits(DENSE, source.weights)) < 1e-13
    # The groups do it: with a row for each expert, slices of different copies meet.
    broken = plan | {f"layers.{n}.ffn.router.weight": own_rows(target, n) for n in target.moe_layers}
    if expert_dim < 48:
        assert relative(logits(target, broken), logits(DENSE, source.weights)) > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_of_a_chain(layout: Layout) -> None:
    """Would catch: later iterations, silent at first, whose slices are chosen apart as soon as they count."""
    plan = plan_of(with_experts(8, 12, 4, chain=CHAIN), layout=layout)
    for name in ("router", "later_routers.0"):
        rows = whole(plan[f"layers.1.ffn.{name}.weight"])
        groups = rows.view(2, 4, -1) if layout is Layout.grouped else rows.view(4, 2, -1).transpose(0, 1)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert not torch.equal(groups[0, 0], groups[1, 0])


def test_factors_that_round() -> None:
    """Would catch: a factor that is exact for 4 slices by chance. sqrt(3) is rounded twice to float32: 6e-8 each."""
    source = pretrained()
    for expert_dim, top_k, options in ((16, 3, {}), (24, 4, {}), (12, 4, {"router_route_scale": 2.5})):
        target = with_experts(2 * 48 // expert_dim, expert_dim, top_k, **options)
        assert relative(logits(target, plan_of(target, source)), logits(DENSE, source.weights)) < 1e-6


def test_losses_of_multi_token_prediction() -> None:
    """Would catch: experts of these layers that are left out, drawing, or taken from a layer of the decoder."""
    shape = replace(DENSE, model=replace(DENSE.model, mtp_layers=2))
    target = with_experts(8, 12, 4)
    target = replace(target, model=replace(target.model, mtp_layers=2))
    source = pretrained(shape)
    expected = losses(shape, source.weights)
    torch.testing.assert_close(losses(target, plan_of(target, source)), expected, rtol=1e-12, atol=0)


def test_weights_that_are_not_normalized() -> None:
    """Would catch: a factor for softmax or sigmoid scores that does not fit a router without preferences.

    Its logits of 1e-9 move weights by that much; factors are rounded to float32.
    """
    source = pretrained()
    wanted = logits(DENSE, source.weights)
    for options in ({}, {"score": Score.sigmoid}, {"route_scale": 2.5}):
        target = with_experts(16, 12, 8, router_normalize=False, **{f"router_{k}": v for k, v in options.items()})
        config = GranularConfig()
        assert config.preserves([source.architecture], target) is Preserves.approximate
        assert relative(logits(target, plan_of(target, source, std=1e-10)), wanted) < 1e-6
        assert relative(logits(target, plan_of(target, source)), wanted) > 1e-2
    target = with_experts(16, 12, 8, router_normalize=False)
    up = experts(plan_of(target, source), 1)[0][1]
    # The published factor: copies * slices^2 / top_k.
    torch.testing.assert_close(up, dense(source.weights, 1)[1][:12] * (4 * 4**2 / 8) ** 0.5)


def test_published_scale() -> None:
    """Would catch: a promise that does not hold, and a cube root somewhere else than in all three matrices. Written out
    by hand: gate, up and down times the cube root of the 4 slices, and weights of 1/4."""
    source, target = pretrained(), with_experts(16, 12, 4, first_dense_layers=0)
    config = GranularConfig(scale_mode=PAPER)
    assert config.preserves([source.architecture], target) is Preserves.approximate
    x_TD, out_TD = layer_pass(target, plan_of(target, source, scale_mode=PAPER), 0)
    root = 4 ** (1 / 3)
    by_hand = swiglu(x_TD, *(weight.double() * root for weight in dense(source.weights, 0))) / 4
    assert relative(out_TD, by_hand) < 1e-6
    assert relative(layer_pass(target, plan_of(target, source), 0)[1], swiglu(x_TD, *dense(source.weights, 0))) < 1e-13
    # That is how far off the published scale is, for gates of standard deviation 1.
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 32, generator=generator, dtype=torch.float64)
    matrices = [torch.randn(64, 32, generator=generator, dtype=torch.float64) / 32**0.5 for _ in range(3)]
    gate, up, down = matrices[0], matrices[1], matrices[2].T
    published = swiglu(x_TD, gate * root, up * root, down * root) / 4
    assert 0.11 < relative(published, swiglu(x_TD, gate, up, down)) < 0.16


@pytest.mark.parametrize("options", [{}, {"scale_mode": PAPER}, {"copy_noise": 0.05}])
def test_the_layout_changes_no_output(options: Any) -> None:
    """Would catch: experts and router rows that are not moved together, noise that belongs to a place and not to a
    copy. Sums of 8 experts in another order: float64 rounding."""
    target = with_experts(16, 12, 8, router_normalize=False)
    grouped, strided = (plan_of(target, layout=layout, **options) for layout in LAYOUTS)
    order = torch.arange(16).view(4, 4).T.flatten()
    for name in ("experts.gate_up", "experts.down", "router.weight"):
        ours, theirs = (whole(plan[f"layers.1.ffn.{name}"]) for plan in (strided, grouped))
        assert torch.equal(ours, theirs[order])
        assert name == "router.weight" or not torch.equal(ours, theirs)
    assert relative(logits(target, strided), logits(target, grouped)) < 1e-13


def test_noise_leaves_copies_whole() -> None:
    """Would catch: noise that is equal in all copies, or slices of a copy that no longer are one network. One copy that
    every token takes is a dense model, whose weights are the slices put together again."""
    source = pretrained()
    target = with_experts(4, 12, 4)
    plan = plan_of(target, source, copy_noise=0.05)
    weights = dict(source.weights)
    for layer in target.moe_layers:
        gate, up, down = zip(*experts(plan, layer))
        for what, value in (("gate", torch.cat(gate)), ("up", torch.cat(up) / 2), ("down", torch.cat(down, 1) / 2)):
            name = f"layers.{layer}.ffn.{what}.weight"
            change = value - whole(source.weights[name])
            assert 0.045 < float(change.std()) < 0.055
            weights[name] = Trained(value, {}, name)
    assert relative(logits(target, plan), logits(DENSE, weights)) < 1e-13
    two = experts(plan_of(with_experts(8, 12, 4), source, copy_noise=0.05), 1)
    assert not torch.equal(two[0][0], two[4][0])


@pytest.mark.parametrize("mode", list(ScaleMode))
def test_moments(mode: ScaleMode) -> None:
    """Would catch: moments of another slice, gate's given to up, a scale that is not divided out, or once where the
    second moment needs it twice. Written out by hand: 1/s and 1/s^2, s = 2 for up and down, or 4^(1/3) for all."""
    source = pretrained()
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, Lazy] = {}
    moments: dict[str, dict[int, torch.Tensor]] = {}
    for name, lazy in source.weights.items():
        moments[name] = {order: torch.rand(lazy.shape, generator=generator) for order in (1, 2)}
        weights[name] = Trained(whole(lazy), moments[name], name)
    target = with_experts(8, 12, 4, first_dense_layers=2)
    plan = plan_of(target, replace(source, weights=weights), scale_mode=mode)
    scale = {"gate": 1.0, "up": 2.0, "down": 2.0}
    if mode is PAPER:
        scale = dict.fromkeys(scale, 4 ** (1 / 3))
    for order in (1, 2):
        found = {name: whole(plan[f"layers.2.ffn.experts.{name}"].moment(order)) for name in ("gate_up", "down")}
        for e in range(8):
            cut = slice(e % 4 * 12, (e % 4 + 1) * 12)
            gate, up, down = (moments[f"layers.2.ffn.{n}.weight"][order] / scale[n] ** order for n in scale)
            torch.testing.assert_close(found["gate_up"][e], torch.cat([gate[cut], up[cut]]))
            torch.testing.assert_close(found["down"][e], down[:, cut])
        for name in ("embedding.weight", "layers.1.ffn.up.weight"):
            assert torch.equal(whole(plan[name].moment(order)), moments[name][order])
        assert not whole(plan["layers.2.ffn.router.weight"].moment(order)).any()


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (with_experts(8, 20, 4), r"moe.expert_dim=20 must divide model.ffn_dim=48 .* values: 16, 24"),
        (with_experts(8, 12, 6), r"router.top_k=6 must be a multiple of the 4 slices .* values: 4, 8"),
        (with_experts(8, 12, 2), r"router.top_k=2 must be a multiple of the 4 slices .* values: 4"),
        (with_experts(10, 12, 4), r"moe.num_experts=10 must be a multiple of the 4 .* values: 8, 12"),
        (with_experts(8, 12, 4, num_shared_experts=1), "moe.num_shared_experts=1 must be 0"),
        (replace(with_experts(8, 12, 4), router=ExpertChoiceConfig(top_k=4)), "set router=softmax_normalized"),
        (with_experts(8, 12, 4, router_num_groups=4, router_top_groups=2), "router.num_groups=4 of 2 experts"),
    ],
)
def test_refused(target: Architecture, text: str) -> None:
    """Would catch: copies that are cut, and shapes that go into an assertion instead of a sentence."""
    with pytest.raises(ValueError, match=text):
        plan_of(target)


def test_groups_of_nodes() -> None:
    """Would catch: whole copies within a router's groups that are refused, or not chosen as such."""
    target = with_experts(16, 12, 8, router_num_groups=2, router_top_groups=1)
    assert relative(logits(target, plan_of(target)), logits(DENSE, pretrained().weights)) < 1e-13
    with pytest.raises(ValueError, match=r"init.layout=strided; set router.num_groups=1"):
        plan_of(target, layout=Layout.strided)


def test_a_source_with_experts_is_refused() -> None:
    """Would catch: a map that slices experts as if they were the dense network."""
    with pytest.raises(ValueError, match="this map starts from a dense"):
        plan_of(with_experts(8, 12, 4), pretrained(with_experts(8, 12, 4)))

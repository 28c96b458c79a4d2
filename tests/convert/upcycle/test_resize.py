"""More experts by copies and fewer by merging: functions, recipes by hand, neurons in another order, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Given, whole
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.neurons import alike, greedy_matching, picked
from moe_parallel.convert.upcycle.resize import NewExpert, ResizeConfig, RouterRows, copies, merged
from moe_parallel.convert.usage import load_usage, measure_usage, save_usage
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.routers.token_choice import GroupScore, Score
from tests.batches import make_batch
from tests.convert.models import SEED, VOCABULARY, logits, pretrained, relative, with_experts

SIGMOID = {"router_score": Score.sigmoid, "router_normalize": False}
GROUPS = {"router_num_groups": 2, "router_top_groups": 1}


def with_bias(architecture: Architecture) -> Architecture:
    """With a selection bias in its routers."""
    return replace(architecture, balance=BalanceConfig(bias_rate=0.1))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"router_normalize": False}, {}),
        (SIGMOID, {**SIGMOID, "router_route_scale": 1 / 3}),
        ({"router_score": Score.sigmoid, "num_shared_experts": 2, "shared_expert_gate": True}, None),
        ({**GROUPS, "router_score": Score.sigmoid}, None),
        ({**GROUPS, "router_group_score": GroupScore.max, "router_normalize": False}, None),
        ({"chain": ChainConfig(iterations=2)}, None),
    ],
)
def test_equally_many_copies_are_the_same_function(options: dict[str, Any], more: dict[str, Any] | None) -> None:
    """Would catch: copies that are not taken together, router rows, biases or offsets of other experts, weights that
    do not share, groups that copies leave, a router of a later iteration that is not copied. Rounding of float64."""
    source = pretrained(with_bias(with_experts(4, 24, 2, **options)))
    target = with_bias(with_experts(12, 24, 6, **{**options, **(more or {})}))
    config = ResizeConfig()
    assert config.preserves([source.architecture], target) is Preserves.exact
    ours = logits(target, make_plan(config, [source], target, SEED))
    assert relative(ours, logits(source.architecture, source.weights)) < 1e-13


def test_other_copies_are_not_called_exact() -> None:
    """Would catch: a promise that does not hold, for every condition of it."""
    source = pretrained(with_experts(4, 24, 2))
    sigmoid = pretrained(with_experts(4, 24, 2, **SIGMOID))
    for start, config, target in (
        (source, ResizeConfig(), with_experts(8, 24, 2)),
        (source, ResizeConfig(router_noise=0.1), with_experts(8, 24, 4)),
        (source, ResizeConfig(copy_noise=0.1), with_experts(8, 24, 4)),
        (source, ResizeConfig(), with_experts(8, 24, 4, router_route_scale=2.0)),
        (source, ResizeConfig(), with_experts(8, 24, 4, router_normalize=False)),
        (sigmoid, ResizeConfig(), with_experts(8, 24, 4, **SIGMOID)),
    ):
        assert config.preserves([start.architecture], target) is Preserves.approximate
        difference = relative(
            logits(target, make_plan(config, [start], target, SEED)), logits(start.architecture, start.weights)
        )
        assert difference > 1e-4, (config, target)


def test_noise_leaves_the_first_copy() -> None:
    """Would catch: noise that moves what is known, or that is the same for all copies."""
    source, target = pretrained(with_experts(2, 24, 2)), with_experts(6, 24, 2)
    plan = make_plan(ResizeConfig(copy_noise=0.1, router_noise=0.2), [source], target, SEED)
    for what, std in (("experts.down", 0.1), ("router.weight", 0.2)):
        theirs = whole(source.weights[f"layers.1.ffn.{what}"]).repeat_interleave(3, 0)
        noise = (whole(plan[f"layers.1.ffn.{what}"]) - theirs).flatten(1).reshape(2, 3, -1)
        assert not noise[:, 0].any()
        assert float(noise[:, 1:].std()) == pytest.approx(std, rel=0.2)
        assert float((noise[0, 1] - noise[0, 2]).std()) > 0.5 * std  # 0 if they were the same


def test_recipes() -> None:
    """By hand. Would catch: the least used experts getting copies or staying, shares that do not sum to 1, an expert
    merged with one that it does not resemble."""
    usage_E = torch.tensor([4.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    assert copies([0, 1, 2, 3], 6, usage_E) == [
        NewExpert((0,)), NewExpert((0,), copy=1), NewExpert((1,)), NewExpert((2,)), NewExpert((3,)),
        NewExpert((3,), copy=1),
    ]  # fmt: skip
    assert [expert.parts for expert in copies([2, 3], 4, None)] == [(2,), (2,), (3,), (3,)]
    row_ED = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-5.0, 0.0], [-1.0, 1.0]])
    first, second = merged([0, 1, 2, 3], 2, usage_E, row_ED)
    assert (first.parts, first.shares) == ((0, 1), (1.0, 0.0))
    assert (second.parts, second.shares) == ((3, 2), (0.75, 0.25))
    unused = merged([0, 1], 1, torch.zeros(2, dtype=torch.float64), row_ED)[0]
    assert (unused.parts, unused.shares) == ((0, 1), (0.5, 0.5))


def test_fewer_experts_by_hand(tmp_path) -> None:
    """Would catch: gate and up of different experts, weights that are not shared by usage, rows, biases or counts of
    another layer or expert."""
    source, target = pretrained(with_bias(with_experts(4, 24, 2))), with_bias(with_experts(3, 24, 2))
    usage = {1: torch.tensor([3.0, 9.0, 1.0, 8.0]), 2: torch.tensor([1.0, 0.5, 2.0, 4.0])}
    save_usage(tmp_path / "usage.safetensors", {layer: count.double() for layer, count in usage.items()})
    for rows in RouterRows:
        config = ResizeConfig(usage=str(tmp_path / "usage.safetensors"), align_neurons=False, router_rows=rows)
        assert config.preserves([source.architecture], target) is Preserves.approximate
        plan = make_plan(config, [source], target, SEED)
        for layer, least in ((1, 2), (2, 1)):
            stored = {name: whole(source.weights[f"layers.{layer}.ffn.{name}"]).double() for name in MATRICES}
            unit_ED = torch.nn.functional.normalize(stored["router.weight"], dim=1)
            likeness_E = unit_ED @ unit_ED[least]
            likeness_E[least] = -2
            near, stay = int(likeness_E.argmax()), [e for e in range(4) if e != least]
            count_E = usage[layer].double()
            share = float(count_E[least] / (count_E[least] + count_E[near]))
            for name, theirs in stored.items():
                wanted = theirs[stay].clone()
                if "experts" in name or rows is RouterRows.mean:
                    wanted[stay.index(near)] = share * theirs[least] + (1 - share) * theirs[near]
                if "bias" in name:  # it is added to scores of a softmax over fewer experts
                    wanted *= 4 / 3
                torch.testing.assert_close(whole(plan[f"layers.{layer}.ffn.{name}"]), wanted.float(), rtol=1e-6, atol=0)


MATRICES = ("experts.gate_up", "experts.down", "router.weight", "router.bias")


def test_neurons_in_another_order_are_put_right(tmp_path) -> None:
    """Would catch: an alignment of gate that down does not follow, or its inverse. Experts that are one network in
    four orders of its neurons, so merged they are that network; means of unaligned ones are another."""
    shape, target = with_experts(4, 24, 2), with_experts(2, 24, 2)
    source = pretrained(shape)
    weights = dict(source.weights)
    generator = torch.Generator().manual_seed(0)
    for layer in (1, 2):
        first = {what: whole(weights[f"layers.{layer}.ffn.experts.{what}"])[0] for what in ("gate_up", "down")}
        orders = [torch.randperm(24, generator=generator) for _ in range(4)]
        gates = [torch.cat([half[order] for half in first["gate_up"].chunk(2)]) for order in orders]
        weights[f"layers.{layer}.ffn.experts.gate_up"] = Given(torch.stack(gates), "gate_up")
        weights[f"layers.{layer}.ffn.experts.down"] = Given(torch.stack([first["down"][:, o] for o in orders]), "down")
    same = replace(source, weights=weights)
    usage = {layer: torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=torch.float64) for layer in (1, 2)}
    save_usage(tmp_path / "usage.safetensors", usage)
    found = []
    for align in (True, False):
        config = ResizeConfig(usage=str(tmp_path / "usage.safetensors"), align_neurons=align)
        plan = make_plan(config, [same], target, SEED)
        found.append(relative(logits(target, plan), logits(shape, weights)))
    # Means of equal float32 numbers with shares that are rounded in float64.
    assert found[0] < 1e-6
    assert found[1] > 1e-2
    box = ((1, 3, 5), (1, 40, 7))  # reaches from gate into up: a rank's part
    part = plan_part = make_plan(replace(config, align_neurons=True), [same], target, SEED)
    name = "layers.1.ffn.experts.gate_up"
    assert torch.equal(plan_part[name].read(box), whole(part[name])[1:2, 3:43, 5:12])


def test_greedy_matching() -> None:
    """Would catch: a neuron that is taken twice, a pair that is not the best of what is left. Against the definition:
    again and again the highest score; ties included."""
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 7, 30):
        for levels in (3, 10**6):
            score = torch.randint(0, levels, (size, size), generator=generator).double()
            left, total = score.clone(), []
            for _ in range(size):
                row, column = divmod(int(left.argmax()), size)
                total.append(float(left[row, column]))
                left[row], left[:, column] = -torch.inf, -torch.inf
            column_F = greedy_matching(score)
            assert sorted(column_F.tolist()) == list(range(size))
            if levels > size**2:  # without ties the greedy matching is one
                assert sorted(total) == sorted(score[torch.arange(size), column_F].tolist())


def test_picked_neurons_keep_their_moments() -> None:
    """Would catch: moments in another order than their weights."""
    weights = [Given(torch.randn(6, 4), "gate"), Given(torch.randn(6, 4), "up"), Given(torch.randn(4, 6), "down")]
    order = torch.tensor([3, 0, 5])
    for part, dim in zip(picked(tuple(weights), 3, lambda: order, "some"), (0, 0, 1)):
        part.inner.moment = lambda _, inner=part.inner: Given(inner.value * 2, "twice")
        assert torch.equal(whole(part.moment(1)), 2 * whole(part))
        assert torch.equal(whole(part), part.inner.value.index_select(dim, order))
    gate, up, down = (weight.value for weight in weights)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    turned = (Given(gate[order], ""), Given(up[order], ""), Given(down[:, order], ""))
    assert torch.equal(alike(tuple(weights), turned), order)


def test_usage_is_counted(tmp_path) -> None:
    """Would catch: padding that is counted, iterations that are left out, a file of another model that is taken."""
    shape = with_experts(4, 24, 2, chain=ChainConfig(iterations=2))
    source = pretrained(shape)
    batches = [make_batch([(13, 11), (20,)], 24, VOCABULARY), make_batch([(9,)], 24, VOCABULARY)]
    usage = measure_usage(build_model(shape, source.weights), batches)
    assert {layer: float(count_E.sum()) for layer, count_E in usage.items()} == dict.fromkeys((1, 2), 53.0 * 2 * 2)
    path = tmp_path / "deep" / "usage.safetensors"
    save_usage(path, usage)
    assert sorted(load_file(path)) == ["layers.1.count", "layers.2.count"]
    assert all(torch.equal(usage[layer], count_E) for layer, count_E in load_usage(path, shape).items())
    with pytest.raises(ValueError, match=r"has 4 numbers for layer 1, not a count for each of its 6 experts"):
        load_usage(path, with_experts(6, 24, 2))
    with pytest.raises(ValueError, match=r"has nothing for layer 0"):
        load_usage(path, with_experts(4, 24, 2, first_dense_layers=0))
    with pytest.raises(ValueError, match=r"is no file; scripts/count_usage\.py writes one"):
        load_usage(tmp_path / "none", shape)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"is no file of scripts/count_usage\.py"):
        load_usage(tmp_path / "text", shape)
    save_usage(path, {layer: torch.full_like(count_E, torch.nan) for layer, count_E in usage.items()})
    with pytest.raises(ValueError, match="not a count"):
        load_usage(path, shape)


@pytest.mark.parametrize(
    ("config", "target", "text"),
    [
        (ResizeConfig(), with_experts(4, 24, 2), "moe.num_experts=4 is what init.sources.0. has"),
        (ResizeConfig(), with_experts(8, 12, 2), "moe.expert_dim=12 here, 24 in init.sources.0."),
        (ResizeConfig(), with_experts(8, 24, 2, num_shared_experts=1), "moe.num_shared_experts=1 here, 0 in"),
        (ResizeConfig(), with_experts(8, 24, 2, first_dense_layers=0), "model.first_dense_layers=0 here, 1 in"),
        (ResizeConfig(), with_experts(8, 24, 2, router_logit_residual=True), "without router.logit_residual"),
        (ResizeConfig(), with_experts(8, 24, 2, adjugate_groups=2), "moe.adjugate_groups=2 here, 0 in"),
        (ResizeConfig(align_neurons=False), with_experts(8, 24, 2), "init.align_neurons=false does nothing for more"),
        (
            ResizeConfig(router_rows=RouterRows.mean),
            with_experts(8, 24, 2),
            "init.router_rows=mean does nothing for more",
        ),
        (ResizeConfig(copy_noise=0.1), with_experts(2, 24, 2), "init.copy_noise=0.1 does nothing for fewer"),
        (ResizeConfig(usage="x"), with_experts(8, 24, 2), "init.usage=x does nothing: each of 4 experts is copied 2"),
        (ResizeConfig(), with_experts(2, 24, 2), "init.usage=null takes what a checkpoint knows"),
        (ResizeConfig(), with_experts(6, 24, 2), "init.usage=null takes what a checkpoint knows"),
    ],
)
def test_refused(config: ResizeConfig, target: Architecture, text: str) -> None:
    """Would catch: weights that are left out in silence, options that do nothing, merging without knowing what is
    used."""
    with pytest.raises(ValueError, match=text):
        make_plan(config, [pretrained(with_experts(4, 24, 2))], target, SEED)


def test_refused_sources() -> None:
    """The same for sources: a dense one, and one whose bias would be lost."""
    with pytest.raises(ValueError, match="is dense, but init=resize starts from a model with experts"):
        make_plan(ResizeConfig(), [pretrained()], with_experts(8, 24, 2), SEED)
    with pytest.raises(ValueError, match=r"has layers.1.ffn.router.bias, .* no place for"):
        make_plan(ResizeConfig(), [pretrained(with_bias(with_experts(4, 24, 2)))], with_experts(8, 24, 2), SEED)
    with pytest.raises(ValueError, match=r"init\.router_noise=-1\.0 must be 0"):
        ResizeConfig(router_noise=-1.0)

"""Delta experts from dense models and from experts: Eckart-Young, exactness at full rank, one start by command."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_parallel.convert.lazy import Lazy, is_zero, whole
from moe_parallel.convert.upcycle.delta import DeltaBase, DeltaConfig, factorized
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.expert_forms import DeltaForm
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import Trained
from tests.runs import Runner, curve
from tests.test_start import STILL

FIRST = DeltaConfig(delta_base=DeltaBase.first)
FLOAT32 = 1e-6
"""Factors are rounded to float32: 6e-8 each, through a handful of layers."""


def delta(rank: int, num_experts: int = 3, **options) -> Architecture:
    return with_experts(num_experts, 48, 2, expert_form="delta", delta_rank=rank, **options)


def made(target: Architecture, plan: dict[str, Lazy], layer: int) -> tuple[Tensor, Tensor]:
    """The matrices of a layer's experts, float64."""
    name, rank = f"layers.{layer}.ffn", target.moe.delta_rank
    assert rank is not None
    form = DeltaForm(rank)
    weights = {n: whole(plan[f"{name}.experts.{n}"]).double() for n in form.shapes(1, 1, 1)}
    base = tuple(whole(plan[f"{name}.base.{what}.weight"]).double() for what in ("gate_up", "down"))
    return form.gate_up(weights, base), form.down(weights, base)  # type: ignore[arg-type]


def tail(matrix: Tensor, rank: int) -> float:
    """Frobenius norm of what no matrix of this rank can have of it, by numpy."""
    return float(np.sqrt((np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_factors_are_the_best_ones(shape: tuple[int, int]) -> None:
    """Would catch: the smallest values instead of the largest, sides mixed up, roots on one side only, directions
    without a value that can never learn. Eckart and Young: no product of this rank is closer than the tail."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    for rank in (1, 5, 12):
        out, into = factorized(matrix, rank)
        assert (out.shape, into.shape) == ((shape[0], rank), (rank, shape[1]))
        error = float((out.double() @ into.double() - matrix).norm())
        assert error == pytest.approx(tail(matrix, rank), rel=1e-6, abs=1e-6 * float(matrix.norm()))
        torch.testing.assert_close(out.norm(dim=0), into.norm(dim=1))
    one = torch.ones(4, 6, dtype=torch.float64)
    out, into = factorized(one, 3)
    torch.testing.assert_close(out @ into, one.float())
    assert (out.norm(dim=0) + into.norm(dim=1) > 0.5).all(), "a direction is zero on both sides: it has no gradient"


@pytest.mark.parametrize("base", DeltaBase)
def test_dense_models_become_experts(base: DeltaBase) -> None:
    """Would catch: gate and up in one decomposition, a base that is not shared, models in another order, weights
    outside of experts from one model where they are averaged."""
    sources = [pretrained(seed=seed) for seed in range(3)]
    config, target = DeltaConfig(delta_base=base), delta(5)
    assert config.preserves([DENSE] * 3, target) is Preserves.none
    plan = make_plan(config, sources, target, SEED)
    gate_ups, downs = made(target, plan, 1)
    theirs = [
        [whole(source.weights[f"layers.1.ffn.{what}.weight"]).double() for what in ("gate", "up", "down")]
        for source in sources
    ]
    bases = [torch.stack(each).mean(0) if base is DeltaBase.mean else each[0] for each in zip(*theirs)]
    for expert, (gate_up, down) in enumerate(zip(gate_ups, downs)):
        for ours, wanted, b in zip((*gate_up.chunk(2), down), theirs[expert], bases):
            error = float((ours - wanted).norm())
            assert error == pytest.approx(tail(wanted - b, 5), rel=1e-5, abs=1e-5), "not the best of its rank"
    query = torch.stack([whole(source.weights["layers.1.attention.query.weight"]) for source in sources])
    torch.testing.assert_close(
        whole(plan["layers.1.attention.query.weight"]), query.mean(0) if base is DeltaBase.mean else query[0]
    )
    if base is DeltaBase.first:
        assert not whole(plan["layers.1.ffn.experts.down_out"])[0].any()
        assert whole(plan["layers.1.ffn.experts.down_in"])[0].any(), "the first expert could never leave the base"


def test_one_dense_model_is_kept() -> None:
    """Would catch: a difference that is not zero at first, a promise where weights do not sum to 1."""
    source, config = pretrained(), DeltaConfig()
    plan = make_plan(config, [source], delta(5, 4), SEED)
    assert config.preserves([DENSE], delta(5, 4)) is Preserves.exact
    assert relative(logits(delta(5, 4), plan), logits(DENSE, source.weights)) < 1e-13
    assert whole(plan["layers.1.ffn.experts.gate_up_in"]).any(), "nothing could learn"
    other = delta(5, 4, router_normalize=False)
    assert config.preserves([DENSE], other) is Preserves.approximate
    assert relative(logits(other, make_plan(config, [source], other, SEED)), logits(DENSE, source.weights)) > 1e-3


@pytest.mark.parametrize("config", [DeltaConfig(), FIRST])
def test_experts_at_full_rank_are_what_they_were(config: DeltaConfig) -> None:
    """Would catch: routers or shared experts that are not taken along, an error that does not fall with the rank."""
    options = {"num_shared_experts": 1, "shared_expert_gate": True}
    architecture = with_experts(3, 48, 2, **options)
    source = pretrained(architecture, seed=3)
    wanted = logits(architecture, source.weights)
    errors = []
    for rank in (1, 8, 24, 32):
        target = delta(rank, **options)
        plan = make_plan(config, [source], target, SEED)
        errors.append(relative(logits(target, plan), wanted))
        promise = config.preserves([architecture], target)
        assert promise is (Preserves.exact if rank == 32 else Preserves.approximate)
    assert errors[-1] < FLOAT32 < 1e-3 < errors[-2]
    assert sorted(errors, reverse=True) == errors


def test_selection_biases() -> None:
    """Would catch: a bias that is left behind, by which other experts are chosen; a new one that nobody fills."""
    biased = BalanceConfig(bias_rate=0.1)
    plain_source, plain_target = with_experts(3, 48, 2), delta(32)
    source = pretrained(replace(plain_source, balance=biased), seed=3)
    target = replace(plain_target, balance=biased)
    plan = make_plan(FIRST, [source], target, SEED)
    assert relative(logits(target, plan), logits(source.architecture, source.weights)) < FLOAT32
    with pytest.raises(ValueError, match=r"router\.bias, .* no place for; set router and balance"):
        make_plan(FIRST, [source], plain_target, SEED)
    new = make_plan(FIRST, [pretrained(plain_source)], target, SEED)
    assert not whole(new["layers.1.ffn.router.bias"]).any()


def test_steps_of_what_is_new() -> None:
    """Would catch: factors without a past, whose optimizer counts on as if their zeros were means of many steps."""
    sources = []
    for seed in range(3):
        source = pretrained(seed=seed)
        weights: dict[str, Lazy] = {
            name: Trained(whole(lazy), {order: torch.ones(lazy.shape) for order in (1, 2)})
            for name, lazy in source.weights.items()
        }
        sources.append(replace(source, weights=weights))
    plan = make_plan(DeltaConfig(sources=["a", "b", "c"]), sources, delta(4), SEED)
    new = {name for name, lazy in plan.items() if is_zero(lazy.moment(1))}
    assert new == {name for name in plan if ".experts." in name or ".router." in name}
    assert not any(whole(plan[name].moment(1)).any() for name in new)


def test_refused() -> None:
    """Would catch: shapes that go into an assertion instead of a sentence."""
    experts = with_experts(3, 48, 2)
    for sources, target, text in (
        ([], delta(5), "init.sources is empty"),
        ([DENSE, DENSE], delta(5), "moe.num_experts=3 must be 2"),
        ([DENSE], with_experts(3, 48, 2), "moe.expert_form=full is not what this map makes; set moe.expert_form=delta"),
        ([DENSE], delta(5, num_shared_experts=1), "moe.num_shared_experts=1 must be 0"),
        ([DENSE], replace(delta(5), moe=replace(delta(5).moe, expert_dim=24)), "moe.expert_dim=24 must be 48"),
        ([experts, experts], delta(5), "init=delta starts from one"),
        ([experts], delta(5, 4), "moe.num_experts=4, but init.sources.0. has 3"),
        ([experts], delta(5, first_dense_layers=0), "model.first_dense_layers=1"),
        ([experts], replace(delta(5), router=TokenChoiceConfig(top_k=1)), "set router and its options"),
        ([delta(5)], delta(5), "matrices of their own"),
    ):
        with pytest.raises(ValueError, match=text):
            DeltaConfig().check(sources, target)


def test_starts_where_the_dense_model_ended(runner: Runner) -> None:
    """Would catch: a map that no option reaches, factors or a base that ranks which share experts fill or save
    otherwise. Two ranks start, one resumes what they saved."""
    dense = runner.run("dense", "model.first_dense_layers=2", "init.std=0.2").folder
    before = curve(dense)
    options = ["init=delta", f"init.sources=[{dense}]", "model.first_dense_layers=0", "router=softmax_normalized"]
    options += ["moe.expert_dim=128", "moe.num_shared_experts=0", "moe.expert_form=delta", "moe.delta_rank=4"]
    folder = runner.run("delta", *STILL, *options, "parallel.ep=2", ranks=2).folder
    loss = "validation/cross_entropy_nats"
    wanted = before[max(before)][loss]
    assert curve(folder)[1][loss] == pytest.approx(wanted, abs=2e-6)  # of 6 nats in float32, in another order
    runner.run("delta", *STILL, *options, "train.steps=2", "resume=auto")
    assert curve(folder)[2][loss] == pytest.approx(wanted, abs=2e-6)

"""Chains of experts from plain mixtures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_parallel.convert.lazy import whole
from moe_parallel.convert.upcycle.chain import ChainStartConfig, LaterRouters
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import FreshConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.chain import ChainBlock, ChainConfig, Renormalize, Residual
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.token_choice import RouterKernel, Score
from moe_parallel.start import _same_model
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import losses

COPIED = LaterRouters.copied
PLAIN = with_experts(8, 24, 3, num_shared_experts=2, shared_expert_gate=True)
BIASED = replace(
    with_experts(8, 24, 3, router_score=Score.sigmoid, first_dense_layers=0), balance=BalanceConfig(bias_rate=0.1)
)
DEEP = replace(PLAIN, model=replace(PLAIN.model, mtp_layers=1, tie_embeddings=True))


def chain_of(source: Architecture, **options: Any) -> Architecture:
    return replace(source, moe=replace(source.moe, chain=ChainConfig(**{"iterations": 2, **options})))


@pytest.mark.parametrize("source", [PLAIN, BIASED, DEEP], ids=["plain", "biased", "deep"])
@pytest.mark.parametrize(
    ("later", "options"),
    [
        ("drawn", {}),
        ("copied", {"iterations": 3}),
        ("drawn", {"renormalize": Renormalize.per_iteration, "iterations": 3}),
        ("copied", {"renormalize": Renormalize.shared, "shared_every_iteration": False}),
        ("drawn", {"own_routers": False}),
    ],
)
def test_same_function(source: Architecture, later: str, options: Any) -> None:
    """Would catch: experts, shared ones, gates, biases or multi-token prediction that are not taken along; a later
    iteration that is not silent. Nothing is computed otherwise: zeros are added, so there is no tolerance."""
    model, target = pretrained(source), chain_of(source, learned_scale=True, **options)
    config = ChainStartConfig(later_routers=LaterRouters(later))
    assert config.preserves([source], target) is Preserves.exact
    plan = make_plan(config, [model], target, SEED)
    assert torch.equal(logits(target, plan), logits(source, model.weights))
    assert torch.equal(losses(target, plan), losses(source, model.weights))


def test_what_later_iterations_start_as() -> None:
    """Would catch: routers that are copied where they should be drawn, or from another layer; a bias that stays behind;
    norms of ones."""
    model = pretrained(BIASED)
    target = chain_of(BIASED, learned_scale=True, renormalize=Renormalize.per_iteration)
    drawn, copied = (make_plan(ChainStartConfig(later_routers=later), [model], target, SEED) for later in LaterRouters)
    for layer in target.moe_layers:
        ffn = f"layers.{layer}.ffn"
        for what in ("weight", "bias"):
            ours, own = f"{ffn}.later_routers.0.{what}", whole(model.weights[f"{ffn}.router.{what}"])
            assert torch.equal(whole(copied[ours]), own)
            assert not torch.equal(whole(drawn[ours]), own)
        for plan in (drawn, copied):
            norms = [whole(plan[f"layers.{layer}.{name}.weight"]) for name in ("later_norms.0", "ffn_norm")]
            assert torch.equal(*norms)
            assert norms[0].std() > 0.1
            assert not whole(plan[f"{ffn}.later_scale"]).any()


def test_agrees_with_weights_of_a_plain_model() -> None:
    """Would catch: two ways to the same chain, `init=chain` and `init.weights`, that come to different models."""
    for source in (PLAIN, BIASED, DEEP):
        model, target = pretrained(source), chain_of(source, learned_scale=True)
        ours = make_plan(ChainStartConfig(), [model], target, SEED)
        theirs = _same_model(FreshConfig(), model, target, SEED)
        assert ours.keys() == theirs.keys()
        for name, lazy in ours.items():
            assert torch.equal(whole(lazy), whole(theirs[name])), name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (PLAIN, chain_of(PLAIN)),
        (PLAIN, chain_of(PLAIN, residual=Residual.initial)),
        (PLAIN, chain_of(PLAIN, learned_scale=True, block=ChainBlock.reference)),
        (PLAIN, replace(chain_of(PLAIN, learned_scale=True), router=replace(PLAIN.router, top_k=2))),
        (with_experts(8, 24, 3, router_logit_residual=True),) * 2,
    ],
)
def test_other_functions_are_not_called_exact(source: Architecture, target: Architecture) -> None:
    """Would catch: a promise that does not hold: for iterations that count from the start, another block, another
    number of experts, logits that later layers take from the last iteration."""
    if source is target:
        target = chain_of(source, learned_scale=True)
    model, config = pretrained(source), ChainStartConfig()
    assert config.preserves([source], target) is Preserves.approximate
    assert relative(logits(target, make_plan(config, [model], target, SEED)), logits(source, model.weights)) > 1e-3


def test_what_acts_in_training_only_may_differ() -> None:
    """Would catch: a model that is called another one for its kernel or its capacity."""
    target = chain_of(PLAIN, learned_scale=True)
    target = replace(
        target,
        moe=replace(target.moe, capacity_factor=1.5),
        router=replace(PLAIN.router, kernel=RouterKernel.triton, input_jitter=0.1),
    )
    config = ChainStartConfig()
    config.check([PLAIN], target)
    assert config.preserves([PLAIN], target) is Preserves.exact


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (PLAIN, PLAIN, "moe.chain.iterations=1 is no chain"),
        (DENSE, chain_of(PLAIN), "is dense, but init=chain starts from a model with experts"),
        (chain_of(PLAIN), chain_of(PLAIN, iterations=3), "is a chain of 2 iterations already"),
        (PLAIN, chain_of(with_experts(4, 24, 3)), "moe.num_experts=4 here, 8 in init"),
        (PLAIN, chain_of(replace(PLAIN, moe=replace(PLAIN.moe, shared_expert_gate=False))), "shared_expert_gate=False"),
        (BIASED, replace(chain_of(BIASED), balance=BalanceConfig()), r"has layers.0.ffn.router.bias .* nothing"),
        (PLAIN, replace(chain_of(PLAIN), router=ExpertChoiceConfig(top_k=3)), "router is ExpertChoiceConfig here"),
        (
            PLAIN, chain_of(replace(PLAIN, model=replace(PLAIN.model, first_dense_layers=2))),
            "model.first_dense_layers=2 here, 1 in",
        ),
        (PLAIN, chain_of(PLAIN, own_routers=False), "init.later_routers=copied with moe.chain.own_routers=false"),
    ],
)  # fmt: skip
def test_refused(source: Architecture, target: Architecture, text: str) -> None:
    """Would catch: weights that are left out without a word, and shapes that go into an assertion."""
    with pytest.raises(ValueError, match=text):
        make_plan(ChainStartConfig(later_routers=COPIED), [pretrained(source)], target, SEED)

"""Adjugates for experts that exist: the same function, and everything else as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_parallel.convert.lazy import whole
from moe_parallel.convert.upcycle.adjugate import AdjugateStartConfig
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.sparse import SparseConfig
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.routers.token_choice import Score
from tests.convert.models import SEED, logits, pretrained, relative, with_experts

GROVE = {"adjugate_groups": 2, "adjugate_dim": 6, "adjugate_scale": 0.2}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_shared_experts": 1, "router_normalize": False}, {"chain": ChainConfig(iterations=2, own_routers=False)}],
)
def test_same_function(options: dict[str, Any]) -> None:
    """Would catch: adjugates that do not start at zero, experts of another layer. Bit for bit but for -0."""
    source, target = pretrained(with_experts(4, 24, 2, **options)), with_experts(4, 24, 2, **GROVE, **options)
    config = AdjugateStartConfig(std=0.006)
    assert config.preserves([source.architecture], target) is Preserves.exact
    plan = make_plan(config, [source], target, SEED)
    assert torch.equal(logits(target, plan), logits(source.architecture, source.weights))
    gate_up = whole(plan["layers.2.ffn.experts.adjugates.gate_up"])
    assert gate_up.shape == (2, 12, 32)
    assert float(gate_up.std()) == pytest.approx(0.006, rel=0.1)
    assert not whole(plan["layers.2.ffn.experts.adjugates.down"]).any()


def test_another_router_is_not_called_exact() -> None:
    """Would catch: a promise that does not hold."""
    source, target = pretrained(with_experts(4, 24, 2)), with_experts(4, 24, 2, **GROVE, router_score=Score.sigmoid)
    config = AdjugateStartConfig()
    assert config.preserves([source.architecture], target) is Preserves.approximate
    plan = make_plan(config, [source], target, SEED)
    assert relative(logits(target, plan), logits(source.architecture, source.weights)) > 1e-3


def test_other_maps_may_add_them() -> None:
    """Would catch: a map from dense models that does not know of adjugates: they add nothing at first, so it is exact
    with them as well."""
    source, target = pretrained(), with_experts(4, 48, 2, **GROVE)
    plan = make_plan(SparseConfig(), [source], target, SEED)
    assert relative(logits(target, plan), logits(source.architecture, source.weights)) < 1e-13


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (with_experts(4, 24, 2), with_experts(4, 24, 2), "moe.adjugate_groups=0 has none; set it, to 2 for pairs"),
        (with_experts(4, 24, 2, **GROVE), with_experts(4, 24, 2, **GROVE), "has adjugates already; take init.weights"),
        (with_experts(4, 24, 2), with_experts(8, 24, 2, **GROVE), "moe.num_experts=8 here, 4 in init.sources.0."),
        (with_experts(4, 24, 2, first_dense_layers=3), with_experts(4, 24, 2, **GROVE), "is dense, but init=adjugate"),
    ],
)
def test_refused(source: Architecture, target: Architecture, text: str) -> None:
    """Would catch: models that differ in more than adjugates."""
    with pytest.raises(ValueError, match=text):
        AdjugateStartConfig().check([source], target)

"""Sparse upcycling: copies of the dense network."""

from __future__ import annotations

import pytest

from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.sparse import SparseConfig
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts


@pytest.mark.parametrize("first_dense_layers", [0, 1])
def test_same_function(first_dense_layers: int) -> None:
    """Would catch: gate and up swapped, a layer's experts from another layer, dense layers that are not taken along.

    The weights of two or three experts sum to 1 within an ulp of float64, and everything after that is the same.
    """
    source = pretrained()
    target = with_experts(4, 48, 3, first_dense_layers)
    config = SparseConfig()
    assert config.preserves([source.architecture], target) is Preserves.exact
    plan = make_plan(config, [source], target, SEED)
    assert relative(logits(target, plan), logits(DENSE, source.weights)) < 1e-13


def test_other_functions_are_not_called_exact() -> None:
    """Would catch: a promise that does not hold, for weights that do not sum to 1 and for copies with noise."""
    source = pretrained()
    wanted = logits(DENSE, source.weights)
    for config, target in (
        (SparseConfig(), with_experts(4, 48, 3, router_normalize=False)),
        (SparseConfig(copy_noise=0.01), with_experts(4, 48, 3)),
    ):
        assert config.preserves([source.architecture], target) is Preserves.approximate
        assert relative(logits(target, make_plan(config, [source], target, SEED)), wanted) > 1e-3


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (with_experts(4, 24, 3), "moe.expert_dim=24 must be 48"),
        (with_experts(4, 48, 3, num_shared_experts=1), "moe.num_shared_experts=1 must be 0"),
    ],
)
def test_refused(target, text: str) -> None:
    """Would catch: shapes that go into an assertion instead of a sentence."""
    with pytest.raises(ValueError, match=text):
        make_plan(SparseConfig(), [pretrained()], target, SEED)
    with pytest.raises(ValueError, match="this map starts from a dense"):
        make_plan(SparseConfig(), [pretrained(with_experts(4, 48, 3))], with_experts(4, 48, 3), SEED)

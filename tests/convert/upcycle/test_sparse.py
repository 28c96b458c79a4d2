"""Sparse upcycling: copies of the dense network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_parallel.convert.lazy import Cast, whole
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.sparse import SparseConfig
from moe_parallel.moe.chain import ChainBlock, ChainConfig, Renormalize
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import losses


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


def test_losses_of_multi_token_prediction() -> None:
    """Would catch: experts of these layers that are left out, or taken from a layer of the decoder."""
    shape, target = DENSE, with_experts(4, 48, 3)
    shape, target = (replace(one, model=replace(one.model, mtp_layers=2)) for one in (shape, target))
    source = pretrained(shape)
    plan = make_plan(SparseConfig(), [source], target, SEED)
    torch.testing.assert_close(losses(target, plan), losses(shape, source.weights), rtol=1e-12, atol=0)


def test_chains() -> None:
    """Would catch: a promise that later passes of a chain break, or one that is not given although they are silent;
    norms of later iterations, which no dense model has, as a KeyError."""
    source = pretrained()
    own, none = Renormalize.per_iteration, Renormalize.none
    for learned, block, norms, promise in (
        (True, ChainBlock.pre_norm, none, Preserves.exact),
        (True, ChainBlock.pre_norm, own, Preserves.exact),
        (False, ChainBlock.pre_norm, none, Preserves.approximate),
        (True, ChainBlock.reference, none, Preserves.approximate),
    ):
        chain = ChainConfig(iterations=2, learned_scale=learned, block=block, renormalize=norms)
        target = with_experts(4, 48, 3, chain=chain)
        assert SparseConfig().preserves([source.architecture], target) is promise
        plan = make_plan(SparseConfig(), [source], target, SEED)
        if norms is own:
            ours, theirs = (whole(plan[f"layers.1.{name}.weight"]) for name in ("later_norms.0", "ffn_norm"))
            assert torch.equal(ours, theirs), "a norm of a later iteration starts otherwise than the layer's"
        off = relative(logits(target, plan), logits(DENSE, source.weights))
        assert off < 1e-13 if promise is Preserves.exact else off > 1e-3


def test_noise_in_other_types() -> None:
    """Would catch: noise that can be added to float32 only. What it changes is of its size: 0.01, of 24 k numbers."""
    source, target = pretrained(), with_experts(4, 48, 3)
    wide = {name: Cast(lazy, torch.float64) for name, lazy in source.weights.items()}
    name = "layers.1.ffn.experts.gate_up"
    plain, noisy = (
        whole(make_plan(SparseConfig(copy_noise=std), [replace(source, weights=wide)], target, SEED)[name])
        for std in (0, 0.01)
    )
    assert noisy.dtype is torch.float64
    assert float((noisy - plain).std()) == pytest.approx(0.01, rel=0.05)


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

"""Drop-Upcycling: copies with re-drawn neurons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_parallel.convert.lazy import Given, Lazy, whole
from moe_parallel.convert.upcycle.drop import DropConfig, IndexSet
from moe_parallel.convert.upcycle.map import Noise, Preserves, make_plan
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import dense, experts, losses

WIDTH = 48
INDEPENDENT = IndexSet.independent


def plan_of(target=None, source=None, seed: int = SEED, **options: Any) -> dict[str, Lazy]:
    target = target or with_experts(8, WIDTH, 2, first_dense_layers=0)
    return make_plan(DropConfig(**options), [source or pretrained()], target, seed)


def kept_neurons(expert: tuple[Tensor, Tensor, Tensor], source: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of gate, up and down: which neurons have all their weights as before, (F)."""
    same = [ours == theirs for ours, theirs in zip(expert, source)]
    return [same[0].all(1), same[1].all(1), same[2].all(0)]


def changed_neurons(expert: tuple[Tensor, Tensor, Tensor], source: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of gate, up and down: which neurons have no weight as before, (F)."""
    other = [ours != theirs for ours, theirs in zip(expert, source)]
    return [other[0].all(1), other[1].all(1), other[2].all(0)]


def test_nothing_dropped_is_the_same_function() -> None:
    """Would catch: networks of another layer or gate and up swapped, also in multi-token prediction, and promises that
    do not hold."""
    shape = replace(DENSE, model=replace(DENSE.model, mtp_layers=1))
    source, target = pretrained(shape), with_experts(4, WIDTH, 3)
    target = replace(target, model=replace(target.model, mtp_layers=1))
    config = DropConfig(drop_fraction=0)
    assert config.preserves([shape], target) is Preserves.exact
    assert relative(logits(target, plan_of(target, source, drop_fraction=0)), logits(shape, source.weights)) < 1e-13
    expected = losses(shape, source.weights)
    torch.testing.assert_close(losses(target, plan_of(target, source, drop_fraction=0)), expected, rtol=1e-12, atol=0)
    free = with_experts(4, WIDTH, 3, router_normalize=False)
    for settings, shape, promise in (
        ({"drop_fraction": 0}, free, Preserves.approximate),
        ({}, target, Preserves.approximate),
        ({"drop_noise": 0.1}, target, Preserves.approximate),
        ({"drop_fraction": 1, "drop_noise": 0.1}, target, Preserves.approximate),
        ({"drop_fraction": 1}, target, Preserves.none),
    ):
        assert DropConfig(**settings).preserves([DENSE], shape) is promise


@pytest.mark.parametrize("noise", [None, 0.02])
def test_which_neurons(noise: float | None) -> None:
    """Would catch: sets that differ between matrices where they must not, or agree where they must not; sets that are
    the same for all experts or layers; too many or too few; a neuron of which a part is left.

    Independent sets leave 48 * (1/2)^3 = 6 neurons whole on average; of 24 experts the mean has a standard deviation
    of some 0.4.
    """
    source = pretrained()
    sets, whole_counts = [], []
    for index_set in IndexSet:
        plan = plan_of(source=source, index_set=index_set, drop_noise=noise)
        for layer in range(3):
            for expert in experts(plan, layer):
                kept = kept_neurons(expert, dense(source.weights, layer))
                changed = changed_neurons(expert, dense(source.weights, layer))
                for ours, theirs in zip(kept, changed):
                    assert int(ours.sum()) == int(theirs.sum()) == WIDTH // 2
                    assert not (ours & theirs).any()
                equal = torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2])
                assert equal == (index_set is IndexSet.shared)
                if index_set is IndexSet.shared:
                    sets.append(tuple(kept[0].tolist()))
                else:
                    whole_counts.append(float((kept[0] & kept[1] & kept[2]).sum()))
    assert len(set(sets)) == 24
    assert abs(torch.tensor(whole_counts).mean() - 6) < 1.5


def test_kept_neurons_compute_what_they_did() -> None:
    """Would catch: rows of up or columns of down that no longer belong to their gate. One expert of which what was
    re-drawn returns nothing is the dense model without these neurons."""
    source = pretrained()
    target = with_experts(1, WIDTH, 1, router_normalize=False)
    plan, weights = plan_of(target, source), dict(source.weights)
    for layer in target.moe_layers:
        lost = ~kept_neurons(experts(plan, layer)[0], dense(source.weights, layer))[0]
        for store, name in ((plan, f"layers.{layer}.ffn.experts.down"), (weights, f"layers.{layer}.ffn.down.weight")):
            value = whole(store[name]).clone()
            value[..., lost] = 0
            store[name] = Given(value, name)
    assert relative(logits(target, plan), logits(DENSE, weights)) < 1e-13
    assert relative(logits(target, plan_of(target, source)), logits(DENSE, source.weights)) > 1e-2


def test_statistics_of_new_weights() -> None:
    """Would catch: mean and deviation of the whole matrix, of another matrix, or of the neurons that stay. They are
    far apart here: rows and columns have means of their own. Numbers are rounded to float32 once."""
    source = pretrained()
    generator = torch.Generator().manual_seed(2)
    weights = dict(source.weights)
    for what, shape, middle, spread in (
        ("gate", (WIDTH, 1), 3, 1), ("up", (WIDTH, 1), -5, 2), ("down", (1, WIDTH), 20, 4)
    ):  # fmt: skip
        name = f"layers.1.ffn.{what}.weight"
        value = whole(weights[name]) + middle + spread * torch.randn(shape, generator=generator)
        weights[name] = Given(value, name)
    source = replace(source, weights=weights)
    plan = plan_of(source=source, index_set=INDEPENDENT)
    for number, expert in enumerate(experts(plan, 1)):
        chosen = [~kept for kept in kept_neurons(expert, dense(weights, 1))]
        for what, ours, theirs, of in zip(("gate", "up", "down"), expert, dense(weights, 1), chosen):
            rows = (lambda t: t.T[of]) if what == "down" else (lambda t: t[of])  # noqa: B023 - used at once
            new, old = rows(ours).double(), rows(theirs).double()
            normal = rows(whole(Noise(ours.shape, 1.0, SEED, f"layers.1.ffn.{number}.{what}"))).double()
            torch.testing.assert_close(new, old.mean() + old.std(correction=0) * normal, rtol=1e-5, atol=1e-5)
            count = new.numel()
            assert abs(new.mean() - old.mean()) < 4 * old.std() / count**0.5
            assert abs(new.std() / old.std() - 1) < 4 / (2 * count) ** 0.5


def test_noise_keeps_what_was_there() -> None:
    """Would catch: noise instead of weights, on other neurons than the chosen, or of another size."""
    source = pretrained()
    plan = plan_of(source=source, drop_noise=0.02)
    for expert in experts(plan, 1):
        for dim, ours, theirs in zip((0, 0, 1), expert, dense(source.weights, 1)):
            change = ours - theirs
            rows = change.abs().sum(1 - dim) > 0
            assert int(rows.sum()) == WIDTH // 2
            assert 0.018 < float(change.index_select(dim, rows.nonzero()[:, 0]).std()) < 0.022


def test_seeds() -> None:
    """Would catch: sets or numbers that do not follow the seed, or do not only follow it."""
    one, same, other = (whole(plan_of(seed=seed)["layers.0.ffn.experts.down"]) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one == other, torch.ones_like(one, dtype=torch.bool))
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments(dtype: torch.dtype) -> None:
    """Would catch: a past for weights that are new, moments of float64 runs that do not fit. Kept ones keep theirs."""
    source = pretrained()

    class Ones(Given):
        def moment(self, order: int) -> Lazy:
            return Given(torch.full_like(self.value, float(order)), "")

    weights: dict[str, Lazy] = {name: Ones(whole(lazy).to(dtype), name) for name, lazy in source.weights.items()}
    plan = plan_of(source=replace(source, weights=weights))
    down, before = whole(plan["layers.0.ffn.experts.down"]), whole(weights["layers.0.ffn.down.weight"])
    for order in (1, 2):
        found = whole(plan["layers.0.ffn.experts.down"].moment(order))
        assert torch.equal(found, (down == before).to(dtype) * order)
    noisy = plan_of(source=replace(source, weights=weights), drop_noise=0.1)
    assert (whole(noisy["layers.0.ffn.experts.down"].moment(1)) == 1).all()


@pytest.mark.parametrize(
    ("options", "target", "text"),
    [
        ({}, with_experts(4, 24, 3), "moe.expert_dim=24 must be 48"),
        ({}, with_experts(4, WIDTH, 3, num_shared_experts=1), "moe.num_shared_experts=1 must be 0"),
        ({"drop_fraction": 0.01}, with_experts(4, WIDTH, 3), "init.drop_fraction=0.01 of 48 neurons .* 0.02083"),
        ({"drop_fraction": 1.5}, None, "init.drop_fraction=1.5 must lie"),
        ({"drop_noise": 0}, None, "init.drop_noise=0.0 must be positive"),
    ],
)
def test_refused(options: dict[str, Any], target: Any, text: str) -> None:
    """Would catch: options that do nothing, and shapes that go into an assertion instead of a sentence."""
    with pytest.raises(ValueError, match=text):
        plan_of(target, **options)
    with pytest.raises(ValueError, match="has 2 models, but init=upcycle_drop starts from one"):
        make_plan(DropConfig(), [replace(pretrained(), path=Path("other"))] * 2, with_experts(4, WIDTH, 3), SEED)

"""The router's kernels in the interpreter, against the reference in plain torch.

Scores are compared to a few roundings. Experts are compared exactly, with the reference choosing from the kernel's own
scores: two exponentials that differ in the last bit may choose differently between near-equals, and both are right.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.counting_sort import sort_slots, tile_counts_reference
from moe_kernels.router_topk import Rule, router_topk, router_topk_reference, select_reference

# An exponential, a sum of at most 384 of them and a quotient in float32: some 1e-7 of the value each.
CLOSE = {"rtol": 4e-6, "atol": 1e-9}

RULES = {
    "softmax": (Rule(2), 7, False),
    "one expert": (Rule(1), 1, False),
    "sigmoid with bias": (Rule(3, sigmoid=True, normalize=True), 20, True),
    "deepseek v3": (Rule(8, sigmoid=True, normalize=True, num_groups=8, top_groups=4, group_best=2), 32, True),
    "groups by maximum": (Rule(6, num_groups=4, top_groups=3, group_best=1), 20, False),
    "groups of six": (Rule(4, sigmoid=True, num_groups=3, top_groups=2, group_best=2), 18, True),
    "many": (Rule(16, normalize=True), 384, False),
}


def logits(tokens: int, experts: int, seed: int, coarse: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    logit_TE = torch.randn(tokens, experts, generator=g) * 2
    return (logit_TE * 2).round() / 2 if coarse else logit_TE


def bias_of(experts: int, biased: bool) -> torch.Tensor | None:
    # So low that most ranks are negative: a group that is masked with zero would win.
    return torch.randn(experts, generator=torch.Generator().manual_seed(5)) - 2 if biased else None


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_choice_and_values(name, tokens):
    """Wrong experts, weights that hold the bias, a group that is not masked or masked with zero, rows that are left
    over in the last program, counts of a tile that miss or double a slot."""
    rule, experts, biased = RULES[name]
    logit_TE, bias_E = logits(tokens, experts, seed=tokens), bias_of(experts, biased)
    got = router_topk(logit_TE, rule, bias_E, fused=True)
    assert got.tile_count is not None, "the reference ran"
    wanted = router_topk_reference(logit_TE, rule, bias_E, got.expert_TK)
    torch.testing.assert_close(got.score_TE, wanted.score_TE, **CLOSE)
    torch.testing.assert_close(got.weight_TK, wanted.weight_TK, **CLOSE)
    rank_TE = got.score_TE if bias_E is None else got.score_TE + bias_E
    assert torch.equal(got.expert_TK, select_reference(rank_TE, rule))
    assert (got.unbiased_TK is None) == (bias_E is None)
    if got.unbiased_TK is not None:
        assert torch.equal(got.unbiased_TK, select_reference(got.score_TE, rule))
    assert torch.equal(got.tile_count, tile_counts_reference(got.expert_TK, experts))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(2, 9), st.integers(0, 99), st.booleans(), st.booleans())
def test_equal_scores_go_to_the_lowest_expert(tokens, experts, seed, sigmoid, groups):
    """Steps of a half make many equal logits. Another order among equals would be another model on another machine."""
    experts = experts * 3
    rule = Rule(4, sigmoid, num_groups=3, top_groups=2, group_best=2) if groups else Rule(4, sigmoid)
    got = router_topk(logits(tokens, experts, seed, coarse=True), rule, fused=True)
    assert torch.equal(got.expert_TK, select_reference(got.score_TE, rule))
    for row, score in zip(got.expert_TK.tolist(), got.score_TE.tolist()):
        keys = [(-score[e], e) for e in row]
        assert keys == sorted(keys)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wanted", ["score", "weight", "both"])
def test_gradient(name, wanted):
    """A term of the quotient's or the softmax's derivative left out, the gradient of an expert given to another, rows
    behind the last one. Given experts, as in a pass that is computed again, must give the same gradient.

    Against autograd in float64 from the same experts; sums of at most 384 float32 products."""
    rule, experts, biased = RULES[name]
    logit_TE, bias_E = logits(19, experts, seed=3), bias_of(experts, biased)
    g = torch.Generator().manual_seed(8)
    grad_TE = torch.randn(19, experts, generator=g)
    grad_TK = torch.randn(19, rule.top_k, generator=g)

    def gradient(chosen, leaf):
        outs = {"score": [chosen.score_TE], "weight": [chosen.weight_TK], "both": [chosen.score_TE, chosen.weight_TK]}
        ups = {"score": [grad_TE], "weight": [grad_TK], "both": [grad_TE, grad_TK]}
        ups = [u.to(leaf.dtype) for u in ups[wanted]]
        return torch.autograd.grad(outs[wanted], leaf, ups)[0]

    leaf, exact = logit_TE.clone().requires_grad_(), logit_TE.double().requires_grad_()
    first = router_topk(leaf, rule, bias_E, fused=True)
    again = router_topk(leaf, rule, expert_TK=first.expert_TK, fused=True)
    right = gradient(router_topk_reference(exact, rule, expert_TK=first.expert_TK), exact)
    assert torch.equal(again.weight_TK, first.weight_TK)
    for chosen in (first, again):
        torch.testing.assert_close(gradient(chosen, leaf).double(), right, rtol=2e-5, atol=2e-6)


def test_counts_feed_the_sort():
    """Tiles of the router that are not those of the sort: slots of a token would go to another expert's rows."""
    for top_k, experts, tokens in ((3, 9, 700), (16, 40, 70), (8, 30, 129)):
        got = router_topk(logits(tokens, experts, 1), Rule(top_k), fused=True)
        fast = sort_slots(got.expert_TK, experts, fused=True, tile_count=got.tile_count)
        assert all(torch.equal(a, b) for a, b in zip(fast, sort_slots(got.expert_TK, experts)))


def test_a_row_of_nan_stays_in_bounds():
    """A run that has diverged must end with a message, not with memory of others overwritten."""
    logit_TE = logits(5, 20, 0)
    logit_TE[2] = torch.nan
    got = router_topk(logit_TE, Rule(4, num_groups=4, top_groups=2, group_best=2), fused=True)
    assert got.expert_TK.min() >= 0
    assert got.expert_TK.max() < 20
    assert got.tile_count.sum() == 20


def test_what_fits_no_kernel_takes_the_reference():
    """float64, as in gradient checks, computed in float32."""
    assert router_topk(logits(3, 8, 0).double(), Rule(2), fused=True).score_TE.dtype is torch.float64

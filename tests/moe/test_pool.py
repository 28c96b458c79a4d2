"""The best of a pool: a sort over all its tokens is the oracle.

1. one rank   2. several ranks, simulated and as threads   3. ties   4. padding   5. with a limit on a token's experts
"""

import itertools
import math
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_parallel.collectives import gather_over, sum_over
from moe_parallel.moe import pool
from moe_parallel.moe.pool import best_at_most, best_in_pools, best_over_ranks, capped_plan
from moe_parallel.moe.routing import Ranks
from tests.ranks import run_threads


def make_scores(pools, tokens, experts, seed, dtype=torch.float64, ties=False):
    score = torch.rand(pools, tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (score * 4).round() / 4 if ties else score


def by_sort(score_PQE, valid_PQ, average):
    """Sort all valid tokens by (score, earlier first) and take the first floor(tokens * average / experts)."""
    chosen = torch.zeros_like(score_PQE, dtype=torch.bool)
    cutoff = torch.zeros_like(score_PQE[:, 0])
    for row, score_QE in enumerate(score_PQE):
        tokens = [t for t in range(score_QE.shape[0]) if valid_PQ is None or valid_PQ[row, t]]
        take = math.floor(len(tokens) * average / score_QE.shape[1])
        for expert in range(score_QE.shape[1]):
            best = sorted(tokens, key=lambda t: (-float(score_QE[t, expert]), t))[:take]
            chosen[row, best, expert] = True
            if best:
                cutoff[row, expert] = min(score_QE[t, expert] for t in best)
    return chosen, cutoff


SHAPES = st.tuples(st.integers(1, 3), st.integers(4, 12), st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 3)]))
"""Pools, tokens, (experts, experts of a token)."""


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_one_rank(shape, ties, padded, seed):
    """An expert that takes one token too many or too few, the wrong one of two equal ones, or padding. Booleans and
    scores are compared exactly: nothing is computed with them."""
    pools, tokens, (experts, average) = shape
    score = make_scores(pools, tokens, experts, seed, ties=ties)
    valid = torch.rand(pools, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4 if padded else None
    for got, wanted in zip(best_in_pools(score, valid, average), by_sort(score, valid, average)):
        assert torch.equal(got, wanted)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_the_search_by_digits_on_one_rank(shape, ties, padded, dtype, seed):
    """A digit of the score's bits that is skipped or taken twice, a sign or width that is wrong. Exact."""
    pools, tokens, (experts, average) = shape
    score = make_scores(pools, tokens, experts, seed, dtype, ties)
    valid = torch.rand(pools, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4 if padded else None
    got = best_over_ranks(score, valid, average, Ranks())
    for a, b in zip(got, by_sort(score, valid, average)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("digit_bits", [8, 4, 2, 1])
def test_digits_of_every_width(monkeypatch, digit_bits):
    """Long pools search in smaller digits to bound the histograms; no small test would reach them otherwise. The sums
    over ranks tell how wide a digit really was. Exact."""
    monkeypatch.setattr(pool, "_HISTOGRAM_CELLS", (2 * 4) << digit_bits)
    widths = []
    ranks = Ranks(sum=lambda value: widths.append(value.shape[-1]) or value)
    for dtype, ties in itertools.product((torch.float32, torch.float64), (True, False)):
        score = make_scores(2, 12, 4, 5, dtype, ties)
        for got, wanted in zip(best_over_ranks(score, None, 2, ranks), by_sort(score, None, 2)):
            assert torch.equal(got, wanted)
    assert max(widths) == 2**digit_bits


def test_a_pool_too_small_for_one_token_each():
    """Where the share of an expert is below one token nothing is taken, with padding or without; a cutoff of the best
    score would say that something was."""
    score = make_scores(2, 3, 8, 0)
    for valid in (None, torch.ones(2, 3, dtype=torch.bool)):
        for found in (best_in_pools(score, valid, 1), best_over_ranks(score, valid, 1, Ranks())):
            assert not found[0].any()
            assert (found[1] == 0).all()


def on_simulated_ranks(held, average, **how):
    """`best_over_ranks` on threads that meet at a barrier: like ranks, but cheap enough for many examples, and free to
    hold unequal parts."""
    barrier, box, found = threading.Barrier(len(held), timeout=20), [None] * len(held), [None] * len(held)

    def work(rank):
        def gather(value):
            box[rank] = value
            barrier.wait()
            everyone = torch.stack(box)
            barrier.wait()
            return everyone

        ranks = Ranks(lambda v: gather(v).sum(0), gather, rank, len(held))
        found[rank] = best_over_ranks(*held[rank], average, ranks, **how)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(held))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found, "a rank failed"
    return found


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.lists(st.integers(0, 12), max_size=3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_no_result_depends_on_how_a_pool_is_cut(shape, cuts, ties, padded, seed):
    """Any cut of the tokens into up to four ranks, also into parts of nothing, gives what one rank finds: cutoffs, and
    among equal scores the earlier token. Exact."""
    pools, tokens, (experts, average) = shape
    score = make_scores(pools, tokens, experts, seed, torch.float32 if seed % 2 else torch.float64, ties)
    valid = torch.rand(pools, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4 if padded else None
    places = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    cut = [slice(a, b) for a, b in itertools.pairwise(places)]
    found = on_simulated_ranks([(score[:, s], None if valid is None else valid[:, s]) for s in cut], average)
    chosen, cutoff = best_in_pools(score, valid, average)
    assert torch.equal(torch.cat([mask for mask, _ in found], 1), chosen)
    assert all(torch.equal(part, cutoff) for _, part in found)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 2), (2, 2), (2, 3), (1, 4)]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_equal_scores_in_sequences_that_are_cut(ranks, rows, length, seed):
    """Ranks that hold parts of sequences have their tokens in another order than one rank; among equal scores the
    earlier token must win all the same. Exact; scores of five values, so that nearly all cutoffs are ties."""
    groups, parts = ranks
    score = make_scores(1, groups * rows * parts * length, 3, seed, ties=True)
    cut = score.view(groups, rows, parts, length, 3).transpose(1, 2).reshape(groups * parts, 1, rows * length, 3)
    found = on_simulated_ranks([(part, None) for part in cut], 1, rows=rows, parts=parts)
    chosen = torch.stack([mask for mask, _ in found]).view(groups, parts, rows, length, 3).transpose(1, 2)
    assert torch.equal(chosen.reshape(1, -1, 3), best_in_pools(score, None, 1)[0])


def search_here(cases):
    """On each rank: its part of every case."""
    group = dist.group.WORLD
    ranks = Ranks(sum_over(group), gather_over(group), dist.get_rank(), dist.get_world_size())
    return [
        best_over_ranks(
            score.chunk(dist.get_world_size(), 1)[dist.get_rank()],
            None if valid is None else valid.chunk(dist.get_world_size(), 1)[dist.get_rank()],
            average,
            ranks,
        )
        for score, valid, average in cases
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_pools_over_ranks(world):
    """A pool cut into ranks must give what one rank finds: cutoffs, and among equal scores the earlier token, who may
    lie on another rank. Scores of five values, so that most cutoffs are ties; one rank is all padding. Exact."""
    cases = []
    for seed in range(6):
        score = make_scores(2, 8, 4, seed, torch.float32 if seed % 2 else torch.float64, ties=seed < 4)
        valid = torch.ones(2, 8, dtype=torch.bool)
        if seed % 3 == 2:
            valid[:, 8 - 8 // world :] = False
            valid[0, 1] = False
        cases.append((score, valid if seed % 3 else None, 2))
    found = run_threads(search_here, world, cases)
    for index, (score, valid, average) in enumerate(cases):
        chosen, cutoff = by_sort(score, valid, average)
        assert torch.equal(torch.cat([rank[index][0] for rank in found], 1), chosen)
        assert all(torch.equal(rank[index][1], cutoff) for rank in found)


def test_the_plan_solves_the_limited_assignment():
    """The soft plan at small entropy must reach the best whole assignment, found by trying all of them: three experts
    that each take two of six tokens, none of which may have two. The entropy term moves the value by less than
    sharpness * log(cells of the plan) for each of the six places: 0.001 * 6 * 3 = 0.018."""
    score = torch.softmax(3 * make_scores(1, 6, 3, 7)[0], -1)
    plan = capped_plan(score, 1.0, 1, sharpness=1e-3, iterations=5000)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-3, atol=0)
    assert float(plan.sum(1).max()) < 1.001
    experts = set(itertools.permutations((0, 0, 1, 1, 2, 2)))
    best = max(sum(float(score[token, expert]) for token, expert in enumerate(choice)) for choice in experts)
    assert float((plan * score).sum()) == pytest.approx(best, abs=0.018)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_plan_meets_the_conditions_of_an_optimum(seed):
    """The problem is convex, so a plan is the best one exactly when it keeps the sums and these conditions: the price
    of a cell, score - sharpness * log(plan), is that of its expert, plus what a token at its limit pays, the same for
    all of its experts, plus what a full cell pays; nobody else pays. A projection that forgets to undo its last step
    makes tokens pay that have room. 1e-9: 1,000 steps have converged to rounding, on prices of size 1."""
    score = make_scores(1, 12, 4, seed)[0] * 0.6
    score[:3] += 0.4  # what all experts want: the limit binds
    sharpness, most = 0.05, 3
    plan = capped_plan(score, 1.5, most, sharpness, iterations=1000)
    assert plan.sum(0).tolist() == pytest.approx([4.0] * 4, abs=1e-9)  # floor(12 * 1.5 / 4)
    assert float(plan.sum(1).max()) < most + 1e-9
    assert float(plan.max()) < 1 + 1e-9
    price_QE, open_QE = score - sharpness * plan.log(), plan < 1 - 1e-6
    roomy_Q = plan.sum(1) < most - 1e-6
    assert not open_QE.all()
    assert not roomy_Q.all()
    price_E = torch.where(roomy_Q.unsqueeze(1) & open_QE, price_QE, float("-inf")).amax(0)
    paid_QE = price_QE - price_E
    assert float(paid_QE.min()) > -1e-9
    for token in range(12):
        paid = paid_QE[token, open_QE[token]]
        assert paid.tolist() == pytest.approx([0.0 if roomy_Q[token] else float(paid.mean())] * len(paid), abs=1e-9)


def test_the_limit_is_held():
    """Tokens that all experts want: without a limit they get all of them, with it at most two; what is dropped are the
    lowest scores, and no expert takes more than its share. Exact counts."""
    score = make_scores(2, 12, 4, 1) * 0.2
    score[:, :3] += 0.7
    free, _ = best_in_pools(score, None, 2)
    assert int(free.sum(-1).max()) == 4
    held, cutoff = best_at_most(score, None, 2, most=2)
    assert int(held.sum(-1).max()) <= 2
    assert (held.sum(1) <= 6).all()
    assert int(held.sum()) >= 0.9 * int(free.sum())
    lowest = score.masked_fill(~held, float("inf")).amin(1)
    assert torch.equal(cutoff, lowest)

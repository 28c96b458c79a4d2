"""Token rounding against sorting: counts, which choices go, which tokens come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_kernels.token_rounding import Rounding, round_tokens, rounded_counts, take_highest

ROUNDINGS = [Rounding.nearest, Rounding.up, Rounding.down]


def by_sorting(
    score_TE: Tensor, expert_TK: Tensor, tile: int, how: Rounding, valid_T: Tensor | None
) -> set[tuple[int, int]]:
    """(expert, token): token by token in the order in which an expert takes them."""
    taken = set()
    num_tokens, num_experts = score_TE.shape
    valid = [t for t in range(num_tokens) if valid_T is None or valid_T[t]]
    for e in range(num_experts):
        chose = [t for t in valid if e in expert_TK[t].tolist()]
        lower = len(chose) // tile * tile
        upper = -(-len(chose) // tile) * tile
        nearest = lower if len(chose) - lower < upper - len(chose) else upper
        wanted = {Rounding.down: lower, Rounding.up: upper, Rounding.nearest: nearest}[how]
        wanted = min(wanted, len(valid) // tile * tile)
        queue = sorted(valid, key=lambda t: (t not in chose, -score_TE[t, e].item(), t))
        taken |= {(e, t) for t in queue[:wanted]}
    return taken


@pytest.mark.parametrize("how", ROUNDINGS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 6),
    st.integers(1, 2),
    st.integers(2, 9),
    st.sampled_from(["fine", "coarse", "saturated"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_sorting(how, tokens, experts, top_k, tile, kind, padded, seed):
    """An added token before a chosen one, the wrong end of the scores dropped, equal scores taken twice or not at all,
    more tokens wanted than there are, padding taken. Sets of integers: equal or wrong."""
    g = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(tokens, experts, generator=g)
    if kind == "coarse":  # many equal scores, zeros among them
        score_TE = (score_TE * 4).floor() / 4
    elif kind == "saturated":  # a sigmoid that is rounded to 1 or to 0
        score_TE = (score_TE > 0.5).float()
    expert_TK = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    valid_T = torch.rand(tokens, generator=g) > 0.3 if padded else None
    if valid_T is not None:
        expert_TK = expert_TK.masked_fill(~valid_T[:, None], experts)
    expert_N, token_N, dropped = round_tokens(score_TE, expert_TK, tile, how, valid_T)
    pairs = list(zip(expert_N.tolist(), token_N.tolist()))
    wanted = by_sorting(score_TE, expert_TK, tile, how, valid_T)
    assert pairs == sorted(wanted)
    chosen = {(e, t) for t, row in enumerate(expert_TK.tolist()) for e in row if e < experts}
    assert dropped == len(chosen - wanted)
    counts = torch.bincount(expert_N, minlength=experts)
    assert (counts % tile == 0).all()


def test_nearest_takes_the_nearer_multiple():
    """64 of a tile of 128 is half-way, and goes up; an odd tile has no half-way."""
    counts = torch.tensor([0, 63, 64, 128, 191, 192])
    assert rounded_counts(counts, 10_000, 128, Rounding.nearest).tolist() == [0, 0, 128, 128, 128, 256]
    assert rounded_counts(torch.tensor([2, 3, 7, 8]), 100, 5, Rounding.nearest).tolist() == [0, 5, 5, 10]
    assert rounded_counts(counts, 10_000, 128, Rounding.up).tolist() == [0, 128, 128, 128, 256, 256]
    assert rounded_counts(counts, 10_000, 128, Rounding.down).tolist() == [0, 0, 0, 128, 128, 128]


def test_no_more_than_there_are():
    """192 of 200 tokens cannot become 256."""
    assert rounded_counts(torch.tensor([192, 200]), 200, 128, Rounding.up).tolist() == [128, 128]


def test_scores_that_differ_in_the_last_bit():
    """A search that stops before the last bit of the scores takes the wrong one of two neighbors."""
    low = torch.tensor(0.3)
    high = torch.nextafter(low, torch.tensor(1.0))
    key = torch.stack([low, high, low, high]).view(torch.int32)[None]
    assert take_highest(key, torch.tensor([2])).tolist() == [[False, True, False, True]]

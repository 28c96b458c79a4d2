"""The counting sort in the interpreter, against the argsort. Integers: equal or wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_kernels.counting_sort import sort_slots, sort_slots_reference, tile_counts_reference, tile_tokens


def table(tokens: int, top_k: int, experts: int, used: str, seed: int) -> torch.Tensor:
    """(T, K); `experts` marks slots that are not used."""
    g = torch.Generator().manual_seed(seed)
    if used == "one":
        return torch.full((tokens, top_k), seed % experts)
    low, high = {"all": (0, experts), "some": (0, experts + 1), "few": (experts // 2, experts // 2 + 1)}[used]
    return torch.randint(low, high, (tokens, top_k), generator=g)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 700),
    st.integers(1, 3),
    st.integers(1, 300),
    st.sampled_from(["all", "some", "few", "one"]),
    st.integers(0, 99),
)
@example(512, 1, 4, "all", 0)  # a tile that is exactly full
@example(513, 1, 4, "all", 0)  # one slot in the last tile
@example(900, 3, 254, "some", 0)  # the bin of lanes without a slot is the last one
@example(0, 2, 3, "all", 0)
def test_equals_the_argsort(tokens, top_k, experts, used, seed):
    """A tile that is shifted by the wrong sum, empty experts, lanes behind the last slot that are counted or stored,
    an order within an expert that is not the order of slots, unused slots in the counts."""
    expert_TK = table(tokens, top_k, experts, used, seed)
    for given_count in (None, tile_counts_reference(expert_TK, experts)):
        got = sort_slots(expert_TK, experts, fused=True, tile_count=given_count)
        for name, a, b in zip(("order", "count", "inverse"), got, sort_slots_reference(expert_TK, experts)):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("experts", [1, 384])
def test_more_tiles_than_one_program_adds_at_once(experts):
    """The running sum over tiles that is not carried on, or the last tiles left out: 140 tiles, 128 at a time."""
    expert_TK = table(140 * tile_tokens(16) - 5, 16, experts, "some", 7)
    got = sort_slots(expert_TK, experts, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(got, sort_slots_reference(expert_TK, experts)))


def test_a_list_of_pairs():
    """Slots that are a list, as expert choice and token rounding return them, and not contiguous."""
    expert_N = table(1100, 2, 9, "some", 3)[:, 1]
    got = sort_slots(expert_N, 9, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(got, sort_slots_reference(expert_N, 9)))

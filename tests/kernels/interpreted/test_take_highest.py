"""The threshold search of token rounding in the interpreter, against the search in plain torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.token_rounding import take_highest, take_highest_reference


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 4), st.sampled_from([1, 256, 1 << 24, 2**31 - 1]), st.integers(0, 99))
def test_equals_the_reference(tokens, experts, step, seed):
    """A digit that is searched among keys of another prefix, keys behind the last token or negative ones counted, the
    count of equal keys not carried from block to block (of 2048). Booleans: equal or wrong.

    Steps put the differences of keys in the lowest digit, in the highest, or make most keys equal."""
    g = torch.Generator().manual_seed(seed)
    high = max((2**31 - 1) // step, 1)
    key_ET = torch.randint(0, min(high, 1 << 20) + 1, (experts, tokens), generator=g) * step
    key_ET = key_ET.clamp(max=2**31 - 1)
    if seed % 2:
        key_ET[torch.rand(experts, tokens, generator=g) < 0.3] = -1
    wanted_E = (torch.rand(experts, generator=g) * ((key_ET >= 0).sum(1) + 1)).long()
    key_ET = key_ET.to(torch.int32)
    take_ET = take_highest(key_ET, wanted_E, fused=True)
    assert torch.equal(take_ET, take_highest_reference(key_ET, wanted_E))
    assert torch.equal(take_ET.sum(1), wanted_E)

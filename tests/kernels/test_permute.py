"""Gather, combine and the orders they use, against loops written here."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.counting_sort import sort_slots
from moe_kernels.permute import chunk_order, combine_rows, gather_rows


def _choice(num_tokens, top_k, num_experts, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_experts, generator=g)[:top_k] for _ in range(num_tokens)])


sizes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(3, 6), st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_sort_is_stable_and_counts(size):
    """An unstable sort changes the order of a sum from run to run; a wrong count sends rows to the wrong expert."""
    num_tokens, top_k, num_experts, seed = size
    expert_TK = _choice(num_tokens, top_k, num_experts, seed)
    order_N, count_E, place_N = sort_slots(expert_TK, num_experts)
    flat = expert_TK.flatten().tolist()
    wanted = [slot for e in range(num_experts) for slot in range(len(flat)) if flat[slot] == e]
    assert order_N.tolist() == wanted
    assert count_E.tolist() == [flat.count(e) for e in range(num_experts)]
    assert [wanted[place] for place in place_N.tolist()] == list(range(len(flat)))


def test_unused_slots_come_last_and_are_not_counted():
    """A dropped slot that is counted would shift every later expert's rows by one."""
    order_N, count_E, _ = sort_slots(torch.tensor([[0, 2], [2, 1]]), 2)
    assert count_E.tolist() == [1, 1]
    assert order_N[:2].tolist() == [0, 3]


@settings(max_examples=40, deadline=None)
@given(sizes, st.booleans())
def test_gather_and_combine_equal_loops(size, static):
    """Both the gather path (K slots a token) and the general path must give the weighted sum and its gradients.

    float64; 1e-12 is rounding of sums of at most 3 terms with room to spare."""
    num_tokens, top_k, num_experts, seed = size
    g = torch.Generator().manual_seed(seed)
    expert_TK = _choice(num_tokens, top_k, num_experts, seed)
    order_N, _, place_N = sort_slots(expert_TK, num_experts)
    token_N = order_N // top_k
    slot_TK = place_N.view(num_tokens, top_k) if static else None
    x_TD = torch.randn(num_tokens, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight_N = torch.rand(token_N.numel(), generator=g, dtype=torch.float64, requires_grad=True)
    grad_TD = torch.randn(num_tokens, 5, generator=g, dtype=torch.float64)

    out_TD = combine_rows(gather_rows(x_TD, token_N, slot_TK).square(), weight_N, token_N, slot_TK, num_tokens)
    mine = [out_TD, *torch.autograd.grad(out_TD, (x_TD, weight_N), grad_TD)]
    wanted_TD = torch.stack(
        [sum(weight_N[n] * x_TD[t] ** 2 for n in range(len(token_N)) if token_N[n] == t) for t in range(num_tokens)]
    )
    wanted = [wanted_TD, *torch.autograd.grad(wanted_TD, (x_TD, weight_N), grad_TD)]
    for a, b in zip(mine, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_token_without_slots_gets_zeros():
    """A token whose slots were all dropped must get exactly zero, not memory."""
    out = combine_rows(torch.ones(1, 3), torch.ones(1), torch.tensor([1]), None, 3)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_combine_accumulates_bf16_rows_in_float32():
    """256 + 1 + 1 is 258 in float32 but 256 in bf16, where each one is lost; the sum must not round between."""
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    slot_TK = torch.tensor([[0, 1, 2]])
    for slots in (slot_TK, None):
        out = combine_rows(rows, torch.ones(3), torch.tensor([0, 0, 0]), slots, 1)
        assert out.item() == 258.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_chunk_order_groups_by_expert_then_source(counts):
    """Rows of one expert in another order than source rank would change the sums of its weight gradient."""
    count_PL = torch.tensor(counts)
    labels = [(e, p, i) for p, row in enumerate(counts) for e, n in enumerate(row) for i in range(n)]
    order_R = chunk_order(count_PL, len(labels))
    assert [labels[i] for i in order_R.tolist()] == sorted(labels)

"""The grouped expert MLP against a loop in plain torch.

1. every implementation and dtype, values and gradients   2. properties over ragged counts   3. traps of grouped_mm
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.expert_mlp import GroupedMatmul, choose_grouped_matmul, expert_mlp, expert_mlp_reference


def _operands(counts, dim=16, hidden=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(sum(counts), dim), draw(len(counts), 2 * hidden, dim), draw(len(counts), dim, hidden)


def _with_gradients(fn, operands, *args, **kwargs):
    out = fn(*operands, *args, **kwargs)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, operands, grad)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [
        # float64: only the order of sums differs. float32: sums of 16 products, eps 1.2e-7 each.
        (GroupedMatmul.loop, torch.float64, 1e-14),
        (GroupedMatmul.loop, torch.float32, 2e-6),
        (GroupedMatmul.grouped_mm, torch.float32, 2e-6),
        # bf16 rounds every intermediate (unit roundoff 2^-9); four roundings in a row, and some cancellation.
        (GroupedMatmul.loop, torch.bfloat16, 8 * 2**-8),
        (GroupedMatmul.grouped_mm, torch.bfloat16, 8 * 2**-8),
    ],
)
def test_values_and_gradients_equal_the_loop(how, dtype, tolerance, recompute):
    """Catches a wrong formula in the handwritten backward, a gate and up swapped, an empty expert left unwritten."""
    counts = [3, 0, 5, 4]
    operands = _operands(counts, dtype=dtype)
    mine = _with_gradients(expert_mlp, operands, torch.tensor(counts), how=how, recompute=recompute)
    exact = [o.detach().double().requires_grad_() for o in operands]
    wanted = _with_gradients(expert_mlp_reference, exact, torch.tensor(counts))
    for a, b in zip(mine, wanted):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.booleans())
def test_any_ragged_counts(counts, host_known):
    """Catches slices that are off by one, all-empty banks, and host counts that disagree with the device's."""
    operands = _operands(counts)
    mine = _with_gradients(expert_mlp, operands, torch.tensor(counts), counts if host_known else None)
    wanted = _with_gradients(expert_mlp_reference, operands, torch.tensor(counts))
    for a, b in zip(mine, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    """An independent check of the backward formula by finite differences, in float64 (its defaults)."""
    counts = [2, 0, 3]
    operands = _operands(counts, dim=4, hidden=3)
    assert torch.autograd.gradcheck(lambda *o: expert_mlp(*o, torch.tensor(counts)), operands)


def test_expanded_gradient():
    """`y.sum().backward()` hands over a gradient of stride 0, which grouped_mm refuses unless it is copied."""
    operands = _operands([3, 5], dtype=torch.float32)
    expert_mlp(*operands, torch.tensor([3, 5]), how=GroupedMatmul.grouped_mm).sum().backward()
    assert all(torch.isfinite(o.grad).all() for o in operands)


def test_empty_expert_gets_zero_gradient_not_garbage():
    """An expert without rows must have a gradient of zeros: uninitialized memory there would poison the optimizer."""
    operands = _operands([4, 0])
    expert_mlp(*operands, torch.tensor([4, 0])).square().sum().backward()
    assert operands[1].grad[1].abs().max() == 0
    assert operands[2].grad[1].abs().max() == 0


def test_choice_on_a_cpu_is_the_loop():
    """On a CPU grouped_mm is slower and knows no float64; the choice must not depend on the dtype there."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_grouped_matmul(*_operands([1], dtype=dtype)) is GroupedMatmul.loop

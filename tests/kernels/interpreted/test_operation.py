"""The experts as one operation on Triton kernels, in the interpreter: every kind of routing, values and gradients."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.choice import ExpertKernel
from moe_kernels.moe_mlp import moe_mlp
from tests.kernels.examples import KINDS, operands, relative_error
from tests.kernels.test_moe_mlp import NAMES, ours, reference, upstream


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-6),  # sums of some dozen products, eps 1.2e-7 each
        (torch.float16, 8 * 2**-11),  # four roundings in a row, and some cancellation
    ],
)
def test_values_and_gradients(kind, dtype, tolerance):
    """The kernels together: indices, weights and counts that reach the wrong kernel, a buffer freed too early."""
    case, recompute = operands(kind, tokens=21, dim=32, hidden=48), kind == "an empty expert"
    for name, a, b in zip(
        NAMES, ours(case, dtype, how=ExpertKernel.triton, recompute=recompute), reference(case), strict=True
    ):
        assert relative_error(a, b) <= tolerance, name


def test_two_runs_agree_to_the_last_bit():
    """Atomics would add in the order of arrival."""
    case = operands("expert choice", tokens=21, dim=32, hidden=48)
    first, second = (ours(case, torch.float32, how=ExpertKernel.triton) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rows_that_only_move():
    """Results are stored straight into the order of the input."""
    case = operands("rows in order", tokens=21, dim=32, hidden=48)
    x, gate_up, down, *_ = leaves = case.cast(torch.float32)
    outs = []
    for how in (ExpertKernel.triton, ExpertKernel.loop):
        out = moe_mlp(x, gate_up, down, case.token_N, case.count_E, None, case.slot_TK, how=how)
        outs.append([out.detach(), *torch.autograd.grad(out, leaves[:3], upstream(out))])
    for a, b in zip(*outs):
        assert relative_error(a, b.double()) < 2e-6


def test_what_is_kept_is_the_lean_formula():
    """As the test of the same name outside: gathered rows or the activation kept would show. Exact, in float16."""
    case = operands("top-k", tokens=32, dim=32, hidden=48)
    x, gate_up, down, weight, _ = case.cast(torch.float16)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in (gate_up.data_ptr(), down.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_mlp(x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.triton)
    assert sum(kept.values()) == 2 * 32 * 32 + 4 * 64 * 48 + 12 * 64 + 4 * 5


def test_weight_gradients_are_added_to_buffers():
    """Two micro-batches in float32 buffers are the sum of both gradients; an expert without rows keeps its buffer."""
    case = operands("an empty expert", tokens=21, dim=32, hidden=48)
    x, gate_up, down, weight, _ = case.cast(torch.float16)
    main = (torch.full(gate_up.shape, 3.0), torch.full(down.shape, 3.0))
    for _ in range(2):
        out = moe_mlp(
            x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.triton, main_grad=main
        )
        out.backward(upstream(out))
    assert gate_up.grad is None
    for buffer, wanted in zip(main, reference(case)[2:4]):
        assert relative_error(buffer - 3.0, 2 * wanted) < 8 * 2**-11
        assert torch.equal(buffer[1], torch.full_like(buffer[1], 3.0))


def test_operators_are_described_for_tracing():
    """`torch.library.opcheck`: the fake implementations give the shapes, types and strides of the real ones, and what
    an operator writes is declared; otherwise compiled graphs would compute something else."""
    from moe_kernels.choice import INTERPRETER
    from moe_kernels.combine import _combine, _grad_combine
    from moe_kernels.expert_rows import _expert_rows
    from moe_kernels.grad_hidden import _grad_hidden
    from moe_kernels.grad_weight import _grad_weight
    from moe_kernels.up_projection import _up_projection

    case = operands("top-k", tokens=21, dim=32, hidden=48)
    x, gate_up, down, weight, _ = (t.detach() for t in case.cast(torch.float32))
    end_E, token_N = case.count_E.cumsum(0, dtype=torch.int32), case.token_N.int()
    assert case.slot_TK is not None
    hidden, activation = torch.randn(len(token_N), 96), torch.randn(len(token_N), 48)
    numbers = INTERPRETER.grad_hidden.numbers()  # type: ignore[union-attr]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_up_projection, (x, token_N, gate_up, end_E, numbers), test_utils=tests)
    torch.library.opcheck(_expert_rows, (activation, down.mT, end_E, None, numbers), test_utils=tests)
    torch.library.opcheck(_grad_hidden, (x, token_N, weight, down, hidden, end_E, numbers), test_utils=tests)
    out = torch.zeros(5, 32, 48)
    torch.library.opcheck(_grad_weight, (x, token_N, activation, None, end_E, out, True, numbers), test_utils=tests)
    torch.library.opcheck(_grad_combine, (x, x[token_N.long()], weight, token_N), test_utils=tests)
    torch.library.opcheck(_combine, (hidden, weight, case.slot_TK.int(), None, len(x), []), test_utils=tests)


def test_traced_as_one_graph():
    """`torch.compile(fullgraph=True)` raises on anything that it cannot trace or that waits for the device; an operator
    whose fake implementation lies about a shape breaks the graph's backward pass. Equal to the last bit: the operators
    run as they are."""
    case = operands("top-k", tokens=21, dim=32, hidden=48)

    def run(x, gate_up, down, weight, added):
        return moe_mlp(
            x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.triton, added=[added]
        )

    results = []
    for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = case.cast(torch.float32)
        out = fn(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_products_are_counted():
    """Would catch: experts that cost nothing where kernels compute them; arms are compared at equal FLOPs. Exact."""
    from torch.utils.flop_counter import FlopCounterMode

    from moe_parallel.measured import FORMULAS

    case = operands("top-k", tokens=21, dim=32, hidden=48)
    totals = []
    for how in (ExpertKernel.triton, ExpertKernel.loop):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            ours(case, torch.float32, how=how)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 42 * 3 * 48 * 32

"""The experts as one operation, against a loop in plain differentiable torch.

1. every implementation, type and kind of routing, values and gradients   2. properties over ragged counts
3. what is kept for the backward pass   4. weight gradients that are added to buffers   5. choice, compile, traps
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels.choice import (
    SPECIALIZED,
    Entry,
    ExpertKernel,
    Problem,
    choose,
    entry_values,
    read_table,
    write_table,
)
from moe_kernels.moe_mlp import moe_mlp, moe_mlp_reference
from tests.kernels.examples import KINDS, Operands, operands, relative_error

NAMES = ("output", "x", "gate_up", "down", "weights", "added")


def ours(case: Operands, dtype: torch.dtype = torch.float64, **options) -> list[torch.Tensor]:
    """Output and gradients of the operation."""
    x, gate_up, down, weight, added = leaves = case.cast(dtype)
    out = moe_mlp(x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, added=[added], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def reference(case: Operands) -> list[torch.Tensor]:
    x, gate_up, down, weight, added = leaves = case.cast(torch.float64)
    out = moe_mlp_reference(x, gate_up, down, case.token_N, case.count_E, weight, [added])
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def upstream(out: torch.Tensor) -> torch.Tensor:
    """Numbers like 1, 0.5, ... that every type holds exactly."""
    return ((torch.arange(out.numel()) * 7 % 9 - 4) / 2).view_as(out).to(out.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [
        # float64: only the order of sums differs. float32: sums of some dozen products, eps 1.2e-7 each.
        (ExpertKernel.loop, torch.float64, 1e-14),
        (ExpertKernel.loop, torch.float32, 2e-6),
        (ExpertKernel.grouped_mm, torch.float32, 2e-6),
        # bf16 rounds every intermediate (unit roundoff 2^-9); four roundings in a row, and some cancellation.
        (ExpertKernel.loop, torch.bfloat16, 8 * 2**-8),
        (ExpertKernel.grouped_mm, torch.bfloat16, 8 * 2**-8),
        (ExpertKernel.grouped_mm, torch.float16, 8 * 2**-11),
    ],
)
def test_values_and_gradients_equal_the_loop(how, dtype, tolerance, recompute, kind):
    """A wrong formula in the handwritten backward, gate and up swapped, an empty expert left unwritten, a token whose
    slots are dropped, slots summed for the wrong token."""
    case = operands(kind)
    for name, a, b in zip(NAMES, ours(case, dtype, how=how, recompute=recompute), reference(case)):
        assert relative_error(a, b) <= tolerance, name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_any_ragged_counts(counts, tokens, host_known):
    """Slices that are off by one, banks without any row, host counts that disagree with the device's, tokens with many
    slots and with none. 1e-12: float64."""
    total = sum(counts)
    g = torch.Generator().manual_seed(total)
    case = operands("expert choice", tokens=8, experts=len(counts), top_k=1)
    case = Operands(
        case.x_TD[:tokens],
        case.gate_up,
        case.down,
        torch.rand(total, generator=g, dtype=torch.float64),
        torch.randint(tokens, (total,), generator=g),
        torch.tensor(counts),
        None,
        case.added_TD[:tokens],
    )
    for a, b in zip(ours(case, host_counts=counts if host_known else None), reference(case)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    """An independent check of the backward formula by finite differences, in float64 (its defaults)."""
    case = operands("top-k", tokens=4, dim=4, hidden=3, experts=3)

    def run(x, gate_up, down, weight, added):
        return moe_mlp(x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, added=[added])

    assert torch.autograd.gradcheck(run, case.cast(torch.float64))


@pytest.mark.parametrize("sorted_rows", [False, True])
def test_rows_that_only_move_need_no_weights(sorted_rows):
    """After an exchange every row has one expert and its weight is elsewhere: the result must lie in the order of the
    input, not of the experts. float64: to rounding."""
    case = operands("rows in order")
    token_N, slot_TK = (None, None) if sorted_rows else (case.token_N, case.slot_TK)
    x, gate_up, down, *_ = case.cast(torch.float64)
    out = moe_mlp(x, gate_up, down, token_N, case.count_E, None, slot_TK)
    index_N = torch.arange(len(x)) if sorted_rows else case.token_N
    wanted = moe_mlp_reference(x, gate_up, down, index_N, case.count_E)
    grads = [torch.autograd.grad(o, (x, gate_up, down), upstream(o)) for o in (out, wanted)]
    for a, b in zip([out, *grads[0]], [wanted, *grads[1]]):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("how", [ExpertKernel.loop, ExpertKernel.grouped_mm])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_is_the_lean_formula(how, recompute):
    """2 T D + 4 N F + 12 N bytes in bf16, and 4 bytes an expert: gathered rows, the activation or the experts' outputs
    kept for the backward pass would show at once. Exact."""
    case = operands("top-k", tokens=64, dim=32, hidden=24)
    x, gate_up, down, weight, added = case.cast(torch.bfloat16)
    kept: dict[int, int] = {}
    weights = {gate_up.data_ptr(), down.data_ptr()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in weights:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_mlp(
            x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=how, recompute=recompute,
            added=[added],
        )  # fmt: skip
    tokens, dim, slots, hidden, experts = 64, 32, 128, 24, 5
    pre_activation = 0 if recompute else 4 * slots * hidden
    assert sum(kept.values()) == 2 * tokens * dim + pre_activation + 12 * slots + 4 * experts


@pytest.mark.parametrize("how", [ExpertKernel.loop, ExpertKernel.grouped_mm])
def test_weight_gradients_are_added_to_buffers(how):
    """Two micro-batches into float32 buffers equal the sum of their gradients; nothing is returned for the weights, and
    an expert without rows leaves its buffer alone. Catches an overwritten buffer, and a sum in bf16: 1 + 2^-10 is 1
    there. bf16 operands; the buffers hold float32 sums of products that were rounded once (2^-8)."""
    case = operands("an empty expert")
    x, gate_up, down, weight, _ = case.cast(torch.bfloat16)
    start = 2.0**12  # spacing of bf16 there: 32
    main = (torch.full(gate_up.shape, start), torch.full(down.shape, start))
    for _ in range(2):
        out = moe_mlp(x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=how, main_grad=main)
        out.backward(upstream(out))
    assert gate_up.grad is None
    assert down.grad is None
    assert x.grad is not None
    exact = case.cast(torch.float64)
    out = moe_mlp_reference(*exact[:3], case.token_N, case.count_E, exact[3])
    wanted = torch.autograd.grad(out, exact[1:3], upstream(out))
    for buffer, gradient in zip(main, wanted):
        assert relative_error(buffer.double() - start, 2 * gradient) < 2**-5
        assert torch.equal(buffer[1], torch.full_like(buffer[1], start))


def test_expanded_gradient():
    """`y.sum().backward()` hands over a gradient of stride 0, which grouped_mm refuses unless it is copied."""
    case = operands("top-k")
    x, gate_up, down, weight, _ = leaves = case.cast(torch.float32)
    moe_mlp(
        x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.grouped_mm
    ).sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves[:4])


def test_empty_expert_gets_zero_gradient_not_garbage():
    """An expert without rows must have a gradient of zeros: uninitialized memory there would poison the optimizer."""
    for how in (ExpertKernel.loop, ExpertKernel.grouped_mm):
        _, _, grad_gate_up, grad_down, *_ = ours(operands("an empty expert"), torch.float32, how=how)
        assert grad_gate_up[1].abs().max() == 0
        assert grad_down[1].abs().max() == 0


def test_only_the_wanted_gradients_are_computed():
    """Frozen experts or a frozen input have none: autograd would refuse a gradient that was not asked for."""
    case = operands("top-k")
    for wanted in range(5):
        leaves = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(case.cast(torch.float64))]
        x, gate_up, down, weight, added = leaves
        out = moe_mlp(x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, added=[added])
        out.backward(upstream(out))
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(5)]
        torch.testing.assert_close(leaves[wanted].grad, reference(case)[1 + wanted], rtol=1e-12, atol=1e-12)


def test_choice_on_a_cpu_is_the_loop():
    """On a CPU grouped_mm is no faster and knows no float64; the choice must not depend on the type there."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, gate_up, *_ = operands("top-k").cast(dtype)
        choice = choose(ExpertKernel.auto, Problem.of(x, gate_up, 74), table=())
        assert choice.how is ExpertKernel.loop
        assert "no measurement" in choice.why


def entry(rows: int, how: ExpertKernel, **other) -> Entry:
    return Entry(**{"device": "cpu", "dtype": "bfloat16", "dim": 64, "expert_dim": 32, "num_experts": 4, **other},
                 rows_per_expert=rows, how=how)  # fmt: skip


def test_a_table_decides_for_its_shape_and_the_nearest_number_of_rows():
    """Another device's, type's or width's entry, or that of very different numbers of experts or rows, must not
    decide. The distance is a ratio: 300 rows are nearer to 1000 than to 64. Half of the experts, as in a chunk of an
    exchange, take what was measured for all."""
    table = (
        entry(64, ExpertKernel.loop),
        entry(1000, ExpertKernel.grouped_mm),
        entry(300, ExpertKernel.loop, dtype="float32"),
        entry(300, ExpertKernel.loop, device="NVIDIA H200"),
        entry(300, ExpertKernel.loop, num_experts=64),
    )
    for rows, wanted in ((64, "loop"), (300, "grouped_mm"), (200, "loop"), (5000, "grouped_mm")):
        problem = Problem(torch.device("cpu"), torch.bfloat16, 64, 32, 4, 4 * rows)
        assert choose(ExpertKernel.auto, problem, table).how.value == wanted
    chunk = Problem(torch.device("cpu"), torch.bfloat16, 64, 32, 2, 2 * 64)
    assert choose(ExpertKernel.auto, chunk, table).why == "measured with 64 rows an expert"
    other = Problem(torch.device("cpu"), torch.bfloat16, 64, 48, 4, 256)
    assert "no measurement" in choose(ExpertKernel.auto, other, table).why


def test_a_table_of_another_triton_is_not_followed(monkeypatch):
    """Tiles with roles for warps were measured with a Triton that compiles them; another one would end the run."""
    from moe_kernels import choice

    roles = replace(entry(64, ExpertKernel.loop), config=SPECIALIZED)
    problem = Problem(torch.device("cpu"), torch.bfloat16, 64, 32, 4, 256)
    for able, wanted in ((True, "measured"), (False, "no measurement")):
        monkeypatch.setattr(choice, "SPECIALIZES", able)
        assert choose(ExpertKernel.auto, problem, (roles,)).why.startswith(wanted)


def test_strides_and_terms_of_any_kind():
    """Combine weights that lie apart in memory, more terms than a kernel takes, rows in order with a term. float64."""
    case = operands("top-k")
    x, gate_up, down, weight, added = case.cast(torch.float64)
    apart = torch.stack([weight, weight + 1], dim=1)[:, 0]
    terms = [added, 2 * added, 3 * added]
    out = moe_mlp(x, gate_up, down, case.token_N, case.count_E, apart, case.slot_TK, added=terms)
    torch.testing.assert_close(
        out, moe_mlp_reference(x, gate_up, down, case.token_N, case.count_E, weight, terms), rtol=1e-12, atol=1e-12
    )
    ordered = operands("rows in order")
    x, gate_up, down, _, added = ordered.cast(torch.float64)
    out = moe_mlp(x, gate_up, down, None, ordered.count_E, added=[added])
    wanted = moe_mlp_reference(x, gate_up, down, torch.arange(len(x)), ordered.count_E, added=[added])
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_a_table_reads_back(tmp_path):
    """Tiles, choices and what was measured beside them survive the file; a file of another kind is named."""
    tiled = replace(entry(64, ExpertKernel.triton), config=SPECIALIZED)
    path = tmp_path / "table.json"
    write_table(path, [entry_values(tiled, milliseconds={"triton": 1.5}), entry_values(entry(9, ExpertKernel.loop))])
    assert read_table(path) == (tiled, entry(9, ExpertKernel.loop))
    for text in ("{}", "[1]", "nonsense", '{"entries": [{"how": "faster", "config": {}}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"table\.json is no table of kernels"):
            read_table(path)


@pytest.mark.parametrize(
    ("how", "dtype", "dim", "why"),
    [
        (ExpertKernel.triton, torch.bfloat16, 64, "run on a GPU"),
        (ExpertKernel.grouped_mm, torch.float64, 64, "no grouped_mm for torch.float64"),
        (ExpertKernel.grouped_mm, torch.bfloat16, 12, "16 bytes"),
    ],
)
def test_an_explicit_choice_that_cannot_run_is_refused(how, dtype, dim, why):
    """A silent fallback would let a user measure something else than what was asked for."""
    case = operands("top-k", dim=dim)
    with pytest.raises(ValueError, match=f"moe.expert_kernel={how.value} .*{why}"):
        ours(case, dtype, how=how)


def test_traced_as_one_graph():
    """`torch.compile(fullgraph=True)` raises on anything that it cannot trace or that waits for the device. Equal to
    the last bit: the traced operations run as they are. bf16: what grouped_mm traces."""
    case = operands("top-k")

    def run(x, gate_up, down, weight, added):
        return moe_mlp(
            x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.grouped_mm,
            added=[added],
        )  # fmt: skip

    results = []
    for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = case.cast(torch.bfloat16)
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results))

"""Each Triton kernel of the experts against its reference in plain torch, in the interpreter.

The interpreter runs float32 exactly enough to compare to a few roundings; bf16 it truncates where a GPU rounds, so the
types here are float32 and float16. Memory is poisoned: what a kernel does not write is NaN.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_kernels.choice import INTERPRETER, ExpertKernel, KernelConfig, Tile
from moe_kernels.combine import combine, combine_reference, gather
from moe_kernels.expert_rows import expert_rows, expert_rows_reference
from moe_kernels.grad_hidden import grad_hidden, grad_hidden_reference
from moe_kernels.grad_weight import grad_weight, grad_weight_reference
from moe_kernels.grouped import Groups
from moe_kernels.permute import combine_rows, gather_rows
from moe_kernels.tiles import most_tiles, row_tiles, row_tiles_reference
from moe_kernels.up_projection import up_projection, up_projection_reference
from tests.kernels.examples import operands, relative_error

COUNTS = st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(sum)
# Sums of at most 48 products of numbers near 1, in another order: some 1e-7 of the norm each.
CLOSE = 2e-6


def groups_of(counts: list[int]) -> Groups:
    return Groups.of(torch.tensor(counts).cumsum(0, dtype=torch.int32), ExpertKernel.loop, counts)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def index_of(counts: list[int], tokens: int) -> Tensor:
    return torch.randint(tokens, (sum(counts),), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def check(got: Tensor | None, wanted: Tensor | None, tolerance: float = CLOSE) -> None:
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None:
        assert got.shape == wanted.shape
        assert torch.isfinite(got).all()
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=300), st.sampled_from([16, 64, 128]))
def test_row_tiles(counts, rows):
    """A tile that crosses experts or leaves rows out, one tile too few launched, the sum that the loop stops at."""
    end_E, total = torch.tensor(counts).cumsum(0, dtype=torch.int32), sum(counts)
    got, wanted = row_tiles(end_E, total, rows), row_tiles_reference(end_E, total, rows)
    used = int(wanted[0, 0])
    assert used == sum(-(-c // rows) for c in counts) <= most_tiles(total, len(counts), rows)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1 : used + 1], wanted[1 : used + 1])
    covered = [r for e, first, end in wanted[1 : used + 1].tolist() for r in range(first, min(first + rows, end))]
    assert covered == list(range(total))


@settings(max_examples=6, deadline=None)
@given(COUNTS, st.booleans(), st.sampled_from([(32, 16), (16, 40)]))
def test_up_projection(counts, gathers, sizes):
    """Rows of the wrong token, gate and up swapped, a ragged last tile of rows or of columns, an expert's tile that
    reads the next one's weights."""
    dim, hidden = sizes
    index_N = index_of(counts, 20) if gathers else None
    x = draw(20 if gathers else sum(counts), dim)
    weight = draw(len(counts), 2 * hidden, dim)
    tile = Tile(16, 32, 16, 1, 1)  # 32 columns: more than some widths
    got = up_projection(x, index_N, weight, groups_of(counts), tile)
    for a, b in zip(got, up_projection_reference(x, index_N, weight, groups_of(counts))):
        check(a, b)


@settings(max_examples=6, deadline=None)
@given(COUNTS, st.booleans(), st.booleans(), st.sampled_from([32, 40]))
def test_expert_rows(counts, transposed, moves, inner):
    """Weights read along the wrong axis, results in the wrong row, rows of the next expert that are stored; sums whose
    last step is not full, where the next expert's weights follow."""
    weight = draw(len(counts), 48, inner).mT if transposed else draw(len(counts), inner, 48)
    rows = draw(sum(counts), inner)
    to_N = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)).int() if moves else None
    got = expert_rows(rows, weight, groups_of(counts), INTERPRETER.down, to_N)
    check(got, expert_rows_reference(rows, weight, groups_of(counts), to_N))


@settings(max_examples=6, deadline=None)
@given(COUNTS, st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]))
def test_grad_hidden(counts, gathers, weighted, parts):
    """A wrong derivative of the activation, pieces of columns in the wrong order, weights applied twice or to the wrong
    row, sums of a row that miss a tile of columns."""
    index_N = index_of(counts, 20) if gathers else None
    grad = draw(20 if gathers else sum(counts), 32)
    weight_N = draw(sum(counts), seed=5).abs() if weighted else None
    down, hidden = draw(len(counts), 32, 40), draw(sum(counts), 80)
    tile = Tile(16, 32, 16, 1, 1, parts=parts)
    got = grad_hidden(grad, index_N, weight_N, down, hidden, groups_of(counts), tile)
    for a, b in zip(got, grad_hidden_reference(grad, index_N, weight_N, down, hidden, groups_of(counts))):
        check(a, b)


@settings(max_examples=10, deadline=None)
@given(COUNTS, st.sampled_from(["left", "right", "none"]), st.booleans(), st.sampled_from([1, 4]))
def test_grad_weight(counts, gathers, adds, parts):
    """Rows of the next expert in the sum, an empty expert left unwritten or, with a buffer, set to zero, a buffer that
    is overwritten."""
    slots, groups = sum(counts), groups_of(counts)
    left_N = index_of(counts, 20) if gathers == "left" else None
    right_N = index_of(counts, 20) if gathers == "right" else None
    left, right = draw(slots if left_N is None else 20, 40), draw(slots if right_N is None else 20, 48)
    main = draw(len(counts), 40, 48, seed=9) if adds else None
    kept = None if main is None else main.clone()
    tile = Tile(16, 32, 16, 1, 1, parts=parts)
    got = grad_weight(left, left_N, right, right_N, groups, tile, main)
    wanted = grad_weight_reference(left, left_N, right, right_N, groups, kept)
    check(got, wanted)
    check(main, kept)


def test_a_specialized_grad_weight_reads_its_own_rows_only():
    """Descriptors that end where the expert does: the next expert's rows must come in as zeros. Poisoned neighbors
    would show as NaN in every weight."""
    counts = [5, 0, 30, 17]
    left, right = draw(sum(counts), 32), draw(sum(counts), 48)
    left[5:35] = float("nan")
    got = grad_weight(left, None, right, None, groups_of(counts), Tile(16, 16, 16, 4, 2, specialize=True))
    clean = torch.nan_to_num(left)
    wanted = grad_weight_reference(clean, None, right, None, groups_of(counts))
    assert got is not None
    for expert in (0, 1, 3):
        check(got[expert] + 1, wanted[expert] + 1)  # type: ignore[index]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3), st.booleans(), st.integers(0, 3), st.sampled_from([16, 40]))
def test_combine(tokens, top_k, weighted, terms, dim):
    """Slots of the wrong token, a term that is not added, tokens without slots (top_k 0 stands for lists of any
    length), columns beyond the width."""
    if top_k:
        order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(2))
        token_N, slot_TK = (order // top_k).int(), torch.argsort(order).view(tokens, top_k).int()
    else:
        token_N, slot_TK = torch.randint(tokens, (2 * tokens,)).int(), None
    rows = draw(len(token_N), dim)
    weight_N = draw(len(token_N), seed=5) if weighted else None
    added = [draw(tokens, dim, seed=n) for n in range(terms)]
    got = combine(rows, weight_N, token_N, slot_TK, tokens, added, fused=True)
    wanted = combine_reference(rows, weight_N, token_N, slot_TK, tokens, added)
    assert (got - wanted).norm() <= CLOSE * (1 + wanted.norm())


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packing_and_combining_around_an_exchange(fixed, dtype):
    """The same functions by kernels and in plain torch, both ways: a row packed for the wrong slot, a combine weight's
    gradient of another slot, a sum rounded before it is complete. float32: 1e-6; float16: one rounding, 2^-11."""
    case = operands("top-k" if fixed else "dropped slots", tokens=21, dim=40)
    results = []
    for fused in (True, False):
        x, _, _, weight, added = case.cast(dtype)
        rows = gather_rows(x, case.token_N, case.slot_TK, fused)
        out = combine_rows(rows * 2, weight, case.token_N, case.slot_TK, len(x), [added], fused)
        wanted = [x, weight, added]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
    for got, plain in zip(*results, strict=True):
        check(got.float(), plain.float(), 1e-6 if dtype is torch.float32 else 4 * 2**-11)


def test_gather_is_a_copy():
    """To the last bit."""
    rows, index = draw(9, 40), torch.tensor([8, 0, 0, 3], dtype=torch.int32)
    assert torch.equal(gather(rows, index, fused=True), rows[index.long()])


def test_half_precision_sums_in_float32():
    """4096 products of 1 in float16: a sum in that type would stop at 2048. Exact."""
    ones = torch.ones(16, 4096, dtype=torch.float16)
    weight = torch.ones(1, 4096, 16, dtype=torch.float16)
    got = expert_rows(ones, weight, groups_of([16]), Tile(16, 16, 256, 1, 1))
    assert torch.equal(got, torch.full((16, 16), 4096.0, dtype=torch.float16))


def test_the_interpreter_multiplies_bf16():
    """Triton's interpreter multiplies the bit patterns of bf16 operands, wrong by 1e9, unless they are cast first. The
    result is exact: small whole numbers."""
    rows = torch.arange(256).view(16, 16).remainder(5).bfloat16()
    weight = torch.arange(256).view(1, 16, 16).remainder(3).bfloat16()
    got = expert_rows(rows, weight, groups_of([16]), INTERPRETER.down)
    assert torch.equal(got, rows @ weight[0])


CONFIGS = {
    "gathered": INTERPRETER,
    "copied": KernelConfig(**{**INTERPRETER.__dict__, "copy_rows": True}),
    "products only": KernelConfig(
        up=INTERPRETER.up, down=None, grad_hidden=None, grad_rows=None, grad_weight=INTERPRETER.grad_weight,
        add_weight=None, combine=False, copy_rows=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_agree(name):
    """Kernels and plain torch may be mixed product by product: what one leaves must be what the next expects."""
    from moe_kernels.choice import Entry
    from moe_kernels.moe_mlp import moe_mlp, moe_mlp_reference

    case = operands("top-k", tokens=21, dim=32, hidden=48)
    table = (Entry("cpu", "float32", 32, 48, 5, 15, ExpertKernel.triton, CONFIGS[name]),)
    x, gate_up, down, weight, added = leaves = case.cast(torch.float32)
    out = moe_mlp(
        x, gate_up, down, case.token_N, case.count_E, weight, case.slot_TK, how=ExpertKernel.auto, table=table,
        added=[added],
    )  # fmt: skip
    exact = case.cast(torch.float64)
    wanted = moe_mlp_reference(*exact[:3], case.token_N, case.count_E, exact[3], [exact[4]])
    got = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    for a, b in zip(got, [wanted.detach(), *torch.autograd.grad(wanted.square().sum(), exact)]):
        assert relative_error(a, b) < 3e-6

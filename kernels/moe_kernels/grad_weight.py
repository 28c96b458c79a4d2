"""Gradient of the experts' weights: for each expert the sum over its rows of the outer product of two of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.choice import Tile
from moe_kernels.grouped import Groups, rows_by_rows
from moe_kernels.tiles import pieces_of, tile_of
from moe_kernels.triton_support import descriptor, dot, jit, num_programs, reserve_descriptors, tl, triton


def grad_weight_reference(
    left_TA: Tensor,
    left_N: Tensor | None,
    right_TB: Tensor,
    right_N: Tensor | None,
    groups: Groups,
    main_EAB: Tensor | None = None,
) -> Tensor | None:
    """See `grad_weight`."""
    left_NA = left_TA if left_N is None else left_TA.index_select(0, left_N)
    right_NB = right_TB if right_N is None else right_TB.index_select(0, right_N)
    out_EAB = rows_by_rows(left_NA, right_NB, groups, main_EAB)
    return out_EAB if main_EAB is None else None


@jit
def grad_weight_kernel(
    left, left_index, right, right_index, end_ptr, out_ptr,
    E: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    num_rows: tl.constexpr = (A + ROWS - 1) // ROWS
    num_columns: tl.constexpr = (B + COLUMNS - 1) // COLUMNS
    for step in tl.range(
        tl.program_id(0), E * num_rows * num_columns, tl.num_programs(0), warp_specialize=SPECIALIZE, flatten=False
    ):
        expert = step // (num_rows * num_columns)
        m, n = tile_of(step % (num_rows * num_columns), num_rows, num_columns, 8)
        start = tl.load(end_ptr + expert - 1, expert > 0, other=0)
        end = tl.load(end_ptr + expert)
        a = m * ROWS + tl.arange(0, ROWS)
        b = n * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        if SPECIALIZE:  # what the copy engine loads ends where the rows of this expert do
            left_rows = tl.make_tensor_descriptor(left, [end, A], [A, 1], [DEPTH, ROWS])
            right_rows = tl.make_tensor_descriptor(right, [end, B], [B, 1], [DEPTH, COLUMNS])
        for first in range(start, end, DEPTH):
            # Finite rows of the next expert count for nothing as long as one of the operands is zero there.
            row = first + tl.arange(0, DEPTH)
            if SPECIALIZE:
                lefts = left_rows.load([first, m * ROWS])
                rights = right_rows.load([first, n * COLUMNS])
            elif GATHER_RIGHT:
                source = tl.load(right_index + row, row < end, other=0).to(tl.int64)
                rights = tl.load(
                    right + source[:, None] * B + b[None, :], (row < end)[:, None] & (b < B)[None, :], other=0.0
                )
                lefts = left.load([first, m * ROWS])
            else:
                source = row.to(tl.int64)
                if GATHER_LEFT:
                    source = tl.load(left_index + row, row < end, other=0).to(tl.int64)
                lefts = tl.load(
                    left + source[:, None] * A + a[None, :], (row < end)[:, None] & (a < A)[None, :], other=0.0
                )
                rights = right.load([first, n * COLUMNS])
            total = dot(lefts.T, rights, total)
        pieces = pieces_of(total, ROWS, COLUMNS, PARTS)
        for part in tl.static_range(PARTS):
            column = n * COLUMNS + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
            inside = (a < A)[:, None] & (column < B)[None, :]
            place = out_ptr + (expert.to(tl.int64) * A + a[:, None]) * B + column[None, :]
            if ADD:
                if start < end:
                    tl.store(place, tl.load(place, inside, other=0.0) + pieces[part], inside)
            else:
                tl.store(place, pieces[part].to(out_ptr.dtype.element_ty), inside)


@torch.library.custom_op("moe_kernels::grad_weight", mutates_args={"out_EAB"})
def _grad_weight(
    left_TA: Tensor,
    left_N: Tensor | None,
    right_TB: Tensor,
    right_N: Tensor | None,
    end_E: Tensor,
    out_EAB: Tensor,
    add: bool,
    tile_sizes: list[int],
) -> None:
    tile = Tile.of(tile_sizes)
    num_experts, height, width = out_EAB.shape
    if (left_TA if left_N is None else left_N).shape[0] == 0:  # nobody chose any: nothing to describe to a kernel
        if not add:
            out_EAB.zero_()
        return
    specialize = tile.specialize and left_N is None and right_N is None
    if specialize:
        reserve_descriptors(out_EAB.device)
        left, right = left_TA, right_TB
    elif right_N is not None:
        left = descriptor(left_TA, (tile.depth, tile.rows))
        right = right_TB
        if left_N is not None:
            raise ValueError("one of the two operands must be sorted by expert")
    else:
        left, right = left_TA, descriptor(right_TB, (tile.depth, tile.columns))
    most = num_experts * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    # A program has memory for one pair of descriptors. Those of a second step would be written while the loads of the
    # first are still on their way: where descriptors are made in the kernel, a program has one step.
    programs = most if specialize else num_programs(out_EAB.device, most, tile.per_processor)
    grad_weight_kernel[(programs,)](
        left,
        left_N,
        right,
        right_N,
        end_E,
        out_EAB,
        E=num_experts,
        A=height,
        B=width,
        GATHER_LEFT=left_N is not None,
        GATHER_RIGHT=right_N is not None,
        ADD=add,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PARTS=tile.parts,
        SPECIALIZE=specialize,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@_grad_weight.register_fake
def _(left_TA, left_N, right_TB, right_N, end_E, out_EAB, add, tile_sizes):
    return None


def grad_weight(
    left_TA: Tensor,
    left_N: Tensor | None,
    right_TB: Tensor,
    right_N: Tensor | None,
    groups: Groups,
    tile: Tile | None,
    main_EAB: Tensor | None = None,
) -> Tensor | None:
    """(N, A) x (N, B) -> (E, A, B); zeros for an expert without rows.

    Args:
        left_N, right_N: integer, the row of the operand for each slot; None if it is sorted by expert already. The
            kernel takes one of them at most.
        tile: of the Triton kernel; None computes in plain torch.
        main_EAB: float32; added to, in the same kernel, and None is returned.
    """
    if tile is None:
        return grad_weight_reference(left_TA, left_N, right_TB, right_N, groups, main_EAB)
    out_EAB = main_EAB
    if out_EAB is None:
        out_EAB = left_TA.new_empty(groups.end_E.shape[0], left_TA.shape[1], right_TB.shape[1])
    _grad_weight(left_TA, left_N, right_TB, right_N, groups.end_E, out_EAB, main_EAB is not None, tile.numbers())
    return out_EAB if main_EAB is None else None

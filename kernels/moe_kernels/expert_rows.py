"""Rows times the weight of their expert: the down-projection, and the gradient of the up-projection's input."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.choice import Tile
from moe_kernels.grouped import Groups, rows_by_weight
from moe_kernels.tiles import most_tiles, row_tiles, tile_of
from moe_kernels.triton_support import descriptor, dot, jit, num_programs, tl, triton


def expert_rows_reference(rows_NA: Tensor, weight_EAB: Tensor, groups: Groups, to_N: Tensor | None = None) -> Tensor:
    """See `expert_rows`."""
    out_NB = rows_by_weight(rows_NA, weight_EAB, groups)
    return out_NB if to_N is None else out_NB.new_empty(out_NB.shape).index_copy_(0, to_N.long(), out_NB)


@jit
def expert_rows_kernel(
    rows_desc, weight, to_ptr, tile_ptr, out_ptr,
    A: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(tile_ptr)
    num_columns: tl.constexpr = (B + COLUMNS - 1) // COLUMNS
    for step in tl.range(
        tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), warp_specialize=SPECIALIZE, flatten=False
    ):
        m, n = tile_of(step, num_tiles, num_columns, 8)
        expert, first, end = tl.load(tile_ptr + 3 + m * 3), tl.load(tile_ptr + 4 + m * 3), tl.load(tile_ptr + 5 + m * 3)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, A, DEPTH):
            rows = rows_desc.load([first, k])  # rows of the next expert may follow; they are not stored
            if TRANSPOSED:
                total = dot(rows, weight.load([expert * B + n * COLUMNS, k]).T, total)
            else:
                total = dot(rows, weight.load([expert * A + k, n * COLUMNS]), total)
        row = first + tl.arange(0, ROWS)
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        if SCATTER:
            to = tl.load(to_ptr + row, row < end, other=0).to(tl.int64)
        else:
            to = row.to(tl.int64)
        inside = (row < end)[:, None] & (column < B)[None, :]
        tl.store(out_ptr + to[:, None] * B + column[None, :], total.to(out_ptr.dtype.element_ty), inside)


@torch.library.custom_op("moe_kernels::expert_rows", mutates_args=())
def _expert_rows(
    rows_NA: Tensor, weight_EAB: Tensor, end_E: Tensor, to_N: Tensor | None, tile_sizes: list[int]
) -> Tensor:
    tile = Tile.of(tile_sizes)
    num_experts, inner, outer = weight_EAB.shape
    out_NB = rows_NA.new_empty(rows_NA.shape[0], outer)
    most = most_tiles(rows_NA.shape[0], num_experts, tile.rows) * triton.cdiv(outer, tile.columns)
    transposed = weight_EAB.stride(1) == 1
    stored = weight_EAB.mT if transposed else weight_EAB
    block = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
    if most > 0:
        expert_rows_kernel[(num_programs(rows_NA.device, most, tile.per_processor),)](
            descriptor(rows_NA, (tile.rows, tile.depth)),
            descriptor(stored.reshape(-1, stored.shape[-1]), block),
            to_N,
            row_tiles(end_E, rows_NA.shape[0], tile.rows),
            out_NB,
            A=inner,
            B=outer,
            TRANSPOSED=transposed,
            SCATTER=to_N is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            SPECIALIZE=tile.specialize and inner > tile.depth,  # one step of the sum leaves nothing to overlap
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_NB


@_expert_rows.register_fake
def _(rows_NA, weight_EAB, end_E, to_N, tile_sizes):
    return rows_NA.new_empty(rows_NA.shape[0], weight_EAB.shape[2])


def expert_rows(
    rows_NA: Tensor, weight_EAB: Tensor, groups: Groups, tile: Tile | None, to_N: Tensor | None = None
) -> Tensor:
    """(N, A) x (E, A, B) -> (N, B).

    Args:
        rows_NA: sorted by expert.
        tile: of the Triton kernel; None computes in plain torch.
        to_N: integer, a permutation: the row of the result for each row.
    """
    if tile is None:
        return expert_rows_reference(rows_NA, weight_EAB, groups, to_N)
    return _expert_rows(rows_NA, weight_EAB, groups.end_E, to_N, tile.numbers())

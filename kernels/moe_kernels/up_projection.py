"""First half of the experts: `h = x W_gate_up^T` for the rows of each expert, and `a = silu(h_gate) * h_up`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.choice import Tile
from moe_kernels.grouped import Groups, rows_by_weight
from moe_kernels.tiles import most_tiles, row_tiles, tile_of
from moe_kernels.triton_support import descriptor, dot, jit, num_programs, tl, triton


def swiglu(hidden_N2F: Tensor) -> Tensor:
    """(N, 2F), gate columns first -> (N, F)."""
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def up_projection_reference(
    x_TD: Tensor, index_N: Tensor | None, gate_up: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """See `up_projection`."""
    rows_ND = x_TD if index_N is None else x_TD.index_select(0, index_N)
    hidden_N2F = rows_by_weight(rows_ND, gate_up.mT, groups)
    return hidden_N2F, swiglu(hidden_N2F)


@jit
def up_projection_kernel(
    x, weight, index_ptr, tile_ptr, hidden_ptr, activation_ptr,
    D: tl.constexpr, F: tl.constexpr, GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(tile_ptr)
    num_columns: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    for step in tl.range(
        tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), warp_specialize=SPECIALIZE, flatten=False
    ):
        m, n = tile_of(step, num_tiles, num_columns, 8)
        expert, first, end = tl.load(tile_ptr + 3 + m * 3), tl.load(tile_ptr + 4 + m * 3), tl.load(tile_ptr + 5 + m * 3)
        row = first + tl.arange(0, ROWS)
        if GATHER:
            source = tl.load(index_ptr + row, row < end, other=0).to(tl.int64)
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        weight_row = expert * (2 * F) + n * COLUMNS
        for k in range(0, D, DEPTH):
            if GATHER:
                rows = tl.load(x + source[:, None] * D + (k + tl.arange(0, DEPTH))[None, :], (row < end)[:, None], 0.0)
            else:
                rows = x.load([first, k])
            gate = dot(rows, weight.load([weight_row, k]).T, gate)
            up = dot(rows, weight.load([weight_row + F, k]).T, up)
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < end)[:, None] & (column < F)[None, :]
        place = row.to(tl.int64)[:, None] * F + column[None, :]
        kind = hidden_ptr.dtype.element_ty
        tl.store(hidden_ptr + place + row.to(tl.int64)[:, None] * F, gate.to(kind), inside)
        tl.store(hidden_ptr + place + row.to(tl.int64)[:, None] * F + F, up.to(kind), inside)
        tl.store(activation_ptr + place, (gate * tl.sigmoid(gate) * up).to(kind), inside)


@torch.library.custom_op("moe_kernels::up_projection", mutates_args=())
def _up_projection(
    x_TD: Tensor, index_N: Tensor | None, gate_up: Tensor, end_E: Tensor, tile_sizes: list[int]
) -> tuple[Tensor, Tensor]:
    tile = Tile.of(tile_sizes)
    num_rows = x_TD.shape[0] if index_N is None else index_N.shape[0]
    num_experts, dim, hidden_dim = gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2
    hidden_N2F, activation_NF = x_TD.new_empty(num_rows, 2 * hidden_dim), x_TD.new_empty(num_rows, hidden_dim)
    most = most_tiles(num_rows, num_experts, tile.rows) * triton.cdiv(hidden_dim, tile.columns)
    if most > 0:
        up_projection_kernel[(num_programs(x_TD.device, most, tile.per_processor),)](
            descriptor(x_TD, (tile.rows, tile.depth)) if index_N is None else x_TD,
            descriptor(gate_up.view(-1, dim), (tile.columns, tile.depth)),
            index_N,
            row_tiles(end_E, num_rows, tile.rows),
            hidden_N2F,
            activation_NF,
            D=dim,
            F=hidden_dim,
            GATHER=index_N is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            SPECIALIZE=tile.specialize and dim > tile.depth,  # one step of the sum leaves nothing to overlap
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return hidden_N2F, activation_NF


@_up_projection.register_fake
def _(x_TD, index_N, gate_up, end_E, tile_sizes):
    num_rows, width = x_TD.shape[0] if index_N is None else index_N.shape[0], gate_up.shape[1]
    return x_TD.new_empty(num_rows, width), x_TD.new_empty(num_rows, width // 2)


def up_projection(
    x_TD: Tensor, index_N: Tensor | None, gate_up: Tensor, groups: Groups, tile: Tile | None
) -> tuple[Tensor, Tensor]:
    """(T, D) x (E, 2F, D) -> pre-activation (N, 2F) and activation (N, F), sorted by expert.

    Args:
        index_N: integer, the row of x for each slot; None if x is sorted by expert already.
        tile: of the Triton kernel; None computes in plain torch.
    """
    if tile is None:
        return up_projection_reference(x_TD, index_N, gate_up, groups)
    return _up_projection(x_TD, index_N, gate_up, groups.end_E, tile.numbers())

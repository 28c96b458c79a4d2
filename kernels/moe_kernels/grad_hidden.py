"""Backward through the down-projection and the activation, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.choice import Tile
from moe_kernels.grouped import Groups, rows_by_weight
from moe_kernels.tiles import most_tiles, pieces_of, row_tiles, tile_of
from moe_kernels.triton_support import descriptor, dot, jit, num_programs, tl, triton


def grad_hidden_reference(
    grad_TD: Tensor, index_N: Tensor | None, weight_N: Tensor | None, down: Tensor, hidden_N2F: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `grad_hidden`."""
    grad_ND = grad_TD if index_N is None else grad_TD.index_select(0, index_N)
    grad_NF = rows_by_weight(grad_ND, down, groups)
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    activation_NF = silu_NF * up_NF
    grad_weight_N = None
    if weight_N is not None:
        # <dO W, a> is <dO, W a>: the output of the experts need not be kept.
        grad_weight_N = (grad_NF.to(weight_N.dtype) * activation_NF).sum(-1)
        column_N1 = weight_N[:, None]
        torch.mul(grad_NF, column_N1, out=grad_NF)  # computed in the wider type, rounded once
        torch.mul(activation_NF, column_N1, out=activation_NF)
    # silu'(g) = s + g s (1 - s) = s + silu (1 - s)
    slope_NF = sigmoid_NF.addcmul(silu_NF, 1 - sigmoid_NF)
    grad_up_NF = silu_NF.mul_(grad_NF)
    grad_gate_NF = grad_NF.mul_(up_NF).mul_(slope_NF)
    return torch.cat([grad_gate_NF, grad_up_NF], dim=-1), activation_NF, grad_weight_N


@jit
def _finish(
    grad,
    row,
    column,
    inside,
    weight,
    hidden_ptr,
    grad_hidden_ptr,
    activation_ptr,
    F: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Stores what follows from the gradient of the activation, and returns its product with it, summed over columns."""
    kind = hidden_ptr.dtype.element_ty
    place = row.to(tl.int64)[:, None] * (2 * F) + column[None, :]
    gate = tl.load(hidden_ptr + place, inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + place + F, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    activation = silu * up
    product = tl.sum(tl.where(inside, grad * activation, 0.0), 1)
    if WEIGHTED:
        grad = grad * weight[:, None]
        activation = activation * weight[:, None]
    tl.store(grad_hidden_ptr + place, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(kind), inside)
    tl.store(grad_hidden_ptr + place + F, (grad * silu).to(kind), inside)
    tl.store(activation_ptr + row.to(tl.int64)[:, None] * F + column[None, :], activation.to(kind), inside)
    return product


@jit
def grad_hidden_kernel(
    grad_out, weight, index_ptr, weight_ptr, hidden_ptr, tile_ptr, grad_hidden_ptr, activation_ptr, product_ptr,
    D: tl.constexpr, F: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.load(tile_ptr)
    num_columns: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    for step in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        m, n = tile_of(step, num_tiles, num_columns, 8)
        expert, first, end = tl.load(tile_ptr + 3 + m * 3), tl.load(tile_ptr + 4 + m * 3), tl.load(tile_ptr + 5 + m * 3)
        row = first + tl.arange(0, ROWS)
        source = row.to(tl.int64)
        if GATHER:
            source = tl.load(index_ptr + row, row < end, other=0).to(tl.int64)
        grad = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            place = source[:, None] * D + (k + tl.arange(0, DEPTH))[None, :]
            rows = tl.load(grad_out + place, (row < end)[:, None], other=0.0)
            grad = dot(rows, weight.load([expert * D + k, n * COLUMNS]), grad)
        of_row = tl.full((ROWS,), 1.0, tl.float32)
        if WEIGHTED:
            of_row = tl.load(weight_ptr + row, row < end, other=0.0)
        product = tl.zeros((ROWS,), tl.float32)
        # In pieces: the whole tile with everything that is loaded and stored here does not fit the registers.
        pieces = pieces_of(grad, ROWS, COLUMNS, PARTS)
        for part in tl.static_range(PARTS):
            column = n * COLUMNS + part * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
            inside = (row < end)[:, None] & (column < F)[None, :]
            product += _finish(
                pieces[part], row, column, inside, of_row, hidden_ptr, grad_hidden_ptr, activation_ptr, F, WEIGHTED
            )
        if WEIGHTED:
            tl.store(product_ptr + row.to(tl.int64) * num_columns + n, product, row < end)


@torch.library.custom_op("moe_kernels::grad_hidden", mutates_args=())
def _grad_hidden(
    grad_TD: Tensor,
    index_N: Tensor | None,
    weight_N: Tensor | None,
    down: Tensor,
    hidden_N2F: Tensor,
    end_E: Tensor,
    tile_sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    tile = Tile.of(tile_sizes)
    num_rows = hidden_N2F.shape[0]
    num_experts, dim, hidden_dim = down.shape
    columns = triton.cdiv(hidden_dim, tile.columns)
    grad_hidden_N2F = torch.empty_like(hidden_N2F)
    activation_NF = hidden_N2F.new_empty(num_rows, hidden_dim)
    # One sum for each tile of columns: added up afterwards in one order, which atomics do not have.
    product_NC = grad_TD.new_empty(0 if weight_N is None else num_rows, columns, dtype=torch.float32)
    most = most_tiles(num_rows, num_experts, tile.rows) * columns
    if most > 0:
        grad_hidden_kernel[(num_programs(grad_TD.device, most, tile.per_processor),)](
            grad_TD,
            descriptor(down.view(-1, hidden_dim), (tile.depth, tile.columns)),
            index_N,
            weight_N,
            hidden_N2F,
            row_tiles(end_E, num_rows, tile.rows),
            grad_hidden_N2F,
            activation_NF,
            product_NC,
            D=dim,
            F=hidden_dim,
            GATHER=index_N is not None,
            WEIGHTED=weight_N is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            PARTS=tile.parts,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return grad_hidden_N2F, activation_NF, product_NC


@_grad_hidden.register_fake
def _(grad_TD, index_N, weight_N, down, hidden_N2F, end_E, tile_sizes):
    num_rows, hidden_dim = hidden_N2F.shape[0], down.shape[2]
    columns = -(-hidden_dim // Tile.of(tile_sizes).columns)
    product_NC = grad_TD.new_empty(0 if weight_N is None else num_rows, columns, dtype=torch.float32)
    return torch.empty_like(hidden_N2F), hidden_N2F.new_empty(num_rows, hidden_dim), product_NC


def grad_hidden(
    grad_TD: Tensor,
    index_N: Tensor | None,
    weight_N: Tensor | None,
    down: Tensor,
    hidden_N2F: Tensor,
    groups: Groups,
    tile: Tile | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of the pre-activation, and what else the same pass gives away.

    Args:
        grad_TD: gradient of the combined output.
        index_N: integer, the row of `grad_TD` for each slot; None if it is sorted by expert already.
        weight_N: combine weights; None for ones.
        tile: of the Triton kernel; None computes in plain torch.
    Returns:
        grad_hidden_N2F; activation_NF times the combine weight, which the gradient of `down` needs; and the gradient of
        the weights, None without them.
    """
    if tile is None:
        return grad_hidden_reference(grad_TD, index_N, weight_N, down, hidden_N2F, groups)
    grad_hidden_N2F, activation_NF, product_NC = _grad_hidden(
        grad_TD, index_N, weight_N, down, hidden_N2F, groups.end_E, tile.numbers()
    )
    return grad_hidden_N2F, activation_NF, None if weight_N is None else product_NC.sum(1)

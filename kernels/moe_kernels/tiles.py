"""Which rows each program of a grouped product works on, found on the device.

A product over ragged groups is cut into tiles of rows that never cross from one expert to the next. How many there are
is known on the device only, where a fixed number of programs share them: the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.triton_support import block_of, jit, runs_triton, tl, triton


def most_tiles(num_rows: int, num_experts: int, block_rows: int) -> int:
    """The most tiles that any counts with this sum can need: each expert wastes less than one."""
    return min(-(-num_rows // block_rows) + num_experts - 1, num_rows) if num_rows else 0


def row_tiles_reference(end_E: Tensor, num_rows: int, block_rows: int) -> Tensor:
    """See `row_tiles`; one row for each tile that there can be, those that are left over filled with ends."""
    num_experts, device = end_E.numel(), end_E.device
    start_E = torch.cat([end_E.new_zeros(1), end_E[:-1]])
    last_E = ((end_E - start_E + block_rows - 1) // block_rows).cumsum(0)
    first_E = torch.cat([last_E.new_zeros(1), last_E[:-1]])
    tile_M = torch.arange(most_tiles(num_rows, num_experts, block_rows), device=device)
    expert_M = torch.searchsorted(last_E, tile_M, right=True)
    inside_M = expert_M.clamp(max=num_experts - 1)
    start_M = start_E[inside_M] + (tile_M - first_E[inside_M]) * block_rows
    used_M = expert_M < num_experts
    columns = (expert_M, torch.where(used_M, start_M, num_rows), torch.where(used_M, end_E[inside_M], num_rows))
    tile_M3 = torch.stack([c.to(torch.int32) for c in columns], dim=1)
    return torch.cat([last_E[-1:].to(torch.int32).expand(1, 3), tile_M3])


@jit
def _row_tiles_kernel(
    end_ptr, tile_ptr, num_tiles, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr
):
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(end_ptr + expert, expert < E, other=0)
    start = tl.load(end_ptr + expert - 1, (expert > 0) & (expert < E), other=0)
    tiles = tl.where(expert < E, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * T + tl.arange(0, T)
    # The experts that end before this tile; those behind the last expert never do.
    done = (last[None, :] <= tile[:, None]) & (expert < E)[None, :]
    mine = tl.sum(done.to(tl.int32), 1)
    skipped = tl.sum(tl.where(done, tiles[None, :], 0), 1)
    used = mine < E
    own_end = tl.load(end_ptr + mine, used, other=num_rows)
    own_start = tl.load(end_ptr + mine - 1, used & (mine > 0), other=0)
    first = tl.where(used, own_start + (tile - skipped) * ROWS, num_rows)
    inside = tile < num_tiles
    tl.store(tile_ptr + 3 + tile * 3, mine, inside)
    tl.store(tile_ptr + 4 + tile * 3, first, inside)
    tl.store(tile_ptr + 5 + tile * 3, own_end, inside)
    if tl.program_id(0) == 0:
        column = tl.arange(0, 4)
        tl.store(tile_ptr + column, tl.sum(tiles, 0), column < 3)


def row_tiles(end_E: Tensor, num_rows: int, block_rows: int) -> Tensor:
    """int32 (1 + M, 3): how many tiles there are; then expert, first row, and end of the expert's rows of each.

    Args:
        end_E: int32, the row after the last one of each expert.
        num_rows: rows of all experts; known on the host.
    Returns:
        Tiles in the order of experts. Those that are left over have the number of experts in the first column.
    """
    if not runs_triton(end_E):
        return row_tiles_reference(end_E, num_rows, block_rows)
    num_tiles, num_experts = most_tiles(num_rows, end_E.numel(), block_rows), end_E.numel()
    tile_M3 = torch.empty(1 + num_tiles, 3, dtype=torch.int32, device=end_E.device)
    per_program = 64
    _row_tiles_kernel[(max(triton.cdiv(num_tiles, per_program), 1),)](
        end_E, tile_M3, num_tiles, num_rows, num_experts, block_of(num_experts), block_rows, per_program
    )
    return tile_M3


@jit
def tile_of(step, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """The tile of rows and that of columns of a step. Neighbors share operands: GROUP row tiles, column by column."""
    per_group = GROUP * num_column_tiles
    group_start = (step // per_group) * GROUP
    size = min(num_row_tiles - group_start, GROUP)
    inside = step % per_group
    return group_start + inside % size, inside // size


@jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    return left, right


@jit
def pieces_of(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A tile cut into PARTS (1, 2 or 4) tiles of neighboring columns."""
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        return (tile,)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        if PARTS == 2:
            return (left, right)
        else:
            return _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)

"""Order slots by expert by counting them: no comparison sort over all slots, and the inverse comes with the order.

Slots are cut into tiles. Each tile counts its slots of every expert; sums over the tiles before it tell where its slots
of an expert go; within a tile each slot counts its equals before it. Integers throughout: two runs agree exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.triton_support import block_of, jit, runs_triton, tl, triton

MOST_EXPERTS = 1024
"""More of them than a program has room to count go to the reference."""
MOST_SLOTS = 2**31 - 2**12
"""Places are int32 within the kernels."""
_TILE_SLOTS = 512
_BLOCK = 64


def sort_slots_reference(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `sort_slots`."""
    flat_N = expert_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_N.device)
    count.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return order_N, count[:num_experts], inverse_N


def tile_tokens(top_k: int) -> int:
    """Tokens whose slots make up a tile; a power of two."""
    return max(block_of(_TILE_SLOTS // top_k + 1) // 2, 1)


def tile_counts_reference(expert_TK: Tensor, num_experts: int) -> Tensor:
    """int32 (tiles, E + 1): slots of each expert in each tile, unused ones last."""
    num_tokens, top_k = expert_TK.shape
    tile_TK = (torch.arange(num_tokens, device=expert_TK.device) // tile_tokens(top_k))[:, None].expand(-1, top_k)
    cell_N = (tile_TK * (num_experts + 1) + expert_TK).reshape(-1)
    cells = num_tiles(num_tokens, top_k) * (num_experts + 1)
    return torch.bincount(cell_N, minlength=cells).to(torch.int32).view(-1, num_experts + 1)


def num_tiles(num_tokens: int, top_k: int) -> int:
    """Tiles of that many tokens."""
    return -(-num_tokens // tile_tokens(top_k))


@jit
def tile_counts_kernel(
    expert_ptr, count_ptr, num_slots, E: tl.constexpr, BINS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile. BINS > E + 1: the last ones are for lanes without a slot."""
    tile = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    slot = tile * SLOTS + place
    expert = tl.load(expert_ptr + slot, (place < SLOTS) & (slot < num_slots), other=E + 1).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(count_ptr + tile * (E + 1) + bins, tl.histogram(expert, BINS), bins <= E)


@jit
def tile_starts_kernel(
    count_ptr, before_ptr, total_ptr, num_tiles, E: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Some experts: the slots of all tiles before each one, and of all."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    running = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < num_tiles)[:, None] & (column <= E)[None, :]
        cell = tile.to(tl.int64)[:, None] * (E + 1) + column[None, :]
        count = tl.load(count_ptr + cell, inside, other=0)
        tl.store(before_ptr + cell, running[None, :] + tl.cumsum(count, 0) - count, inside)
        running += tl.sum(count, 0)
    tl.store(total_ptr + column, running.to(tl.int64), column <= E)


@jit
def place_slots_kernel(
    expert_ptr, before_ptr, total_ptr, order_ptr, inverse_ptr, num_slots,
    E: tl.constexpr, BINS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile, BLOCK slots at a time: a slot goes behind those of its expert before it."""
    tile = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    total = tl.load(total_ptr + bins, bins <= E, other=0).to(tl.int32)
    before = tl.load(before_ptr + tile * (E + 1) + bins, bins <= E, other=0)
    free = tl.cumsum(total, 0) - total + before  # of each expert, the next place
    lane = tl.arange(0, BLOCK)
    for first in tl.range(0, SLOTS, BLOCK, num_stages=1):
        slot = tile * SLOTS + first + lane
        inside = (first + lane < SLOTS) & (slot < num_slots)
        expert = tl.load(expert_ptr + slot, inside, other=E + 1).to(tl.int32)
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        place = (tl.gather(free, expert, 0) + tl.sum(earlier.to(tl.int32), 1)).to(tl.int64)
        tl.store(order_ptr + place, slot, inside)
        tl.store(inverse_ptr + slot, place, inside)
        free += tl.histogram(expert, BINS)


@torch.library.custom_op("moe_kernels::sort_slots", mutates_args=())
def _sort_slots(expert_TK: Tensor, tile_count: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = expert_TK.shape
    num_slots, tiles, device = expert_TK.numel(), num_tiles(num_tokens, top_k), expert_TK.device
    slots = tile_tokens(top_k) * top_k
    sizes = {"E": num_experts, "BINS": block_of(num_experts + 2), "SLOTS": slots}
    expert_TK = expert_TK.contiguous()
    if tile_count is None:
        tile_count = torch.empty(tiles, num_experts + 1, dtype=torch.int32, device=device)
        if tiles > 0:
            tile_counts_kernel[(tiles,)](expert_TK, tile_count, num_slots, **sizes, BLOCK=block_of(slots), num_warps=4)
    before = torch.empty_like(tile_count)
    total = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    order_N, inverse_N = (torch.empty(num_slots, dtype=torch.int64, device=device) for _ in range(2))
    columns = 16
    tile_starts_kernel[(triton.cdiv(num_experts + 1, columns),)](
        tile_count, before, total, tiles, E=num_experts, TILES=128, COLUMNS=columns, num_warps=4
    )
    if tiles > 0:
        place_slots_kernel[(tiles,)](
            expert_TK, before, total, order_N, inverse_N, num_slots, **sizes, BLOCK=_BLOCK, num_warps=4
        )
    return order_N, total[:num_experts].clone(), inverse_N


@_sort_slots.register_fake
def _(expert_TK, tile_count, num_experts):
    order_N = expert_TK.new_empty(expert_TK.numel(), dtype=torch.int64)
    return order_N, expert_TK.new_empty(num_experts, dtype=torch.int64), torch.empty_like(order_N)


def sort_slots(
    expert_TK: Tensor, num_experts: int, fused: bool = False, tile_count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Order slots by expert, those of an expert in the order in which they stand.

    Args:
        expert_TK: int64, expert of each slot, (T, K) or (N). The value `num_experts` marks a slot that is not used;
            such slots come last in the order and are not counted.
        fused: by Triton kernels, where there are any; the same integers.
        tile_count: what `router_topk` counted of this table, for the kernels; None counts here.
    Returns:
        order_N: int64 (T*K), flat slot index (token * K + k) of each place in expert order.
        count_E: int64, slots per expert.
        inverse_N: int64 (T*K), the place of each slot: `inverse_N[order_N[i]] == i`.
    """
    table_TK = expert_TK.unsqueeze(1) if expert_TK.ndim == 1 else expert_TK
    fits = num_experts <= MOST_EXPERTS and 0 < table_TK.shape[1] <= _TILE_SLOTS and table_TK.numel() <= MOST_SLOTS
    if fused and fits and runs_triton(expert_TK):
        return _sort_slots(table_TK, tile_count, num_experts)
    return sort_slots_reference(expert_TK, num_experts)

"""Round the number of slots of each expert to a multiple of a tile, by giving slots up or adding the next best tokens.

A grouped product computes whole tiles of rows: one that an expert fills in part costs as much as a full one (SonicMoE,
arXiv 2512.14080). Which tokens an expert takes follows from one order: first those that chose it, by score, then all
others, by score; equal scores by position. Instead of sorting the scores of all tokens, each expert searches for the
score of the last token that it takes.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from moe_kernels.triton_support import jit, tl

_BITS = 31
_CHOSEN = 1 << 30
"""Above the bits of every float32 up to 1."""


class Rounding(str, Enum):
    none = "none"
    """Experts compute what was chosen."""
    nearest = "nearest"
    """To the nearer multiple; half-way goes up."""
    up = "up"
    """Experts gain tokens that did not choose them; no choice is lost."""
    down = "down"
    """Experts lose the choices that they score lowest; no token is added."""


def rounded_counts(count_E: Tensor, num_tokens: Tensor | int, tile: int, how: Rounding) -> Tensor:
    """int64: slots of each expert after rounding: a multiple of `tile` that does not exceed the number of tokens."""
    more = {Rounding.nearest: tile // 2, Rounding.up: tile - 1, Rounding.down: 0}[how]
    most = torch.as_tensor(num_tokens, device=count_E.device) // tile * tile
    return torch.minimum((count_E + more) // tile * tile, most)


def _keys(score_TE: Tensor, chosen_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """int32 (E, T): larger is taken first; -1 is never taken. Bits of numbers in 0..1 have the order of the numbers."""
    bits_TE = score_TE.detach().to(torch.float32).clamp(0, 1).contiguous().view(torch.int32)
    key_TE = torch.where(chosen_TE, bits_TE + _CHOSEN, bits_TE)
    if valid_T is not None:
        key_TE = key_TE.masked_fill(~valid_T[:, None], -1)
    return key_TE.T.contiguous()


def take_highest_reference(key_ET: Tensor, wanted_E: Tensor) -> Tensor:
    """See `take_highest`."""
    least_E = torch.zeros_like(wanted_E, dtype=torch.int32)
    for bit in reversed(range(_BITS)):  # the largest key that enough tokens reach, bit by bit
        higher_E = least_E + (1 << bit)
        reached_E = (key_ET >= higher_E[:, None]).sum(1) >= wanted_E
        least_E = torch.where(reached_E, higher_E, least_E)
    above_ET = key_ET > least_E[:, None]
    equal_ET = key_ET == least_E[:, None]
    left_E = wanted_E - above_ET.sum(1)
    return above_ET | (equal_ET & (equal_ET.cumsum(1) <= left_E[:, None]))


@jit
def take_highest_kernel(key_ptr, wanted_ptr, take_ptr, num_tokens, BLOCK: tl.constexpr):
    """One expert. The least key is found by digits of 8 bits: how many keys have each value of the next digit?"""
    expert = tl.program_id(0)
    row = expert.to(tl.int64) * num_tokens
    lane = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    left = tl.load(wanted_ptr + expert).to(tl.int32)
    least = left * 0
    for step in range(4):
        shift = 24 - 8 * step
        count = tl.zeros((256,), tl.int32)
        for first in range(0, num_tokens, BLOCK):
            key = tl.load(key_ptr + row + first + lane, first + lane < num_tokens, other=-1)
            # Keys that agree in all digits before this one; -1 agrees with none, for keys have 31 bits.
            same = (key >= 0) & (((key ^ least) >> shift) < 256)
            digit = (key >> shift) & 255
            count += tl.histogram(tl.where(same, digit, 0), 256)  # how many have 0 is never asked
        reaching = tl.sum(count) - tl.cumsum(count, 0) + count  # keys with this digit or a higher one
        legal = (reaching >= left) & ((digits < 128) | (step > 0))  # 31 bits; all are legal where none is wanted
        digit = tl.max(tl.where(legal, digits, 0))
        left -= tl.sum(tl.where(digits > digit, count, 0))
        least += digit << shift
    seen = left * 0
    for first in range(0, num_tokens, BLOCK):
        inside = first + lane < num_tokens
        key = tl.load(key_ptr + row + first + lane, inside, other=-1)
        equal = (key == least).to(tl.int32)
        take = (key > least) | ((equal == 1) & (seen + tl.cumsum(equal, 0) <= left))
        tl.store(take_ptr + row + first + lane, take, inside)
        seen += tl.sum(equal)


@torch.library.custom_op("moe_kernels::take_highest", mutates_args=())
def _take_highest(key_ET: Tensor, wanted_E: Tensor) -> Tensor:
    num_experts, num_tokens = key_ET.shape
    take_ET = torch.empty(num_experts, num_tokens, dtype=torch.bool, device=key_ET.device)
    if take_ET.numel() > 0:
        take_highest_kernel[(num_experts,)](key_ET, wanted_E, take_ET, num_tokens, BLOCK=2048, num_warps=8)
    return take_ET


@_take_highest.register_fake
def _(key_ET, wanted_E):
    return torch.empty_like(key_ET, dtype=torch.bool)


def take_highest(key_ET: Tensor, wanted_E: Tensor, fused: bool = False) -> Tensor:
    """bool (E, T): of each row its `wanted_E` highest keys, the first of equal ones.

    Args:
        key_ET: int32, contiguous; a negative one is never taken.
        wanted_E: int64; at most the number of keys that are not negative.
        fused: by a Triton kernel; the same result.
    """
    return _take_highest(key_ET, wanted_E) if fused else take_highest_reference(key_ET, wanted_E)


def round_tokens(
    score_TE: Tensor,
    expert_TK: Tensor,
    tile: int,
    how: Rounding,
    valid_T: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots that experts compute, their number a multiple of `tile` for each.

    Args:
        score_TE: in 0..1; compared in float32.
        expert_TK: int64, the experts that each token chose; E marks a slot that is not used.
        valid_T: bool; False for tokens that no expert takes, which must have unused slots only. None takes all.
        fused: search by a Triton kernel.
    Returns:
        expert_N: int64, ascending; within an expert tokens ascend.
        token_N: int64.
        dropped: int64 scalar, chosen slots that are not among them.
    """
    num_tokens, num_experts = score_TE.shape
    chosen_TE = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=score_TE.device)
    chosen_TE = chosen_TE.scatter_(1, expert_TK, True)[:, :num_experts]
    wanted_E = rounded_counts(chosen_TE.sum(0), num_tokens if valid_T is None else valid_T.sum(), tile, how)
    take_ET = take_highest(_keys(score_TE, chosen_TE, valid_T), wanted_E, fused)
    expert_N, token_N = take_ET.nonzero(as_tuple=True)  # a wait for the device: the number of slots is data here
    return expert_N, token_N, (chosen_TE.T & ~take_ET).sum()

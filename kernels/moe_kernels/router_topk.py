"""From logits to scores, experts and weights of a token: one kernel forward, one backward.

Equal scores go to the lowest expert first, here and in the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.counting_sort import num_tiles, tile_tokens
from moe_kernels.triton_support import HAS_TRITON, INTERPRETED, block_of, jit, runs_triton, tl, triton

MOST_EXPERTS, MOST_TOP_K = 512, 16


class Rule(NamedTuple):
    """How a token's experts and weights follow from its logits."""

    top_k: int
    sigmoid: bool = False
    """Scores by a sigmoid of each logit; else a softmax over them."""
    normalize: bool = False
    """Weights are divided by their sum + 1e-20."""
    num_groups: int = 1
    """Groups of neighboring experts; a token chooses `top_groups` of them first. 1 has none."""
    top_groups: int = 1
    group_best: int = 1
    """A group is worth the sum of its so many best experts."""


class Chosen(NamedTuple):
    """What a rule made of logits."""

    score_TE: Tensor
    """In the type of the logits, with gradient."""
    weight_TK: Tensor
    """With gradient: scores, without the bias, of the chosen."""
    expert_TK: Tensor
    """int64, best first."""
    unbiased_TK: Tensor | None
    """int64: what would be chosen without the bias; None where there is none, or where experts were given."""
    tile_count: Tensor | None
    """int32 (tiles, E + 1): how often each tile of tokens chose each expert, for `sort_slots`; None where experts were
    given, and from the reference."""


def mask_groups(rank_TE: Tensor, num_groups: int, top_groups: int, group_best: int) -> Tensor:
    """Minus infinity for experts of groups that a token does not choose."""
    rank_TGe = rank_TE.unflatten(-1, (num_groups, -1))
    # Added one by one, best first: the order in which the kernel adds.
    group_TG = sum(rank_TGe.topk(group_best, dim=-1).values.unbind(-1), torch.zeros((), dtype=rank_TE.dtype))
    best_TG = group_TG.sort(dim=-1, descending=True, stable=True).indices
    chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best_TG[:, :top_groups], True)
    # Not zero: a bias can make every score of a chosen group negative.
    return rank_TGe.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(1)


def select_reference(rank_TE: Tensor, rule: Rule) -> Tensor:
    """int64 (T, K): the experts of highest rank, in the groups that are chosen."""
    if rule.num_groups > 1:
        rank_TE = mask_groups(rank_TE, rule.num_groups, rule.top_groups, rule.group_best)
    return rank_TE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]


def router_topk_reference(
    logit_TE: Tensor, rule: Rule, bias_E: Tensor | None = None, expert_TK: Tensor | None = None
) -> Chosen:
    """See `router_topk`."""
    score_TE = logit_TE.sigmoid() if rule.sigmoid else logit_TE.softmax(-1)
    unbiased_TK: Tensor | None = None
    if expert_TK is None:
        rank_TE = score_TE.detach()
        expert_TK = select_reference(rank_TE if bias_E is None else rank_TE + bias_E, rule)
        unbiased_TK = None if bias_E is None else select_reference(rank_TE, rule)
    weight_TK = score_TE.gather(1, expert_TK)
    if rule.normalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return Chosen(score_TE, weight_TK, expert_TK, unbiased_TK, None)


@jit
def _best_columns(
    rank, ROWS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK_K): columns of the K highest ranks of each row, the leftmost of equal ones first."""
    low = float("-inf")
    if BLOCK_G > 1:
        inner = tl.reshape(rank, (ROWS, BLOCK_G, BLOCK_M))
        member, group = tl.arange(0, BLOCK_M)[None, None, :], tl.arange(0, BLOCK_G)[None, :]
        rest = inner
        value = tl.zeros((ROWS, BLOCK_G), tl.float32)
        for _ in tl.static_range(GROUP_BEST):
            best, place = tl.max(rest, 2, return_indices=True, return_indices_tie_break_left=True)
            value += best
            rest = tl.where(member == place[:, :, None], low, rest)
        taken = tl.zeros((ROWS, BLOCK_G), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            best, place = tl.max(value, 1, return_indices=True, return_indices_tie_break_left=True)
            here = group == place[:, None]
            taken = tl.where(here, 1, taken)
            value = tl.where(here, low, value)
        rank = tl.reshape(tl.where(taken[:, :, None] == 1, inner, low), (ROWS, BLOCK_G * BLOCK_M))
    column, choice = tl.arange(0, BLOCK_G * BLOCK_M)[None, :], tl.arange(0, BLOCK_K)[None, :]
    found = tl.zeros((ROWS, BLOCK_K), tl.int32)
    for k in range(K):
        best, place = tl.max(rank, 1, return_indices=True, return_indices_tie_break_left=True)
        found = tl.where(choice == k, place[:, None], found)
        rank = tl.where(column == place[:, None], low, rank)
    return found


@jit
def _experts_of(found, E: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Columns have room for BLOCK_M experts a group; a group has M. A row of NaN must not lead out of bounds."""
    return tl.minimum(found // BLOCK_M * M + found % BLOCK_M, E - 1)


@jit
def router_topk_kernel(
    logit_ptr, bias_ptr, given_ptr, score_ptr, weight_ptr, expert_ptr, unbiased_ptr, count_ptr, num_tokens,
    E: tl.constexpr, M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, BIASED: tl.constexpr, GIVEN: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, which lie in one tile of TILE tokens. Groups are columns of BLOCK_M, of which M are experts."""
    low = float("-inf")
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens
    column = tl.arange(0, BLOCK_G * BLOCK_M)
    expert_of = column // BLOCK_M * M + column % BLOCK_M
    real = (column % BLOCK_M < M) & (expert_of < E)
    cell = token.to(tl.int64)[:, None] * E + expert_of[None, :]
    mask = inside[:, None] & real[None, :]
    logit = tl.load(logit_ptr + cell, mask, other=0.0)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        logit = tl.where(real[None, :], logit, low)
        power = tl.exp(logit - tl.max(logit, 1)[:, None])
        score = power / tl.sum(power, 1)[:, None]
    tl.store(score_ptr + cell, score, mask)

    choice = tl.arange(0, BLOCK_K)
    place = token.to(tl.int64)[:, None] * K + choice[None, :]
    chosen = inside[:, None] & (choice < K)[None, :]
    rank = tl.where(real[None, :], score, low)
    if GIVEN:
        expert = tl.load(given_ptr + place, chosen, other=0).to(tl.int32)
    elif BIASED:
        bias = tl.load(bias_ptr + expert_of, real, other=0.0)
        found = _best_columns(rank + bias[None, :], ROWS, BLOCK_G, BLOCK_M, K, BLOCK_K, TOP_GROUPS, GROUP_BEST)
        expert = _experts_of(found, E, M, BLOCK_M)
        found = _best_columns(rank, ROWS, BLOCK_G, BLOCK_M, K, BLOCK_K, TOP_GROUPS, GROUP_BEST)
        tl.store(unbiased_ptr + place, _experts_of(found, E, M, BLOCK_M).to(tl.int64), chosen)
    else:
        found = _best_columns(rank, ROWS, BLOCK_G, BLOCK_M, K, BLOCK_K, TOP_GROUPS, GROUP_BEST)
        expert = _experts_of(found, E, M, BLOCK_M)
    weight = tl.gather(score, expert // M * BLOCK_M + expert % M, 1)
    if NORMALIZE:
        weight = weight / (tl.sum(tl.where(chosen, weight, 0.0), 1)[:, None] + 1e-20)
    tl.store(weight_ptr + place, weight, chosen)
    if not GIVEN:
        tl.store(expert_ptr + place, expert.to(tl.int64), chosen)
        bins = tl.arange(0, BINS)
        count = tl.histogram(tl.reshape(tl.where(chosen, expert, E + 1), (ROWS * BLOCK_K,)), BINS)
        tile = (tl.program_id(0) * ROWS // TILE).to(tl.int64)
        # Integers, so that the order in which programs add does not show.
        tl.atomic_add(count_ptr + tile * (E + 1) + bins, count, (bins <= E) & (count > 0), sem="relaxed")


@jit
def router_topk_backward_kernel(
    score_ptr, expert_ptr, grad_score_ptr, grad_weight_ptr, grad_logit_ptr, num_tokens,
    E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: gradients of scores and of weights to that of logits."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < num_tokens
    column = tl.arange(0, BLOCK_E)
    cell = token.to(tl.int64)[:, None] * E + column[None, :]
    mask = inside[:, None] & (column < E)[None, :]
    score = tl.load(score_ptr + cell, mask, other=0.0)
    grad = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if HAS_SCORE:
        grad = tl.load(grad_score_ptr + cell, mask, other=0.0)
    if HAS_WEIGHT:
        choice = tl.arange(0, BLOCK_K)
        place = token.to(tl.int64)[:, None] * K + choice[None, :]
        chosen = inside[:, None] & (choice < K)[None, :]
        expert = tl.load(expert_ptr + place, chosen, other=0).to(tl.int32)
        grad_weight = tl.load(grad_weight_ptr + place, chosen, other=0.0)
        if NORMALIZE:
            taken = tl.where(chosen, tl.gather(score, expert, 1), 0.0)
            total = tl.sum(taken, 1)[:, None] + 1e-20
            grad_weight = (grad_weight - tl.sum(grad_weight * taken, 1)[:, None] / total) / total
        for k in range(K):
            here = choice[None, :] == k
            mine = tl.sum(tl.where(here, expert, 0), 1)
            grad += tl.where(
                column[None, :] == mine[:, None], tl.sum(tl.where(here, grad_weight, 0.0), 1)[:, None], 0.0
            )
    if SIGMOID:
        grad = grad * score * (1.0 - score)
    else:
        grad = score * (grad - tl.sum(grad * score, 1)[:, None])
    tl.store(grad_logit_ptr + cell, grad, mask)


def rows_of(block: int) -> int:
    """Rows of a program: sixteen numbers for each thread of four warps, or registers run out."""
    return max(min(2048 // block, 64), 1)


def _rule(parts: list[int]) -> Rule:
    """From the integers that an operator of torch can be given."""
    top_k, sigmoid, normalize, *groups = parts
    return Rule(top_k, bool(sigmoid), bool(normalize), *groups)


@torch.library.custom_op("moe_kernels::router_topk", mutates_args=())
def _router_topk(
    logit_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, rule: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r = _rule(rule)
    num_tokens, num_experts = logit_TE.shape
    score_TE, weight_TK, expert_TK, unbiased_TK, tile_count = _empty(logit_TE, bias_E, given_TK, r)
    if num_tokens > 0:
        block_g, members = block_of(r.num_groups), num_experts // r.num_groups
        rows = min(rows_of(block_g * block_of(members)), tile_tokens(r.top_k))
        router_topk_kernel[(triton.cdiv(num_tokens, rows),)](
            logit_TE.contiguous(),
            None if bias_E is None else bias_E.contiguous(),
            None if given_TK is None else given_TK.contiguous(),
            score_TE,
            weight_TK,
            expert_TK,
            unbiased_TK,
            tile_count,
            num_tokens,
            E=num_experts,
            M=members,
            BLOCK_G=block_g,
            BLOCK_M=block_of(members),
            K=r.top_k,
            BLOCK_K=block_of(r.top_k),
            TOP_GROUPS=r.top_groups,
            GROUP_BEST=r.group_best,
            SIGMOID=r.sigmoid,
            NORMALIZE=r.normalize,
            BIASED=bias_E is not None,
            GIVEN=given_TK is not None,
            TILE=tile_tokens(r.top_k),
            BINS=block_of(num_experts + 2),
            ROWS=rows,
            num_warps=4,
        )
    return score_TE, weight_TK, expert_TK, unbiased_TK, tile_count


def _empty(
    logit_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results of a launch; those that it does not make have no elements."""
    num_tokens, num_experts = logit_TE.shape
    selects = given_TK is None
    tokens, unbiased = (num_tokens if there else 0 for there in (selects, selects and bias_E is not None))
    tiles = num_tiles(tokens, rule.top_k)
    return (
        torch.empty_like(logit_TE, memory_format=torch.contiguous_format),
        logit_TE.new_empty(num_tokens, rule.top_k),
        logit_TE.new_empty(tokens, rule.top_k, dtype=torch.int64),
        logit_TE.new_empty(unbiased, rule.top_k, dtype=torch.int64),
        logit_TE.new_zeros(tiles, num_experts + 1, dtype=torch.int32),
    )


@_router_topk.register_fake
def _(logit_TE, bias_E, given_TK, rule):
    return _empty(logit_TE, bias_E, given_TK, _rule(rule))


@torch.library.custom_op("moe_kernels::router_topk_backward", mutates_args=())
def _router_topk_backward(
    score_TE: Tensor, expert_TK: Tensor, grad_score_TE: Tensor | None, grad_weight_TK: Tensor | None, rule: list[int]
) -> Tensor:
    r = _rule(rule)
    num_tokens, num_experts = score_TE.shape
    grad_logit_TE = torch.empty_like(score_TE)
    if num_tokens > 0:
        rows = rows_of(block_of(num_experts))
        router_topk_backward_kernel[(triton.cdiv(num_tokens, rows),)](
            score_TE,
            expert_TK.contiguous(),
            None if grad_score_TE is None else grad_score_TE.contiguous(),
            None if grad_weight_TK is None else grad_weight_TK.contiguous(),
            grad_logit_TE,
            num_tokens,
            E=num_experts,
            BLOCK_E=block_of(num_experts),
            K=r.top_k,
            BLOCK_K=block_of(r.top_k),
            SIGMOID=r.sigmoid,
            NORMALIZE=r.normalize,
            HAS_SCORE=grad_score_TE is not None,
            HAS_WEIGHT=grad_weight_TK is not None,
            ROWS=rows,
            num_warps=4,
        )
    return grad_logit_TE


@_router_topk_backward.register_fake
def _(score_TE, expert_TK, grad_score_TE, grad_weight_TK, rule):
    return torch.empty_like(score_TE)


class _RouterTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, rule: Rule):
        score_TE, weight_TK, *integers = _router_topk(logit_TE, bias_E, given_TK, [int(part) for part in rule])
        ctx.rule = rule
        # The same two whether experts were given or chosen: a pass that is computed again must keep what the first did.
        ctx.save_for_backward(score_TE, integers[0] if given_TK is None else given_TK)
        ctx.mark_non_differentiable(*integers)
        ctx.set_materialize_grads(False)
        return score_TE, weight_TK, *integers

    @staticmethod
    def backward(ctx, grad_score_TE, grad_weight_TK, *_):
        if grad_score_TE is None and grad_weight_TK is None:
            return None, None, None, None
        score_TE, expert_TK = ctx.saved_tensors
        rule = [int(part) for part in ctx.rule]
        return _router_topk_backward(score_TE, expert_TK, grad_score_TE, grad_weight_TK, rule), None, None, None


def refusal(device_type: str, num_experts: int, top_k: int) -> str | None:
    """Why the kernel cannot run; None if it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type != "cuda" and not INTERPRETED:
        return f"Triton kernels run on a GPU, and the logits are on the {device_type}"
    if num_experts > MOST_EXPERTS or top_k > MOST_TOP_K:
        return (
            f"it takes {MOST_TOP_K} of {MOST_EXPERTS} experts at most, not router.top_k={top_k} of "
            f"moe.num_experts={num_experts}"
        )
    return None


def router_topk(
    logit_TE: Tensor,
    rule: Rule,
    bias_E: Tensor | None = None,
    expert_TK: Tensor | None = None,
    fused: bool = False,
) -> Chosen:
    """Score, choose, weigh, count.

    Args:
        logit_TE: (T, E); the kernels take float32, all else goes to the reference.
        bias_E: float32, added to scores for the choice only.
        expert_TK: int64 experts that were chosen before, as when a pass is computed again: none are chosen then.
        fused: by Triton kernels, where they can run: see `refusal`.
    """
    fits = refusal(logit_TE.device.type, logit_TE.shape[1], rule.top_k) is None and logit_TE.dtype is torch.float32
    if not (fused and fits and runs_triton(logit_TE)):
        return router_topk_reference(logit_TE, rule, bias_E, expert_TK)
    score_TE, weight_TK, *integers = _RouterTopK.apply(logit_TE, bias_E, expert_TK, rule)
    if expert_TK is not None:
        return Chosen(score_TE, weight_TK, expert_TK, None, None)
    chosen_TK, unbiased_TK, tile_count = integers
    return Chosen(score_TE, weight_TK, chosen_TK, None if bias_E is None else unbiased_TK, tile_count)

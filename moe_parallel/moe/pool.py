"""The best k tokens of a pool, for every expert; the pool may lie on several ranks.

Scores are at least 0. Equal scores go to the earlier token: hidden states that are equal to the last bit are common,
for sequences that begin alike, and a choice among them must not depend on the layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_parallel.moe.routing import Ranks

_HISTOGRAM_CELLS = 1 << 22
"""Counters of one pass over all ranks; bounds its memory and traffic."""


def best_in_pools(score_PQE: Tensor, valid_PQ: Tensor | None, average: float) -> tuple[Tensor, Tensor]:
    """For each expert the best tokens of each pool; pools lie whole on this rank.

    Args:
        score_PQE: scores of the Q tokens of P pools.
        valid_PQ: False for padding, which is neither taken nor counted; None if there is none.
        average: experts per token: an expert takes floor(tokens * average / experts) of a pool.
    Returns:
        bool (P, Q, E), and the lowest score taken, (P, E); 0 where none is.
    """
    num_tokens, num_experts = score_PQE.shape[1:]
    if valid_PQ is None:
        take = math.floor(num_tokens * average / num_experts)
        take_P = torch.full_like(score_PQE[:, 0, 0], take, dtype=torch.int64)
        cutoff_PE = score_PQE.topk(max(take, 1), dim=1).values[:, -1]
    else:
        take_P = _take(valid_PQ.sum(1), average, num_experts)
        score_PQE = score_PQE.masked_fill(~valid_PQ.unsqueeze(-1), -1.0)
        place = (take_P - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, num_experts)
        cutoff_PE = score_PQE.sort(dim=1, descending=True).values.gather(1, place)[:, 0]
    above_PQE = score_PQE > cutoff_PE.unsqueeze(1)
    tied_PQE = score_PQE == cutoff_PE.unsqueeze(1)
    admitted_PE = take_P.unsqueeze(-1) - above_PQE.sum(1)
    chosen_PQE = above_PQE | (tied_PQE & (tied_PQE.cumsum(1) <= admitted_PE.unsqueeze(1)))
    some_P = take_P > 0
    return chosen_PQE & some_P.view(-1, 1, 1), torch.where(some_P.unsqueeze(-1), cutoff_PE, 0.0)


def best_over_ranks(
    score_PQE: Tensor, valid_PQ: Tensor | None, average: float, ranks: Ranks, *, rows: int = 1, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The same for pools that lie on several ranks, each holding some of the tokens of every pool.

    The cutoff is found digit by digit from the top of the scores' binary form: scores are not negative, so their bits
    are in the order of their values. A pass sums histograms of one digit over ranks; the result is exact.

    Args:
        rows: this rank's tokens of a pool are of so many sequences.
        parts: so many neighbors in `ranks` have consecutive parts of the same sequences.
    """
    num_experts = score_PQE.shape[-1]
    here_P = score_PQE.new_full(score_PQE.shape[:1], score_PQE.shape[1], dtype=torch.int64)
    if valid_PQ is not None:
        here_P = valid_PQ.sum(1)
        score_PQE = score_PQE.masked_fill(~valid_PQ.unsqueeze(-1), -1.0)
    take_P = _take(ranks.sum(here_P), average, num_experts)
    cutoff_PE, admitted_PE = _cutoff_over_ranks(score_PQE, take_P, ranks)
    tied_PQE = score_PQE == cutoff_PE.unsqueeze(1)
    tied_PBSE = tied_PQE.unflatten(1, (rows, tied_PQE.shape[1] // rows))
    admitted_PBE = admitted_PE.unsqueeze(1) - _earlier(tied_PBSE.sum(2), ranks, parts)
    admitted_PBSE = tied_PBSE & (tied_PBSE.cumsum(2) <= admitted_PBE.unsqueeze(2))
    chosen_PQE = (score_PQE > cutoff_PE.unsqueeze(1)) | admitted_PBSE.flatten(1, 2)
    some_P = take_P > 0
    return chosen_PQE & some_P.view(-1, 1, 1), torch.where(some_P.unsqueeze(-1), cutoff_PE, 0.0)


def _earlier(number_PBE: Tensor, ranks: Ranks, parts: int) -> Tensor:
    """How many of those that are counted for each row lie before it, in the order of whole sequences over all ranks."""
    number_RPBE = ranks.gather(number_PBE)
    in_order = number_RPBE.unflatten(0, (-1, parts)).permute(0, 3, 1, 2, 4)  # (rows of ranks, B, parts, P, E)
    before = in_order.flatten(0, 2).cumsum(0).view_as(in_order) - in_order
    return before[ranks.place // parts, :, ranks.place % parts].transpose(0, 1)


def _take(tokens_P: Tensor, average: float, num_experts: int) -> Tensor:
    return (tokens_P.double() * average / num_experts).floor().to(torch.int64)


def _cutoff_over_ranks(score_PQE: Tensor, take_P: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The value of rank `take` among all ranks' scores, (P, E), and how many of the scores equal to it are taken."""
    bits, integer = (64, torch.int64) if score_PQE.dtype == torch.float64 else (32, torch.int32)
    key_PQE = score_PQE.contiguous().view(integer).to(torch.int64)
    pools, _, experts = key_PQE.shape
    digit_bits = next(b for b in (8, 4, 2, 1) if b == 1 or pools * experts << b <= _HISTOGRAM_CELLS)
    prefix_PE = key_PQE.new_zeros(pools, experts)
    wanted_PE = take_P.unsqueeze(-1).expand(pools, experts).clone()
    for shift in range(bits - digit_bits, -1, -digit_bits):
        matching_PQE = key_PQE >= 0  # padding is negative
        if shift + digit_bits < bits:
            matching_PQE &= key_PQE >> (shift + digit_bits) == prefix_PE.unsqueeze(1)
        digit_PQE = (key_PQE >> shift) & ((1 << digit_bits) - 1)
        count_PED = key_PQE.new_zeros(pools, experts, 1 << digit_bits)
        count_PED.scatter_add_(2, digit_PQE.transpose(1, 2), matching_PQE.transpose(1, 2).to(torch.int64))
        count_PED = ranks.sum(count_PED)
        # From the highest digit down: the first at which as many as wanted are reached.
        reached_PED = count_PED.flip(2).cumsum(2)
        place_PE = (reached_PED < wanted_PE.unsqueeze(2)).sum(2).clamp(max=(1 << digit_bits) - 1)
        before_PED = torch.nn.functional.pad(reached_PED, (1, 0))
        wanted_PE = wanted_PE - before_PED.gather(2, place_PE.unsqueeze(2))[..., 0]
        prefix_PE = (prefix_PE << digit_bits) | ((1 << digit_bits) - 1 - place_PE)
    return prefix_PE.to(integer).view(score_PQE.dtype), wanted_PE


def best_at_most(score_PQE: Tensor, valid_PQ: Tensor | None, average: float, most: int) -> tuple[Tensor, Tensor]:
    """`best_in_pools` with a limit on the experts of a token.

    The soft assignment of `capped_plan` takes the place of the scores in the choice. It keeps the limit up to its
    rounding to whole tokens; what is still over goes, lowest scores first, and leaves places empty.
    """
    plan_PQE = torch.zeros_like(score_PQE, dtype=torch.float64)
    for pool, score_QE in enumerate(score_PQE):  # padding has no part in the sums
        real = slice(None) if valid_PQ is None else valid_PQ[pool]
        plan_PQE[pool, real] = capped_plan(score_QE[real], average, most)
    chosen_PQE, _ = best_in_pools(plan_PQE, valid_PQ, average)
    kept_PQE = torch.zeros_like(chosen_PQE)
    kept_PQE.scatter_(2, score_PQE.masked_fill(~chosen_PQE, -1.0).topk(most, dim=-1).indices, True)
    chosen_PQE &= kept_PQE
    lowest_PE = score_PQE.masked_fill(~chosen_PQE, float("inf")).amin(1)
    return chosen_PQE, lowest_PE.masked_fill(~chosen_PQE.any(1), 0.0)


def capped_plan(score_QE: Tensor, average: float, most: int, sharpness: float = 1e-2, iterations: int = 100) -> Tensor:
    """Soft assignment that gives each expert its share of the tokens and each token at most `most` experts.

    Maximizes <score, plan> + sharpness * entropy over plans in 0..1 with these sums, by Dykstra's projections. A
    sharpness of 0.001, as in the paper, needs ten times the iterations to meet the sums.
    Source: arXiv 2202.09368, section 3.3.

    Returns:
        float64 (Q, E).
    """
    num_tokens, num_experts = score_QE.shape
    take = math.floor(num_tokens * average / num_experts)
    if take == 0:
        return torch.zeros_like(score_QE, dtype=torch.float64)
    log_plan = score_QE.double() / sharpness
    log_row, log_cell = torch.zeros_like(log_plan[:, :1]), torch.zeros_like(log_plan)
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + math.log(take)
        # Projections on inequalities first undo what they did the last time.
        log_plan = log_plan + log_row
        log_row = (log_plan.logsumexp(1, keepdim=True) - math.log(most)).clamp(min=0)
        log_plan = log_plan - log_row + log_cell
        log_cell = log_plan.clamp(min=0)
        log_plan = log_plan - log_cell
    return log_plan.exp()

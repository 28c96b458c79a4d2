"""Which experts the tokens choose: four given routings. No router runs, so that all sides compute the same rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SKEW = 3.0
"""Rows of the busiest expert over the mean, of the skewed routing."""


def loads(expert_TK: Tensor, experts: int) -> Tensor:
    """Rows of each expert, (E,)."""
    return torch.bincount(expert_TK.flatten(), minlength=experts)


def balanced(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Every expert gets the same number of rows, up to one a slot; a token's experts differ; otherwise random."""
    device = generator.device
    evenly_T = torch.arange(tokens, device=device) % experts
    columns: list[Tensor] = []
    for _ in range(top_k):
        column_T = evenly_T[torch.randperm(tokens, generator=generator, device=device)]
        # Rows that repeat an expert trade with as many others at random: the numbers of the experts stay.
        while columns and bool((clash := _clashes(columns, column_T)).any()):
            others = torch.randperm(tokens, generator=generator, device=device)[: int(clash.sum()) + 1]
            clash[others] = True
            place = clash.nonzero().flatten()
            column_T[place] = column_T[place[torch.randperm(len(place), generator=generator, device=device)]]
        columns.append(column_T)
    return torch.stack(columns, dim=1)


def _clashes(columns: list[Tensor], column_T: Tensor) -> Tensor:
    return torch.stack([other == column_T for other in columns]).any(0)


def multinomial(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Each token draws its experts uniformly, without repeating one."""
    return torch.rand(tokens, experts, generator=generator, device=generator.device).topk(top_k).indices


def one_empty(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """As `multinomial`, but nobody draws the expert in the middle."""
    score_TE = torch.rand(tokens, experts, generator=generator, device=generator.device)
    score_TE[:, experts // 2] = -1.0
    return score_TE.topk(top_k).indices


def skewed(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Draws without repetition after Zipf's law, its exponent such that the busiest expert has SKEW times the mean.

    Raises:
        ValueError: SKEW is out of reach, because an expert gets at most one row of a token.
    """
    if SKEW * top_k > experts:
        raise ValueError(
            f"{SKEW:g} times the mean load needs at least {SKEW * top_k:g} experts, and there are {experts}"
        )
    device = generator.device
    uniform_TE = torch.rand(tokens, experts, generator=generator, device=device).clamp_min(1e-30)
    noise_TE = -(-uniform_TE.log()).log()
    rank_E = torch.arange(1, experts + 1, device=device)
    score_E = -rank_E[torch.randperm(experts, generator=generator, device=device)].float().log()
    low, high = 0.0, 8.0
    # The noise stays the same, so that the load of the best expert grows with the exponent.
    for _ in range(24):
        middle = (low + high) / 2
        choice_TK = (noise_TE + middle * score_E).topk(top_k).indices
        count_E = loads(choice_TK, experts).double()
        low, high = (middle, high) if float(count_E.max() / count_E.mean()) < SKEW else (low, middle)
    return (noise_TE + high * score_E).topk(top_k).indices


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "multinomial": multinomial,
    "skewed": skewed,
    "balanced": balanced,
    "one_empty": one_empty,
}
"""In the order of measuring."""

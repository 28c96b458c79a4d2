"""The sum of each token's slots, weighted or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine_reference(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    token_N: Tensor,
    slot_TK: Tensor | None,
    num_tokens: int,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """See `combine`."""
    wide = torch.promote_types(rows_ND.dtype, torch.float32 if weight_N is None else weight_N.dtype)
    if slot_TK is None:
        out_TD = torch.zeros(num_tokens, rows_ND.shape[1], dtype=wide, device=rows_ND.device)
        out_TD.index_add_(0, token_N, rows_ND.to(wide) if weight_N is None else rows_ND * weight_N[:, None])
    else:
        weight_TK = None if weight_N is None else weight_N[slot_TK]
        out_TD = torch.zeros((), dtype=wide, device=rows_ND.device)
        for k, slot_T in enumerate(slot_TK.unbind(1)):
            row_TD = rows_ND.index_select(0, slot_T).to(wide)
            if weight_TK is None:
                out_TD = row_TD if k == 0 else out_TD.add_(row_TD)
            else:
                weight_T1 = weight_TK[:, k : k + 1]
                out_TD = row_TD.mul_(weight_T1) if k == 0 else out_TD.addcmul_(row_TD, weight_T1)
    for term_TD in added:
        out_TD += term_TD
    return out_TD.to(rows_ND.dtype)


def combine(
    rows_ND: Tensor,
    weight_N: Tensor | None,
    token_N: Tensor,
    slot_TK: Tensor | None,
    num_tokens: int,
    added: Sequence[Tensor] = (),
    fused: bool = False,
) -> Tensor:
    """(N, D) -> (T, D): weighted sums in at least float32, rounded once to the type of the rows.

    Args:
        weight_N: one a slot; None for ones.
        token_N: the token of each slot.
        slot_TK: the places of each token's slots when every token has exactly K of them, else None.
        added: (T, D) each; added to the sum before it is rounded.
        fused: one kernel that reads every row once, in one order; else in plain torch.
    """
    return combine_reference(rows_ND, weight_N, token_N, slot_TK, num_tokens, added)

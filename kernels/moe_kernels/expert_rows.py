"""Rows times the weight of their expert: the down-projection, and the gradient of the up-projection's input."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.grouped import Groups, rows_by_weight


def expert_rows_reference(rows_NA: Tensor, weight_EAB: Tensor, groups: Groups, to_N: Tensor | None = None) -> Tensor:
    """See `expert_rows`."""
    out_NB = rows_by_weight(rows_NA, weight_EAB, groups)
    return out_NB if to_N is None else out_NB.new_empty(out_NB.shape).index_copy_(0, to_N.long(), out_NB)


def expert_rows(rows_NA: Tensor, weight_EAB: Tensor, groups: Groups, to_N: Tensor | None = None) -> Tensor:
    """(N, A) x (E, A, B) -> (N, B).

    Args:
        rows_NA: sorted by expert.
        to_N: integer, a permutation: the row of the result for each row.
    """
    return expert_rows_reference(rows_NA, weight_EAB, groups, to_N)

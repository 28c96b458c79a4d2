"""Gradient of the experts' weights: for each expert the sum over its rows of the outer product of two of them."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.grouped import Groups, rows_by_rows


def grad_weight_reference(
    left_TA: Tensor,
    left_N: Tensor | None,
    right_TB: Tensor,
    right_N: Tensor | None,
    groups: Groups,
    main_EAB: Tensor | None = None,
) -> Tensor | None:
    """See `grad_weight`."""
    left_NA = left_TA if left_N is None else left_TA.index_select(0, left_N)
    right_NB = right_TB if right_N is None else right_TB.index_select(0, right_N)
    out_EAB = rows_by_rows(left_NA, right_NB, groups, main_EAB)
    return out_EAB if main_EAB is None else None


def grad_weight(
    left_TA: Tensor,
    left_N: Tensor | None,
    right_TB: Tensor,
    right_N: Tensor | None,
    groups: Groups,
    main_EAB: Tensor | None = None,
) -> Tensor | None:
    """(N, A) x (N, B) -> (E, A, B); zeros for an expert without rows.

    Args:
        left_N, right_N: integer, the row of the operand for each slot; None if it is sorted by expert already.
        main_EAB: float32; added to, and None is returned.
    """
    return grad_weight_reference(left_TA, left_N, right_TB, right_N, groups, main_EAB)

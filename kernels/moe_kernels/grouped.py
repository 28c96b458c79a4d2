"""Products over rows that are grouped by expert, in plain torch. The reference, and the fallback of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.choice import ExpertKernel


@dataclass(frozen=True)
class Groups:
    """Where the rows of each expert lie, and how products over them are computed."""

    end_E: Tensor
    """int32: the first row after those of each expert; the last is the number of rows."""
    how: ExpertKernel
    slices: tuple[slice, ...] | None
    """The rows of each expert on the host, for the loop."""

    @staticmethod
    def of(end_E: Tensor, how: ExpertKernel, host_counts: Sequence[int] | None) -> Groups:
        """A loop needs the counts on the host."""
        slices = None
        if how is ExpertKernel.loop:
            assert host_counts is not None
            ends = list(accumulate(host_counts))
            slices = tuple(slice(start, end) for start, end in zip([0, *ends], ends))
        return Groups(end_E, how, slices)


def rows_by_weight(rows_RA: Tensor, weight_EAB: Tensor, groups: Groups) -> Tensor:
    """(R, A) x (E, A, B) -> (R, B), each row by the weight of its expert."""
    if groups.slices is None:
        return F.grouped_mm(rows_RA, weight_EAB, offs=groups.end_E)
    out_RB = rows_RA.new_empty(rows_RA.shape[0], weight_EAB.shape[2])
    for expert, rows in enumerate(groups.slices):
        if rows.stop > rows.start:
            torch.mm(rows_RA[rows], weight_EAB[expert], out=out_RB[rows])
    return out_RB


def rows_by_rows(left_RA: Tensor, right_RB: Tensor, groups: Groups, out_EAB: Tensor | None = None) -> Tensor:
    """(R, A) x (R, B) -> (E, A, B), summed over the rows of each expert: the gradient of a weight.

    Args:
        out_EAB: added to in place, in its own type, instead of making a new tensor.
    """
    if groups.slices is None:
        product_EAB = F.grouped_mm(left_RA.mT, right_RB, offs=groups.end_E)
        return product_EAB if out_EAB is None else out_EAB.add_(product_EAB)
    if out_EAB is None:
        out_EAB = left_RA.new_empty(len(groups.slices), left_RA.shape[1], right_RB.shape[1])
        for expert, rows in enumerate(groups.slices):
            torch.mm(left_RA[rows].T, right_RB[rows], out=out_EAB[expert])  # zeros where there are no rows
        return out_EAB
    for expert, rows in enumerate(groups.slices):
        if rows.stop > rows.start:
            out_EAB[expert] += left_RA[rows].T @ right_RB[rows]
    return out_EAB

"""First half of the experts: `h = x W_gate_up^T` for the rows of each expert, and `a = silu(h_gate) * h_up`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_kernels.grouped import Groups, rows_by_weight


def swiglu(hidden_N2F: Tensor) -> Tensor:
    """(N, 2F), gate columns first -> (N, F)."""
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def up_projection_reference(
    x_TD: Tensor, index_N: Tensor | None, gate_up: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    rows_ND = x_TD if index_N is None else x_TD.index_select(0, index_N)
    hidden_N2F = rows_by_weight(rows_ND, gate_up.mT, groups)
    return hidden_N2F, swiglu(hidden_N2F)


def up_projection(x_TD: Tensor, index_N: Tensor | None, gate_up: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """(T, D) x (E, 2F, D) -> pre-activation (N, 2F) and activation (N, F), sorted by expert.

    Args:
        index_N: integer, the row of x for each slot; None if x is sorted by expert already.
    """
    return up_projection_reference(x_TD, index_N, gate_up, groups)

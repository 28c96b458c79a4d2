"""Backward through the down-projection and the activation, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.grouped import Groups, rows_by_weight


def grad_hidden_reference(
    grad_TD: Tensor, index_N: Tensor | None, weight_N: Tensor | None, down: Tensor, hidden_N2F: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `grad_hidden`."""
    grad_ND = grad_TD if index_N is None else grad_TD.index_select(0, index_N)
    grad_NF = rows_by_weight(grad_ND, down, groups)
    gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    activation_NF = silu_NF * up_NF
    grad_weight_N = None
    if weight_N is not None:
        # <dO W, a> is <dO, W a>: the output of the experts need not be kept.
        grad_weight_N = (grad_NF.to(weight_N.dtype) * activation_NF).sum(-1)
        column_N1 = weight_N[:, None]
        torch.mul(grad_NF, column_N1, out=grad_NF)  # computed in the wider type, rounded once
        torch.mul(activation_NF, column_N1, out=activation_NF)
    # silu'(g) = s + g s (1 - s) = s + silu (1 - s)
    slope_NF = sigmoid_NF.addcmul(silu_NF, 1 - sigmoid_NF)
    grad_up_NF = silu_NF.mul_(grad_NF)
    grad_gate_NF = grad_NF.mul_(up_NF).mul_(slope_NF)
    return torch.cat([grad_gate_NF, grad_up_NF], dim=-1), activation_NF, grad_weight_N


def grad_hidden(
    grad_TD: Tensor, index_N: Tensor | None, weight_N: Tensor | None, down: Tensor, hidden_N2F: Tensor, groups: Groups
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of the pre-activation, and what else the same pass gives away.

    Args:
        grad_TD: gradient of the combined output.
        index_N: integer, the row of `grad_TD` for each slot; None if it is sorted by expert already.
        weight_N: combine weights; None for ones.
    Returns:
        grad_hidden_N2F; activation_NF times the combine weight, which the gradient of `down` needs; and the gradient of
        the weights, None without them.
    """
    return grad_hidden_reference(grad_TD, index_N, weight_N, down, hidden_N2F, groups)

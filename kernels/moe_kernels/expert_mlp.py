"""SwiGLU experts over rows sorted by expert: `down_e(silu(gate_e(x)) * up_e(x))` for every row of expert e.

One autograd operation with its own backward. It keeps the input rows and the pre-activation only; the activation
is computed again in the backward pass, which costs one element-wise pass and saves a third of the memory.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedMatmul(str, Enum):
    """How the per-expert products are computed."""

    loop = "loop"
    """One matmul an expert. Any dtype and size; needs the counts on the host."""
    grouped_mm = "grouped_mm"
    """`torch.nn.functional.grouped_mm`: one kernel, counts stay on the device; bf16 or fp32, rows of 16 bytes."""


def choose_grouped_matmul(rows_RD: Tensor, gate_up: Tensor, down: Tensor) -> GroupedMatmul:
    """The fastest implementation that is right for these operands.

    On a CPU the loop is at least as fast (measured, `docs/benchmarks.md`); on a GPU it would wait for the counts.
    """
    if rows_RD.device.type != "cuda" or rows_RD.dtype != torch.bfloat16:
        return GroupedMatmul.loop
    aligned = all(size * rows_RD.element_size() % 16 == 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
    return GroupedMatmul.grouped_mm if aligned else GroupedMatmul.loop


def expert_mlp_reference(rows_RD: Tensor, gate_up: Tensor, down: Tensor, count_L: Tensor) -> Tensor:
    """The same function in plain differentiable torch; the oracle of the tests."""
    outputs = []
    for rows, w_in, w_out in zip(rows_RD.split(count_L.tolist()), gate_up, down):
        gate, up = F.linear(rows, w_in).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, w_out))
    return torch.cat(outputs)


class _Groups:
    """Products over rows grouped by expert. Bound to one set of counts; not differentiable by itself."""

    def __init__(self, count_L: Tensor, host_counts: Sequence[int] | None, how: GroupedMatmul) -> None:
        self.how = how
        if how is GroupedMatmul.loop:
            sizes = list(host_counts) if host_counts is not None else count_L.tolist()
            self.slices = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes))]
        else:
            self.offsets_L = count_L.cumsum(0).to(torch.int32)

    def rows_by_weight(self, rows_RA: Tensor, weight_LAB: Tensor) -> Tensor:
        """(R, A) x (L, A, B) -> (R, B)."""
        if self.how is GroupedMatmul.grouped_mm:
            return F.grouped_mm(rows_RA, weight_LAB, offs=self.offsets_L)
        out_RB = rows_RA.new_empty(rows_RA.shape[0], weight_LAB.shape[2])
        for expert, rows in enumerate(self.slices):
            if rows.stop > rows.start:
                torch.mm(rows_RA[rows], weight_LAB[expert], out=out_RB[rows])
        return out_RB

    def rows_by_rows(self, left_RA: Tensor, right_RB: Tensor) -> Tensor:
        """(R, A) x (R, B) -> (L, A, B), summed over the rows of each expert: the gradient of a weight."""
        if self.how is GroupedMatmul.grouped_mm:
            return F.grouped_mm(left_RA.mT, right_RB, offs=self.offsets_L)
        out = left_RA.new_empty(len(self.slices), left_RA.shape[1], right_RB.shape[1])
        for expert, rows in enumerate(self.slices):
            if rows.stop > rows.start:
                torch.mm(left_RA[rows].T, right_RB[rows], out=out[expert])
            else:
                out[expert].zero_()
        return out


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, gate_up, down, groups: _Groups, recompute: bool):
        hidden_R2F = groups.rows_by_weight(rows_RD, gate_up.mT)
        gate_RF, up_RF = hidden_R2F.chunk(2, dim=-1)
        activation_RF = F.silu(gate_RF).mul_(up_RF)
        ctx.save_for_backward(rows_RD, None if recompute else hidden_R2F, gate_up, down)
        ctx.groups = groups
        return groups.rows_by_weight(activation_RF, down.mT)

    @staticmethod
    def backward(ctx, grad_RD):
        rows_RD, hidden_R2F, gate_up, down = ctx.saved_tensors
        groups: _Groups = ctx.groups
        if hidden_R2F is None:
            hidden_R2F = groups.rows_by_weight(rows_RD, gate_up.mT)
        grad_RD = grad_RD.contiguous()  # an expanded gradient (of a sum) has strides that grouped_mm refuses
        gate_RF, up_RF = hidden_R2F.chunk(2, dim=-1)
        grad_activation_RF = groups.rows_by_weight(grad_RD, down)
        sigmoid_RF = torch.sigmoid(gate_RF)
        silu_RF = gate_RF * sigmoid_RF
        grad_down = groups.rows_by_rows(grad_RD, silu_RF * up_RF) if ctx.needs_input_grad[2] else None
        grad_hidden_R2F = torch.empty_like(hidden_R2F)
        grad_gate_RF, grad_up_RF = grad_hidden_R2F.chunk(2, dim=-1)
        torch.mul(grad_activation_RF, silu_RF, out=grad_up_RF)
        # silu'(g) = s + g s (1 - s) = s + silu (1 - s)
        slope_RF = sigmoid_RF.addcmul(silu_RF, 1 - sigmoid_RF)
        torch.mul(grad_activation_RF.mul_(up_RF), slope_RF, out=grad_gate_RF)
        grad_gate_up = groups.rows_by_rows(grad_hidden_R2F, rows_RD) if ctx.needs_input_grad[1] else None
        grad_rows_RD = groups.rows_by_weight(grad_hidden_R2F, gate_up) if ctx.needs_input_grad[0] else None
        return grad_rows_RD, grad_gate_up, grad_down, None, None


def expert_mlp(
    rows_RD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    count_L: Tensor,
    host_counts: Sequence[int] | None = None,
    how: GroupedMatmul | None = None,
    recompute: bool = False,
) -> Tensor:
    """Apply each expert to its rows.

    Args:
        rows_RD: rows sorted by expert.
        gate_up: (L, 2F, D), gate rows first; the layout of `nn.Linear` and of fused public checkpoints.
        down: (L, D, F).
        count_L: int64, rows of each expert, sums to R. An expert may have none.
        host_counts: the same counts when the host knows them; saves a wait for the device.
        how: implementation; None lets `choose_grouped_matmul` decide.
        recompute: keep only the input rows and compute the pre-activation again in the backward pass.
    Returns:
        (R, D), rows in the same order.
    """
    if how is None:
        how = choose_grouped_matmul(rows_RD, gate_up, down)
    return _ExpertMLP.apply(rows_RD, gate_up, down, _Groups(count_L, host_counts, how), recompute)

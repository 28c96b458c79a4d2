"""The experts of a mixture-of-experts layer as one operation: gather, SwiGLU experts, weighted combine.

`out_t = added terms + sum over the slots s of token t of weight_s * down_e(silu(gate_e(x_t)) * up_e(x_t))`

Its backward pass is its own. It keeps the input, the pre-activation and integers: 2 T D + 4 N F + 12 N bytes in bf16.
Rows of the width of the model exist for one product at a time; the gradient of the combine weights needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.choice import Entry, ExpertKernel, Problem, choose
from moe_kernels.combine import combine, gather
from moe_kernels.expert_rows import expert_rows
from moe_kernels.grad_hidden import grad_hidden
from moe_kernels.grad_weight import grad_weight
from moe_kernels.grouped import Groups
from moe_kernels.up_projection import up_projection


def moe_mlp_reference(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token_N: Tensor,
    count_E: Tensor,
    weight_N: Tensor | None = None,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """The same function in plain differentiable torch; the oracle of the tests."""
    outputs = []
    for rows_RD, w_in, w_out in zip(x_TD[token_N].split(count_E.tolist()), gate_up, down):
        gate, up = (rows_RD @ w_in.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ w_out.T)
    rows_ND = torch.cat(outputs) if weight_N is None else torch.cat(outputs) * weight_N[:, None]
    out_TD = rows_ND.new_zeros(x_TD.shape).index_add(0, token_N, rows_ND).to(x_TD.dtype)
    return sum(added, out_TD)


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_TD, gate_up, down, weight_N, token_N, slot_TK, end_E, choice, host_counts, recompute, main_grad, *added
    ):
        groups, tiles = Groups.of(end_E, choice.how, host_counts), choice.config
        rows, index_N = (x_TD, token_N) if tiles.gathers else (gather(x_TD, token_N, tiles.combine), None)
        hidden_N2F, activation_NF = up_projection(rows, index_N, gate_up, groups, tiles.up)
        del rows
        ctx.save_for_backward(x_TD, None if recompute else hidden_N2F, gate_up, down, weight_N, token_N, slot_TK, end_E)
        ctx.choice, ctx.host_counts, ctx.main_grad = choice, host_counts, main_grad
        if weight_N is None and not added and _moves_rows(token_N, slot_TK):
            return expert_rows(activation_NF, down.mT, groups, tiles.down, to_N=token_N)
        rows_ND = expert_rows(activation_NF, down.mT, groups, tiles.down)
        return combine(rows_ND, weight_N, token_N, slot_TK, x_TD.shape[0], added, fused=tiles.combine)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, hidden_N2F, gate_up, down, weight_N, token_N, slot_TK, end_E = ctx.saved_tensors
        groups, tiles = Groups.of(end_E, ctx.choice.how, ctx.host_counts), ctx.choice.config
        main_gate_up, main_down = ctx.main_grad or (None, None)
        weight_tile = tiles.grad_weight if ctx.main_grad is None else tiles.add_weight
        grad_added = [grad_TD if needed else None for needed in ctx.needs_input_grad[11:]]
        grad_TD = grad_TD.contiguous()  # an expanded gradient (of a sum) has strides that kernels refuse
        # Kernels may gather as they load. Otherwise rows are copied into order, one operand at a time.
        index_N = token_N if tiles.gathers else None

        def in_order(rows_TD: Tensor) -> Tensor:
            return rows_TD if tiles.gathers else gather(rows_TD, token_N, tiles.combine)

        if hidden_N2F is None:
            hidden_N2F, _ = up_projection(in_order(x_TD), index_N, gate_up, groups, tiles.up)
        grad_rows = in_order(grad_TD)
        grad_hidden_N2F, activation_NF, grad_weight_N = grad_hidden(
            grad_rows, index_N, weight_N, down, hidden_N2F, groups, tiles.grad_hidden
        )
        del hidden_N2F
        grad_gate_up = grad_down = grad_x_TD = None
        if ctx.needs_input_grad[2] or main_down is not None:
            grad_down = grad_weight(grad_rows, index_N, activation_NF, None, groups, weight_tile, main_down)
        del activation_NF, grad_rows
        if ctx.needs_input_grad[1] or main_gate_up is not None:
            grad_gate_up = grad_weight(
                grad_hidden_N2F, None, in_order(x_TD), index_N, groups, weight_tile, main_gate_up
            )
        if ctx.needs_input_grad[0]:
            if _moves_rows(token_N, slot_TK):
                grad_x_TD = expert_rows(grad_hidden_N2F, gate_up, groups, tiles.grad_rows, to_N=token_N)
            else:
                grad_rows_ND = expert_rows(grad_hidden_N2F, gate_up, groups, tiles.grad_rows)
                grad_x_TD = combine(grad_rows_ND, None, token_N, slot_TK, x_TD.shape[0], fused=tiles.combine)
        return grad_x_TD, grad_gate_up, grad_down, grad_weight_N, *[None] * 7, *grad_added


def _moves_rows(token_N: Tensor | None, slot_TK: Tensor | None) -> bool:
    """Every row of the input has one slot, so that outputs are rows in another order and not sums."""
    return token_N is None or (slot_TK is not None and slot_TK.shape[1] == 1)


def moe_mlp(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token_N: Tensor | None,
    count_E: Tensor,
    weight_N: Tensor | None = None,
    slot_TK: Tensor | None = None,
    *,
    host_counts: Sequence[int] | None = None,
    how: ExpertKernel = ExpertKernel.auto,
    table: tuple[Entry, ...] | None = None,
    recompute: bool = False,
    added: Sequence[Tensor] = (),
    main_grad: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply to each row its experts and add up what they return.

    Args:
        x_TD: one row a token.
        gate_up: (E, 2F, D), gate rows first; the layout of `nn.Linear` and of fused public checkpoints.
        down: (E, D, F).
        token_N: integer, the row of `x_TD` of each slot; slots are sorted by expert. None: slot n is row n.
        count_E: integer, slots of each expert; sums to N. An expert may have none.
        weight_N: combine weight of each slot, float32 (or float64), with gradient; None stands for ones.
        slot_TK: integer, the places of each token's slots when every token has exactly K; None for any other list.
        host_counts: `count_E` when the host knows it; saves the loop a wait for the device.
        how: implementation; `auto` looks it up. Explicit ones are refused where they cannot run.
        table: measured shapes that `auto`, and the tiles of `triton`, are taken from; None for the shipped ones.
        recompute: keep no pre-activation and compute it again in the backward pass.
        added: tensors (T, D) that are added to the result in the same pass: the output of shared experts, the residual.
        main_grad: float32 buffers like `gate_up` and `down`. Weight gradients are added to them, with no sum in a
            narrower type between micro-batches, and not returned.
    Returns:
        (T, D) in the type of `x_TD`. A token without slots gets only what is added.
    """
    num_rows = x_TD.shape[0] if token_N is None else token_N.shape[0]
    choice = choose(how, Problem.of(x_TD, gate_up, num_rows), table)
    if choice.how is ExpertKernel.loop and host_counts is None:
        host_counts = count_E.tolist()  # the one wait for the device, for both passes
    if token_N is None and (weight_N is not None or added):
        token_N = torch.arange(x_TD.shape[0], dtype=torch.int32, device=x_TD.device)
        slot_TK = token_N.unsqueeze(1)
    weight_N = None if weight_N is None else weight_N.contiguous()
    # int32 halves what is kept for the backward pass.
    integers = (None if index is None else index.to(torch.int32).contiguous() for index in (token_N, slot_TK))
    end_E = count_E.cumsum(0, dtype=torch.int32)
    return _MoEMLP.apply(
        x_TD.contiguous(), gate_up, down, weight_N, *integers, end_E, choice, host_counts, recompute, main_grad, *added
    )

"""The operation of this project, once for each of its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.gpu.peers.base import Peer
from moe_kernels.choice import Entry, ExpertKernel, device_name
from moe_kernels.counting_sort import sort_slots
from moe_kernels.moe_mlp import moe_mlp
from moe_kernels.tuning import starting_config


class _Ours(Peer):
    """What cannot run an input says so itself, with a ValueError at the first call."""

    how: ClassVar[ExpertKernel]

    def table(self) -> tuple[Entry, ...] | None:
        """Measured shapes to choose from; None takes the shipped ones."""
        return None

    def forward(self, main: tuple[Tensor, Tensor] | None = None) -> Tensor:
        expert_TK, shape = self.inputs.expert_TK, self.inputs.case.shape
        gate_up, down = self.weights
        order_N, count_E, place_N = sort_slots(expert_TK, shape.experts, fused=self.how is ExpertKernel.triton)
        return moe_mlp(
            self.x_TD,
            gate_up,
            down,
            token_N=order_N // shape.top_k,
            count_E=count_E,
            weight_N=self.weight_TK.flatten()[order_N],
            slot_TK=place_N.view_as(expert_TK),
            how=self.how,
            table=self.table(),
            main_grad=main,
        )

    def accumulate(self, main: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """In one pass: the kernels add to the buffers themselves."""
        gate_up, down = main
        out_TD = self.forward((gate_up, down))
        inputs = (self.x_TD, self.weight_TK)
        grad_x_TD, grad_weight_TK = torch.autograd.grad(out_TD, inputs, self.inputs.grad_TD)
        return out_TD.detach(), grad_x_TD, grad_weight_TK


class OursTriton(_Ours):
    """Kernels of this project, with the tiles of the shipped table, or untuned ones that gather rows."""

    how = ExpertKernel.triton


class OursCopied(_Ours):
    """Kernels of this project, untuned, on rows that were copied into order: loaded by warps of their own on Hopper."""

    how = ExpertKernel.triton

    def table(self) -> tuple[Entry, ...] | None:
        case, device = self.inputs.case, self.x_TD.device
        if device.type != "cuda":
            return None
        shape, kind = case.shape, str(self.x_TD.dtype).removeprefix("torch.")
        config = starting_config(device, copies=True)
        sizes = (shape.dim, shape.expert_dim, shape.experts, 1)
        return (Entry(device_name(device), kind, *sizes, ExpertKernel.triton, config),)


class OursGrouped(_Ours):
    """Products by torch, everything else as in the operation."""

    how = ExpertKernel.grouped_mm


class OursLoop(_Ours):
    """One product an expert. On a GPU it waits for the counts."""

    how = ExpertKernel.loop

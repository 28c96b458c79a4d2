"""DeepSpeed's experts (0.19.8) as its layer runs them on one rank: torch's grouped product, or its Triton one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from deepspeed.module_inject.auto_ep_layer import (
    combine_from_routed,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.base import Peer


class DeepSpeedGrouped(Peer):
    """Sort, gather, pad each expert's rows to a multiple of 8, three products, unpad, weighted sum."""

    triton: ClassVar[bool] = False

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        super().__init__(inputs, tuned)
        shape = inputs.case.shape
        with torch.device("meta"):
            self.experts = GroupedExperts(shape.dim, shape.expert_dim, shape.experts, disable_triton_grouped_mm=True)
        self.experts.use_triton_grouped_mm = self.triton
        self.weights = tuple(nn.Parameter(weight.detach()) for weight in self.weights)
        self.experts.w1, self.experts.w3, self.experts.w2 = self.weights

    def pack(self) -> Sequence[Tensor]:
        if self.triton:
            self.needs_gpu()
        return *self.inputs.weights.gate_and_up, self.inputs.weights.down

    def forward(self) -> Tensor:
        shape, expert_TK = self.inputs.case.shape, self.inputs.expert_TK
        order_N = torch.argsort(expert_TK.flatten(), stable=True)
        count_E = count_tokens_per_expert(expert_TK, shape.experts)
        rows, index, padded_E, total = permute_by_local_expert(self.x_TD[order_N // shape.top_k], count_E)
        rows = unpermute_by_local_expert(self.experts(rows, padded_E), index, total)
        size = (1, *self.x_TD.shape)
        return combine_from_routed(
            rows, self.weight_TK, order_N, shape.top_k, score_apply="post", combine_impl="weighted_sum", shape=size
        ).squeeze(0)

    def of_expert(self, grads: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        return torch.cat((grads[0][expert], grads[1][expert])), grads[2][expert]


class DeepSpeedTriton(DeepSpeedGrouped):
    """The same with its Triton products, which choose among six configurations by themselves at the first call."""

    triton = True

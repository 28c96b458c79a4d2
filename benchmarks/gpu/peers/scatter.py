"""ScatterMoE (0.3.0): one Triton product that gathers and scatters; activation and combine are torch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scattermoe.mlp import GLUMLP
from torch import Tensor, nn

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.base import Peer


class ScatterMoE(Peer):
    """Its GLU layer. It has up rows first, and combines in the type of the rows."""

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        super().__init__(inputs, tuned)
        self.needs_gpu()
        shape = inputs.case.shape
        with torch.device("meta"):
            self.layer = GLUMLP(shape.dim, shape.expert_dim, shape.experts, shape.top_k)
        self.weights = tuple(nn.Parameter(weight.detach()) for weight in self.weights)
        self.layer.experts.weight, self.layer.output_experts.weight = self.weights

    def pack(self) -> Sequence[Tensor]:
        self.needs_gpu()
        return self.inputs.weights.up_first, self.inputs.weights.down

    def forward(self) -> Tensor:
        return self.layer(self.x_TD, self.weight_TK.to(self.x_TD.dtype), self.inputs.expert_TK)

    def of_expert(self, grads: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        up, gate = grads[0][expert].chunk(2)
        return torch.cat((gate, up)), grads[1][expert]

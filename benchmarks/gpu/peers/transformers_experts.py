"""The experts of `transformers`, with its implementation on torch's grouped product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.base import Peer


class Transformers(Peer):
    """Qwen3's experts: SwiGLU, no bias, which is what every shape here has."""

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        super().__init__(inputs, tuned)
        shape = inputs.case.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.dim,
            moe_intermediate_size=shape.expert_dim,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        gate_up, down = (nn.Parameter(weight.detach()) for weight in self.weights)
        self.experts.gate_up_proj, self.experts.down_proj = gate_up, down
        self.weights = (gate_up, down)

    def forward(self) -> Tensor:
        return self.experts(self.x_TD, self.inputs.expert_TK, self.weight_TK)

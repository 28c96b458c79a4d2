"""SonicMoE (sonic-moe 0.1.2.post1) on QuACK's Hopper kernels."""

from __future__ import annotations

from collections.abc import Sequence

import quack.gemm_interface as gemms
import torch
from quack.autotuner import AutotuneConfig
from sonicmoe.enums import ActivationType
from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection
from torch import Tensor

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.base import Peer

_SEARCHES = (gemms.gemm_tuned, gemms.gemm_gated_tuned, gemms.gemm_dgated_tuned)
_CONFIGURATIONS = {search: list(search.configs) for search in _SEARCHES}


class Sonic(Peer):
    """The steps of its own layer after the router, with a given choice; gate and up interleaved, its native layout.

    Untuned it runs QuACK's default configuration of the device; tuned, QuACK tries each of its configurations for each
    product and each number of tokens.
    """

    tunes = True

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        super().__init__(inputs, tuned)
        self.needs_gpu()
        self.expert_TK = inputs.expert_TK.to(torch.int32)

    def pack(self) -> Sequence[Tensor]:
        self.needs_gpu()
        return self.inputs.weights.interleaved, self.inputs.weights.down

    def set_tuning(self, tuned: bool) -> None:
        for search, all_of_them in _CONFIGURATIONS.items():
            default = [AutotuneConfig(config=gemms.default_config(self.inputs.device))]
            search.configs = all_of_them if tuned else default

    def forward(self) -> Tensor:
        shape, (tokens, top_k) = self.inputs.case.shape, self.expert_TK.shape
        rows = tokens * top_k

        def integers(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=self.expert_TK.device)

        count, start, token, scatter, inverse = map(integers, (shape.experts, shape.experts + 1, rows, rows, rows))
        TC_topk_router_metadata_triton(self.expert_TK, shape.experts, count, start, token, scatter, inverse)
        gate_up, down = (weight.permute(1, 2, 0) for weight in self.weights)
        swiglu = ActivationType.SWIGLU
        activation, hidden = _UpProjection.apply(
            self.x_TD, gate_up, None, start, rows, top_k, token, scatter, inverse, None, False, swiglu, False, False
        )
        return _DownProjection.apply(
            activation, hidden, down, None, self.weight_TK, start, tokens, top_k, token, scatter, inverse, None, False,
            swiglu,
        )  # fmt: skip

    def of_expert(self, grads: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        return torch.cat((grads[0][expert][0::2], grads[0][expert][1::2])), grads[1][expert]

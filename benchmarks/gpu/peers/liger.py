"""Liger's fused experts (liger-kernel 0.8.5): Triton, gathers in the kernels."""

from __future__ import annotations

import torch
from liger_kernel.ops import fused_moe_kernels
from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from torch import Tensor

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.base import Peer


class Liger(Peer):
    """Untuned it runs the configuration that it ships for LIGER_FUSED_MOE_AUTOTUNE=0, which the harness sets."""

    tunes = True

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        super().__init__(inputs, tuned)
        self.needs_gpu()
        self.expert_TK = inputs.expert_TK.to(torch.int32)

    def set_tuning(self, tuned: bool) -> None:
        """It reads the variable while it is imported, so this can only be verified here."""
        searches = not fused_moe_kernels._AUTOTUNE_DISABLED
        assert searches is tuned, "LIGER_FUSED_MOE_AUTOTUNE was set after the import"

    def forward(self) -> Tensor:
        return LigerFusedMoEFunction.apply(self.x_TD, *self.weights, self.expert_TK, self.weight_TK)

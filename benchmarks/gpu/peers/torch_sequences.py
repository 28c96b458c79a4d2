"""Sequences of torch's own operations: the plain one, and the one that torchtitan's layer makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.peers.base import Peer


class TorchGrouped(Peer):
    """Sort, gather, one product for gate and up, activation, one product down, weighted sum of each token's rows."""

    def forward(self) -> Tensor:
        shape, expert_TK = self.inputs.case.shape, self.inputs.expert_TK
        gate_up, down = self.weights
        order_N = expert_TK.flatten().argsort(stable=True)
        # A bincount would wait for the device.
        count_E = torch.zeros(shape.experts, dtype=torch.int32, device=expert_TK.device)
        count_E.index_add_(0, expert_TK.flatten(), torch.ones_like(order_N, dtype=torch.int32))
        end_E = count_E.cumsum(0, dtype=torch.int32)
        hidden_N2F = F.grouped_mm(self.x_TD[order_N // shape.top_k], gate_up.mT, offs=end_E)
        gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
        rows_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, down.mT, offs=end_E)
        rows_TKD = rows_ND[order_N.argsort()].view(*expert_TK.shape, shape.dim)
        return (rows_TKD * self.weight_TK.unsqueeze(-1)).sum(1).to(self.x_TD.dtype)


class TitanEquivalent(Peer):
    """What torchtitan's layer calls, one after another; the layer itself cannot be had without its trainer.

    Three separate products, weights of gate and up in two tensors; combine weights applied to the rows in float32;
    rows added into the tokens by index. (torchtitan, `models/common/moe.py` and `token_dispatcher.py`, August 2026.)
    """

    def pack(self) -> Sequence[Tensor]:
        return *self.inputs.weights.gate_and_up, self.inputs.weights.down

    def forward(self) -> Tensor:
        shape, flat_N = self.inputs.case.shape, self.inputs.expert_TK.flatten()
        gate, up, down = self.weights
        count_E = torch.histc(flat_N.float(), bins=shape.experts, min=0, max=shape.experts)
        order_N = flat_N.argsort(stable=True)
        token_N = order_N // shape.top_k
        end_E = count_E.cumsum(0, dtype=torch.int32)
        rows_ND = self.x_TD[token_N]
        hidden_NF = F.silu(F.grouped_mm(rows_ND, gate.mT, offs=end_E)) * F.grouped_mm(rows_ND, up.mT, offs=end_E)
        rows_ND = F.grouped_mm(hidden_NF, down.mT, offs=end_E)
        rows_ND = (rows_ND.float() * self.weight_TK.flatten()[order_N].unsqueeze(1)).to(self.x_TD.dtype)
        return torch.zeros_like(self.x_TD).index_add(0, token_N, rows_ND)

    def of_expert(self, grads: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        return torch.cat((grads[0][expert], grads[1][expert])), grads[2][expert]

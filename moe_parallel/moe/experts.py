"""Experts: the bank of routed experts, and the SwiGLU network that shared experts and dense layers use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.expert_mlp import expert_mlp


def local_tensor(parameter: Tensor) -> Tensor:
    """The shard that this rank holds of an expert-parallel parameter; the parameter itself without parallelism."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class RoutedExperts(nn.Module):
    """A bank of SwiGLU experts in stacked tensors, over rows that are sorted by expert."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        self.recompute = False
        """Compute the hidden activations again in the backward pass. Set by the engine."""

    def forward(
        self,
        rows_RD: Tensor,
        count_L: Tensor,
        host_counts: Sequence[int] | None = None,
        transfer: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(R, D) -> (R, D).

        Args:
            count_L: int64, rows of each expert computed here; `host_counts`: the same on the host.
            transfer: see `Ticket.transfer`.
        """
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        if transfer is not None:
            gate_up, down = transfer(gate_up), transfer(down)
        return expert_mlp(rows_RD, gate_up, down, count_L, host_counts, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, gate_up={tuple(self.gate_up.shape)}, down={tuple(self.down.shape)}"


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: dense layers, and all shared experts of a layer fused into one network."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

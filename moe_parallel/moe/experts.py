"""Experts: the bank of routed experts, and the SwiGLU network that shared experts and dense layers use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.choice import ExpertKernel
from moe_kernels.moe_mlp import moe_mlp
from moe_parallel.moe.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Ties one `combine` to one `dispatch`, and tells the experts what they need to know."""

    arrived: Routing
    """Of the rows here among the experts that are computed here. Its weights are None where they stay at the source."""
    host_counts: Sequence[int] | None
    """Slots of each of these experts, when the host knows them."""
    transfer: Callable[[Tensor], Tensor] | None = None
    """Stacked weights of this rank's own experts (L, ...) to those of all experts that it computes (L', ...), with
    gradient; None if they are the same."""
    sums_here: bool = False
    """The experts work on the tokens themselves: their result is that of the layer, and nothing is left to combine."""


def local_tensor(parameter: Tensor) -> Tensor:
    """The shard that this rank holds of an expert-parallel parameter; the parameter itself without parallelism."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class RoutedExperts(nn.Module):
    """A bank of SwiGLU experts in stacked tensors."""

    def __init__(self, num_experts: int, dim: int, expert_dim: int, kernel: ExpertKernel = ExpertKernel.auto) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        self.kernel = kernel
        self.recompute = False
        """Compute the hidden activations again in the backward pass. Set by the engine."""

    def forward(self, rows_RD: Tensor, ticket: Ticket, added: Sequence[Tensor] = ()) -> Tensor:
        """For each row the weighted sum of what its experts return, (R, D) -> (R, D).

        Args:
            ticket: of the dispatch that brought the rows.
            added: tensors (R, D) that are added to the result in the same pass.
        """
        routing = ticket.arrived
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        if ticket.transfer is not None:
            gate_up, down = ticket.transfer(gate_up), ticket.transfer(down)
        return moe_mlp(
            rows_RD,
            gate_up,
            down,
            routing.token_N,
            routing.count_E,
            routing.weight_N,
            routing.slot_TK,
            host_counts=ticket.host_counts,
            how=self.kernel,
            recompute=self.recompute,
            added=added,
        )

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

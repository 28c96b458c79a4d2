"""Experts: the bank of routed experts, and the SwiGLU network that shared experts use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.choice import Choice, Entry, ExpertKernel, Problem, choose
from moe_kernels.moe_mlp import moe_mlp
from moe_parallel.moe.routing import Routing


class Part(ABC):
    """A group of the experts that are computed here, and their rows, which may still be on the way."""

    host_counts: Sequence[int] | None
    """Slots of each of these experts, when the host knows them."""

    @abstractmethod
    def receive(self, token: Tensor) -> tuple[Tensor, Routing]:
        """Wait for the rows that `token` stands for: (R, D), and their routing among the experts of this part. Its
        weights are None where they stay at the source."""

    @abstractmethod
    def send(self, rows_RD: Tensor) -> Tensor:
        """Start the way back of what the experts made of these rows, in the same order; a token for `combine`."""


@dataclass(frozen=True, kw_only=True)
class LocalPart(Part):
    """Rows that are here and stay here."""

    arrived: Routing
    host_counts: Sequence[int] | None

    def receive(self, token: Tensor) -> tuple[Tensor, Routing]:
        return token, self.arrived

    def send(self, rows_RD: Tensor) -> Tensor:
        return rows_RD


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Ties one `combine` to one `dispatch`, and tells the experts what they need to know."""

    parts: Sequence[Part]
    """Consecutive groups of equally many experts, computed one after the other."""
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

    def __init__(
        self,
        num_experts: int,
        dim: int,
        expert_dim: int,
        kernel: ExpertKernel = ExpertKernel.auto,
        table: tuple[Entry, ...] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        self.kernel = kernel
        self.table = table
        self.recompute = False
        """Compute the hidden activations again in the backward pass. Set by the engine."""
        self.output = nn.Identity()
        """What each part's rows pass through, before they travel: hooks see them there."""

    def forward(self, rows: Sequence[Tensor], ticket: Ticket, added: Sequence[Tensor] = ()) -> list[Tensor]:
        """For each row the weighted sum of what its experts return, (R, D) -> (R, D), part by part.

        Results of one part travel back while the next is computed. All parts in one call: weights are gathered once.

        Args:
            rows, ticket: of one dispatch.
            added: tensors (R, D) that are added to the result of the only part in the same pass.
        Returns:
            what the ticket's `combine` takes.
        """
        gate_up, down = local_tensor(self.gate_up), local_tensor(self.down)
        if ticket.transfer is not None:
            gate_up, down = ticket.transfer(gate_up), ticket.transfer(down)
        count = len(ticket.parts)
        # One split: its gradient is one concatenation, where slices would each make a whole tensor of zeros.
        weights = [(gate_up, down)]
        if count > 1:
            weights = list(zip(gate_up.split(len(gate_up) // count), down.split(len(down) // count)))
        results = []
        for token, part, (gate_up, down) in zip(rows, ticket.parts, weights, strict=True):
            rows_RD, routing = part.receive(token)
            rows_RD = self.output(self._compute(rows_RD, routing, gate_up, down, part.host_counts, added))
            results.append(part.send(rows_RD))
        return results

    def _compute(
        self,
        rows_RD: Tensor,
        routing: Routing,
        gate_up: Tensor,
        down: Tensor,
        host_counts: Sequence[int] | None,
        added: Sequence[Tensor],
    ) -> Tensor:
        return moe_mlp(
            rows_RD,
            gate_up,
            down,
            routing.token_N,
            routing.count_E,
            routing.weight_N,
            routing.slot_TK,
            host_counts=host_counts,
            how=self.kernel,
            table=self.table,
            recompute=self.recompute,
            added=added,
        )

    @property
    def local_shape(self) -> torch.Size:
        """(experts, twice their width, D) of `gate_up` on this rank."""
        return local_tensor(self.gate_up).shape

    def choice(self, device: torch.device, dtype: torch.dtype, num_rows: int) -> Choice:
        """What will compute that many rows on this rank."""
        num_experts, double, dim = self.local_shape
        return choose(self.kernel, Problem(device, dtype, dim, double // 2, num_experts, num_rows), self.table)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, gate_up={tuple(self.gate_up.shape)}, down={tuple(self.down.shape)}"


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: all shared experts of a layer fused into one network."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The first two of the three products, for those who have something to do before the last."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up

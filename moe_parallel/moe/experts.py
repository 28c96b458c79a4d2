"""Experts: the bank of routed experts, and the SwiGLU network that shared experts use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.choice import Choice, Entry, ExpertKernel, Problem, choose
from moe_kernels.moe_mlp import moe_mlp
from moe_parallel.moe.adjugate import AdjugatePart, Adjugates
from moe_parallel.moe.expert_forms import Base, Form, FullForm, Weights, made_again
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

    gate_up: nn.Parameter
    down: nn.Parameter
    """These two in the full and ternary forms; a form names its parameters."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        expert_dim: int,
        kernel: ExpertKernel = ExpertKernel.auto,
        table: tuple[Entry, ...] | None = None,
        adjugates: Adjugates | None = None,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.expert_dim = num_experts, dim, expert_dim
        self.form = FullForm() if form is None else form
        shapes = self.form.shapes(num_experts, dim, expert_dim)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.names = tuple(shapes)
        """Of the stacked parameters."""
        self.adjugates = adjugates
        self.kernel = kernel
        self.table = table
        self.recompute = False
        """Compute the hidden activations again in the backward pass. Set by the engine."""
        self.keeps_made = False
        """Keep what a form makes of the parameters until the backward pass. For layers that are computed again as a
        whole: there this pass is part of the backward pass. Set by the engine."""
        self.output = nn.Identity()
        """What each part's rows pass through, before they travel: hooks see them there."""

    def forward(
        self, rows: Sequence[Tensor], ticket: Ticket, added: Sequence[Tensor] = (), base: Base | None = None
    ) -> list[Tensor]:
        """For each row the weighted sum of what its experts return, (R, D) -> (R, D), part by part.

        Results of one part travel back while the next is computed. All parts in one call: weights are gathered once.

        Args:
            rows, ticket: of one dispatch.
            added: tensors (R, D) that are added to the result of the only part in the same pass.
            base: what the layer's experts share, for a form that uses one.
        Returns:
            what the ticket's `combine` takes.
        """
        stacked = [local_tensor(getattr(self, name)) for name in self.names]
        if ticket.transfer is not None:
            stacked = [ticket.transfer(weight) for weight in stacked]
        count = len(ticket.parts)
        # One split: its gradient is one concatenation, where slices would each make a whole tensor of zeros.
        of_parts: list[Sequence[Tensor]] = [stacked]
        if count > 1:
            of_parts = list(zip(*(weight.split(len(weight) // count) for weight in stacked), strict=True))
        adjugates: Sequence[AdjugatePart | None] = [None] * count
        if self.adjugates is not None:
            held = local_tensor(self.adjugates.gate_up), local_tensor(self.adjugates.down)
            adjugates = self.adjugates.parts(*held, count, ticket.transfer)
        results = []
        for token, part, mine, adjugate in zip(rows, ticket.parts, of_parts, adjugates, strict=True):
            weights = dict(zip(self.names, mine, strict=True))
            gate_up, down = self.form.gate_up(weights, base), self.form.down(weights, base)  # while rows travel
            rows_RD, routing = part.receive(token)
            with self._keeping(gate_up, down, weights, base):
                out_RD = self._compute(rows_RD, routing, gate_up, down, part.host_counts, added)
            if adjugate is not None:
                out_RD = self._compute(rows_RD, *adjugate.of_groups(routing, part.host_counts), [out_RD])
            results.append(part.send(self.output(out_RD)))
        return results

    def _keeping(self, gate_up: Tensor, down: Tensor, weights: Weights, base: Base | None) -> AbstractContextManager:
        """What autograd keeps of the experts' matrices: themselves, or what they are made of."""
        if self.keeps_made or not self.form.makes_weights:
            return nullcontext()
        form = self.form
        return made_again((gate_up, down), (lambda: form.gate_up(weights, base), lambda: form.down(weights, base)))

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
        """(experts, twice their width, D) of the gate and up matrices on this rank."""
        num_local = local_tensor(getattr(self, self.names[0])).shape[0]
        return torch.Size((num_local, 2 * self.expert_dim, self.dim))

    def choice(self, device: torch.device, dtype: torch.dtype, num_rows: int) -> Choice:
        """What will compute that many rows on this rank."""
        num_experts, double, dim = self.local_shape
        return choose(self.kernel, Problem(device, dtype, dim, double // 2, num_experts, num_rows), self.table)

    def extra_repr(self) -> str:
        shapes = (f"{name}={tuple(getattr(self, name).shape)}" for name in self.names)
        return f"experts={self.num_experts}, {', '.join(shapes)}"


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

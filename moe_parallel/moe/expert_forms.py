"""Forms of experts: how the matrices that are computed with follow from the parameters that are trained.

Experts are stored in one form and always computed as whole matrices, so every kernel and dispatcher serves every form.
What is made of the parameters lives for one pass only: autograd makes it again instead of keeping it (`made_again`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Weights = Mapping[str, Tensor]
"""Stacked parameters by name, experts first."""
Base = tuple[Tensor, Tensor]
"""`gate_up` (2F, D) and `down` (D, F) of a network that all experts of a layer share."""


class ExpertForm(str, Enum):
    full = "full"
    """Each expert has matrices of its own."""
    delta = "delta"
    """Each expert is a base, which all experts of a layer share, plus a difference of rank delta_rank (FlexMoRE)."""
    ternary = "ternary"
    """Experts compute with weights of -1, 0 or 1 times a scale; what is trained is not rounded (MoTE)."""


class Form(ABC):
    """How a bank's matrices follow from its parameters. Gate rows come before up rows everywhere."""

    uses_base = False
    """`base` below is given; for others it is None."""
    makes_weights = True
    """The matrices are others than the parameters."""

    @abstractmethod
    def shapes(self, num_experts: int, dim: int, expert_dim: int) -> dict[str, tuple[int, ...]]:
        """Of the stacked parameters, by name."""

    @abstractmethod
    def gate_up(self, weights: Weights, base: Base | None) -> Tensor:
        """(E, 2F, D), with gradient, in the type of the parameters."""

    @abstractmethod
    def down(self, weights: Weights, base: Base | None) -> Tensor:
        """(E, D, F), with gradient, in the type of the parameters."""


class FullForm(Form):
    makes_weights = False

    def shapes(self, num_experts: int, dim: int, expert_dim: int) -> dict[str, tuple[int, ...]]:
        return {"gate_up": (num_experts, 2 * expert_dim, dim), "down": (num_experts, dim, expert_dim)}

    def gate_up(self, weights: Weights, base: Base | None) -> Tensor:
        return weights["gate_up"]

    def down(self, weights: Weights, base: Base | None) -> Tensor:
        return weights["down"]


@dataclass(frozen=True)
class DeltaForm(Form):
    """`W_e = base + out_e in_e`, for gate, up and down each (as in FlexMoRE)."""

    rank: int
    uses_base = True

    def shapes(self, num_experts: int, dim: int, expert_dim: int) -> dict[str, tuple[int, ...]]:
        return {
            "gate_up_out": (num_experts, 2 * expert_dim, self.rank),
            "gate_up_in": (num_experts, 2 * self.rank, dim),
            "down_out": (num_experts, dim, self.rank),
            "down_in": (num_experts, self.rank, expert_dim),
        }

    def gate_up(self, weights: Weights, base: Base | None) -> Tensor:
        assert base is not None
        # Gate and up of each expert are matrices of their own.
        factors = (weights[name].unflatten(1, (2, -1)).flatten(0, 1) for name in ("gate_up_out", "gate_up_in"))
        made: Tensor = _Delta.apply(base[0].unflatten(0, (2, -1)), *factors)
        return made.unflatten(0, (-1, 2)).flatten(1, 2)

    def down(self, weights: Weights, base: Base | None) -> Tensor:
        assert base is not None
        return _Delta.apply(base[1].unsqueeze(0), weights["down_out"], weights["down_in"])


class _Delta(torch.autograd.Function):
    """Products of `out` (A, m, r) and `into` (A, r, n), plus `base` (B, m, n) in turns. A is a multiple of B."""

    @staticmethod
    def forward(ctx, base: Tensor, out: Tensor, into: Tensor) -> Tensor:
        ctx.save_for_backward(out, into)
        ctx.turns = base.shape[0]
        made = torch.bmm(out, into)
        made.unflatten(0, (-1, ctx.turns)).add_(base)
        return made

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        out, into = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            grad.unflatten(0, (-1, ctx.turns)).sum(0) if needed[0] else None,
            torch.bmm(grad, into.mT) if needed[1] else None,
            torch.bmm(out.mT, grad) if needed[2] else None,
        )


class TernaryForm(FullForm):
    """Weights are rounded as in BitNet b1.58 (arXiv 2402.17764), by which MoTE (arXiv 2506.14435) trains its experts;
    activations are not."""

    makes_weights = True

    def gate_up(self, weights: Weights, base: Base | None) -> Tensor:
        return ternary(weights["gate_up"].unflatten(1, (2, -1))).flatten(1, 2)

    def down(self, weights: Weights, base: Base | None) -> Tensor:
        return ternary(weights["down"])


def ternary(matrices: Tensor) -> Tensor:
    """Each matrix of the last two dimensions as `s * clip(round(W / s), -1, 1)` with the scale s = mean |W|.

    The gradient is that of the result, straight through. Scales and quotients are float32, or float64 for such weights.
    A matrix of zeros stays one.
    """
    return _Ternary.apply(matrices)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrices: Tensor) -> Tensor:
        wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        scale = wide.abs().mean(dim=(-2, -1), keepdim=True)
        return ((wide / scale.clamp(min=torch.finfo(wide.dtype).tiny)).round_().clamp_(-1, 1) * scale).to(matrices)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


@contextmanager
def made_again(made: Sequence[Tensor], makers: Sequence[Callable[[], Tensor]]) -> Iterator[None]:
    """Within it autograd keeps none of the tensors `made`: when it needs one, its maker makes it again.

    So matrices of all layers need not lie in memory between the forward and the backward pass, nor does FSDP gather
    their parameters for nothing.
    """
    storages = [tensor.untyped_storage() for tensor in made]

    def pack(tensor: Tensor) -> Tensor | int:
        storage = tensor.untyped_storage()
        return next((place for place, own in enumerate(storages) if own is storage), tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return makers[packed]()

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        storages.clear()  # what is packed may hold on to `pack`

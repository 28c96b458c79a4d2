"""Nothing is timed that is not right: results against float64, on a sample, and no number that nobody wrote.

Sampled are tokens at random (their output and the gradients of their input and combine weights) and two experts, the
one with most and the one with fewest rows (all of their weight gradients). Everything else must at least be finite:
the memory that a side gets holds NaN beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.routing_sets import loads

SAMPLED_TOKENS = 256
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative error in the norm. Rounding to bf16 costs 2^-9 a number, 2 to 5e-3 over the chain of a layer; a missing
slot, a wrong weight or a wrong row costs more than 1e-1. In float32 the same is 1e-6; 1e-4 still forbids tf32."""


@dataclass
class Result:
    """What one forward and backward pass of a side gave."""

    out_TD: Tensor
    grad_x_TD: Tensor
    grad_weight_TK: Tensor
    grad_weights: Sequence[Tensor]
    """Of the weights, in the layout of the side."""
    of_expert: Callable[[Sequence[Tensor], int], tuple[Tensor, Tensor]]
    """From those, the gradients (2F, D), gate first, and (D, F) of one expert."""


def expert_mlp(x_RD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert in plain torch."""
    gate, up = (x_RD @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


@dataclass
class Reference:
    """The sampled results in float64, from the same inputs."""

    inputs: Inputs
    token_S: Tensor = field(init=False)
    experts: tuple[int, ...] = field(init=False)
    out_SD: Tensor = field(init=False)
    grad_x_SD: Tensor = field(init=False)
    grad_weight_SK: Tensor = field(init=False)
    grad_experts: dict[int, tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        case = self.inputs.case
        generator = torch.Generator(self.inputs.device).manual_seed(1)
        every_T = torch.randperm(case.tokens, generator=generator, device=self.inputs.device)
        self.token_S = every_T[:SAMPLED_TOKENS]
        count_E = loads(self.inputs.expert_TK, case.shape.experts)
        self.experts = tuple(sorted({int(count_E.argmin()), int(count_E.argmax())}))
        self._of_tokens()
        self.grad_experts = {expert: self._of_expert(expert) for expert in self.experts}

    def _of_tokens(self) -> None:
        """The outputs are sums over slots, so that each expert's part and its gradients are added up by themselves."""
        inputs, shape = self.inputs, self.inputs.case.shape
        x_SD, grad_SD = (tensor[self.token_S].double() for tensor in (inputs.x_TD, inputs.grad_TD))
        weight_SK, expert_SK = inputs.weight_TK[self.token_S].double(), inputs.expert_TK[self.token_S]
        self.out_SD, self.grad_x_SD = torch.zeros_like(x_SD), torch.zeros_like(x_SD)
        self.grad_weight_SK = torch.zeros_like(weight_SK)
        for expert in range(shape.experts):
            row, slot = (expert_SK == expert).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            rows_RD, weight_R = x_SD[row].requires_grad_(), weight_SK[row, slot].requires_grad_()
            w_in, w_out = (w[expert].double() for w in (inputs.weights.gate_up, inputs.weights.down))
            part_RD = expert_mlp(rows_RD, w_in, w_out) * weight_R[:, None]
            grad_rows_RD, grad_weight_R = torch.autograd.grad(part_RD, (rows_RD, weight_R), grad_SD[row])
            self.out_SD.index_add_(0, row, part_RD.detach())
            self.grad_x_SD.index_add_(0, row, grad_rows_RD)
            self.grad_weight_SK[row, slot] = grad_weight_R

    def _of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        inputs = self.inputs
        w_in, w_out = (w[expert].double().requires_grad_() for w in (inputs.weights.gate_up, inputs.weights.down))
        token_R, slot_R = (inputs.expert_TK == expert).nonzero(as_tuple=True)
        weighted_RD = inputs.grad_TD[token_R].double() * inputs.weight_TK[token_R, slot_R].double()[:, None]
        out_RD = expert_mlp(inputs.x_TD[token_R].double(), w_in, w_out)
        grad_in, grad_out = torch.autograd.grad(out_RD, (w_in, w_out), weighted_RD)
        return grad_in, grad_out


@dataclass
class Verdict:
    """How far a result is from the reference, and why it is refused, if it is."""

    errors: dict[str, float]
    refused: str | None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the norms. Where zeros are expected (an expert without rows) any other number is infinitely wrong."""
    expected = expected.double()
    distance, size = float((found.double() - expected).norm()), float(expected.norm())
    if size == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return distance / size


def check(result: Result, reference: Reference) -> Verdict:
    """The gate that every side passes before it is timed."""
    for name, tensor in _parts(result):
        # Expert by expert, since a mask of all of them would take half as much memory as the gradients.
        bad = sum(int((~part.isfinite()).sum()) for part in (tensor if tensor.ndim == 3 else (tensor,)))
        if bad:
            return Verdict({}, f"{name} has {bad} of {tensor.numel()} numbers that are not finite")
    token_S = reference.token_S
    errors = {
        "out": relative_error(result.out_TD[token_S], reference.out_SD),
        "grad_x": relative_error(result.grad_x_TD[token_S], reference.grad_x_SD),
        "grad_weight": relative_error(result.grad_weight_TK[token_S], reference.grad_weight_SK),
    }
    return _judge(errors | expert_errors(result, reference), result.out_TD.dtype)


def expert_errors(result: Result, reference: Reference, start: float = 0.0) -> dict[str, float]:
    """Of the weight gradients of the sampled experts, the worse of each; `start` is what the tensors held before."""
    errors = {"grad_gate_up": 0.0, "grad_down": 0.0}
    for expert, expected in reference.grad_experts.items():
        found = result.of_expert(result.grad_weights, expert)
        for name, one, other in zip(errors, found, expected):
            errors[name] = max(errors[name], relative_error(one - start, other))
    return errors


def check_added(result: Result, start: float, reference: Reference) -> Verdict:
    """The gate of gradient accumulation: `grad_weights` are float32 buffers that held `start` everywhere."""
    return _judge(expert_errors(result, reference, start), result.out_TD.dtype)


def _parts(result: Result) -> list[tuple[str, Tensor]]:
    named = [("out", result.out_TD), ("grad_x", result.grad_x_TD), ("grad_weight", result.grad_weight_TK)]
    return named + [(f"gradient {index} of the weights", grad) for index, grad in enumerate(result.grad_weights)]


def _judge(errors: dict[str, float], dtype: torch.dtype) -> Verdict:
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= ALLOWED[dtype]]
    return Verdict(errors, f"{', '.join(wrong)}; {ALLOWED[dtype]:.0e} allowed" if wrong else None)

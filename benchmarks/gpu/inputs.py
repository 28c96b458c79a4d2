"""The tensors of one case, the same for all sides; and layouts of the weights that some peers want."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.gpu.routing_sets import ROUTINGS
from benchmarks.gpu.shapes import Shape, Work

SEED = 20260101


@dataclass(frozen=True)
class Case:
    """One column of the comparison: a layer, a number of tokens, a routing."""

    shape: Shape
    tokens: int
    routing: str

    @property
    def key(self) -> str:
        """Names the case in the results."""
        return f"{self.shape.name}/{self.tokens}/{self.routing}"


@dataclass
class Weights:
    """Experts of a layer: (E, 2F, D), gate rows first, and (E, D, F). Other layouts are made once, when asked for."""

    gate_up: Tensor
    down: Tensor

    @staticmethod
    def random(shape: Shape, device: torch.device, dtype: torch.dtype) -> Weights:
        """Normal, of the scale that keeps the size of activations."""
        generator = torch.Generator(device).manual_seed(SEED)

        def draw(rows: int, columns: int) -> Tensor:
            weight = torch.empty(shape.experts, rows, columns, device=device, dtype=dtype)
            for expert in weight:  # one at a time: no copy of all of them in a wider type
                expert.normal_(std=columns**-0.5, generator=generator)
            return weight

        return Weights(draw(2 * shape.expert_dim, shape.dim), draw(shape.dim, shape.expert_dim))

    @cached_property
    def gate_and_up(self) -> tuple[Tensor, Tensor]:
        """Two tensors (E, F, D)."""
        gate, up = self.gate_up.chunk(2, dim=1)
        return gate.contiguous(), up.contiguous()

    @cached_property
    def up_first(self) -> Tensor:
        """(E, 2F, D), up rows first."""
        return torch.cat(self.gate_up.chunk(2, dim=1)[::-1], dim=1)

    @cached_property
    def interleaved(self) -> Tensor:
        """(E, 2F, D): row 0 of gate, row 0 of up, row 1 of gate, ..."""
        gate, up = self.gate_up.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Whatever has been made of the weights: not part of what a forward pass keeps."""
        made = self.__dict__
        layouts = (*made.get("gate_and_up", ()), made.get("up_first"), made.get("interleaved"))
        return (self.gate_up, self.down, *(layout for layout in layouts if layout is not None))


@dataclass
class Inputs:
    """Random numbers of unit size, never zeros: products of zeros draw less power and run faster."""

    case: Case
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    x_TD: Tensor = field(init=False)
    grad_TD: Tensor = field(init=False)
    """Gradient of the output."""
    expert_TK: Tensor = field(init=False)
    """int64."""
    weight_TK: Tensor = field(init=False)
    """Combine weights, float32."""

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        return Work(self.case.shape, self.case.tokens, self.dtype.itemsize)

    def __post_init__(self) -> None:
        shape, tokens = self.case.shape, self.case.tokens
        generator = torch.Generator(self.device).manual_seed(SEED + tokens)
        size = (tokens, shape.dim)
        self.x_TD = torch.randn(size, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)
        self.grad_TD = torch.randn(size, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)
        self.expert_TK = ROUTINGS[self.case.routing](tokens, shape.experts, shape.top_k, generator)
        logits_TK = torch.randn(tokens, shape.top_k, generator=generator, device=self.device)
        # A token with one slot would have weight 1 and nothing to check.
        self.weight_TK = logits_TK.softmax(-1) if shape.top_k > 1 else logits_TK.sigmoid()

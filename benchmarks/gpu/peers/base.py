"""What the harness needs of a side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.gpu.inputs import Inputs


class Refused(Exception):
    """A side cannot compute this case; the reason goes into the table."""


class Peer(ABC):
    """One implementation of the layer, made for one case: the weights repacked if it wants them so.

    What is made in the constructor is not timed: layouts of the weights, and the types of the given routing. What
    depends on the routing (sorting, counting, tile tables) is done in `forward` and is timed.
    """

    tunes: ClassVar[bool] = False
    """It can search for its own best configuration, for minutes; `--tune` names the sides that do."""

    def __init__(self, inputs: Inputs, tuned: bool) -> None:
        """
        Raises:
            Refused: this side has no way to compute these inputs.
        """
        self.inputs = inputs
        self.x_TD = inputs.x_TD.detach().requires_grad_()
        self.weight_TK = inputs.weight_TK.detach().requires_grad_()
        self.weights = tuple(weight.detach().requires_grad_() for weight in self.pack())
        if self.tunes:
            self.set_tuning(tuned)

    def pack(self) -> Sequence[Tensor]:
        """The weights in the layout of this side."""
        return self.inputs.weights.gate_up, self.inputs.weights.down

    def set_tuning(self, tuned: bool) -> None:  # noqa: B027 - sides without a search need nothing
        """Search for the best configuration at the first call, or take the one that the side ships."""

    @abstractmethod
    def forward(self) -> Tensor:
        """(T, D), with a graph."""

    def backward(self, out_TD: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, of the combine weights, and of each of `weights`."""
        return torch.autograd.grad(out_TD, (self.x_TD, self.weight_TK, *self.weights), self.inputs.grad_TD)

    def accumulate(self, main: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A step of gradient accumulation: the weight gradients are added to float32 buffers.

        Returns:
            The output, and the gradients of x and of the combine weights.
        """
        out_TD = self.forward()
        grad_x_TD, grad_weight_TK, *grads = self.backward(out_TD)
        for buffer, grad in zip(main, grads):
            buffer.add_(grad)
        return out_TD.detach(), grad_x_TD, grad_weight_TK

    def of_expert(self, grads: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        """Weight gradients of one expert as (2F, D), gate rows first, and (D, F)."""
        return grads[0][expert], grads[1][expert]

    def needs_gpu(self) -> None:
        """
        Raises:
            Refused: the inputs are on a CPU.
        """
        if self.inputs.device.type != "cuda":
            raise Refused("its kernels need an NVIDIA GPU")

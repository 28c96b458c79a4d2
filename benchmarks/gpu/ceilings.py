"""What the device reaches at best, measured in every run: its clock depends on its temperature and its power limit."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import Inputs


def matmul_flops_per_second(device: Device, size: int, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """Square products for a while: median rate of the first tenth, and of the last half, when the clock has settled."""
    left, right = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device.device, dtype=dtype)
    for _ in range(3):
        torch.mm(left, right, out=out)
    once = device.seconds(lambda: torch.mm(left, right, out=out))
    stamps = [device.stamp()]
    for _ in range(max(10, int(seconds / max(once, 1e-6)))):
        torch.mm(left, right, out=out)
        stamps.append(device.stamp())
    device.synchronize()
    times = [before.until(after) for before, after in pairwise(stamps)]
    first, last = times[: max(1, len(times) // 10)], times[len(times) // 2 :]
    return {part: 2 * size**3 / statistics.median(some) for part, some in (("burst", first), ("sustained", last))}


def copy_bytes_per_second(device: Device, size: int, repeats: int = 20) -> float:
    """Bytes read plus bytes written of a copy, median."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 2):
        device.flush()
        start = device.stamp()
        target.copy_(source)
        times.append((start, device.stamp()))
    device.synchronize()
    return 2 * size / statistics.median(start.until(end) for start, end in times[2:])


@dataclass
class BmmChain:
    """The six products of a layer whose experts have equally many rows, by torch.bmm, and nothing else.

    No routing, no gather, no activation, no combine: what a layer would take if only its products cost time and they
    ran as fast as the vendor's batched ones. The bound that all sides are divided by. Where the rows do not divide by
    the experts, each expert gets one more.
    """

    inputs: Inputs

    def __post_init__(self) -> None:
        case, weights = self.inputs.case, self.inputs.weights
        rows = -(-case.shape.rows(case.tokens) // case.shape.experts)

        def draw(width: int) -> Tensor:
            tensor = torch.empty(case.shape.experts, rows, width, device=weights.down.device, dtype=weights.down.dtype)
            return tensor.normal_()

        self._x_ERD, self._grad_ERD = draw(case.shape.dim), draw(case.shape.dim)
        self._activation_ERF, self._grad_hidden_ER2F = draw(case.shape.expert_dim), draw(2 * case.shape.expert_dim)

    def forward(self) -> None:
        """Up and down."""
        weights = self.inputs.weights
        torch.bmm(self._x_ERD, weights.gate_up.mT)
        torch.bmm(self._activation_ERF, weights.down.mT)

    def backward(self, _: None) -> None:
        """Of the activation, of the down weights, of x, of the up weights."""
        weights = self.inputs.weights
        torch.bmm(self._grad_ERD, weights.down)
        torch.bmm(self._grad_ERD.mT, self._activation_ERF)
        torch.bmm(self._grad_hidden_ER2F, weights.gate_up)
        torch.bmm(self._grad_hidden_ER2F.mT, self._x_ERD)


def ceilings(device: Device, dry: bool) -> dict[str, float]:
    """Of the device as a whole. TFLOP/s of bf16 products, TB/s of a copy."""
    size, seconds, copied = (256, 0.05, 2**20) if dry else (8192, 5.0, 2**30)
    rates = matmul_flops_per_second(device, size, seconds, torch.bfloat16)
    return {
        "matmul_size": size,
        "burst_tflops": rates["burst"] / 1e12,
        "sustained_tflops": rates["sustained"] / 1e12,
        "copy_tb_per_s": copy_bytes_per_second(device, copied) / 1e12,
    }

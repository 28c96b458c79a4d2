"""Which implementation computes the experts: chosen by device, type and shape, never by trying at run time."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from moe_kernels.triton_support import HAS_TRITON, INTERPRETED


class ExpertKernel(str, Enum):
    """How the products of the experts are computed."""

    auto = "auto"
    """The table of measured shapes, else grouped_mm on a GPU; the loop on a CPU."""
    triton = "triton"
    """Kernels of this project: gather, products, activation and combine fused; bf16 or fp16 on a GPU."""
    grouped_mm = "grouped_mm"
    """`torch.nn.functional.grouped_mm`: one kernel a product, counts stay on the device; rows of 16 bytes."""
    loop = "loop"
    """One matmul an expert. Any dtype and size; needs the counts on the host."""


def choose(how: ExpertKernel, x_TD: Tensor, gate_up: Tensor, down: Tensor) -> ExpertKernel:
    """The implementation for these operands.

    On a CPU the loop is at least as fast as grouped_mm (measured, `docs/benchmarks.md`); on a GPU it would wait for
    the counts.

    Raises:
        ValueError: an explicit choice cannot run on these operands.
    """
    if how is ExpertKernel.auto:
        if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
            return ExpertKernel.loop
        return ExpertKernel.loop if refusal(ExpertKernel.grouped_mm, x_TD, gate_up, down) else ExpertKernel.grouped_mm
    why = refusal(how, x_TD, gate_up, down)
    if why is not None:
        raise ValueError(f"moe.expert_kernel={how.value} cannot compute these experts: {why}")
    return how


def refusal(how: ExpertKernel, x_TD: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Why an implementation cannot run on these operands; None if it can."""
    dim, expert_dim = gate_up.shape[2], down.shape[2]
    if how is ExpertKernel.grouped_mm:
        if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"torch has no grouped_mm for {x_TD.dtype}"
        if any(size * x_TD.element_size() % 16 for size in (dim, expert_dim)):
            return f"model.dim={dim} and moe.expert_dim={expert_dim} must fill rows of 16 bytes"
    if how is ExpertKernel.triton:
        if not HAS_TRITON:
            return "triton is not installed"
        if not (x_TD.is_cuda or INTERPRETED):
            return f"Triton kernels run on a GPU, and the rows are on {x_TD.device.type}"
        if x_TD.dtype not in (torch.bfloat16, torch.float16) and not INTERPRETED:
            return f"its products are of bf16 or fp16, not {x_TD.dtype}"
        step = 16 if INTERPRETED else 64
        if dim % step or expert_dim % step:
            return f"model.dim={dim} and moe.expert_dim={expert_dim} must be multiples of {step}"
    return None

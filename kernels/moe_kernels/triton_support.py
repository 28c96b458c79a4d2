"""Whether Triton kernels can run here. The one place that imports Triton, which not every machine has."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # a laptop without wheels of Triton: everything else still works
    triton, tl = None, None
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on tensors of the CPU. Slow; for tests."""


def jit(kernel: Any) -> Any:
    """`triton.jit`; the plain function, which nobody calls, where Triton is missing."""
    return triton.jit(kernel) if HAS_TRITON else kernel


def runs_triton(tensor: Tensor) -> bool:
    """Kernels can run on this tensor."""
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def block_of(size: int) -> int:
    """The smallest power of two that is not below `size`: a legal extent of a block."""
    return 1 << max(size - 1, 0).bit_length()


def descriptor(matrix: Tensor, block: tuple[int, int]) -> Any:
    """A view of a contiguous matrix that Hopper's copy engine loads and stores in blocks; zeros beyond its edges."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert matrix.is_contiguous()
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def interpreter_needs_upcast(dtype: torch.dtype) -> bool:
    """The interpreter multiplies the bit patterns of bf16 operands of a dot: cast them first."""
    return INTERPRETED and dtype is torch.bfloat16

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


SPECIALIZES = HAS_TRITON and triton.__version__.startswith("3.6.")
"""Loops over tiles can give warps roles of their own on Hopper. Triton 3.9 cannot compile them: it halves the rows of a
tile for two groups of warps, but not the block that the copy engine loads."""


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


if HAS_TRITON:
    UPCAST = tl.constexpr(INTERPRETED)
else:
    UPCAST = None


@jit
def dot(a, b, sum):
    """sum + a b, in float32. The interpreter would multiply the bit patterns of bf16, so there they are cast first."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


def num_programs(device: torch.device, most: int, per_processor: int = 1) -> int:
    """Programs that share `most` steps: as many as run at once."""
    if device.type != "cuda":
        return min(most, 3)
    return min(most, torch.cuda.get_device_properties(device).multi_processor_count * per_processor)


def reserve_descriptors(device: torch.device) -> None:
    """Let kernels make descriptors of their own: Triton asks for the memory that they lie in."""
    if device.type == "cuda":
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))

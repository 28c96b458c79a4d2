"""What tensor parallelism may split: linear layers by their outputs or inputs, and the dense network made of them."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_parallel.moe.experts import local_tensor
from moe_parallel.sequence_exchange import SequenceExchange


class Split(Enum):
    """Which side of a weight is divided over tensor-parallel ranks; the value is its dimension of the weight."""

    outputs = 0
    inputs = 1


class SplitLinear(nn.Linear):
    """A linear layer without bias. Split by outputs, a rank has some of them; by inputs, a part of their sum."""

    def __init__(self, inputs: int, outputs: int, split: Split) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_tensor(self.weight))


class DenseNetwork(nn.Module):
    """`down(silu(gate(x)) * up(x))`, the feed-forward network of dense layers.

    Gate and up are two weights here, unlike in shared experts, so that a split by outputs cuts both alike.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = SplitLinear(dim, hidden_dim, Split.outputs)
        self.up = SplitLinear(dim, hidden_dim, Split.outputs)
        self.down = SplitLinear(hidden_dim, dim, Split.inputs)
        self.exchange: SequenceExchange | None = None
        """Set by the engine where ranks share sequences."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.exchange is None:
            return self.network(x_BSD)
        (x_BSD,) = self.exchange.gather(x_BSD)
        return self.exchange.scatter(self.network(x_BSD))

    def network(self, x_BSD: Tensor) -> Tensor:
        """On the tokens that are here, with the part of the width that is here."""
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))


def add_split(x: Tensor, bias: Tensor, exchange: SequenceExchange) -> Tensor:
    """`x + bias`, where each tensor-parallel rank has an equal part of `x`, in the order of the ranks, and all of the
    bias. Its gradient is this rank's part of the whole, zeros elsewhere: the sum over the ranks is all of it."""
    width = x.shape[-1]
    return x + bias[exchange.tp_rank * width :][:width]


def normalize_split(x: Tensor, norm: nn.RMSNorm, exchange: SequenceExchange) -> Tensor:
    """`norm` of a vector of which each tensor-parallel rank has an equal part, in the order of the ranks."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    width = x.shape[-1]
    weight = norm.weight[exchange.tp_rank * width :][:width]
    assert norm.eps is not None
    mean_square = exchange.mean(wide.square().mean(-1, keepdim=True))
    return (wide * (mean_square + norm.eps).rsqrt()).to(x.dtype) * weight

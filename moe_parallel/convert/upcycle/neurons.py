"""Neurons of SwiGLU networks: which of them are alike, and which are large. Decided when they are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.lazy import Lazy, whole
from moe_parallel.convert.upcycle.between import Network

Pick = Callable[[], Tensor]
"""Gives numbers of neurons, int64; asked when something is read."""


class Picked(Lazy):
    """Rows of a tensor, or elements along another dimension, whose numbers follow from weights."""

    def __init__(self, inner: Lazy, dim: int, count: int, pick: Pick, text: str) -> None:
        shape = list(inner.shape)
        shape[dim] = count
        self.inner, self.dim, self.pick, self.text = inner, dim, pick, text
        self.shape, self.dtype = tuple(shape), inner.dtype

    def read(self, box: Box) -> Tensor:
        (offsets, sizes), dim = (list(box[0]), list(box[1])), self.dim
        index = self.pick()[offsets[dim] : offsets[dim] + sizes[dim]]
        offsets[dim], sizes[dim] = 0, self.inner.shape[dim]
        return self.inner.read((tuple(offsets), tuple(sizes))).index_select(dim, index)

    def moment(self, order: int) -> Lazy:
        return Picked(self.inner.moment(order), self.dim, self.shape[self.dim], self.pick, self.text)

    def __str__(self) -> str:
        return f"{self.text} of {self.inner}"


def picked(network: Network, count: int, pick: Pick, text: str) -> Network:
    """A network of some neurons of another one, in the order of their numbers as picked."""
    gate, up, down = network
    return Picked(gate, 0, count, pick, text), Picked(up, 0, count, pick, text), Picked(down, 1, count, pick, text)


def neurons(network: Network) -> Tensor:
    """All weights of each neuron as a row: (F, 3 D), float32. Read whole."""
    gate, up, down = (whole(weight).float() for weight in network)
    return torch.cat([gate, up, down.T], dim=1)


def largest(network: Network, count: int) -> Tensor:
    """The neurons with the largest Euclidean norm of all their weights, ascending by number."""
    return neurons(network).norm(dim=1).topk(count).indices.sort().values


def alike(network: Network, wanted: Network) -> Tensor:
    """For each neuron of `wanted` one of `network`, each once, so that their weights point the same way.

    Greedy by cosine: the best pair first. A network with its neurons in another order is put right exactly.
    """
    ours, theirs = (torch.nn.functional.normalize(neurons(n), dim=1) for n in (wanted, network))
    return greedy_matching(ours @ theirs.T)


def greedy_matching(score_FF: Tensor) -> Tensor:
    """int64 (F): the column of each row, when the highest score is taken first, then the highest of what is left.

    Pairs that are each other's best are taken together: no later choice could part them.
    """
    score_FF = score_FF.clone()
    column_F = torch.full(score_FF.shape[:1], -1, dtype=torch.int64)
    row_F = torch.arange(len(column_F))
    while bool((column_F < 0).any()):
        best_F = score_FF.argmax(1)
        mutual_F = (score_FF.argmax(0)[best_F] == row_F) & (column_F < 0)
        rows = mutual_F.nonzero().flatten()
        column_F[rows] = best_F[rows]
        score_FF[rows] = -torch.inf
        score_FF[:, best_F[rows]] = -torch.inf
    return column_F

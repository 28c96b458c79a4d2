"""Tensors that are described before they are read: every kind, in random combinations, by random boxes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_kernels.hashing import hash_key
from moe_parallel.convert.lazy import (
    Cast,
    Computed,
    Constant,
    Given,
    Joined,
    Lazy,
    Part,
    Repeated,
    Scaled,
    Stacked,
    Sum,
    columns_of,
    expert_of,
    rows_of,
    whole,
)
from moe_parallel.convert.upcycle.drop import Chosen, Redrawn, Replaced
from moe_parallel.convert.upcycle.map import Drawn, Noise
from moe_parallel.model.initialize import InitConfig
from tests.convert.models import DENSE
from tests.convert.upcycle.networks import Trained

FLOATS = torch.float32
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
KINDS = ("part", "dropped", "joined", "scaled", "sum", "cast", "stacked", "repeated", "replaced", "leaf")


@st.composite
def leaves(draw, shape: tuple[int, ...]) -> Lazy:
    seed = draw(st.integers(0, 5))
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kinds = ["given", "constant", "computed", "noise"] + ["drawn"] * (len(shape) >= 2)
    match draw(st.sampled_from(kinds)):
        case "given":
            return Given(value, "given")
        case "constant":
            return Constant(shape, float(seed))
        case "computed":
            return Computed(shape, FLOATS, lambda: value * 2, "computed")
        case "noise":
            return Noise(shape, 0.5, seed, "noise")
        case _:
            return Drawn("layers.0.attention.query.weight", shape, DENSE, InitConfig(), seed)


@st.composite
def trees(draw, shape: tuple[int, ...], depth: int, kinds: tuple[str, ...] = KINDS) -> Lazy:
    """A lazy tensor of this shape, made of others. A leaf where the shape does not allow the kind that was drawn."""
    if depth == 0:
        return draw(leaves(shape))

    def inner(*inner_shape: int) -> Lazy:
        return draw(trees(inner_shape, depth - 1))

    match draw(st.sampled_from(kinds)):
        case "part":
            before, after = (draw(st.tuples(*(st.integers(0, 2) for _ in shape))) for _ in range(2))
            larger = inner(*(a + n + b for a, n, b in zip(before, shape, after)))
            return Part(larger, (before, shape))
        case "dropped":
            return expert_of(inner(3, *shape), draw(st.integers(0, 2)))
        case "joined":
            dim = draw(st.integers(0, len(shape) - 1))
            cut = draw(st.integers(0, shape[dim]))
            sizes = [[*shape[:dim], size, *shape[dim + 1 :]] for size in (cut, shape[dim] - cut)]
            return Joined([inner(*sizes[0]), inner(*sizes[1])], dim)
        case "scaled":
            return Scaled(inner(*shape), draw(st.sampled_from([0.5, 3.0, 0.0])))
        case "sum":
            return Sum([inner(*shape), inner(*shape)], [0.25, 2.0])
        case "cast":
            return Cast(Cast(inner(*shape), torch.bfloat16), FLOATS)
        case "stacked" if len(shape) > 1 and shape[0] > 0:
            return Stacked([inner(*shape[1:]) for _ in range(shape[0])])
        case "repeated" if shape[0] % 2 == 0:
            return Repeated(inner(shape[0] // 2, *shape[1:]), 2)
        case "replaced" if len(shape) == 2 and shape[0] > 0 and shape[1] > 0:
            dim = draw(st.integers(0, 1))
            chosen = Chosen(hash_key(depth), draw(st.integers(1, shape[dim])), shape[dim], dim)
            old = inner(*shape)
            return Replaced(old, draw(st.sampled_from([Redrawn(old, chosen, 3, "x"), inner(*shape)])), chosen)
        case _:
            return draw(leaves(shape))


def slices(box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(*box))


@pytest.mark.parametrize("kind", KINDS)
@SETTINGS
@given(st.data())
def test_a_box_is_a_part_of_the_whole(kind: str, data) -> None:
    """Would catch: offsets that are counted from the wrong start, the part before a cut twice, a row of an expert next
    to it, random numbers or statistics that depend on what else is read. No tolerance: nothing is computed otherwise.
    """
    num_dims = 2 if kind == "replaced" else data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.sampled_from([4, 6, 5, 1])) for _ in range(num_dims))
    lazy = data.draw(trees(shape, 3, (kind,)))
    value = whole(lazy)
    assert (tuple(value.shape), value.dtype) == (shape, lazy.dtype) == (lazy.shape, FLOATS)
    cuts = [sorted(data.draw(st.integers(1, size)) for _ in range(2)) for size in shape]
    ranges = [((0, a), (a, b - a), (b, size - b)) for (a, b), size in zip(cuts, shape)]
    for node in (lazy, lazy.moment(1), lazy.moment(2)):
        assert node.shape == shape
        expected = whole(node)
        for box in (tuple(zip(*chosen)) for chosen in itertools.product(*ranges)):
            read = node.read(box)
            assert tuple(read.shape) == box[1]
            assert torch.equal(read, expected[slices(box)])
    assert str(lazy)
    assert torch.equal(whole(lazy), value), "reading has changed what it read from"


def adam(weight: Tensor, coefficients: list[Tensor], factor: float = 1.0) -> dict[int, Tensor]:
    """AdamW's moments, by autograd, after steps of the loss sum(c * sin(weight / factor))."""
    moments = {1: torch.zeros_like(weight), 2: torch.zeros_like(weight)}
    for coefficient in coefficients:
        leaf = weight.clone().requires_grad_()
        (coefficient * torch.sin(leaf / factor)).sum().backward()
        assert leaf.grad is not None
        moments[1] = 0.9 * moments[1] + 0.1 * leaf.grad
        moments[2] = 0.99 * moments[2] + 0.01 * leaf.grad**2
    return moments


def test_moments_are_those_of_training_it_as_it_is() -> None:
    """Would catch: a scale that is applied to a moment instead of divided out, the first power for the second moment, a
    moment of another part. The same losses, as functions of the old weights and of the new ones, by autograd; float64,
    where the two orders of rounding differ by some 1e-16 of numbers near 1.
    """
    generator = torch.Generator().manual_seed(0)
    value_EFD, *coefficients = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(5))
    bank = Trained(value_EFD, adam(value_EFD, coefficients))
    first, second = expert_of(bank, 0), expert_of(bank, 1)
    cases: list[tuple[Lazy, list[Tensor], float]] = [
        (Scaled(bank, 4.0), coefficients, 4.0),
        (Scaled(Scaled(bank, 4.0), 0.5), coefficients, 2.0),
        (second, [c[1] for c in coefficients], 1.0),
        (rows_of(second, 1, 2), [c[1, 1:3] for c in coefficients], 1.0),
        (columns_of(bank, 2, 3), [c[..., 2:] for c in coefficients], 1.0),
        (Stacked([second, first]), [c[[1, 0]] for c in coefficients], 1.0),
        (Joined([first, second], 1), [torch.cat([c[0], c[1]], 1) for c in coefficients], 1.0),
        (Repeated(first, 2), [c[0].repeat_interleave(2, 0) for c in coefficients], 1.0),
        (Cast(bank, torch.float64), coefficients, 1.0),
        (Sum([bank, bank], [0.5, 0.5]), coefficients, 1.0),
    ]
    for lazy, seen, factor in cases:
        expected = adam(whole(lazy), seen, factor)
        for order in (1, 2):
            torch.testing.assert_close(whole(lazy.moment(order)), expected[order], rtol=1e-12, atol=1e-14)


def test_what_is_new_has_no_past() -> None:
    """Would catch: moments of replaced weights that stay with what is drawn there, or are lost with the rest."""
    value = torch.arange(20.0).reshape(4, 5) + 1
    trained = Trained(value, {1: value * 2, 2: value * 3})
    chosen = Chosen(hash_key("any"), 2, 4, 0)
    replaced = Replaced(trained, Redrawn(trained, chosen, 0, "new"), chosen)
    kept = [row for row in range(4) if row not in chosen.indices()]
    for order, factor in ((1, 2), (2, 3)):
        expected = torch.zeros_like(value)
        expected[kept] = value[kept] * factor
        assert torch.equal(whole(replaced.moment(order)), expected)
    for lazy in (Constant((2, 2), 3.0), Noise((2, 2), 1.0, 0, "n"), Scaled(trained, 0.0)):
        assert not whole(lazy.moment(1)).any()

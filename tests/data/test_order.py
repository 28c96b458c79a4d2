"""The order of sequences: permutations are bijections, quotas are exact, no process has its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_data.order import Mixture, derive_key, permute, shuffled


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    """A round function or a walk that maps two indices to one loses one sequence and repeats another."""
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1])
def test_permute_is_a_bijection_around_a_power_of_two(size: int) -> None:
    """The widths of the halves change here."""
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


def test_permute_huge_domain_stays_inside_and_distinct() -> None:
    """Corpora of 10^13 tokens: 64-bit arithmetic must not wrap into a collision."""
    size = 10**15 + 7
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    image = permute(index, size, 3)
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < size


def test_permute_looks_random() -> None:
    """An order that keeps neighbors together gives correlated batches. The mean distance of neighbors in a
    random order of n is n/3 with a standard error of about 0.24 n / sqrt(n) = 0.0024 n; 0.02 n is eight."""
    n = 10_000
    for key in range(5):
        steps = np.abs(np.diff(permute(np.arange(n), n, key)))
        assert abs(steps.mean() / n - 1 / 3) < 0.02


def test_permute_refuses_an_index_outside() -> None:
    """Cycle walking from outside would never be a bijection."""
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        permute(np.array([10]), 10, 0)


weights = st.lists(st.floats(0, 100).map(lambda w: round(w, 3)), min_size=1, max_size=12).filter(lambda w: sum(w) > 0)


@given(weights=weights, seed=st.integers(0, 99), block=st.sampled_from([16, 100, 4096]))
def test_mixture_quotas_are_exact(weights: list[float], seed: int, block: int) -> None:
    """Drawing sources independently drifts; flooring without carrying starves small weights.

    At each block's end a source is within one sample of its due, the largest within one per other source."""
    mixture = Mixture(weights, seed, block)
    drawn = [mixture.locate(n) for n in range(3 * mixture.block)]
    for blocks in (1, 2, 3):
        count = Counter(source for source, _ in drawn[: blocks * mixture.block])
        assert [count[s] for s in range(len(weights))] == mixture.taken(blocks)
        for source, weight in enumerate(weights):
            due = weight / sum(weights) * blocks * mixture.block
            assert abs(count[source] - due) <= len(weights) + 1e-6
    for source in range(len(weights)):
        # Each source's own indices run 0, 1, 2, ...: none is missing or twice, no epoch overlaps the next.
        indices = [index for s, index in drawn if s == source]
        assert indices == list(range(len(indices)))


def test_mixture_never_draws_weight_zero() -> None:
    """A source that only validates must not leak into training."""
    mixture = Mixture([0.0, 1.0, 2.0], 0)
    assert all(mixture.locate(n)[0] != 0 for n in range(5000))


def test_mixture_spreads_within_a_block() -> None:
    """All of one source first, then the other, would satisfy the quotas. A run of 30 in 4,096 throws of a fair
    coin has a probability below 1e-5."""
    mixture = Mixture([1, 1], 1)
    sources = [mixture.locate(n)[0] for n in range(4096)]
    longest = max(len(list(run)) for _, run in groupby(sources))
    assert longest < 30


def test_shuffled_visits_everything_once_per_epoch_and_differs_between_epochs() -> None:
    """The same order each epoch, or an epoch that repeats a sequence."""
    epochs = [[shuffled(e * 100 + i, 100, 5, "code") for i in range(100)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [shuffled(i, 100, 5, "prose") for i in range(100)]
    assert epochs[0] != [shuffled(i, 100, 6, "code") for i in range(100)]


def test_order_does_not_depend_on_the_hash_seed() -> None:
    """Python's hash() differs from process to process: ranks would disagree on the order."""
    program = "from moe_data.order import *; m = Mixture([1, .5, .1], 3); " + (
        "print([m.locate(n) for n in range(50)], [shuffled(i, 77, 3, 'a') for i in range(50)])"
    )
    mixture = Mixture([1, 0.5, 0.1], 3)
    here = f"{[mixture.locate(n) for n in range(50)]} {[shuffled(i, 77, 3, 'a') for i in range(50)]}\n"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == here


def test_keys_of_different_parts_differ() -> None:
    """Joining parts without a separator makes ("a", 11) and ("a1", 1) one key."""
    assert derive_key("a", 11) != derive_key("a1", 1)


def test_one_row_a_source_is_the_order_of_before() -> None:
    """An order that changes with a version of this code: resumed runs repeat some tokens and miss others.

    The digest was taken before groups existed.
    """
    mixture = Mixture([4, 2, 1, 1, 0.5], 7)
    drawn = np.array([mixture.locate(n) for n in range(3 * 4096)], dtype="<i8")
    assert (
        hashlib.sha256(drawn.tobytes()).hexdigest()
        == "5d62d32d158e3108e4141a4691a50afebd2a5b67432b4218e8f7d5528daedb45"
    )


@given(weights=weights, seed=st.integers(0, 99), rows=st.sampled_from([1, 2, 3, 8, 64]))
def test_groups_are_pure_and_quotas_exact(weights: list[float], seed: int, rows: int) -> None:
    """Groups cut off at the end of a block, or quotas that are right of groups but not of samples."""
    mixture = Mixture(weights, seed, 256, rows)
    assert mixture.block % rows == 0
    drawn = [mixture.locate(n) for n in range(2 * mixture.block)]
    for first in range(0, len(drawn), rows):
        assert len({source for source, _ in drawn[first : first + rows]}) == 1
    for blocks in (1, 2):
        count = Counter(source for source, _ in drawn[: blocks * mixture.block])
        assert [count[s] for s in range(len(weights))] == mixture.taken(blocks)
        for source, weight in enumerate(weights):
            due = weight / sum(weights) * blocks * mixture.block
            assert abs(count[source] - due) <= len(weights) * rows + 1e-6
    for source in range(len(weights)):
        indices = [index for s, index in drawn if s == source]
        assert indices == list(range(len(indices)))


def test_groups_are_spread_within_a_block() -> None:
    """Groups of one source side by side would make whole batches pure, and the model forget the other sources."""
    mixture = Mixture([1, 1], 1, rows_per_source=4)
    sources = [mixture.locate(n)[0] for n in range(0, 4096, 4)]
    assert max(len(list(run)) for _, run in groupby(sources)) < 30

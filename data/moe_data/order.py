"""Which sequence comes when: a pure function of (seed, global sample index), in constant memory.

Nothing here uses a generator of a library, whose stream may change with its version, nor floating point,
whose rounding may change with the machine: the order is the same everywhere and for every world size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUNDS = 8
"""Feistel rounds. Four make a permutation that is hard to tell from a random one on large domains; small
domains, as few as two, need more."""


def derive_key(*parts: object) -> int:
    """64-bit key of a purpose, e.g. derive_key(seed, "epoch", source, 3). Different parts, unrelated keys."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(x_N: np.ndarray) -> np.ndarray:
    """Bijective scrambling of uint64 (the finalizer of splitmix64: Steele, Lea, Flood 2014)."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def permute(index_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of `index_N` under the permutation of 0..size-1 that `key` names.

    A balanced Feistel network permutes the next power of four; an image outside 0..size-1 is sent through
    again until it lands inside (cycle walking), fewer than four times on average.

    Args:
        index_N: integers in 0..size-1, any shape.
        size: length of the permuted range, 1..2^62.
        key: any 64-bit integer.
    Returns:
        int64, same shape. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    index_N = np.asarray(index_N)
    if index_N.size and (int(index_N.min()) < 0 or int(index_N.max()) >= size):
        raise ValueError(f"index {int(index_N.min())}..{int(index_N.max())} lies outside 0..{size - 1}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key))
    x_N = index_N.astype(np.uint64).reshape(-1)
    outside_M = np.arange(x_N.size)
    while outside_M.size:
        left_M, right_M = x_N[outside_M] >> half, x_N[outside_M] & mask
        for round_key in round_keys:
            left_M, right_M = right_M, left_M ^ (mix(right_M ^ round_key) & mask)
        x_N[outside_M] = (left_M << half) | right_M
        outside_M = outside_M[x_N[outside_M] >= np.uint64(size)]
    return x_N.astype(np.int64).reshape(index_N.shape)


class Mixture:
    """Interleaves weighted sources with exact quotas.

    Samples come in blocks. After k blocks source s has given floor(share_s * k * block) samples, and the
    source of the largest weight the rest: never more than one sample from its due at a block's end, for any s
    but that one. Within a block a seeded permutation spreads the sources; each source's own indices ascend,
    so that an epoch of a source is over before its next begins.

    With `rows_per_source` above 1 all this holds of groups of so many neighboring samples, each group from one source:
    what a block deals out and permutes are groups.

    Args:
        weights: at least one above 0, none below; only their proportions matter.
        seed: of the run.
        block: samples per block; raised to len(weights)**2 groups, below which a quota could turn negative, and to a
            multiple of `rows_per_source`.
        rows_per_source: neighboring samples that come from one source.
    """

    def __init__(self, weights: Sequence[float], seed: int, block: int = 4096, rows_per_source: int = 1) -> None:
        # The decimal that the user wrote, exactly: 0.1 is one tenth here and not a binary fraction near it.
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) < 0 or sum(exact) == 0:
            raise ValueError(f"weights={list(weights)} must be 0 or more with at least one above 0")
        self._shares = [weight / sum(exact) for weight in exact]
        self._largest = max(range(len(exact)), key=lambda s: exact[s])
        self._seed = seed
        self._group = rows_per_source
        self._groups = max(-(-block // rows_per_source), len(exact) ** 2)
        self.block = self._groups * rows_per_source
        self._cached: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def taken(self, blocks: int) -> list[int]:
        """Samples of each source in the first `blocks` blocks."""
        return [count * self._group for count in self._taken_groups(blocks)]

    def _taken_groups(self, blocks: int) -> list[int]:
        counts = [int(share * blocks * self._groups) for share in self._shares]
        counts[self._largest] += blocks * self._groups - sum(counts)
        return counts

    def locate(self, sample: int) -> tuple[int, int]:
        """Global sample index -> (source, index within that source)."""
        group, row = divmod(sample, self._group)
        block, offset = divmod(group, self._groups)
        known, source_N, index_N = self._cached
        if known != block:
            source_N, index_N = self._lay_out(block)
            self._cached = (block, source_N, index_N)
        return int(source_N[offset]), int(index_N[offset]) * self._group + row

    def _lay_out(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each group of a block, and the group's number within that source."""
        before, after = self._taken_groups(block), self._taken_groups(block + 1)
        counts = [b - a for a, b in zip(before, after)]
        assert min(counts) >= 0, f"quota below 0 in block {block}: {counts}"
        ordered_N = np.repeat(np.arange(len(counts)), counts)
        source_N = ordered_N[permute(np.arange(self._groups), self._groups, derive_key(self._seed, "mixture", block))]
        index_N = np.empty(self._groups, dtype=np.int64)
        for source, first in enumerate(before):
            places = np.flatnonzero(source_N == source)
            index_N[places] = first + np.arange(len(places))
        return source_N, index_N


def shuffled(index: int, size: int, seed: int, source: str) -> int:
    """The index-th sequence to draw from a source of `size`: epochs end to end, each newly shuffled."""
    epoch, place = divmod(index, size)
    return int(permute(np.array([place]), size, derive_key(seed, "epoch", source, epoch))[0])

"""Which rank computes which rows of which expert, when experts are unevenly loaded. Numbers only: no tensors, no ranks.

Least-loaded expert parallelism (LLEP). Every rank derives the same plan from the same counts, so nothing about it is
exchanged. Two deviations from the published code: the capacity is rounded up, and `min_chunk_rows` holds for the last
piece of an expert too. With a capacity that is rounded down up to P - 1 rows find no rank, and a handful of rows then
move a whole expert, some of them twice to the same rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SpillPlan:
    """The pieces that experts are cut into, by expert, then by rank.

    The rows of an expert have one global order: those of source rank 0 first. A piece is an interval of it. Each expert
    has a piece on its owner, which may be empty, and at most one on any other rank.
    """

    expert_C: Integers
    rank_C: Integers
    """The rank that computes the piece."""
    start_C: Integers
    stop_C: Integers
    num_local: int
    """Experts that each rank owns: rank p has p * num_local to (p + 1) * num_local - 1."""

    @property
    def owner_C(self) -> Integers:
        """The rank that owns the expert."""
        return self.expert_C // self.num_local

    @property
    def foreign_C(self) -> NDArray[np.bool_]:
        """Whether the piece is computed elsewhere than at its owner: then the expert's weights move."""
        return self.rank_C != self.owner_C

    @property
    def moves_weights(self) -> bool:
        """False for plain expert parallelism."""
        return bool(self.foreign_C.any())

    def rows_of(self, count_PE: Integers) -> Integers:
        """Rows (P, C) that each source rank sends for each piece."""
        end_PC = count_PE.cumsum(0)[:, self.expert_C]
        begin_PC = end_PC - count_PE[:, self.expert_C]
        return (np.minimum(self.stop_C, end_PC) - np.maximum(self.start_C, begin_PC)).clip(min=0)


def plan_spill(
    load_E: Integers, num_ranks: int, *, threshold: float, capacity_factor: float, min_chunk_rows: int
) -> SpillPlan:
    """Cut the experts of overloaded ranks into pieces for the least loaded ones.

    Experts are visited by decreasing load. One whose owner has no room for all of it keeps what fits and spills the
    rest, to the least loaded rank each time, as far as that has room, but at least `min_chunk_rows`. A smaller rest
    stays at home. A rank is filled beyond its capacity only when no rank has room for `min_chunk_rows`.

    With capacity C and m = min_chunk_rows no rank computes more than

        max(C + m - 1,  sum over its own experts of min(load, m - 1))

    rows: a rank that receives was below C before its last chunk, and either that chunk fits or it has m rows. A rank
    that spills keeps less than m rows above C, unless it has spilled all it could, down to rests below m. No rank
    both spills and receives, and the busiest rank never gets busier.

    Args:
        load_E: rows of each expert, over all sources.
        threshold: busiest rank over the mean below which nothing is spilled.
        capacity_factor: rows that a rank takes, over the mean; at least 1, so that all ranks together hold all rows.
    """
    num_local = len(load_E) // num_ranks
    loads = [int(load) for load in load_E]
    rank_rows = [sum(loads[p * num_local : (p + 1) * num_local]) for p in range(num_ranks)]
    total = sum(loads)
    spilled: dict[int, list[tuple[int, int]]] = {}
    if total > 0 and max(rank_rows) * num_ranks >= threshold * total:
        capacity = math.ceil(capacity_factor * total / num_ranks)
        for expert in sorted(range(len(loads)), key=lambda e: -loads[e]):  # stable: equal loads by number
            owner = expert // num_local
            rest = min(loads[expert], rank_rows[owner] - capacity)
            while rest >= min_chunk_rows:
                # Below its capacity, as the owner is above: so never the owner, and never the same rank twice.
                receiver = min(range(num_ranks), key=rank_rows.__getitem__)
                rows = min(rest, max(capacity - rank_rows[receiver], min_chunk_rows))
                spilled.setdefault(expert, []).append((receiver, rows))
                rank_rows[receiver] += rows
                rank_rows[owner] -= rows
                rest -= rows
    return _in_rank_order(loads, spilled, num_local)


def plain_plan(load_E: Integers, num_ranks: int) -> SpillPlan:
    """Every expert at its owner."""
    return _in_rank_order([int(load) for load in load_E], {}, len(load_E) // num_ranks)


def _in_rank_order(loads: list[int], spilled: dict[int, list[tuple[int, int]]], num_local: int) -> SpillPlan:
    """Lay each expert's pieces along its rows by rank: sources lie in the same order, so most rows stay on theirs."""
    pieces = []
    for expert, load in enumerate(loads):
        chunks = spilled.get(expert, [])
        kept = load - sum(rows for _, rows in chunks)
        start = 0
        for rank, rows in sorted([(expert // num_local, kept), *chunks]):
            pieces.append((expert, rank, start, start + rows))
            start += rows
    expert_C, rank_C, start_C, stop_C = np.array(pieces, dtype=np.int64).T
    return SpillPlan(expert_C, rank_C, start_C, stop_C, num_local)

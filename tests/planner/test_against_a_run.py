"""A plan and the run that it is a plan of, on 2 and 4 processes: the same bytes alive, the same bytes sent."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from moe_parallel.planner.rank import RankTrace, plan_rank
from moe_parallel.planner.trace_time import messages_of_step
from tests.planner.real import LAPTOP, Sent, config_of, real_steps
from tests.ranks import forked, run_ranks

BATCH = "train.global_batch_tokens=1024"  # 16 sequences
ONE = "train.micro_batch_sequences=1"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "replicated": (4, (BATCH, "parallel.shard=1")),
    "sharded and accumulated": (4, (BATCH, "train.micro_batch_sequences=2")),
    "gradients wait": (4, (BATCH, "train.micro_batch_sequences=2", "parallel.reshard_after_forward=false")),
    "experts": (4, (BATCH, "parallel.ep=2", "parallel.shard=2", "train.micro_batch_sequences=2")),
    "experts, recomputed": (4, (BATCH, "parallel.ep=4", "parallel.recompute=full")),
    "tensor parallel": (4, (BATCH, "parallel.tp=2", "parallel.ep=2")),
    "context parallel": (4, (BATCH, "parallel.cp=2", "parallel.ep=2", "parallel.recompute=selective")),
    "pipeline": (4, (BATCH, "parallel.pp=2", "parallel.ep=2", ONE)),
    "interleaved pipeline": (4, (BATCH, "parallel.pp=2", "parallel.schedule=interleaved", ONE)),
    "two ranks": (2, (BATCH, "parallel.ep=2", "train.micro_batch_sequences=4")),
}
# Where a plan runs all micro-batches, bytes are equal but for a few scalars; of a pipeline it runs as many as fill it.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, int], tuple[int, Sent]]:
    """Of each case and rank what was held and sent."""
    found = {}
    for world in (2, 4):
        names = [name for name, (ranks, _) in CASES.items() if ranks == world]
        for rank, seen in enumerate(run_ranks(real_steps, world, [CASES[name][1] for name in names])):
            found |= {(name, rank): value for name, value in zip(names, seen)}
    return found


@pytest.fixture(scope="module")
def planned() -> dict[tuple[str, int], RankTrace]:
    """Of each case the first and the last rank; in processes of their own, for fake groups bear no others."""
    with ProcessPoolExecutor(2, mp_context=forked()) as pool:
        futures = {
            (name, rank): pool.submit(plan_rank, config_of(overrides, ranks), LAPTOP, rank)
            for name, (ranks, overrides) in CASES.items()
            for rank in (0, ranks - 1)
        }
        return {key: future.result() for key, future in futures.items()}


@pytest.mark.parametrize("name", CASES)
def test_peak_memory(name, real, planned):
    """A buffer, a gradient that waits, or an activation of a micro-batch in flight that the plan lacks or has twice."""
    for rank in (0, CASES[name][0] - 1):
        measured, trace = real[name, rank][0], planned[name, rank]
        assert trace.peak_bytes == pytest.approx(measured, rel=TOLERANCE), rank
        assert sum(trace.timeline.peak_by_kind.values()) == trace.timeline.peak_bytes


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_collectives(name, real, planned):
    """A collective that a plan counts once for several, for a wrong group, or with the bytes of the wrong side; the
    real run's are counted where Python calls them. Integers."""
    for rank in (0, CASES[name][0] - 1):
        sent: Sent = {}
        for message, (calls, num_bytes) in messages_of_step(planned[name, rank]).items():
            if len(message.ranks) > 1:
                key = message.op, len(message.ranks)
                before = sent.get(key, (0, 0))
                sent[key] = before[0] + calls, before[1] + num_bytes
        assert sent == real[name, rank][1], rank

"""Tier 3: every shipped config builds, shards and runs a whole step for its real number of ranks, without memory.

One rank of each model preset (on the fewest ranks that split and shard its experts) and of each experiment (on the
ranks that it names) runs forward, backward, gradient norm, clipping, optimizer and bias update on fake tensors; see
`plan.py`. To save time, at most two micro-batches of a step are run, and one of a model of more than 32 layers.
Numbers are compared in the other two tiers: here it is shapes, bytes and calls, with what options and layout alone say
they must be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from moe_parallel.mesh import Layout, Recompute
from moe_parallel.model.counts import MemoryEstimate, count_parameters, memory_per_rank
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.options import architecture
from tests.parity.plan import CONFIGS, Plan, Planned, Weight, run
from tests.ranks import forked

GPU_BYTES = 80 * 2**30
# A tenth of the GPU is left for what is not counted: the allocator's slack, buffers of collectives and kernels.
USABLE_BYTES = 0.9 * GPU_BYTES
# The estimate leaves out small temporaries: the experiments take up to 11 percent more than it says.
SLACK = 1.2


def _names(group: str, pattern: str = "*") -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob(f"{pattern}.yaml"))


EXPERIMENTS = [Plan(name, (f"experiment={name}",)) for name in _names("experiment", "pretrain_*")]
CHOICES = [
    Plan(f"{group}={name}", ("model=small_cpu", f"{group}={name}"), few_ranks=True)
    for group, names in (("router", _names("router")), ("moe", _names("moe", "chain_*")))
    for name in names
    if name != "plugin"  # it is no router until it is told which
]
PRESETS = [Plan(name, (f"model={name}", "train.sequence_tokens=512"), few_ranks=True) for name in _names("model")]
CHAINS = [Plan(f"{n} iterations", ("model=small_cpu", f"moe.chain.iterations={n}"), few_ranks=True) for n in (1, 3)]
CHUNKS = [Plan(f"{n} chunks", ("model=small_cpu", f"dispatch.chunks={n}"), few_ranks=True) for n in (1, 4)]
PLACES = [Plan("pretrain_olmoe_1b_7b", ("experiment=pretrain_olmoe_1b_7b",), place) for place in (0.0, 0.5, 1.0)]
SHARDS = [Plan("pretrain_deepseek_v3", ("experiment=pretrain_deepseek_v3",), place, step=False) for place in (0.5, 1.0)]


@pytest.fixture(scope="module")
def planned(request: pytest.FixtureRequest) -> Iterator[dict[Plan, Future[Planned]]]:
    """Results of the selected cases, from two fresh processes: fake and real process groups do not mix in one."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    plans = dict.fromkeys(plan for item in items for plan in item.callspec.params.values())
    pool = ProcessPoolExecutor(2, mp_context=forked())
    try:
        yield {plan: pool.submit(run, plan) for plan in plans}
    finally:
        pool.shutdown(cancel_futures=True)


# -- what must be seen, from options and layout alone --------------------------------------------------------------


def by_expert(weight: Weight, layout: Layout) -> bool:
    """Whether the weight is split over `ep` and the expert shards; if not, over the dense shards."""
    return layout.ep > 1 and ".experts." in weight.name


def holders(weight: Weight, layout: Layout) -> int:
    """Ranks that hold one whole copy of the weight between them."""
    return layout.ep * layout.expert_shard if by_expert(weight, layout) else layout.shard


def is_even(weight: Weight, layout: Layout) -> bool:
    """Whether all of them hold equal pieces."""
    return by_expert(weight, layout) or weight.whole[0] % layout.shard == 0


def chunk(size: int, parts: int, part: int) -> int:
    """Length of one part of an axis that is split into equal chunks while it lasts; the last parts may get nothing."""
    longest = math.ceil(size / parts)
    return min(longest, max(0, size - part * longest))


def local_shape(weight: Weight, layout: Layout, rank: int) -> tuple[int, ...]:
    """Shape of the piece that `rank` must hold."""
    first, *rest = weight.whole
    if not by_expert(weight, layout):  # neighbors share a shard axis
        return (chunk(first, layout.shard, rank % layout.shard), *rest)
    axis = next(axis for axis in (0, 1) if rest[axis] % layout.expert_shard == 0)
    rest[axis] //= layout.expert_shard
    return (first // layout.ep, *rest)


def estimate(planned: Planned) -> MemoryEstimate:
    """What a dry run says of this rank."""
    config, layout = planned.config, planned.layout
    return memory_per_rank(
        architecture(config, 257),
        planned.rows * config.train.sequence_tokens,
        shard=layout.shard,
        ep=layout.ep,
        expert_shard=layout.expert_shard,
        recompute=config.parallel.recompute,
    )


# -- checks --------------------------------------------------------------------------------------------------------


def check_weights(planned: Planned) -> None:
    """This rank holds its piece of each weight; pieces times the ranks that hold others are the model, exactly."""
    layout, together = planned.layout, 0
    for weight in planned.weights:
        assert weight.local == local_shape(weight, layout, planned.rank), weight
        even = is_even(weight, layout)
        together += math.prod(weight.local) * holders(weight, layout) if even else math.prod(weight.whole)
    assert together == count_parameters(architecture(planned.config, 257)).total


def check_training_state(planned: Planned) -> None:
    """Every weight got a gradient and two moments of its own piece, and their bytes are those of the estimate."""
    for weight in planned.weights:
        assert weight.gradient == weight.local, weight
        assert weight.moments == (weight.local, weight.local), weight
    held, said = 4 * sum(math.prod(weight.local) for weight in planned.weights), estimate(planned)
    assert (said.gradients, said.optimizer) == (said.weights, 2 * said.weights)
    # The estimate divides. Where an axis does not divide, a rank holds a chunk that is longer than that, or shorter.
    uneven = [weight for weight in planned.weights if not is_even(weight, planned.layout)]
    most = sum(4 * math.ceil(w.whole[0] / planned.layout.shard) * math.prod(w.whole[1:]) for w in uneven)
    assert abs(held - said.weights) <= most


def check_exchanges(planned: Planned) -> None:
    """Two all-to-alls forward and two backward per pass of a MoE layer and micro-batch, and two to replay a pass."""
    config = planned.config
    layers = (config.model.num_layers - config.model.first_dense_layers) * config.moe.chain.iterations
    each = 6 if config.parallel.recompute is Recompute.full else 4
    calls = each * layers * planned.micro_batches if planned.layout.ep > 1 else 0
    slots = planned.rows * config.train.sequence_tokens * config.router.top_k
    chunks = config.dispatch.chunks if isinstance(config.dispatch, AllToAllConfig) else 1
    assert planned.sent_bytes == [slots * config.model.dim * 2 // chunks] * calls * chunks


def row(plan: Plan, planned: Planned) -> tuple[str, ...]:
    """One line of the printed table."""
    config, layout = planned.config, planned.layout
    held = sum(math.prod(weight.local) for weight in planned.weights)
    total = sum(math.prod(weight.whole) for weight in planned.weights)
    return (
        plan.name, str(layout.ranks), str(planned.rank), str(layout.ep), str(layout.shard),
        config.parallel.recompute.value, f"{planned.rows} x {config.train.sequence_tokens}", f"{total / 1e6:,.0f}",
        f"{held / 1e6:,.1f}", f"{estimate(planned).total / 2**30:,.1f}", f"{planned.peak_bytes / 2**30:,.1f}",
        f"{planned.seconds:.1f}",
    )  # fmt: skip


# -- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*EXPERIMENTS, *PRESETS, *CHOICES], ids=lambda plan: plan.name)
def test_config_runs_a_step(plan, planned, plan_table):
    """A preset that cannot be split, a weight that is sharded otherwise or not at all, a gradient or moment that is
    missing or whole, an exchange too many or of the wrong size, a step that asks the device for a value. All
    comparisons are of integers."""
    seen = planned[plan].result(timeout=300)
    check_weights(seen)
    check_training_state(seen)
    check_exchanges(seen)
    plan_table(row(plan, seen))


@pytest.mark.parametrize("plan", CHAINS[1:], ids=lambda plan: plan.name)
@pytest.mark.parametrize("plain", CHAINS[:1], ids=lambda plan: plan.name)
def test_a_chain_gathers_and_reduces_its_experts_once(plan, plain, planned):
    """Experts that are gathered, or whose gradients are reduced, once for each iteration: C times the traffic of the
    largest part of the model. Integers, found by the size of a layer's experts."""
    chained, once = (planned[p].result(timeout=300) for p in (plan, plain))
    moe, layout = once.config.moe, once.layout
    elements = 3 * once.config.model.dim * moe.expert_dim * moe.num_experts // layout.ep
    assert layout.expert_shard > 1
    for name, size in (("gathered_bytes", 2 * elements), ("reduced_bytes", 4 * elements)):
        calls = [getattr(seen, name).count(size) for seen in (chained, once)]
        assert calls[0] == calls[1] >= once.config.model.num_layers, name


@pytest.mark.parametrize("plan", CHUNKS[1:], ids=lambda plan: plan.name)
@pytest.mark.parametrize("plain", CHUNKS[:1], ids=lambda plan: plan.name)
def test_chunks_gather_and_reduce_experts_once(plan, plain, planned):
    """Experts whose weights are gathered for each chunk, or whose gradients are reduced for each: the traffic that they
    save would come back. The same collectives of the same sizes, but for rows, which travel in pieces."""
    chunked, once = (planned[p].result(timeout=300) for p in (plan, plain))
    check_exchanges(chunked)
    check_training_state(chunked)
    assert chunked.gathered_bytes == once.gathered_bytes
    assert chunked.reduced_bytes == once.reduced_bytes


@pytest.mark.parametrize("plan", EXPERIMENTS, ids=lambda plan: plan.name)
def test_experiment_fits(plan, planned):
    """An experiment that its GPUs cannot hold, or an engine that holds more than a dry run says."""
    seen = planned[plan].result(timeout=300)
    assert seen.peak_bytes <= USABLE_BYTES
    assert seen.peak_bytes <= SLACK * estimate(seen).total
    assert seen.config.train.dtype.value == "bfloat16"


@pytest.mark.parametrize("plan", PLACES, ids=lambda plan: f"{plan.name}-{plan.place}")
def test_ranks_of_one_world(plan, planned):
    """Coordinates that are right on rank 0 alone: first, middle and last rank hold and send what they must."""
    seen = planned[plan].result(timeout=300)
    assert seen.rank == round(plan.place * (seen.layout.ranks - 1))
    check_weights(seen)
    check_training_state(seen)
    check_exchanges(seen)


@pytest.mark.parametrize("plan", SHARDS, ids=lambda plan: f"{plan.name}-{plan.place}")
def test_uneven_shards(plan, planned):
    """1024 ranks and tensors of 256 to 129,280 rows: later ranks hold a shorter chunk, or none at all."""
    seen = planned[plan].result(timeout=300)
    check_weights(seen)
    assert any(weight.local[0] == 0 for weight in seen.weights)

"""Least-loaded dispatch: outputs and all gradients against plain expert parallelism.

1. options   2. the dispatcher with 2 and 4 ranks in threads, every kind of load   3. the same in processes
4. recompute   5. bf16   6. no weights move without need
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_kernels.counting_sort import sort_slots
from moe_kernels.permute import invert_permutation
from moe_parallel import collectives
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig, LeastLoadedDispatcher
from moe_parallel.moe.dispatch.local import LocalDispatcher
from moe_parallel.moe.experts import RoutedExperts
from moe_parallel.moe.routing import ForwardContext, LayerContext, Replay, Routing
from tests.ranks import run_ranks, run_threads

# --- options ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.9}, "dispatch.threshold=0.9 must be at least 1"),
        ({"threshold": float("nan")}, "dispatch.threshold=nan"),
        ({"capacity_factor": 0.5}, "dispatch.capacity_factor=0.5 must be finite and at least 1"),
        ({"capacity_factor": float("inf")}, "dispatch.capacity_factor=inf"),
        ({"min_chunk_rows": 0}, "dispatch.min_chunk_rows=0 must be at least 1"),
    ],
)
def test_bad_options(options, words):
    """A capacity below the mean cannot hold all rows; the planner would run out of ranks. Each is refused by name."""
    with pytest.raises(ValueError, match=words):
        LeastLoadedConfig(**options)


# --- the dispatcher ---

DIM, EXPERT_DIM, TOKENS, EXPERTS, TOP_K = 6, 5, 24, 8, 2
EAGER = {"threshold": 1.0, "min_chunk_rows": 1}


@dataclass(frozen=True)
class Load:
    """How the tokens of one rank choose."""

    name: str
    options: dict
    spills: bool
    table: bool = True
    """Every token has K slots; else a list without `slot_TK`."""


LOADS = (
    Load("one expert gets most", EAGER, spills=True),
    Load("one expert gets most", EAGER, spills=True, table=False),
    Load("one expert gets most", {"threshold": 1.0, "min_chunk_rows": 5, "capacity_factor": 1.2}, spills=True),
    Load("one rank gets all", EAGER, spills=True),
    Load("one rank gets all, its last expert most", EAGER, spills=True, table=False),  # lends in no order of ranks
    Load("some ranks have no tokens", EAGER, spills=True),
    Load("no tokens at all", EAGER, spills=False),
    Load("dropped slots", EAGER, spills=True, table=False),
    Load("balanced", EAGER, spills=False),
    Load("uniform", EAGER, spills=False),
    Load("one expert gets most", {"threshold": 100.0, "min_chunk_rows": 1}, spills=False),
    Load("one expert gets most", {"threshold": 1.0, "min_chunk_rows": 10_000}, spills=False),
)


def named(name: str) -> Load:
    return next(load for load in LOADS if load.name == name)


def experts_of(load: Load, rank: int, world: int) -> Tensor:
    """int64 (T, K), distinct in a row; EXPERTS marks a dropped slot."""
    generator = torch.Generator().manual_seed(100 + rank)
    order_TE = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)
    if load.name == "no tokens at all" or (load.name == "some ranks have no tokens" and rank % 2 == 0):
        return order_TE[:0, :TOP_K]
    if load.name in ("balanced", "uniform"):
        return (torch.arange(TOKENS)[:, None] * TOP_K + torch.arange(TOP_K)) % EXPERTS
    if load.name.startswith("one rank gets all"):
        first = EXPERTS - EXPERTS // world
        expert_TK = first + torch.rand(TOKENS, EXPERTS // world, generator=generator).argsort(1)[:, :TOP_K]
        if load.name == "one rank gets all":
            return expert_TK
        dropped_TK = (torch.arange(TOKENS)[:, None] % 2 == 0) & (expert_TK < EXPERTS - 1)
        return torch.where(dropped_TK, EXPERTS, expert_TK)
    hot_T = torch.rand(TOKENS, generator=generator) < 0.9
    score_TE = torch.rand(TOKENS, EXPERTS, generator=generator)
    score_TE[:, 1] += hot_T * 1.0
    expert_TK = score_TE.argsort(1, descending=True)[:, :TOP_K]
    if load.name == "dropped slots":
        expert_TK = torch.where(torch.rand(TOKENS, TOP_K, generator=generator) < 0.3, EXPERTS, expert_TK)
    return expert_TK


def make_routing(expert_TK: Tensor, weight_TK: Tensor, table: bool, uniform: bool = False) -> Routing:
    order_N, count_E, place_N = sort_slots(expert_TK, EXPERTS)
    order_N = order_N[: int(count_E.sum())]
    return Routing(
        token_N=order_N // TOP_K,
        weight_N=weight_TK.reshape(-1)[order_N],
        count_E=count_E,
        slot_TK=place_N.view_as(expert_TK) if table else None,
        uniform_count=TOKENS * TOP_K // EXPERTS if uniform else None,
    )


def numbers(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def context(replay: Replay | None = None) -> LayerContext:
    return LayerContext(layer=0, batch_shape=(1, TOKENS), forward=ForwardContext(replay=replay))


def bank(first: int, count: int, dtype=torch.float64) -> RoutedExperts:
    """Experts `first` to `first + count - 1` of one bank."""
    experts = RoutedExperts(count, DIM, EXPERT_DIM).to(dtype)
    for seed, parameter in enumerate((experts.gate_up, experts.down)):
        whole = numbers(EXPERTS, *parameter.shape[1:], seed=seed, dtype=dtype)
        parameter.data.copy_(whole[first : first + count])
    return experts


@dataclass
class Side:
    """A dispatcher's output and gradients on one rank, and what it handed to the experts."""

    out_TD: Tensor
    grads: dict[str, Tensor]
    host_counts: list[int]


def compute(dispatcher, load: Load, ranks: list[int], world: int, dtype=torch.float64, permute=False, recompute=False):
    """One layer pass, forward and backward, for the tokens of `ranks`."""
    me = ranks[0] if len(ranks) == 1 else None
    num_local = EXPERTS if me is None else EXPERTS // world
    experts = bank(0 if me is None else me * num_local, num_local, dtype)
    expert_TK = torch.cat([experts_of(load, r, world) for r in ranks])
    x_TD = torch.cat([numbers(TOKENS, DIM, seed=10 + r, dtype=dtype)[: len(experts_of(load, r, world))] for r in ranks])
    weight_TK = torch.cat([numbers(TOKENS, TOP_K, seed=50 + r)[: len(experts_of(load, r, world))] for r in ranks])
    grad_TD = torch.cat([numbers(TOKENS, DIM, seed=90 + r)[: len(experts_of(load, r, world))] for r in ranks])
    if permute:
        order = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(7))
        expert_TK, x_TD, weight_TK, grad_TD = expert_TK[order], x_TD[order], weight_TK[order], grad_TD[order]
    weight_TK = weight_TK.to(torch.promote_types(dtype, torch.float32))
    x_TD, weight_TK = x_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
    seen = []

    def layer(x_TD: Tensor, weight_TK: Tensor, context: LayerContext) -> Tensor:
        uniform = load.name == "uniform" and isinstance(me, int)
        routing = make_routing(expert_TK, weight_TK, load.table, uniform)
        rows, ticket = dispatcher.dispatch(x_TD, routing, context)
        seen.append(ticket.parts[0].host_counts)
        return dispatcher.combine(experts(rows, ticket), routing, ticket)

    if recompute:
        out_TD = checkpoint(layer, x_TD, weight_TK, context(Replay()), use_reentrant=False)
    else:
        out_TD = layer(x_TD, weight_TK, context())
    (out_TD * grad_TD.to(dtype)).sum().backward()
    assert all(counts == seen[0] for counts in seen)
    grads = {"x": x_TD.grad, "weight": weight_TK.grad, "gate_up": experts.gate_up.grad, "down": experts.down.grad}
    out_TD = out_TD.detach()
    if permute:
        inverse = invert_permutation(order)
        out_TD, grads["x"], grads["weight"] = out_TD[inverse], grads["x"][inverse], grads["weight"][inverse]
    return Side(out_TD, grads, seen[0])


def assert_same(got: Side, wanted: Side, tolerance: float) -> None:
    torch.testing.assert_close(got.out_TD, wanted.out_TD, rtol=tolerance, atol=tolerance)
    for name, grad in wanted.grads.items():
        torch.testing.assert_close(
            got.grads[name], grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def part_of(whole: Side, load: Load, rank: int, world: int) -> Side:
    """What one rank must have, cut from what one process has for all."""
    sizes = [len(experts_of(load, r, world)) for r in range(world)]
    start, num_local = sum(sizes[:rank]), EXPERTS // world
    tokens, mine = slice(start, start + sizes[rank]), slice(rank * num_local, (rank + 1) * num_local)
    grads = {name: whole.grads[name][tokens if name in ("x", "weight") else mine] for name in whole.grads}
    return Side(whole.out_TD[tokens], grads, [])


def check_rank(loads: tuple[Load, ...]) -> list[int]:
    """All loads on this rank; returns how many rows it computed under each."""
    rank, world, rows = dist.get_rank(), dist.get_world_size(), []
    for load in loads:
        plain = compute(AllToAllDispatcher(dist.group.WORLD), load, [rank], world)
        whole = compute(LocalDispatcher(), load, list(range(world)), world)
        assert_same(plain, part_of(whole, load, rank, world), 1e-12)
        dispatcher = LeastLoadedDispatcher(dist.group.WORLD, LeastLoadedConfig(**load.options))
        got = compute(dispatcher, load, [rank], world)
        assert_same(got, plain, 1e-12)
        assert_same(got, part_of(whole, load, rank, world), 1e-12)
        if not load.spills:  # bit for bit the same dispatcher
            assert got.host_counts == plain.host_counts
            assert_same(got, plain, 0.0)
        rows.append(sum(got.host_counts))
    return rows


def check_rows(results: list[list[int]]) -> None:
    """Where the load spills, ranks end up even: the test would pass with a planner that never does anything."""
    for load, rows in zip(LOADS, zip(*results)):
        if load.spills and load.options is EAGER:
            assert max(rows) - min(rows) <= len(rows), load
        elif load.name == "one expert gets most" and not load.spills:
            assert max(rows) > 1.3 * sum(rows) / len(rows), load


@pytest.mark.parametrize("world", [2, 4])
def test_equals_plain_expert_parallelism(world):
    """A row sent to the wrong expert, a weight gradient that is not returned, returned twice or added to the wrong
    expert, or a permutation of combine weights: each gives a right-looking loss. Output and gradients of x, combine
    weights, gate_up and down against all-to-all and against one process that has all tokens.

    float64; 1e-12 is the rounding of sums of some tens of terms in another order (parts of an expert's rows are
    summed apart). Without a transfer the tolerance is 0: nothing differs."""
    check_rows(run_threads(check_rank, world, LOADS))


def test_equals_plain_expert_parallelism_in_processes():
    """The same on gloo, which has real sizes and buffers: a mismatch of what is sent and received aborts or hangs
    there, where threads merely copy. Tolerances as above."""
    check_rows(run_ranks(check_rank, 4, LOADS))


def check_recompute() -> int:
    """Recompute, and its collectives: how often counts were gathered."""
    rank, world, load = dist.get_rank(), dist.get_world_size(), LOADS[0]
    config = LeastLoadedConfig(**load.options)
    dispatcher = LeastLoadedDispatcher(dist.group.WORLD, config)
    wanted = compute(dispatcher, load, [rank], world)
    planned = []
    plan = dispatcher.plan
    dispatcher.plan = lambda count_PE: planned.append(1) or plan(count_PE)  # type: ignore[method-assign]
    got = compute(dispatcher, load, [rank], world, recompute=True)
    assert_same(got, wanted, 0.0)
    return len(planned)


def test_recompute_replays_the_plan():
    """A recomputed pass that plans again exchanges counts a second time, on those ranks that recompute first: a
    deadlock, or another plan after the counts have changed. Planned once; gradients equal to the last bit, as the same
    operations run on the same numbers."""
    assert run_threads(check_recompute, 4) == [1] * 4


def check_permuted(load: Load) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    dispatcher = LeastLoadedDispatcher(dist.group.WORLD, LeastLoadedConfig(**load.options))
    sides = [compute(dispatcher, load, [rank], world, permute=permute) for permute in (False, True)]
    assert_same(sides[1], sides[0], 1e-12)


@pytest.mark.parametrize("load", LOADS[:2], ids=["table", "list"])
def test_order_of_tokens_does_not_matter(load):
    """Which rank computes a token follows from its place in the expert's order; its result may not. Shuffle each rank's
    tokens: after sorting back everything is the same. float64; 1e-12 for weight gradients, whose terms are summed
    in another order."""
    run_threads(check_permuted, 4, load)


def check_bf16() -> list[float]:
    """Relative error of the weight gradients against float64, for both dispatchers."""
    rank, world, load = dist.get_rank(), dist.get_world_size(), LOADS[0]
    exact = part_of(compute(LocalDispatcher(), load, list(range(world)), world), load, rank, world)
    dispatchers = (
        AllToAllDispatcher(dist.group.WORLD),
        LeastLoadedDispatcher(dist.group.WORLD, LeastLoadedConfig(**load.options)),
    )
    sides = [compute(d, load, [rank], world, torch.bfloat16) for d in dispatchers]
    assert torch.equal(sides[0].out_TD, sides[1].out_TD)
    assert torch.equal(sides[0].grads["x"], sides[1].grads["x"])
    assert torch.equal(sides[0].grads["weight"], sides[1].grads["weight"])
    errors = []
    for side in sides:
        distance = [
            (side.grads[n].double() - exact.grads[n]).norm() / exact.grads[n].norm() for n in ("gate_up", "down")
        ]
        errors.append(float(max(distance)))
    return errors


def test_bf16_is_as_exact_as_plain_expert_parallelism():
    """Rows are computed one by one, so output, input and combine weight gradients are equal to the last bit. A weight's
    gradient is a sum of at most 4 parts, each rounded to bf16 once (2^-9 relative), then summed in float32 and rounded
    once more: two roundings of 2^-9 beside the error that the bf16 activations cause in both. Summed in bf16 it would
    be up to four."""
    for plain, spilled in run_threads(check_bf16, 4):
        assert spilled <= plain + 2 * 2**-9


def check_sum_in_float32() -> None:
    """One weight lent to all others, whose parts bf16 cannot add one by one: 256 + 1 = 256 in bf16."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    lends = rank == 0
    stacked = collectives.lend_weights(
        own,
        lent=[0] * (world - 1) if lends else [],
        sent=[0] + [1] * (world - 1) if lends else [0] * world,
        received=[0] * world if lends else [1] + [0] * (world - 1),
        group=dist.group.WORLD,
    )
    grad = torch.full_like(stacked, 256.0 if lends else 1.0)
    stacked.backward(grad)
    assert own.grad.item() == (260.0 if lends else 1.0)  # 259, rounded to bf16's step of 2 with ties to even
    assert (grad == (256.0 if lends else 1.0)).all()
    assert own.grad.untyped_storage().nbytes() == 2


def test_returned_gradients_are_summed_in_float32():
    """Sums in bf16 lose what is small beside what is there already: 256 + 1 + 1 + 1 stays 256. In float32 it is 259,
    rounded once to 260. Nor may the sum be written into the gradient that came in, which others may hold, or a rank's
    own gradient be a view that keeps the borrowed one alive. Equality: all numbers are exact."""
    run_threads(check_sum_in_float32, 4)


def check_collectives() -> list[int]:
    """Calls of lend_weights' exchange: with weights that spill, and with weights that do not."""
    rank, world, calls = dist.get_rank(), dist.get_world_size(), []
    for load in (named("one expert gets most"), named("balanced"), named("uniform"), LOADS[-1]):
        dispatcher = LeastLoadedDispatcher(dist.group.WORLD, LeastLoadedConfig(**load.options))
        expert_TK = experts_of(load, rank, world)
        routing = make_routing(expert_TK, torch.ones(expert_TK.shape), True, load.name == "uniform")
        ticket = dispatcher.dispatch(numbers(TOKENS, DIM, seed=rank), routing, context())[1]
        calls.append(0 if ticket.transfer is None else 1)
        assert ticket.transfer is None or isinstance(ticket.transfer, partial)
    return calls


def test_no_weights_move_without_need():
    """All ranks know from the same counts whether anything moves. If only those that lend or borrow entered the
    exchange of weights, the others would hang; if all always entered, plain loads would pay for it."""
    assert run_threads(check_collectives, 4) == [[1, 0, 0, 0]] * 4

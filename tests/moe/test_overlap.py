"""Exchanges that run while something else is computed: in which order, and that chunks change nothing else.

The order is read from events: the start and the wait of each exchange of rows, and the products around them.
"""

from __future__ import annotations

import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig, AllToAllDispatcher
from moe_parallel.moe.dispatch.config import DispatchSetting
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig, LeastLoadedDispatcher
from moe_parallel.moe.dispatch.two_hop import TwoHopDispatcher
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import Choice, ForwardContext, LayerContext, Replay, Routing
from moe_parallel.row_exchange import RowExchange
from tests.moe.test_two_hop import CASES, EXPERTS, HERE, WIDTH, Spy, check_same, mesh_of, through
from tests.ranks import forked, run_ranks, run_threads

ROWS = 20


class Events:
    """Writes down when exchanges of rows start and are waited for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.original = dist.all_to_all_single

    def __call__(self, out, rows, *args, async_op=False, **options):
        work = self.original(out, rows, *args, async_op=async_op, **options)
        if not async_op:
            return work
        self.seen.append("start")
        return _Waited(work, self.seen)

    def take(self) -> list[str]:
        seen = list(self.seen)
        self.seen.clear()
        return seen


class _Waited:
    def __init__(self, work: dist.Work, seen: list[str]) -> None:
        self.work, self.seen = work, seen

    def wait(self) -> None:
        self.seen.append("wait")
        self.work.wait()


def make_layer(dispatcher, world: int) -> MoELayer:
    """A layer with shared experts, split by hand."""
    torch.manual_seed(3)
    config = MoEConfig(num_experts=EXPERTS, expert_dim=4, num_shared_experts=1)
    layer = MoELayer(WIDTH, config, TokenChoiceConfig(top_k=2), BalanceConfig(), 0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for name in ("gate_up", "down"):
        whole = getattr(layer.experts, name).data
        mine = whole.chunk(world)[dist.get_rank()].clone()
        setattr(layer.experts, name, nn.Parameter(mine))
    layer.dispatcher = dispatcher
    return layer


def watch(layer: MoELayer, events: Events) -> None:
    """Forward and backward passes of what is computed between exchanges."""
    for name, module in (("up", layer.shared.gate_up), ("down", layer.shared.down), ("experts", layer.experts.output)):
        module.register_forward_hook(lambda *_, name=name: events.seen.append(name))
        module.register_full_backward_hook(lambda *_, name=name: events.seen.append(name))


ONE = ["start", "up", "wait", "experts", "start", "down", "wait"]
ONE_BACK = ["start", "down", "wait", "experts", "start", "up", "wait"]
TWO = ["start", "start", "up", *["wait", "experts", "start"] * 2, "down", "wait", "wait"]
TWO_BACK = ["start", "start", "down", *["wait", "experts", "start"] * 2, "up", "wait", "wait"]
NESTED = ["start", "up", "wait", "start", "wait", "experts", "start", "wait", "start", "down", "wait"]
NESTED_BACK = ["start", "down", "wait", "start", "wait", "experts", "start", "wait", "start", "up", "wait"]


def check_order() -> None:
    mesh = mesh_of(2)
    group = mesh.ep.get_group()
    for name, dispatcher, forward, backward in (
        ("flat", AllToAllDispatcher(group), ONE, ONE_BACK),
        ("two chunks", AllToAllDispatcher(group, 2), TWO, TWO_BACK),
        ("least loaded", LeastLoadedDispatcher(group, LeastLoadedConfig()), ONE, ONE_BACK),
        ("two hops", TwoHopDispatcher(*mesh.node_groups(1)), NESTED, NESTED_BACK),
    ):
        layer, events = make_layer(dispatcher, 2), Events()
        watch(layer, events)
        x_TD = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        context = LayerContext(layer=0, batch_shape=(1, ROWS))
        with mock.patch.object(dist, "all_to_all_single", events):
            out_TD = layer(x_TD, context, stream_TD=x_TD)[0]
            assert events.take() == forward, name
            out_TD.sum().backward()
            assert events.take() == backward, name
            again = replace(context, forward=ForwardContext(replay=Replay()))
            out_TD = checkpoint(layer, x_TD, again, stream_TD=x_TD, use_reentrant=False)[0]
            assert events.take() == forward, name
            out_TD.sum().backward()
            assert events.take() == forward + backward, f"{name}, recomputed"


def check_nothing_is_held() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    even = [[4] * world, [2] * world]
    there = RowExchange(even, even, dist.group.WORLD)
    back = there.way_back()
    rows = torch.full((6 * world, 3), float(rank), dtype=torch.float64, requires_grad=True)
    sent = rows * 1.0
    tokens = there.start_all(sent)
    sent = weakref.ref(sent)
    got = [there.wait(token, part) for part, token in enumerate(tokens)]
    assert [t.tolist() for t in got] == [
        [[float(r)] * 3 for r in range(world) for _ in range(size)] for size in (4, 2)
    ]  # fmt: skip
    arrived = [weakref.ref(t) for t in got]
    tokens = [back.start(t, part) for part, t in enumerate(got)]
    del got
    out = back.wait_all(tokens)
    assert torch.equal(out, rows)
    deadline = time.monotonic() + 10.0  # gloo's workers let go of tensors a moment after the wait
    while any(ref() is not None for ref in (sent, *arrived)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sent() is None
    assert all(ref() is None for ref in arrived)
    for _ in range(2):  # a graph may be walked twice
        (gradient,) = torch.autograd.grad((out * out).sum(), rows, retain_graph=True)
        assert torch.equal(gradient, 2 * rows)
        assert not there._under_way
        assert not back._under_way
        assert there._whole is back._whole is None


def check_chunked(ep: int) -> None:
    """Every case with 1 chunk and with more."""
    group = mesh_of(ep).ep.get_group()
    for case in CASES:
        wanted = through(AllToAllDispatcher(group), case, ep)
        for chunks in (c for c in (2, 4) if EXPERTS // ep % c == 0):
            dispatcher = AllToAllDispatcher(group, chunks)
            got, again = through(dispatcher, case, ep), through(dispatcher, case, ep)
            # A table's sums run over a token's slots, whatever order these lie in. Those of a list follow its order.
            exact = replace(case, tolerance=0.0 if case.kind not in ("list", "dropped", "silent") else case.tolerance)
            check_same(exact, got, wanted, f"{chunks} chunks", experts=0.0)
            assert all(torch.equal(a, b) for a, b in zip(got, again)), f"{case.name}: two runs differ"


def check_messages(ep: int) -> None:
    """The same rows in as many times more messages, and one exchange of sizes."""
    group = mesh_of(ep).ep.get_group()
    for case in CASES:
        seen = []
        for chunks in (1, 2):
            with mock.patch.object(dist, "all_to_all_single", Spy()) as spy:
                through(AllToAllDispatcher(group, chunks), case, ep)
            assert len(spy.rows(group)) == 4 * chunks
            seen.append((sum(spy.rows(group)), spy.size_exchanges))
        assert seen[0] == seen[1], case.name


def as_threads() -> None:
    check_chunked(2)


def in_two() -> None:
    check_order()
    check_chunked(2)
    check_messages(2)
    check_nothing_is_held()


def in_four() -> None:
    check_chunked(4)
    check_chunked(2)
    check_messages(4)


def without_memory() -> list[tuple[int, ...]]:
    """Shapes that one of 8 ranks sees of two chunks with fake tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    dispatcher = AllToAllDispatcher(dist.group.WORLD, 2)
    with FakeTensorMode():
        x_TD, weight_TK = torch.randn(128, 16, requires_grad=True), torch.rand(128, 2, requires_grad=True)
        routing = Routing.of(Choice(torch.arange(256).view(128, 2) % 32, uniform_count=8), weight_TK, 32)
        tokens, ticket = dispatcher.dispatch(x_TD, routing, HERE)
        rows = [part.receive(token)[0] for token, part in zip(tokens, ticket.parts)]
        results = [part.send(rows_RD * 2) for rows_RD, part in zip(rows, ticket.parts)]
        out_TD = dispatcher.combine(results, routing, ticket)
        out_TD.sum().backward()
        assert x_TD.grad is not None
        assert weight_TK.grad is not None
        return [tuple(t.shape) for t in (*rows, out_TD, x_TD.grad, weight_TK.grad)]


# -- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "ep", "message"),
    [
        (3, 4, r"dispatch.chunks=3 does not divide the 4 experts of a rank \(moe.num_experts=16 / parallel.ep=4\); "
         r"legal values: \[1, 2, 4\]"),
        (8, 4, r"legal values: \[1, 2, 4\]"),
        (2, 1, "dispatch.chunks=2 has no exchange to hide with parallel.ep=1"),
    ],
)  # fmt: skip
def test_illegal_chunks(chunks, ep, message):
    """Chunks that would cut an expert, or overlap nothing: found before ranks meet, with what would be legal."""
    with pytest.raises(ValueError, match=message):
        AllToAllConfig(chunks=chunks).check(DispatchSetting(ep=ep, num_experts=16, dim=8, top_k=1))
    AllToAllConfig(chunks=2).check(DispatchSetting(ep=4, num_experts=16, dim=8, top_k=1))
    with pytest.raises(ValueError, match=r"dispatch.chunks=0 must be at least 1"):
        AllToAllConfig(chunks=0)


def test_fake_tensors():
    """A size that is asked from the device although the host knows it, or a collective that a plan's fake group cannot
    start asynchronously: a plan of a large run would stop there."""
    with ProcessPoolExecutor(1, mp_context=forked()) as pool:
        shapes = pool.submit(without_memory).result(timeout=120)
    assert shapes == [(128, 16), (128, 16), (128, 16), (128, 16), (128, 2)]


def test_threads():
    """A chunk's row that meets another expert, slot or weight; a chunk that is lost or sent twice. To the last bit
    where every token has the same number of slots: the same products, summed in the same order. An expert's gradient is
    one product either way."""
    run_threads(as_threads, 2)


def test_two_processes():
    """Over gloo, where exchanges really run beside the computation. The order of events shows what they run beside: the
    shared experts between start and wait both ways, one chunk's experts while the others travel, and the mirror image
    in the backward pass, which autograd's own order alone brings about. A wait that moves, a start that waits, or a
    backward pass in another order would leave all numbers right and hide nothing. Buffers that outlive their exchange
    would double the memory of activations."""
    run_ranks(in_two, 2)


def test_four_processes():
    """More than one chunk and rank in every place: a chunk-major order that is right for two ranks only."""
    run_ranks(in_four, 4)

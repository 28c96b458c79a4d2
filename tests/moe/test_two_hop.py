"""Two-hop dispatch against the flat all-to-all: outputs, every gradient, rows on each level.

Cheapest first: option errors, fake tensors, threads as 2 x 2, 4 x 1 and 2 x 1 nodes, then gloo processes with rows
counted on their way into the collectives.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.two_hop import TwoHopConfig, TwoHopDispatcher, check_nodes, node_size
from moe_parallel.moe.routing import Choice, ForwardContext, LayerContext, Replay, Routing
from tests.ranks import forked, run_ranks, run_threads

RANKS, EXPERTS, WIDTH, TOKENS = 4, 8, 6, 40
HERE = LayerContext(layer=0, batch_shape=(1, TOKENS))
EXACT, SUMMED, BFLOAT16 = 0.0, 1e-12, 2.0**-7
"""Tolerances, relative to the largest number: the same products in the same order; sums of a few float64 in another
order; two roundings to bf16, 2^-9 each, where the flat exchange has one."""


@dataclass(frozen=True)
class Case:
    """How tokens of a rank choose experts."""

    name: str
    top_k: int = 1
    kind: str = "random"
    dtype: torch.dtype = torch.float64
    tolerance: float = SUMMED

    def choice(self, rank: int) -> Choice:
        """Another one on each rank."""
        generator = torch.Generator().manual_seed(100 + rank)
        tokens = 0 if self.kind == "idle" and rank == 1 else TOKENS
        expert_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(self.top_k).indices
        keep_TK = torch.rand(tokens, self.top_k, generator=generator) < 0.6
        match self.kind:
            case "skewed":
                expert_TK = torch.arange(self.top_k).expand(tokens, -1)
            case "half":  # no token for the experts of the first ranks
                expert_TK = (
                    torch.rand(tokens, EXPERTS // 2, generator=generator).topk(self.top_k).indices + EXPERTS // 2
                )
            case "twice":
                expert_TK = expert_TK[:, :1].expand(-1, self.top_k)
            case "one node":  # with any size of node: pairs of experts that live on one rank
                expert_TK = expert_TK[:, :1] // 2 * 2 + torch.arange(2)
            case "dropped":
                return Choice(expert_TK, is_full=False).only(keep_TK, EXPERTS)
            case "silent":
                return Choice(expert_TK, is_full=False).only(keep_TK & (rank != 2), EXPERTS)
            case "list":  # experts choose tokens: some never, some often
                token_N = torch.randint(0, tokens, (3 * tokens,), generator=generator)
                return Choice(torch.randint(0, EXPERTS, token_N.shape, generator=generator), token_N)
            case "dealt":
                slots = torch.arange(tokens * self.top_k).view(tokens, -1)
                return Choice(slots % EXPERTS, uniform_count=slots.numel() // EXPERTS)
        return Choice(expert_TK)


CASES = [
    Case("top-1", tolerance=EXACT),
    Case("top-1, everything to one expert", 1, "skewed", tolerance=EXACT),
    Case("top-1, an idle rank", 1, "idle", tolerance=EXACT),
    Case("top-1, dropped", 1, "dropped", tolerance=EXACT),
    Case("top-2", 2),
    Case("top-4", 4),
    Case("all experts", EXPERTS),
    Case("everything to the first experts", 3, "skewed"),
    Case("half of the experts idle", 2, "half"),
    Case("the same expert twice", 2, "twice"),
    Case("pairs on one rank", 2, "one node"),
    Case("an idle rank", 3, "idle"),
    Case("dropped slots, tokens without any", 3, "dropped"),
    Case("a rank that sends nothing", 2, "silent"),
    Case("expert choice", 1, "list"),
    Case("sizes known to the host", 2, "dealt"),
    Case("bf16 rows", 4, dtype=torch.bfloat16, tolerance=BFLOAT16),
]


# -- what runs on a rank -------------------------------------------------------------------------------------------


def mesh_of(ep: int) -> ParallelMesh:
    return ParallelMesh(make_layout(ParallelConfig(ep=ep), dist.get_world_size(), EXPERTS), "cpu")


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Choice]:
    """x_TD, combine weights in the shape of the choice, the choice."""
    choice, generator = case.choice(rank), torch.Generator().manual_seed(rank)
    tokens = TOKENS if choice.token_N is not None else choice.expert.shape[0]
    weight_dtype = torch.float32 if case.dtype is torch.bfloat16 else case.dtype
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(case.dtype)
    weight = torch.rand(choice.expert.shape, generator=generator, dtype=torch.float64).to(weight_dtype)
    return x_TD.requires_grad_(), weight.requires_grad_(), choice


def expert_weights(ep_rank: int, local: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return whole[ep_rank * local : (ep_rank + 1) * local].clone().requires_grad_()


def through(dispatcher, case: Case, ep: int, context: LayerContext = HERE) -> list[Tensor]:
    """Output, and gradients of tokens, combine weights, expert weights. Experts work on elements: a matrix product may
    round a row by its place."""
    rank = dist.get_rank()
    x_TD, weight, choice = inputs(case, rank)
    weight_LD = expert_weights(rank % ep, EXPERTS // ep, case.dtype)
    routing = Routing.of(choice, weight, EXPERTS)
    tokens, ticket = dispatcher.dispatch(x_TD, routing, context)
    results = []
    for token, part, part_LD in zip(tokens, ticket.parts, weight_LD.chunk(len(tokens)), strict=True):
        rows_RD, arrived = part.receive(token)
        assert list(part.host_counts) == arrived.count_E.tolist()
        # Rows lie as they arrived: each takes the weight of the place that it fills.
        of_place_RD = part_LD.repeat_interleave(arrived.count_E, dim=0)
        results.append(part.send(torch.tanh(rows_RD * of_place_RD[arrived.slot_TK[:, 0]])))
    out_TD = dispatcher.combine(results, routing, ticket)
    (out_TD * torch.sin(torch.arange(out_TD.numel(), dtype=out_TD.dtype)).view_as(out_TD)).sum().backward()
    gradients = [leaf.grad for leaf in (x_TD, weight, weight_LD)]
    return [out_TD.detach(), *(g if g is not None else torch.zeros(0) for g in gradients)]


def check_same(case: Case, got: list[Tensor], wanted: list[Tensor], where: str, experts: float = SUMMED) -> None:
    for name, a, b in zip(("output", "x", "combine weights", "expert weights"), got, wanted, strict=True):
        # An expert's rows come in another order of ranks, so its gradient is summed in another.
        tolerance = max(case.tolerance, experts) if name == "expert weights" else case.tolerance
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        error = float((a - b).abs().max()) / scale if b.numel() else 0.0
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert error <= tolerance, f"{case.name}, {where}: {name} is off by {error:.1e}"


def compare_with_flat(ep: int, ranks_per_node: int) -> None:
    mesh = mesh_of(ep)
    flat, two_hop = AllToAllDispatcher(mesh.ep.get_group()), TwoHopDispatcher(*mesh.node_groups(ranks_per_node))
    for case in CASES:
        wanted, got = through(flat, case, ep), through(two_hop, case, ep)
        check_same(case, got, wanted, f"{ep // ranks_per_node} nodes of {ranks_per_node}")
        again = through(two_hop, case, ep)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), f"{case.name}: two runs differ"


def as_threads() -> None:
    for ep, ranks_per_node in ((4, 2), (4, 1), (2, 1)):
        compare_with_flat(ep, ranks_per_node)


class Spy:
    """Notes what each all-to-all sends to other ranks: (ranks of the group, rows, dtype, columns)."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[int], int, torch.dtype, int]] = []
        self.original = dist.all_to_all_single

    def __call__(self, out, rows, received=None, sent=None, group=None, **options):
        ranks, place = dist.get_process_group_ranks(group), dist.get_rank(group)
        sizes = sent if sent is not None else [rows.shape[0] // len(ranks)] * len(ranks)
        others = sum(sizes) - sizes[place]
        self.sent.append((ranks, others, rows.dtype, rows.shape[1] if rows.ndim > 1 else 1))
        return self.original(out, rows, received, sent, group=group, **options)

    def rows(self, group: dist.ProcessGroup) -> list[int]:
        """Of token rows, in order."""
        ranks = dist.get_process_group_ranks(group)
        return [
            n for where, n, dtype, width in self.sent if where == ranks and width == WIDTH and dtype.is_floating_point
        ]

    @property
    def size_exchanges(self) -> int:
        return sum(not dtype.is_floating_point for _, _, dtype, _ in self.sent)


def pairs(case: Case, rank: int) -> list[tuple[int, int]]:
    """(token, expert) of each slot."""
    choice = case.choice(rank)
    both = zip(choice.tokens().tolist(), choice.expert.flatten().tolist())
    return [(token, expert) for token, expert in both if expert < EXPERTS]


def check_rows(ranks_per_node: int) -> None:
    across, within = mesh_of(RANKS).node_groups(ranks_per_node)
    dispatcher, me, per_rank = TwoHopDispatcher(across, within), dist.get_rank(), EXPERTS // RANKS
    for case in [case for case in CASES if case.kind != "dealt"]:
        with mock.patch.object(dist, "all_to_all_single", Spy()) as spy:
            through(dispatcher, case, RANKS)
        nodes = {(token, expert // per_rank // ranks_per_node) for token, expert in pairs(case, me)}
        mine = sum(node != me // ranks_per_node for _, node in nodes)
        # What comes back, and the gradient of what was sent, are the rows of others.
        assert spy.rows(across)[0] == mine, f"{case.name}: rows across nodes"
        assert spy.rows(across)[2] == mine, f"{case.name}: rows across nodes, gradient of the results"
        assert len(spy.rows(across)) == len(spy.rows(within)) == 4
        # A rank deals out what its rail sent to its node.
        rail = dist.get_process_group_ranks(across)
        arrived = [expert // per_rank for rank in rail for _, expert in pairs(case, rank)]
        dealt = sum(owner // ranks_per_node == me // ranks_per_node and owner != me for owner in arrived)
        assert spy.rows(within)[0] == dealt, f"{case.name}: rows within the node"


def check_replay() -> None:
    dispatcher = TwoHopDispatcher(*mesh_of(RANKS).node_groups(2))
    for case in CASES[:8]:
        context = replace(HERE, forward=ForwardContext(replay=Replay()))
        with mock.patch.object(dist, "all_to_all_single", Spy()) as first:
            wanted = through(dispatcher, case, RANKS, context)
        with (
            mock.patch.object(dist, "all_to_all_single", Spy()) as second,
            mock.patch.object(torch, "unique", side_effect=AssertionError("planned again")),
        ):
            got = through(dispatcher, case, RANKS, context)
        assert (first.size_exchanges, second.size_exchanges) == (2, 0), case.name
        assert [s for s in first.sent if s[2].is_floating_point] == second.sent, case.name
        assert all(torch.equal(a, b) for a, b in zip(got, wanted)), case.name


def check_groups() -> None:
    rank = dist.get_rank()
    for ep, ranks_per_node, across, within in (
        (4, 2, [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]),
        (4, 1, [0, 1, 2, 3], [rank]),
        (2, 1, [rank // 2 * 2, rank // 2 * 2 + 1], [rank]),
    ):
        groups = mesh_of(ep).node_groups(ranks_per_node)
        assert [dist.get_process_group_ranks(group) for group in groups] == [across, within]


def as_processes() -> None:
    check_groups()
    compare_with_flat(RANKS, 2)
    check_rows(2)
    check_rows(1)
    check_replay()


def without_memory() -> list[tuple[int, ...]]:
    """Shapes that one of 32 ranks, 4 nodes of 8, sees with fake tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=32)
    mesh = ParallelMesh(make_layout(ParallelConfig(ep=32), 32, 64), "cpu")
    dispatcher = TwoHopDispatcher(*mesh.node_groups(8))
    with FakeTensorMode():
        x_TD, weight_TK = torch.randn(128, 16, requires_grad=True), torch.rand(128, 2, requires_grad=True)
        expert_TK = torch.arange(256).view(128, 2) % 64
        routing = Routing.of(Choice(expert_TK, uniform_count=4), weight_TK, 64)
        (token,), ticket = dispatcher.dispatch(x_TD, routing, HERE)
        rows_RD, arrived = ticket.parts[0].receive(token)
        out_TD = dispatcher.combine([ticket.parts[0].send(rows_RD * 2)], routing, ticket)
        out_TD.sum().backward()
        assert x_TD.grad is not None
        assert weight_TK.grad is not None
        return [tuple(t.shape) for t in (rows_RD, arrived.count_E, out_TD, x_TD.grad, weight_TK.grad)]


# -- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "remedy"),
    [
        (8, 3, r"\[1, 2, 4\]"),
        (8, 8, r"\[1, 2, 4\]"),
        (8, 0, r"\[1, 2, 4\]"),
        (1, 1, "dispatch=all_to_all"),
    ],
)
def test_illegal_nodes(ep, ranks_per_node, remedy):
    """Nodes that are cut in half, a single node, none: found before ranks meet, with what would be legal."""
    with pytest.raises(ValueError, match=rf"dispatch.ranks_per_node={ranks_per_node} .* parallel.ep={ep} .*{remedy}"):
        check_nodes(ep, ranks_per_node)


def test_node_size(monkeypatch):
    """The launcher's number is taken only where none is given, and its message says where the number came from."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert node_size(TwoHopConfig(), ep=8) == 4
    assert node_size(TwoHopConfig(ranks_per_node=2), ep=8) == 2
    with pytest.raises(
        ValueError, match=r"=null takes the 4 ranks that the launcher starts .* does not divide parallel.ep=6"
    ):
        node_size(TwoHopConfig(), ep=6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ValueError, match="does not say; give a number"):
        node_size(TwoHopConfig(), ep=8)
    with pytest.raises(ValueError, match=r"dispatch.ranks_per_node=0 must be at least 1"):
        TwoHopConfig(ranks_per_node=0)


def test_fake_tensors():
    """Sizes that are asked from the device although the host knows them: a plan of a large run would stop there."""
    with ProcessPoolExecutor(1, mp_context=forked()) as pool:
        shapes = pool.submit(without_memory).result(timeout=120)
    assert shapes == [(256, 16), (2,), (128, 16), (128, 16), (128, 2)]


def test_threads():
    """A row that goes to the wrong rank, is lost, or is summed twice; a gradient that does not come back; slots that
    meet another's row. Top-1 in float64 must agree to the last bit: each output is one product, wherever it is taken.
    With more experts a token's sum is made node by node, in another order."""
    run_threads(as_threads, RANKS)


def test_processes():
    """The same over gloo, where a rank that skips or swaps a collective hangs. Rows on each level are whole numbers,
    counted here from the routing alone: a token that crosses twice, or a row that leaves its rail, changes them. A
    recomputed pass must neither plan nor exchange sizes again: its ranks might disagree."""
    run_ranks(as_processes, RANKS)

"""Triton kernels on an NVIDIA GPU. Each check names its twin on a CPU, which always runs.

1. values and gradients in bf16 and fp16, every kind of routing, every shipped configuration   2. no wait for the device
3. graphs: captured, and traced by torch.compile   4. float32 buffers
"""

from __future__ import annotations

import pytest
import torch

from moe_kernels.choice import AMPERE, GATHERED, SPECIALIZED, Entry, ExpertKernel, KernelConfig, device_name
from moe_kernels.counting_sort import sort_slots
from moe_kernels.moe_mlp import moe_mlp, moe_mlp_reference
from moe_kernels.permute import combine_rows, gather_rows
from moe_kernels.router_topk import Rule, router_topk
from moe_kernels.token_rounding import take_highest
from moe_kernels.triton_support import HAS_TRITON, SPECIALIZES
from tests.kernels.examples import KINDS, Operands, operands, relative_error

pytestmark = pytest.mark.gpu
DIM, HIDDEN, TOKENS = 256, 192, 700  # neither a multiple of the other, nor of a tile of rows


def configs() -> dict[str, KernelConfig]:
    if not (HAS_TRITON and torch.cuda.is_available()):
        return {"gathered": GATHERED, "specialized": SPECIALIZED}
    if torch.cuda.get_device_capability() < (9, 0):
        return {"ampere": AMPERE}
    return {"gathered": GATHERED, **({"specialized": SPECIALIZED} if SPECIALIZES else {})}


def case_of(kind: str) -> Operands:
    return operands(kind, tokens=TOKENS, dim=DIM, hidden=HIDDEN, experts=9, top_k=3)


def table_of(config: KernelConfig, dtype: torch.dtype) -> tuple[Entry, ...]:
    name = device_name(torch.device("cuda", torch.cuda.current_device()))
    return (Entry(name, str(dtype).removeprefix("torch."), DIM, HIDDEN, 9, 233, ExpertKernel.triton, config),)


def on_gpu(case: Operands, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Leaves, and the integers of the routing."""
    leaves = [t.detach().cuda().requires_grad_() for t in case.cast(dtype)]
    slot_TK = None if case.slot_TK is None else case.slot_TK.cuda()
    return leaves, [case.token_N.cuda(), case.count_E.cuda(), slot_TK]


def run(leaves, routing, upstream, **options):
    x, gate_up, down, weight, added = leaves
    token_N, count_E, slot_TK = routing
    out = moe_mlp(
        x, gate_up, down, token_N, count_E, weight, slot_TK, how=ExpertKernel.triton, added=[added], **options
    )
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.fixture
def poisoned():
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", configs())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8 * 2**-8), (torch.float16, 8 * 2**-11)])
def test_values_and_gradients(kind, name, dtype, tolerance, poisoned):
    """Twin: tests/kernels/interpreted/test_operation.py. Against float64; four roundings of the type in a row."""
    case = case_of(kind)
    leaves, routing = on_gpu(case, dtype)
    upstream = torch.randn(TOKENS, DIM, device="cuda").to(dtype)
    table = table_of(configs()[name], dtype)
    got = run(leaves, routing, upstream, table=table)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = moe_mlp_reference(*exact[:3], routing[0], routing[1], exact[3], [exact[4]])
    wanted = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for what, a, b in zip(("output", "x", "gate_up", "down", "weights", "added"), got, wanted, strict=True):
        assert relative_error(a.detach(), b.detach()) <= tolerance, what
    torch.use_deterministic_algorithms(False)  # which would hide parts of plain torch that have no order
    first, second = (run(leaves, routing, upstream, table=table) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "two runs differ"


@pytest.mark.parametrize("name", configs())
@pytest.mark.parametrize("kind", ["top-k", "expert choice"])
def test_nothing_waits_for_the_device(kind, name):
    """Twin: test_traced_as_one_graph in tests/kernels/test_moe_mlp.py. torch raises where a host waits."""
    leaves, routing = on_gpu(case_of(kind), torch.bfloat16)
    upstream = torch.randn(TOKENS, DIM, device="cuda").bfloat16()
    table = table_of(configs()[name], torch.bfloat16)
    run(leaves, routing, upstream, table=table, recompute=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, routing, upstream, table=table, recompute=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", configs())
def test_captured_in_a_graph(name):
    """Twin: as above. A captured step must follow new values and new loads of the experts, not replay the old ones."""
    case, other = case_of("top-k"), case_of("an empty expert")
    leaves, routing = on_gpu(case, torch.bfloat16)
    upstream = torch.randn(TOKENS, DIM, device="cuda").bfloat16()
    table = table_of(configs()[name], torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(leaves, routing, upstream, table=table)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, routing, upstream, table=table)
    new_leaves, new_routing = on_gpu(other, torch.bfloat16)
    with torch.no_grad():
        for old, new in zip([*leaves, *routing], [*new_leaves, *new_routing], strict=True):
            old.copy_(new)
    graph.replay()
    wanted = run(new_leaves, new_routing, upstream, table=table)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted))


def test_traced_by_the_compiler():
    """Twin: tests/kernels/test_moe_mlp.py. One graph, also where a table is looked up; equal to the last bit but for
    the gradient of the combine weights, whose last sum the compiler may order otherwise."""
    leaves, routing = on_gpu(case_of("top-k"), torch.bfloat16)
    upstream = torch.randn(TOKENS, DIM, device="cuda").bfloat16()
    x, gate_up, down, weight, added = leaves
    table = table_of(next(iter(configs().values())), torch.bfloat16)

    def forward(x, gate_up, down, weight, added):
        return moe_mlp(
            x, gate_up, down, routing[0], routing[1], weight, routing[2], how=ExpertKernel.auto, table=table,
            added=[added],
        )  # fmt: skip

    out = torch.compile(forward, fullgraph=True)(x, gate_up, down, weight, added)
    traced = [out, *torch.autograd.grad(out, leaves, upstream)]
    for place, (a, b) in enumerate(zip(traced, run(leaves, routing, upstream, table=table))):
        assert relative_error(a.detach(), b.detach().double()) < 1e-6 if place == 4 else torch.equal(a, b)


@pytest.mark.parametrize("name", configs())
def test_weight_gradients_are_added_to_buffers(name, poisoned):
    """Twin: tests/kernels/interpreted/test_operation.py. Two micro-batches equal the sum of both, without a rounding to
    bf16 in between."""
    case = case_of("an empty expert")
    leaves, (token_N, count_E, slot_TK) = on_gpu(case, torch.bfloat16)
    x, gate_up, down, weight, _ = leaves
    upstream = torch.randn(TOKENS, DIM, device="cuda").bfloat16()
    start = 2.0**12  # spacing of bf16 there: 32
    main = tuple(torch.full(t.shape, start, device="cuda") for t in (gate_up, down))
    table = table_of(configs()[name], torch.bfloat16)
    for _ in range(2):
        moe_mlp(
            x, gate_up, down, token_N, count_E, weight, slot_TK, how=ExpertKernel.triton, main_grad=main, table=table
        ).backward(upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = moe_mlp_reference(*exact[:3], token_N, count_E, exact[3])
    wanted = torch.autograd.grad(out, exact[1:3], upstream.double())
    for buffer, gradient in zip(main, wanted):
        assert relative_error(buffer.double() - start, 2 * gradient) < 8 * 2**-8
        assert torch.equal(buffer[1], torch.full_like(buffer[1], start))


@pytest.mark.parametrize("name", configs())
def test_many_ragged_experts_again_and_again(name):
    """Twin: none: a race shows on a device only. Programs go from expert to expert while loads of the last are under
    way; every gradient of a weight must be the same each time, and that of plain torch."""
    case = operands("top-k", tokens=6000, dim=DIM, hidden=HIDDEN, experts=200, top_k=4)
    leaves, routing = on_gpu(case, torch.bfloat16)
    upstream = torch.randn(6000, DIM, device="cuda").bfloat16()
    table = table_of(configs()[name], torch.bfloat16)
    first = run(leaves, routing, upstream, table=table)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = moe_mlp_reference(*exact[:3], routing[0], routing[1], exact[3], [exact[4]])
    for a, b in zip(first[1:], torch.autograd.grad(wanted, exact, upstream.double())):
        assert relative_error(a, b) < 8 * 2**-8
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, routing, upstream, table=table)))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 6), (256, 8)])
def test_router_sort_and_rounding(experts, top_k):
    """Twins: tests/kernels/interpreted/test_router_topk.py, test_counting_sort.py, test_take_highest.py. Integers must
    be equal; histograms and gathers within a program differ most between a device and the interpreter."""
    logit_TE = torch.randn(3001, experts, device="cuda")
    rule = Rule(top_k=top_k)
    mine, plain = router_topk(logit_TE, rule, fused=True), router_topk(logit_TE, rule)
    assert torch.equal(mine.expert_TK, plain.expert_TK)
    torch.testing.assert_close(mine.weight_TK, plain.weight_TK)
    sorted_ = [
        sort_slots(plain.expert_TK, experts, fused=fused, tile_count=mine.tile_count if fused else None)
        for fused in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*sorted_, strict=True))
    key_ET = torch.randint(0, 50, (experts, 3001), device="cuda", dtype=torch.int32)
    wanted_E = torch.randint(0, 3001, (experts,), device="cuda")
    assert torch.equal(take_highest(key_ET, wanted_E, fused=True), take_highest(key_ET, wanted_E))


@pytest.mark.parametrize("kind", ["top-k", "dropped slots"])
def test_packing_and_combining(kind):
    """Twin: tests/kernels/interpreted/test_products.py. Around an exchange, forward and backward, in bf16."""
    case = case_of(kind)
    (x, _, _, weight, added), (token_N, _, slot_TK) = on_gpu(case, torch.bfloat16)
    results = []
    for fused in (True, False):
        rows = gather_rows(x, token_N, slot_TK, fused)
        out = combine_rows(rows * 2, weight, token_N, slot_TK, len(x), [added], fused)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, weight, added])])
    for got, plain in zip(*results, strict=True):
        assert relative_error(got, plain.double()) < 4 * 2**-8

"""The MoE layer against dense networks, loops and its own laws.

1. closed forms   2. a loop over tokens   3. capacity   4. padding   5. causality   6. recompute replays
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.capacity import DropOrder, expert_capacity, keep_within_capacity
from moe_parallel.moe.experts import SwiGLU
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.token_choice import Score, TokenChoiceConfig
from moe_parallel.moe.routing import ForwardContext, LayerContext, Replay

DIM = 12


def make_layer(moe=None, router=None, balance=None, seed=0) -> MoELayer:
    moe = {"num_experts": 6, "expert_dim": 5, "num_shared_experts": 1, **(moe or {})}
    config = BalanceConfig(**(balance or {}))
    layer = MoELayer(DIM, MoEConfig(**moe), TokenChoiceConfig(**{"top_k": 2, **(router or {})}), config, 0).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return layer


def tokens(count=10, seed=1):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(count=10, training=True, valid_T=None, **forward):
    return LayerContext(
        layer=0, batch_shape=(1, count), valid_T=valid_T, forward=ForwardContext(training=training, **forward)
    )


def by_loop(layer, x_TD, keep=None):
    """Token by token, expert by expert."""
    out = []
    for t, x in enumerate(x_TD):
        logit_E = layer.router.weight @ x
        softmax = layer.router.config.score is Score.softmax
        score_E = logit_E.softmax(-1) if softmax else logit_E.sigmoid()
        chosen = score_E.topk(layer.router.config.top_k).indices.tolist()
        weights = torch.stack([score_E[e] for e in chosen])
        if layer.router.config.normalize:
            weights = weights / weights.sum()
        y = torch.zeros(DIM, dtype=torch.float64)
        for k, e in enumerate(chosen):
            if keep is None or keep[t][k]:
                gate, up = (layer.experts.gate_up[e] @ x).chunk(2)
                y = y + weights[k] * (layer.experts.down[e] @ (F.silu(gate) * up))
        if layer.shared is not None:
            gate = 1.0 if layer.shared_gate is None else torch.sigmoid(layer.shared_gate.weight[0] @ x)
            y = y + gate * layer.shared(x[None])[0]
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("moe", "router"),
    [
        ({}, {}),
        ({"num_shared_experts": 0}, {"top_k": 1}),
        ({"num_shared_experts": 2, "shared_expert_gate": True}, {"normalize": True}),
        ({}, {"score": Score.sigmoid, "normalize": True}),
    ],
)
def test_equals_a_loop_with_all_gradients(moe, router):
    """float64; 1e-12 is the rounding of sums of some tens of terms."""
    layer, x_TD = make_layer(moe, router), tokens().requires_grad_()
    out, _ = layer(x_TD, context())
    wanted = by_loop(layer, x_TD)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    grad = tokens(seed=5)
    inputs = [x_TD, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_dense_network_cut_into_experts():
    """A SwiGLU network split by width into E experts, all taken with weight 1, is that network."""
    dense = SwiGLU(DIM, 30).double()
    layer = make_layer({"num_shared_experts": 0}, {"top_k": 6, "normalize": True, "route_scale": 6.0})
    gate, up = dense.gate_up.weight.chunk(2)
    with torch.no_grad():
        layer.router.weight.zero_()  # equal scores: every weight is 6 * 1/6
        layer.experts.gate_up.copy_(torch.cat([gate.view(6, 5, DIM), up.view(6, 5, DIM)], dim=1))
        layer.experts.down.copy_(dense.down.weight.view(DIM, 6, 5).permute(1, 0, 2))
    torch.testing.assert_close(layer(tokens(), context())[0], dense(tokens()), rtol=1e-12, atol=1e-12)


def test_shared_expert_alone_is_a_dense_network():
    """With routed weights of zero only the shared experts are left, fused to one network of their total width."""
    layer = make_layer({"num_shared_experts": 3})
    with torch.no_grad():
        layer.experts.down.zero_()
    torch.testing.assert_close(layer(tokens(), context())[0], layer.shared(tokens()), rtol=0, atol=0)
    assert layer.shared.down.weight.shape == (DIM, 15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6), st.sampled_from(list(DropOrder)), st.integers(0, 99))
def test_drop_order_equals_a_queue(num_tokens, top_k, capacity, order, seed):
    """Ties in an unordered top-k drop other tokens from run to run; the queue written out here is the contract."""
    g = torch.Generator().manual_seed(seed)
    expert_TK = torch.stack([torch.randperm(4, generator=g)[:top_k] for _ in range(num_tokens)])
    weight_TK = torch.randint(0, 3, (num_tokens, top_k), generator=g).double()  # many ties
    keep_TK = keep_within_capacity(expert_TK, weight_TK, capacity, 4, order)
    slots = [(t, k) for k in range(top_k) for t in range(num_tokens)]
    if order is DropOrder.weight:
        slots = sorted(((t, k) for t in range(num_tokens) for k in range(top_k)), key=lambda s: -weight_TK[s])
    room = [capacity] * 4
    for slot in slots:
        expert = int(expert_TK[slot])
        assert bool(keep_TK[slot]) == (room[expert] > 0)
        room[expert] -= 1


def test_capacity_drops_count_and_lose_their_share():
    """Dropped slots are counted, kept ones keep their weight unless renormalization is asked for."""
    layer = make_layer({"capacity_factor": 0.5})
    out, (stats,) = layer(tokens(), context())
    expert_TK = layer.router.select(layer.router.scores(layer.router(tokens(), context())), context()).expert
    capacity = expert_capacity(10, 2, 6, 0.5)
    keep_TK = keep_within_capacity(expert_TK, expert_TK.double(), capacity, 6, DropOrder.position)
    assert int(stats.dropped) == int((~keep_TK).sum()) > 0
    assert int(stats.count_E.sum()) == 20  # before drops
    torch.testing.assert_close(out, by_loop(layer, tokens(), keep_TK), rtol=1e-12, atol=1e-12)


def test_renormalized_weights_keep_their_sum():
    """A token that lost a slot gives its weight to the ones it kept; one that lost all gets nothing."""
    layer = make_layer({"capacity_factor": 0.7, "renormalize_after_drop": True, "num_shared_experts": 0})
    routing, _ = layer.route(tokens(), layer.router, context())
    score_TE = layer.router.scores(layer.router(tokens(), context()))
    full_T = score_TE.topk(2).values.sum(-1)
    kept_T = torch.zeros(10, dtype=torch.float64).index_add(0, routing.token_N, routing.weight_N)
    served = torch.zeros(10, dtype=torch.bool).index_fill(0, routing.token_N, True)
    assert served.sum() < 10 or (torch.bincount(routing.token_N) < 2).any()  # something was dropped
    torch.testing.assert_close(kept_T[served], full_T[served], rtol=1e-12, atol=0)
    assert (kept_T[~served] == 0).all()


def test_padding_is_not_routed_nor_counted():
    """Padding that is sent to experts costs compute and, with a capacity, throws out real tokens."""
    layer, x_TD = make_layer({"capacity_factor": 1.0}), tokens()
    valid_T = torch.tensor([True] * 7 + [False] * 3)
    routing, stats = layer.route(x_TD, layer.router, context(valid_T=valid_T))
    assert int(routing.token_N.max()) < 7
    assert int(stats.count_E.sum()) == 14
    assert float(stats.entropy) == pytest.approx(float(layer.route(x_TD[:7], layer.router, context(7))[1].entropy))


@pytest.mark.parametrize(
    "moe", [{}, {"capacity_factor": 0.5}, {"capacity_factor": 0.5, "drop_order": DropOrder.weight}]
)
def test_evaluation_is_causal(moe):
    """Perturb the future: earlier outputs must not move. With a capacity, training is not causal (and this probe must
    fail there), so evaluation does not drop.

    1e-13: a matrix product over another number of rows may round otherwise; a routing that changed moves by 0.1."""
    layer = make_layer(moe)
    x_TD = tokens()
    changed_TD = torch.cat([x_TD[:6], tokens(seed=9)[6:]])
    before, after = (layer(x, context(training=False))[0][:6] for x in (x_TD, changed_TD))
    torch.testing.assert_close(before, after, rtol=1e-13, atol=1e-13)
    if "drop_order" in moe:
        before, after = (layer(x, context())[0][:6] for x in (x_TD, changed_TD))
        assert float((before - after).abs().max()) > 1e-3  # the probe can fail


def test_recompute_replays_the_choice():
    """Between forward and recomputation the bias moves (as a trainer's update would do): the second run must follow
    the first run's choice, or its gradients belong to another routing."""
    layer = make_layer(router={"score": Score.sigmoid}, balance={"bias_rate": 0.1})
    x_TD = tokens().requires_grad_()
    wanted = torch.autograd.grad(layer(x_TD, context())[0].square().sum(), [x_TD, *layer.parameters()])

    def run(x, ctx):
        return layer(x, ctx)[0]

    out = checkpoint(run, x_TD, context(replay=Replay()), use_reentrant=False)
    layer.router.bias += torch.linspace(-9, 9, 6, dtype=torch.float64)
    got = torch.autograd.grad(out.square().sum(), [x_TD, *layer.parameters()])
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_counts_are_returned_not_stored():
    """Buffers updated in forward double under recompute; a forward pass must leave no trace in the module."""
    layer = make_layer(balance={"bias_rate": 0.1, "global_coefficient": 0.1})
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    _, (first,) = layer(tokens(), context())
    _, (second,) = layer(tokens(), context())
    assert torch.equal(first.count_E, second.count_E)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert dataclasses.fields(first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 0}, "moe.num_experts=0"),
        ({"num_shared_experts": -1}, "moe.num_shared_experts=-1"),
        ({"shared_expert_gate": True, "num_shared_experts": 0}, "shared_expert_gate"),
        ({"capacity_factor": 0.0}, "moe.capacity_factor=0.0"),
        ({"renormalize_after_drop": True}, "renormalize_after_drop"),
    ],
)
def test_bad_options(options, words):
    """Each contradiction is refused by name."""
    with pytest.raises(ValueError, match=words):
        MoEConfig(**options)

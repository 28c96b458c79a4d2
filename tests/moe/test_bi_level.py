"""Bi-level routing against flat routing and closed forms.

1. a flat router of low rank   2. degenerate cases   3. balance of both levels   4. bad options
"""

import math

import pytest
import torch

from moe_parallel.moe.balance import BalanceConfig, DeviceScope, balance_terms
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.bi_level import BiLevelConfig, BiLevelRouter
from moe_parallel.moe.routing import Choice, LayerContext

NODES, EXPERTS, DIM, TOKENS = 4, 16, 6, 24
CONTEXT = LayerContext(layer=0, batch_shape=(1, TOKENS))
X = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make_router(num_experts=EXPERTS, **options) -> BiLevelRouter:
    router = BiLevelRouter(DIM, num_experts, BiLevelConfig(**{"num_nodes": NODES, "top_k": 1, **options})).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
    return router


def route(router):
    return router.route(router(X, CONTEXT), CONTEXT)


def test_one_local_router_is_a_flat_router_of_added_logits():
    """p_i q_j is softmax over a_i + b_j, and the best pair is the best node with the best expert: a router that mixes
    up nodes and experts, or normalizes twice, differs. 1e-14: two softmaxes instead of one."""
    router = make_router()
    logit = X @ router.weight.T
    flat_TE = (logit[:, :NODES, None] + logit[:, None, NODES:]).flatten(1).softmax(-1)
    routed = route(router)
    torch.testing.assert_close(routed.share_TE, flat_TE, rtol=1e-13, atol=1e-15)
    assert torch.equal(routed.choice.expert[:, 0], flat_TE.argmax(-1))
    torch.testing.assert_close(routed.weight[:, 0], flat_TE.amax(-1), rtol=1e-13, atol=0)
    for got, wanted in ((routed.weight, flat_TE.amax(-1)), (routed.share_TE**2, flat_TE**2)):
        a, b = (torch.autograd.grad(value.sum(), router.weight, retain_graph=True)[0] for value in (got, wanted))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_equal_routers_of_nodes_are_one_router():
    """With the same rows for every node a router for each is the one for all: rows in the order of nodes, not of
    places. 1e-13: the products of a wider matrix round otherwise."""
    one, own = make_router(top_k=4, top_nodes=2), make_router(top_k=4, top_nodes=2, local_router_per_node=True)
    with torch.no_grad():
        own.weight.copy_(torch.cat([one.weight[:NODES], *[one.weight[NODES:]] * NODES]))
    a, b = route(one), route(own)
    assert torch.equal(a.choice.expert, b.choice.expert)
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-13, atol=0)


@pytest.mark.parametrize("nodes", [1, EXPERTS])
def test_one_level_is_switch(nodes):
    """With one node, or one expert a node, what is left is flat top-1 over the other level's logits."""
    router = make_router(num_nodes=nodes)
    rows = router.weight[1:] if nodes == 1 else router.weight[:nodes]
    wanted = (X @ rows.T).softmax(-1)
    routed = route(router)
    assert torch.equal(routed.choice.expert[:, 0], wanted.argmax(-1))
    torch.testing.assert_close(routed.weight[:, 0], wanted.amax(-1), rtol=1e-13, atol=0)


def test_routers_of_their_own_choose_greedily():
    """A router for each node: the best node first, then its best expert, which is not the best pair for all tokens; a
    joint choice would send tokens to nodes that the first router does not prefer. Compared with a loop."""
    router = make_router(local_router_per_node=True)
    assert router.weight.shape == (NODES + EXPERTS, DIM)
    logit = X @ router.weight.T
    expert_T = route(router).choice.expert[:, 0]
    joint = 0
    for token in range(TOKENS):
        node_G, local_GM = logit[token, :NODES].softmax(-1), logit[token, NODES:].view(NODES, -1).softmax(-1)
        node = int(node_G.argmax())
        assert int(expert_T[token]) == node * 4 + int(local_GM[node].argmax())
        joint += int((node_G[:, None] * local_GM).argmax()) == int(expert_T[token])
    assert joint < TOKENS


@pytest.mark.parametrize("per_node", [False, True])
def test_a_token_stays_on_its_nodes(per_node):
    """top_k experts that are spread over more than top_nodes nodes cost the exchange what the method saves."""
    router = make_router(top_k=4, top_nodes=2, local_router_per_node=per_node)
    expert_TK = route(router).choice.expert
    assert all(len(set((row // 4).tolist())) == 2 and len(set(row.tolist())) == 4 for row in expert_TK)


def test_router_weights():
    """(n + m) D weights instead of n m D, in the count as in the module."""
    for per_node, rows in ((False, 4 + 4), (True, 4 + 16)):
        config = BiLevelConfig(num_nodes=NODES, top_k=1, local_router_per_node=per_node)
        assert config.num_weights(DIM, EXPERTS) == rows * DIM
        assert sum(p.numel() for p in config.build(DIM, EXPERTS, False).parameters()) == rows * DIM


def level_losses(router, routed) -> list[float]:
    """What each level costs a token, from the definition: cells * sum of share of slots * mean score."""
    expert_TK, logit = routed.choice.expert, X @ router.weight.detach().T
    node_TG, local = logit[:, :NODES].softmax(-1), logit[:, NODES:].unflatten(-1, (-1, 4)).softmax(-1)
    slots = [[int((expert_TK == node * 4 + place).sum()) for place in range(4)] for node in range(NODES)]
    total = TOKENS * expert_TK.shape[1]
    node = NODES * sum(sum(slots[i]) / total * float(node_TG[:, i].mean()) for i in range(NODES))
    if not router.config.local_router_per_node:
        places = [sum(row[place] for row in slots) / total for place in range(4)]
        return [node, 4 * sum(places[j] * float(local[:, 0, j].mean()) for j in range(4))]
    inner = 0.0  # each node over the tokens that chose it, by the share of a token that it has
    for i in range(NODES):
        mine = (expert_TK // 4 == i).any(-1)
        for j in range(4):
            share = slots[i][j] / max(sum(slots[i]), 1)
            inner += 4 * share * float(local[mine, i, j].sum()) / router.config.top_nodes / TOKENS
    return [node, inner]


@pytest.mark.parametrize("per_node", [False, True])
@pytest.mark.parametrize(("top_k", "top_nodes"), [(1, 1), (4, 2), (2, 2)])
def test_losses_of_both_levels_equal_a_loop(per_node, top_k, top_nodes):
    """Slots counted for the wrong node or place, scores of tokens that went elsewhere, a weight on the wrong level.
    1e-13: sums of a hundred terms of size 1."""
    options = {"top_k": top_k, "top_nodes": top_nodes, "node_loss_weight": 0.3, "local_loss_weight": 2.0}
    router = make_router(local_router_per_node=per_node, **options)
    routed = route(router)
    config = BalanceConfig(micro_batch_coefficient=0.5)
    found = balance_terms(config, routed.levels, routed.choice, EXPERTS, CONTEXT)
    node, local = level_losses(router, routed)
    assert float(found.weighted.detach()) / TOKENS == pytest.approx(0.5 * (0.3 * node + 2 * local), rel=1e-13)
    assert float(found.value) / TOKENS == pytest.approx((node + local) / 2, rel=1e-13)
    assert abs(node - 1) > 0.01 < abs(local - 1)


@pytest.mark.parametrize("per_node", [False, True])
def test_collapse_costs_the_cells_of_a_level(per_node):
    """All tokens on the first expert of one node, with all probability there: 4 nodes + 4 experts of a node. Exact."""
    router = make_router(local_router_per_node=per_node)
    logit = torch.full((TOKENS, router.weight.shape[0]), -900.0, dtype=torch.float64)
    logit[:, [2, *range(NODES, logit.shape[1], 4)]] = 0.0
    routed = router.route(logit, CONTEXT)
    assert (routed.choice.expert == 8).all()
    config = BalanceConfig(micro_batch_coefficient=1.0)
    found = balance_terms(config, routed.levels, routed.choice, EXPERTS, CONTEXT)
    assert float(found.weighted) / TOKENS == pytest.approx(8.0, abs=1e-14)


@pytest.mark.parametrize("per_node", [False, True])
def test_z_losses_of_equal_routers(per_node):
    """Logits c of every router: (c + log 4)^2 for the nodes and once more for the places, however many routers there
    are. A sum over nodes would press four times as hard where each has its own."""
    layer = MoELayer(
        DIM,
        MoEConfig(num_experts=EXPERTS, expert_dim=4),
        BiLevelConfig(num_nodes=NODES, top_k=1, local_router_per_node=per_node),
        BalanceConfig(z_coefficient=0.5),
        0,
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.25)
    x_TD = torch.full((TOKENS, DIM), 2.0, dtype=torch.float64)
    _, stats = layer.route(x_TD, layer.router, CONTEXT)
    wanted = 2 * TOKENS * (0.25 * 2.0 * DIM + math.log(4)) ** 2
    assert float(stats.z_square) == pytest.approx(wanted, rel=1e-14)
    assert float(stats.balance.detach()) == pytest.approx(0.5 * wanted, rel=1e-14)


@pytest.mark.parametrize("devices", [2, 8])
def test_losses_over_devices_take_the_scores_of_experts(devices):
    """A router of two levels has scores of nodes and of places; devices are groups of experts, whose scores are their
    products, also where there are more devices than nodes. 1e-13: sums of some hundred terms."""
    balance = BalanceConfig(device_coefficient=0.5, num_devices=devices, device_scope=DeviceScope.micro_batch)
    config = BiLevelConfig(num_nodes=NODES, top_k=4, top_nodes=2)
    layer = MoELayer(DIM, MoEConfig(num_experts=EXPERTS, expert_dim=4), config, balance, 0).double()
    layer.router.load_state_dict(make_router(top_k=4, top_nodes=2).state_dict())
    routing, stats = layer.route(X, layer.router, CONTEXT)
    share_TE = route(layer.router).share_TE.detach()
    load_D = routing.count_E.view(devices, -1).sum(-1).double() / (4 * TOKENS)
    wanted = 0.5 * devices * float((load_D * share_TE.view(TOKENS, devices, -1).sum((0, 2))).sum())
    assert float(stats.balance.detach()) == pytest.approx(wanted, rel=1e-13)


def value(router, expert_T, local_TGM: torch.Tensor | None = None) -> float:
    """Mean balance loss with these experts, at equal scores of nodes and equal or given ones within them."""
    if local_TGM is None:
        local_TGM = torch.full((TOKENS, NODES, 4), 1 / 4, dtype=torch.float64)
    choice = Choice(torch.as_tensor(expert_T)[:, None])
    node = router._node_level(torch.full((TOKENS, NODES), 1 / NODES, dtype=torch.float64))
    local = router._local_level(local_TGM, choice)
    config = BalanceConfig(micro_batch_coefficient=1.0)
    return float(balance_terms(config, (node, local), choice, EXPERTS, CONTEXT).weighted) / TOKENS


@pytest.mark.parametrize("per_node", [False, True])
def test_two_losses_of_one_at_balance(per_node):
    """Each level is worth 1.0 when its cells get equal shares: 2 in all. Exact up to a rounding."""
    balanced = torch.arange(TOKENS) % EXPERTS
    balanced[16:] = torch.arange(8) % 4 * 4 + torch.arange(8) // 4  # equal over nodes; equal scores anyway
    assert value(make_router(local_router_per_node=per_node), balanced) == pytest.approx(2.0, abs=1e-14)


def test_imbalance_within_nodes_shows_only_with_routers_of_their_own():
    """Node i sends everything to its expert i: summed over nodes all places are equal, within each node all is on one.
    A loss over places alone would call that balanced. With scores that follow the choice it is 1 and 4."""
    tokens = torch.arange(TOKENS)
    expert_T = tokens % NODES * 4 + tokens % NODES
    share = torch.zeros(TOKENS, NODES, 4, dtype=torch.float64)
    share[tokens, :, tokens % NODES] = 1.0
    assert value(make_router(), expert_T, share) - 1 == pytest.approx(1.0, abs=1e-14)
    own = make_router(local_router_per_node=True)
    assert value(own, expert_T, share) - 1 == pytest.approx(4.0, abs=1e-14)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_nodes": 3}, "router.num_nodes=3; legal values"),
        ({"top_nodes": 5, "top_k": 5}, "router.top_nodes=5"),
        ({"top_nodes": 2, "top_k": 3}, "router.top_k=3 is not divisible"),
        ({"top_k": 5}, "takes 5 experts of a node, which has 4"),
        ({"node_loss_weight": -1.0}, "node_loss_weight=-1.0"),
    ],
)
def test_bad_options(options, words):
    """Every relation is told with its numbers."""
    with pytest.raises(ValueError, match=words):
        make_router(**options)

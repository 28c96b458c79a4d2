"""Bi-level routing against flat routing and closed forms.

1. a flat router of low rank   2. degenerate cases   3. balance of both levels   4. bad options
"""

import pytest
import torch

from moe_parallel.moe.balance import BalanceConfig, balance_terms
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

"""Token rounding in the layer: what experts compute, what is counted, what it cannot be combined with.

The choice of slots itself is tested against sorting in `tests/kernels/test_token_rounding.py`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels.token_rounding import Rounding
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.router import LooksAt, RouterConfig
from moe_parallel.moe.routers.token_choice import Score, TokenChoiceConfig
from moe_parallel.moe.routing import Replay
from tests.moe.test_layer import context, make_layer, tokens

TILE = 4
ROUTERS = [{}, {"score": Score.sigmoid, "normalize": True, "route_scale": 2.5}]


def rounding_layer(how: Rounding, router=None, **options):
    return make_layer({"token_rounding": how, "token_rounding_tile": TILE}, router, **options)


def by_loop(layer, x_TD: torch.Tensor, routing) -> torch.Tensor:
    """Slots as the layer lists them, weights computed here: score, over the sum of the token's own best k, scaled."""
    config = layer.router.config
    logit_TE = x_TD @ layer.router.weight.T
    score_TE = logit_TE.softmax(-1) if config.score is Score.softmax else logit_TE.sigmoid()
    out_TD = torch.zeros_like(x_TD)
    expert_N = torch.arange(6).repeat_interleave(routing.count_E)
    for e, t in zip(expert_N.tolist(), routing.token_N.tolist()):
        weight = score_TE[t, e] * config.route_scale
        if config.normalize:
            weight = weight / score_TE[t].topk(config.top_k).values.sum()
        gate, up = (layer.experts.gate_up[e] @ x_TD[t]).chunk(2)
        row_D = weight * (layer.experts.down[e] @ (F.silu(gate) * up))
        out_TD = out_TD + F.one_hot(torch.tensor(t), len(x_TD))[:, None] * row_D
    return out_TD + layer.shared(x_TD)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", [Rounding.nearest, Rounding.up, Rounding.down])
def test_output_and_gradients_of_all_slots(how, router):
    """Added slots without a weight's gradient, weights of another token's choice, slots that reach the wrong expert.
    float64; 1e-12 is the rounding of sums of some tens of terms."""
    layer, x_TD = rounding_layer(how, router), tokens(22).requires_grad_()
    routing, _ = layer.route(x_TD, layer.router, context(22))
    own, _ = make_layer(None, router).route(x_TD, layer.router, context(22))
    assert (routing.count_E % TILE == 0).all()
    expert_N, own_N = (torch.arange(6).repeat_interleave(r.count_E) for r in (routing, own))
    added = set(zip(expert_N.tolist(), routing.token_N.tolist())) - set(zip(own_N.tolist(), own.token_N.tolist()))
    assert bool(added) == (how is not Rounding.down), "the case must have what it is to show"
    out_TD, _ = layer(x_TD, context(22))
    wanted_TD = by_loop(layer, x_TD, routing)
    torch.testing.assert_close(out_TD, wanted_TD, rtol=1e-12, atol=1e-12)
    inputs, grad_TD = [x_TD, *layer.parameters()], tokens(22, seed=5)
    for a, b in zip(torch.autograd.grad(out_TD, inputs, grad_TD), torch.autograd.grad(wanted_TD, inputs, grad_TD)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_counts_are_those_before_rounding():
    """Counts after rounding look balanced whatever the router does: the losses and the bias would be blind. Tokens that
    lost all their slots must show."""
    for how in (Rounding.up, Rounding.down):
        layer, x_TD = rounding_layer(how), tokens(22)
        routing, stats = layer.route(x_TD, layer.router, context(22))
        plain, before = make_layer().route(x_TD, layer.router, context(22))
        assert torch.equal(stats.count_E, plain.count_E)
        assert torch.equal(stats.balance_value, before.balance_value)
        lost = plain.count_E - routing.count_E
        assert int(stats.dropped) == (int(lost.sum()) if how is Rounding.down else 0)
        assert int(stats.unserved) == 22 - len(set(routing.token_N.tolist()))


def test_padding_is_not_added():
    """Padding that scores well fills the tile instead of a token."""
    layer, x_TD = rounding_layer(Rounding.up), tokens(22)
    valid_T = torch.arange(22) % 3 > 0
    routing, stats = layer.route(x_TD, layer.router, context(22, valid_T=valid_T))
    assert valid_T[routing.token_N].all()
    assert (routing.count_E % TILE == 0).all()
    assert int(stats.count_E.sum()) == 2 * int(valid_T.sum())


def test_evaluation_and_forced_balance_round_nothing():
    """Which tokens an expert gains depends on later ones, so text could not be generated; and benchmarks of equal loads
    must stay what they are."""
    layer, plain, x_TD = rounding_layer(Rounding.up), make_layer(), tokens(12)
    assert torch.equal(layer(x_TD, context(12, training=False))[0], plain(x_TD, context(12, training=False))[0])
    assert not torch.equal(layer(x_TD, context(12))[0], plain(x_TD, context(12))[0])
    assert layer.looks_at(training=False) == LooksAt.itself
    assert layer.looks_at(training=True) == LooksAt.past | LooksAt.future | LooksAt.others
    forced = rounding_layer(Rounding.up, {"forced_balance": True})
    routing, _ = forced.route(x_TD, forced.router, context(12))
    assert routing.count_E.unique().tolist() == [4]
    assert forced.looks_at(training=True) == LooksAt.itself


def test_recompute_takes_the_same_slots():
    """Scores that move by a rounding when a pass is computed again would take other slots. Here they move for good."""
    layer, x_TD = rounding_layer(Rounding.nearest), tokens(22).requires_grad_()
    made = []
    route = layer.route
    layer.route = lambda *a: made.append(route(*a)) or made[-1]

    def run(x_TD, ctx):
        return layer(x_TD, ctx)[0]

    out_TD = checkpoint(run, x_TD, context(22, replay=Replay()), use_reentrant=False)
    with torch.no_grad():
        layer.router.weight.neg_()
    out_TD.square().sum().backward()
    assert len(made) == 2
    assert torch.equal(made[0][0].token_N, made[1][0].token_N)
    assert torch.equal(made[0][0].count_E, made[1][0].count_E)
    assert not torch.equal(made[0][0].weight_N, made[1][0].weight_N)


ROUNDED = {"token_rounding": Rounding.nearest}


@pytest.mark.parametrize(
    ("moe", "router", "words"),
    [
        ({**ROUNDED, "capacity_factor": 1.0}, TokenChoiceConfig(), "moe.capacity_factor=1.0 and moe.token_rounding"),
        ({"token_rounding_tile": 1}, TokenChoiceConfig(), "moe.token_rounding_tile=1 must be at least 2"),
        (ROUNDED, ExpertChoiceConfig(), "needs a router by which each token chooses"),
        (ROUNDED, TokenChoiceConfig(top_k=2, normalize=True, random_second=True), "router.random_second=true"),
        (ROUNDED, TokenChoiceConfig(num_groups=4, top_groups=2), "top_groups=2 of router.num_groups=4"),
    ],
)
def test_refused_at_the_start(moe, router: RouterConfig, words):
    """What cannot be combined ends with a name and a way out, before a process meets another."""
    with pytest.raises(ValueError, match=words):
        Architecture(ModelConfig(), GroupedQueryConfig(), MoEConfig(**moe), router, BalanceConfig(), 100)


def test_what_may_be_combined_and_how_many_tokens():
    """Groups hold where no token is added. A tile that the mean load does not fill leaves most experts without tokens,
    or with those that did not choose them."""
    down = MoEConfig(token_rounding=Rounding.down)
    down.check_router(TokenChoiceConfig(num_groups=4, top_groups=2))
    down.check_tokens(512, top_k=4)
    MoEConfig().check_tokens(1, top_k=1)
    with pytest.raises(ValueError, match=r"508 tokens .* router.top_k=4 / moe.num_experts=16 are 127"):
        down.check_tokens(508, top_k=4)

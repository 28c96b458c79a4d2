"""Random, hash, Switch and GShard routing: what they draw, and what their draws depend on."""

import itertools

import pytest
import torch

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.hash import HashConfig
from moe_parallel.moe.routers.random import RandomConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import ForwardContext, LayerContext

EXPERTS, TOKENS, DIM = 8, 4000, 6


def context(first=0, count=TOKENS, step=0, layer=0, iteration=0, training=True, seed=0, token_T=None):
    return LayerContext(
        layer=layer,
        batch_shape=(1, count),
        iteration=iteration,
        token_id_T=torch.arange(first, first + count),
        token_T=token_T,
        forward=ForwardContext(step=step, training=training, seed=seed),
    )


def rows(count=TOKENS):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def route(router, ctx, x_TD=None):
    x_TD = rows(ctx.batch_shape[1]) if x_TD is None else x_TD
    return router.route(router(x_TD, ctx), ctx)


def test_random_experts_are_uniform_and_distinct():
    """A biased draw is no baseline. Loads are binomial, 1000 +- 27 for each of 8 experts at k = 2: 5 sigma of the
    worst of eight is passed by chance once in 200,000 draws, and the hash is fixed."""
    router = RandomConfig(top_k=2).build(DIM, EXPERTS, False)
    routed = route(router, context())
    expert_TK = routed.choice.expert
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    load = torch.bincount(expert_TK.flatten(), minlength=EXPERTS)
    assert float((load - 1000).abs().max()) < 5 * (TOKENS * 0.25 * 0.75) ** 0.5
    assert (routed.weight == 0.5).all()


@pytest.mark.parametrize("next_to", ["slot", "token", "step", "layer"])
def test_random_experts_are_independent(next_to):
    """Experts that follow from those of the token before, of the last step or layer make some pairs of experts meet
    and others not. Chi-square over all pairs: 55 degrees of freedom for the 56 ordered pairs of a token, 63 for
    others, deviation sqrt(2 * 63) = 11; 5 of them above the mean is passed once in some 10,000 draws, and the hash is
    fixed."""
    router = RandomConfig(top_k=2).build(DIM, EXPERTS, False)
    expert_TK = route(router, context()).choice.expert
    first = expert_TK[:, 0]
    other = {
        "slot": expert_TK[:, 1],
        "token": first.roll(1),
        "step": route(router, context(step=1)).choice.expert[:, 0],
        "layer": route(router, context(layer=1)).choice.expert[:, 0],
    }[next_to]
    count = torch.bincount(first * EXPERTS + other, minlength=64).double().view(8, 8)
    if next_to == "slot":
        assert (count.diagonal() == 0).all()
        count = count[~torch.eye(8, dtype=torch.bool)]
    wanted = TOKENS / count.numel()
    assert float(((count - wanted) ** 2 / wanted).sum()) < 63 + 5 * 11


def test_random_experts_depend_on_the_token_and_the_place_alone():
    """A generator would draw other experts on another layout, or when a pass is computed again."""
    router = RandomConfig(top_k=2).build(DIM, EXPERTS, False)
    whole = route(router, context()).choice.expert
    part = route(router, context(first=1000, count=500)).choice.expert
    assert torch.equal(part, whole[1000:1500])
    for other in (context(step=1), context(layer=1), context(iteration=1), context(seed=1)):
        same = float((route(router, other).choice.expert == whole).double().mean())
        assert same < 0.2  # 1/8 by chance


def test_hash_experts_depend_on_the_vocabulary_alone():
    """A table that moved with the step, the seed or the place would be random routing, and one that evaluation does
    not share would be another model."""
    router = HashConfig(top_k=2).build(DIM, EXPERTS, False)
    token_T = torch.randint(0, 50, (TOKENS,), generator=torch.Generator().manual_seed(3))
    table = route(router, context(token_T=token_T)).choice.expert
    for other in (context(step=3, seed=5, token_T=token_T), context(first=9, training=False, token_T=token_T)):
        assert torch.equal(route(router, other).choice.expert, table)
    for token in range(50):
        assert len({tuple(row) for row in table[token_T == token].tolist()}) == 1
    other = route(router, context(layer=1, token_T=token_T)).choice.expert
    assert not torch.equal(other, table)
    one = HashConfig(top_k=2, same_in_all_layers=True).build(DIM, EXPERTS, False)
    a, b = (route(one, context(layer=layer, token_T=token_T)).choice.expert for layer in (0, 1))
    assert torch.equal(a, b)


def test_hash_tables_are_uniform_and_independent():
    """A table of 4000 ids: 500 +- 21 on each of 8 experts; those of other layers and iterations agree in 500 +- 21
    places. 5 sigma are 105."""
    token_T = torch.arange(TOKENS)
    router = HashConfig(top_k=1).build(DIM, EXPERTS, False)
    tables = [
        route(router, context(layer=layer, iteration=iteration, token_T=token_T)).choice.expert[:, 0]
        for layer, iteration in ((0, 0), (1, 0), (0, 1))
    ]
    for table in tables:
        assert float((torch.bincount(table, minlength=EXPERTS) - 500).abs().max()) < 105
    for a, b in itertools.combinations(tables, 2):
        assert abs(int((a == b).sum()) - 500) < 105


@pytest.mark.parametrize("config", [RandomConfig(), HashConfig()])
def test_losses_that_cannot_act_are_refused(config):
    """A coefficient on a router that learns nothing would do nothing."""
    for options in ({"global_coefficient": 0.1}, {"z_coefficient": 0.1}, {"bias_rate": 0.1}):
        with pytest.raises(ValueError, match="balance"):
            config.check_balance(BalanceConfig(**options))
    config.check_balance(BalanceConfig())
    assert config.num_weights(DIM, EXPERTS) == 0 == sum(1 for _ in config.build(DIM, EXPERTS, False).parameters())


def token_choice(**options):
    router = TokenChoiceConfig(**options).build(DIM, EXPERTS, False).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(1)))
    return router


def test_jitter_is_bounded_repeatable_and_for_training_only():
    """Noise in evaluation makes it random; noise from a generator cannot be recomputed; and the logits tell how far the
    input moved: each of 6 products by at most 10 %."""
    router, plain = token_choice(top_k=1, input_jitter=0.1), token_choice(top_k=1)
    x_TD = rows()
    still, noisy = plain(x_TD, context()), router(x_TD, context())
    assert torch.equal(router(x_TD, context(training=False)), still)
    assert torch.equal(router(x_TD, context()), noisy)
    moved = (noisy - still).detach().abs()
    assert (moved <= 0.1 * x_TD.abs() @ router.weight.abs().T + 1e-12).all()
    assert float(moved.mean()) > 0.01
    assert not torch.equal(router(x_TD, context(step=1)), noisy)


def test_jitter_is_uniform_and_drawn_for_every_number():
    """One factor for a whole row or column would be no more than a temperature. Rows of the identity as weights show
    the factors: mean 1 and variance 0.1^2 / 3 within 5 standard errors of 24,000 draws (0.0019 and 0.000096), rows and
    columns without correlation (5 / sqrt(4000) = 0.08 and, for the means of 6, 0.1 / sqrt(18) within a tenth)."""
    router = token_choice(top_k=1, input_jitter=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS, DIM))
    x_TD = rows()
    factor_TD = router(x_TD, context())[:, :DIM].detach() / x_TD
    assert 0.9 <= float(factor_TD.min()) < 0.901
    assert 1.099 < float(factor_TD.max()) <= 1.1
    assert abs(float(factor_TD.mean()) - 1) < 0.0019
    assert abs(float(factor_TD.var()) - 0.01 / 3) < 0.000096
    assert float((torch.corrcoef(factor_TD.T) - torch.eye(DIM)).abs().max()) < 0.08
    assert float(factor_TD.mean(-1).std()) == pytest.approx(0.1 / 18**0.5, rel=0.1)
    part = router(x_TD[1000:1500], context(first=1000, count=500))[:, :DIM].detach() / x_TD[1000:1500]
    torch.testing.assert_close(part, factor_TD[1000:1500], rtol=1e-14, atol=0)


def test_random_numbers_of_a_layer_have_no_double():
    """Numbers of another seed, step, layer, iteration or purpose that are the same repeat noise; so do those of the
    next token moved by a cell, where tokens do not have cells of their own. 5 standard errors of a correlation of
    12,000 numbers are 0.046."""
    number_TC = context().random("a", 3)
    others = [context(**{name: 1}).random("a", 3) for name in ("seed", "step", "layer", "iteration", "first")]
    others += [context().random("b", 3)]
    for other_TC in others:
        assert abs(float(torch.corrcoef(torch.stack([number_TC.flatten(), other_TC.flatten()]))[0, 1])) < 0.046
    assert not (number_TC[:-1, 1:] == number_TC[1:, :-1]).any()
    assert torch.equal(context(first=7).random("a", 3)[:-7], number_TC[7:])


def test_second_expert_is_taken_as_often_as_twice_its_weight():
    """GShard's rule: expected number of second experts = sum of 2 w. A sum of independent draws with variance
    of at most 1/4 each: 5 sigma of 4000 are 158. Evaluation takes both."""
    router = token_choice(top_k=2, normalize=True, random_second=True)
    routed = route(router, context())
    taken, chance_T = routed.choice.expert < EXPERTS, 2 * routed.weight[:, 1].detach()
    assert taken[:, 0].all()
    expected = float(chance_T.sum())  # the second of two weights is below a half
    assert abs(int(taken[:, 1].sum()) - expected) < 158
    assert 0.1 < float(taken[:, 1].double().mean()) < 0.9
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):  # any rule with the right mean would pass so far
        mine = (chance_T >= low) & (chance_T < low + 0.2)
        expected, deviation = float(chance_T[mine].sum()), 0.5 * int(mine.sum()) ** 0.5
        assert int(mine.sum()) > 300
        assert abs(int(taken[mine, 1].sum()) - expected) < 5 * deviation
    plain = route(token_choice(top_k=2, normalize=True), context())
    assert torch.equal(routed.weight, plain.weight), "a first expert keeps its weight when the second is not taken"
    assert (route(router, context(training=False)).choice.expert < EXPERTS).all()
    with pytest.raises(ValueError, match=r"router.random_second=true needs router.top_k=2, not 3"):
        TokenChoiceConfig(top_k=3, normalize=True, random_second=True)

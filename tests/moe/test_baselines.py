"""Random, hash, Switch and GShard routing: what they draw, and what their draws depend on."""

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
    pairs = torch.bincount(expert_TK[:, 0] * EXPERTS + expert_TK[:, 1], minlength=64)
    assert (pairs > 0).sum() == 56, "every ordered pair of different experts occurs"
    assert (routed.weight == 0.5).all()


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
    moved = (noisy - still).abs()
    assert (moved <= 0.1 * x_TD.abs() @ router.weight.abs().T + 1e-12).all()
    assert float(moved.mean()) > 0.01
    assert not torch.equal(router(x_TD, context(step=1)), noisy)


def test_second_expert_is_taken_as_often_as_twice_its_weight():
    """GShard's rule: expected number of second experts = sum of min(1, 2 w). A sum of independent draws with variance
    of at most 1/4 each: 5 sigma of 4000 are 158. Evaluation takes both."""
    router = token_choice(top_k=2, normalize=True, random_second=True)
    routed = route(router, context())
    taken = routed.choice.expert < EXPERTS
    assert taken[:, 0].all()
    expected = float((2 * routed.weight[:, 1]).clamp(max=1).sum())
    assert abs(int(taken[:, 1].sum()) - expected) < 158
    assert 0.1 < float(taken[:, 1].double().mean()) < 0.9
    assert (route(router, context(training=False)).choice.expert < EXPERTS).all()
    with pytest.raises(ValueError, match=r"router.random_second=true needs router.top_k=2, not 3"):
        TokenChoiceConfig(top_k=3, normalize=True, random_second=True)

"""Token choice against its papers' properties and an independent implementation.

1. weights   2. the selection bias   3. groups   4. forced balance   5. bad options
"""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_parallel import relations
from moe_parallel.moe.routers.token_choice import GroupScore, RouterKernel, Score, TokenChoiceConfig, TokenChoiceRouter
from moe_parallel.moe.routing import Choice, LayerContext
from moe_parallel.options import ConfigError, composed

CONFIGS = Path(__file__).parents[2] / "configs"

CONTEXT = LayerContext(layer=0, batch_shape=(1, 32))


def make_router(num_experts=8, with_bias=False, dim=16, seed=0, **options) -> TokenChoiceRouter:
    router = TokenChoiceRouter(dim, num_experts, TokenChoiceConfig(**options), with_bias).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, dim, generator=torch.Generator().manual_seed(seed)))
    return router


def route(router, x):
    logit = router(x, CONTEXT)
    routed = router.route(logit, CONTEXT)
    return router.scores(logit), routed.choice.expert, routed.weight


X = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_plain_softmax_weights_are_the_scores():
    """DeepSeekMoE, V2 and OLMoE do not renormalize; doing so silently is another method."""
    router = make_router(top_k=3)
    _, expert, weight = route(router, X)
    wanted, chosen = torch.softmax(X @ router.weight.T, -1).sort(descending=True)
    assert torch.equal(expert, chosen[:, :3])
    torch.testing.assert_close(weight, wanted[:, :3], rtol=1e-14, atol=0)


@pytest.mark.parametrize("score", list(Score))
def test_normalized_weights_sum_to_route_scale(score):
    """The scale must come after the normalization, and the sum is exact to one rounding of float64 per expert."""
    _, _, weight = route(make_router(top_k=4, score=score, normalize=True, route_scale=2.5), X)
    torch.testing.assert_close(weight.sum(-1), torch.full((32,), 2.5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_router_computes_in_float32_from_bf16_rows():
    """A product in bf16 flips near-ties and with them experts."""
    router = TokenChoiceRouter(16, 8, TokenChoiceConfig(top_k=2), with_bias=False)
    torch.nn.init.normal_(router.weight)
    logits = router(X.bfloat16(), CONTEXT)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, X.bfloat16().float() @ router.weight.T, rtol=0, atol=0)


def test_bias_moves_the_choice_and_nothing_else():
    """The bias in the weights, or with a gradient, would pull on the loss; then it is no longer loss-free."""
    plain = make_router(top_k=2, score=Score.sigmoid, normalize=True)
    biased = make_router(top_k=2, score=Score.sigmoid, normalize=True, with_bias=True)
    biased.bias[3] += 10.0
    score, expert, weight = route(biased, X)
    assert (expert == 3).any(-1).all()
    assert torch.equal(weight, plain.weights(score, Choice(expert)))
    assert not biased.bias.requires_grad


def test_equal_bias_changes_nothing():
    """The choice depends on differences of the bias only."""
    plain, biased = make_router(top_k=3), make_router(top_k=3, with_bias=True)
    biased.bias += 0.25
    assert torch.equal(route(plain, X)[1], route(biased, X)[1])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 4)]), st.sampled_from(list(GroupScore)), st.integers(0, 50))
def test_groups_bound_the_fan_out(groups, how, seed):
    """A token that leaves its groups costs another node; checked against a loop over tokens."""
    num_groups, top_groups = groups
    router = make_router(16, seed=seed, top_k=4, num_groups=num_groups, top_groups=top_groups, group_score=how)
    score, expert, _ = route(router, X)
    size, best = 16 // num_groups, 1 if how is GroupScore.max else 4 // top_groups
    for token in range(32):
        parts = score[token].view(num_groups, size)
        worth = parts.sort(-1, descending=True).values[:, :best].sum(-1)
        allowed = set(worth.topk(top_groups).indices.tolist())
        candidates = [e for e in range(16) if e // size in allowed]
        wanted = sorted(candidates, key=lambda e: -score[token, e])[:4]
        assert expert[token].tolist() == wanted


def test_all_groups_equal_no_groups():
    """Masking must be a no-op when every group is allowed, to the last bit."""
    free = make_router(16, top_k=4)
    grouped = make_router(16, top_k=4, num_groups=4, top_groups=4, group_score=GroupScore.max)
    for a, b in zip(route(free, X), route(grouped, X)):
        assert torch.equal(a, b)


def test_negative_scores_still_lose_to_allowed_groups():
    """With a mask of zero instead of minus infinity, a negative biased score would lose to a forbidden expert."""
    router = make_router(8, top_k=2, num_groups=2, top_groups=1, with_bias=True)
    router.bias -= 5.0
    _, expert, _ = route(router, X)
    assert ((expert // 4) == (expert[:, :1] // 4)).all()


def test_equals_transformers_deepseek_v3():
    """An independent implementation of sigmoid scores, groups, bias, normalization and scale."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=1, num_hidden_layers=1,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    ours = make_router(
        16, with_bias=True, top_k=4, score=Score.sigmoid, normalize=True, route_scale=2.5, num_groups=4, top_groups=2
    )
    bias = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.2
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        ours.bias.copy_(bias)
    # float32 logits there, float64 here: weights agree to float32 rounding, choices wherever there is no near-tie.
    _, weights, indices = theirs(X)
    _, expert, weight = route(ours, X)
    order, wanted_order = expert.argsort(-1), indices.argsort(-1)
    assert torch.equal(expert.gather(1, order), indices.gather(1, wanted_order))
    torch.testing.assert_close(weight.gather(1, order), weights.gather(1, wanted_order).double(), rtol=1e-5, atol=1e-6)


def test_forced_balance_is_balanced():
    """The benchmark mode promises equal, host-known loads; a remainder would break the exchange."""
    _, expert, _ = route(make_router(8, top_k=2, forced_balance=True), X)
    assert torch.bincount(expert.flatten(), minlength=8).tolist() == [8] * 8
    assert (expert[:, 0] != expert[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "experts", "words"),
    [
        ({"top_k": 9}, 8, ("router.top_k=9", "moe.num_experts=8")),
        ({"top_k": 0}, 8, ("router.top_k=0",)),
        ({"num_groups": 3, "top_groups": 1}, 8, ("num_groups=3", "legal")),
        ({"num_groups": 4, "top_groups": 5}, 8, ("top_groups=5",)),
        ({"top_k": 4, "num_groups": 4, "top_groups": 1}, 8, ("top_k=4", "groups")),
        ({"top_k": 3, "num_groups": 4, "top_groups": 2}, 8, ("multiple",)),
        ({"route_scale": 0.0}, 8, ("route_scale",)),
    ],
)
def test_bad_options_are_refused_with_reason(options, experts, words):
    """Nothing is clamped: the message names option, value and relation."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words are checked below
        TokenChoiceRouter(16, experts, TokenChoiceConfig(**options), with_bias=False)
    assert all(word in str(error.value) for word in words)


def test_weights_of_one_are_for_frozen_routers_only():
    """A router whose weights are exactly 1 whatever it does would never learn, and nothing in a run would say so."""
    start = ["model=tiny", "router=softmax_normalized", "router.top_k=1"]
    with pytest.raises(ConfigError, match=r"router.top_k=1 makes every weight exactly 1.*'optim.frozen="):
        relations.check(composed(start, CONFIGS), 1)
    relations.check(composed([*start, "optim.frozen=[*.router.*]"], CONFIGS), 1)
    chain = [*start, "moe.chain.iterations=2"]
    with pytest.raises(ConfigError) as error:
        relations.check(composed(chain, CONFIGS), 1)
    (advice,) = re.findall("'(optim.frozen=.*?)'", str(error.value))
    relations.check(composed([*chain, advice], CONFIGS), 1)  # routers of later iterations are routers, too
    router = make_router(top_k=1, normalize=True)
    assert (route(router, X)[2] == 1).all()


def test_a_kernel_that_cannot_run_is_refused():
    """Else a run ends in the first step, on every rank, or computes in plain torch what was asked of the kernel."""
    config = TokenChoiceConfig(kernel=RouterKernel.triton)
    TokenChoiceConfig().check_device("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"router.kernel=triton cannot run: .*; set router.kernel=torch"):
        config.check_device("cpu", torch.float32)
    with pytest.raises(ValueError, match=r"at most 16 of 512 experts, not router.top_k=4 of moe.num_experts=513"):
        config.check_experts(513)
    with pytest.raises(ValueError, match=r"not router.top_k=17"):
        TokenChoiceConfig(kernel=RouterKernel.triton, top_k=17).check_experts(64)

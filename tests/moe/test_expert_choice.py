"""Expert choice and its cutoffs against a loop, closed forms and each other.

1. pools   2. the layer   3. cutoffs   4. the policy of each mode   5. options that leak or do not fit
"""

import pytest
import torch
import torch.nn.functional as F

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from moe_parallel.moe.routers.router import BatchShape, LooksAt
from moe_parallel.moe.routing import ForwardContext, LayerContext, Ranks

ROWS, LENGTH, EXPERTS, DIM = 2, 8, 4, 6
CAP = "max_experts_per_token"
LEAKING = {"pool": "micro_batch", "pool_sequences": 1, "allow_leak": True}


def make_router(**options) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(DIM, EXPERTS, ExpertChoiceConfig(**{"top_k": 2, **LEAKING, **options})).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(1)))
    return router


def context(training=True, step=0, valid_T=None):
    forward = ForwardContext(training=training, step=step)
    return LayerContext(layer=0, batch_shape=(ROWS, LENGTH), valid_T=valid_T, forward=forward)


X = torch.randn(ROWS * LENGTH, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def chosen(router, ctx, x_TD=X) -> torch.Tensor:
    """The choice as a table of booleans, (T, E)."""
    choice = router.route(router(x_TD, ctx), ctx).choice
    mask = torch.zeros(x_TD.shape[0], EXPERTS, dtype=torch.bool)
    mask[choice.tokens(), choice.expert] = True
    assert int(mask.sum()) == choice.expert.numel(), "a pair that comes twice"
    return mask


POOLS = [
    ({"pool_sequences": 1}, "sequences"),
    ({"pool_sequences": 2}, "all"),
    ({"pool": "data_parallel", "pool_sequences": 2}, "all"),
    ({"pool": "global_batch", "pool_sequences": None}, "all"),
    ({"pool": "position", "pool_sequences": None}, "places"),
]
"""Options, and what they make pools of."""


def score(router, x_TD=X) -> torch.Tensor:
    logit_TE = x_TD @ router.weight.T
    return logit_TE.softmax(-1) if router.config.score == "softmax" else logit_TE.sigmoid()


def by_sort(router, made_of, valid_T=None) -> tuple[torch.Tensor, list[list[float]]]:
    """For each expert the best of each pool, (T, E), and the lowest score of each pool of which something is taken."""
    score_TE = score(router).detach()
    index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    pools = {"sequences": index.tolist(), "places": index.T.tolist(), "all": [index.flatten().tolist()]}[made_of]
    wanted, lowest = torch.zeros(ROWS * LENGTH, EXPERTS, dtype=torch.bool), [[] for _ in range(EXPERTS)]
    for pool in pools:
        tokens = [t for t in pool if valid_T is None or valid_T[t]]
        for expert in range(EXPERTS):
            take = len(tokens) * router.config.top_k // EXPERTS
            best = sorted(tokens, key=lambda t: -float(score_TE[t, expert]))[:take]
            wanted[best, expert] = True
            lowest[expert] += [float(score_TE[best[-1], expert])] if best else []
    return wanted, lowest


def some_padding() -> torch.Tensor:
    """The second half of the first sequence, and the last token of the other."""
    valid_T = torch.ones(ROWS * LENGTH, dtype=torch.bool)
    valid_T[[4, 5, 6, 7, 15]] = False
    return valid_T


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("options", "made_of"), POOLS)
def test_every_expert_takes_the_best_of_each_pool(options, made_of, kind, padded):
    """A pool that is too large or too small, made of the wrong tokens or of padding: compared with a sort of each pool.
    Exact. The cutoff is the mean of the pools' lowest scores, for places that of all tokens as one pool; one that
    counted pools of padding as 0 would be far too low, and evaluation would take many more experts. 1e-14: a sum of
    up to 8."""
    router, valid_T = make_router(score=kind, **options), some_padding() if padded else None
    wanted, lowest = by_sort(router, made_of, valid_T)
    assert torch.equal(chosen(router, context(valid_T=valid_T)), wanted)
    if made_of == "places":
        _, lowest = by_sort(router, "all", valid_T)
    ctx = context(valid_T=valid_T)
    observed_E = router.route(router(X, ctx), ctx).observed_E
    assert observed_E.tolist() == pytest.approx([sum(values) / len(values) for values in lowest], rel=1e-14)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_layer_equals_a_loop_with_all_gradients(kind):
    """Expert by expert, each over its own tokens, as the paper writes it: tokens that come several times or never, a
    weight that is normalized, or scaled twice. 1e-12: sums of some tens of terms in float64."""
    config = ExpertChoiceConfig(top_k=1, score=kind, route_scale=1.5, **LEAKING)
    moe = MoEConfig(num_experts=EXPERTS, expert_dim=5, num_shared_experts=0)
    layer = MoELayer(DIM, moe, config, BalanceConfig(), 0).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x_TD, wanted = X.clone().requires_grad_(), torch.zeros(ROWS * LENGTH, DIM, dtype=torch.float64)
    mask, _ = by_sort(layer.router, "sequences", some_padding())
    for expert in range(EXPERTS):
        for token in mask[:, expert].nonzero()[:, 0].tolist():
            gate, up = (layer.experts.gate_up[expert] @ x_TD[token]).chunk(2)
            y = layer.experts.down[expert] @ (F.silu(gate) * up)
            one = torch.zeros(ROWS * LENGTH, 1, dtype=torch.float64).index_fill(0, torch.tensor(token), 1.0)
            wanted = wanted + one * y * 1.5 * score(layer.router, x_TD)[token, expert]
    out, (stats,) = layer(x_TD, context(valid_T=some_padding()))
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    assert int(stats.unserved) == int((~mask.any(-1) & some_padding()).sum()) > 0
    inputs = [x_TD, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(value.square().sum(), inputs) for value in (out, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_expert_takes_everything_with_weight_one():
    """One expert and k = 1: softmax over one expert is 1, so the layer is a dense network. 1e-14: one product."""
    config = ExpertChoiceConfig(top_k=1, **LEAKING)
    layer = MoELayer(DIM, MoEConfig(num_experts=1, expert_dim=5, num_shared_experts=0), config, BalanceConfig(), 0)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    gate, up = (X @ layer.experts.gate_up[0].T).chunk(2, -1)
    out, _ = layer(X, context())
    torch.testing.assert_close(out, (F.silu(gate) * up) @ layer.experts.down[0].T, rtol=1e-14, atol=1e-14)


def test_gradient_flows_through_the_scores_alone():
    """The weight of a chosen pair is its score: its gradient must be the softmax's, as if the choice were fixed."""
    router = make_router()
    logit_TE = (X @ router.weight.detach().T).requires_grad_()
    routed = router.route(logit_TE, context())
    got = torch.autograd.grad(routed.weight.sum(), logit_TE)[0]
    mask = torch.zeros(ROWS * LENGTH, EXPERTS, dtype=torch.bool)
    mask[routed.choice.tokens(), routed.choice.expert] = True
    wanted = torch.autograd.grad((logit_TE.softmax(-1) * mask).sum(), logit_TE)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)


def test_cutoffs_do_not_depend_on_who_has_the_padding():
    """Two ranks with a pool each, one of them all padding: both must observe the one cutoff that there is, as one
    process with both pools does. Sums over ranks are played by the parts of a run before. Exact: sums of two."""
    router, half = make_router(), ROWS * LENGTH // 2
    valid_T = torch.ones(ROWS * LENGTH, dtype=torch.bool)
    valid_T[half:] = False
    ctx = context(valid_T=valid_T)
    whole_E = router.route(router(X, ctx), ctx).observed_E
    parts = []

    def observed(part, sum_over_data):
        forward = ForwardContext(data=Ranks(sum=sum_over_data))
        ctx = LayerContext(layer=0, batch_shape=(1, LENGTH), valid_T=valid_T[part], forward=forward)
        return router.route(router(X[part], ctx), ctx).observed_E

    ranks = [slice(0, half), slice(half, None)]
    for part in ranks:
        observed(part, lambda value: parts.append(value) or value)
    assert all(torch.equal(observed(part, lambda value: parts[0] + parts[1]), whole_E) for part in ranks)
    assert (whole_E > 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_the_limit_on_a_tokens_experts_is_held(padded):
    """A limit of the two experts that a token has on average: without it some token takes more. Nobody takes padding;
    at most every fifth place may stay empty, for the assignment is soft and 16 tokens are few."""
    valid_T = some_padding() if padded else None
    free, held = (chosen(make_router(**options), context(valid_T=valid_T)) for options in ({}, {CAP: 2}))
    assert int(free.sum(-1).max()) > 2
    assert int(held.sum(-1).max()) <= 2
    assert (held.sum(0) <= free.sum(0)).all()
    assert 0.8 * int(free.sum()) <= int(held.sum())
    assert valid_T is None or not held[~valid_T].any()


def test_cutoffs_of_the_batch_itself_give_the_same_choice():
    """Evaluation by cutoffs must be the same rule as training by pools: with the batch's own lowest scores as cutoffs
    both choose the same pairs. Exact, for no two scores are equal."""
    router = make_router(pool_sequences=2, cutoff_decay=0.0)  # the mean of one step is that step's
    ctx = context()
    routed = router.route(router(X, ctx), ctx)
    router.after_step(torch.zeros(EXPERTS), routed.observed_E, BalanceConfig())
    assert torch.equal(chosen(router, context(training=False)), chosen(router, ctx))


def test_running_cutoffs_are_weighted_means():
    """Without the correction for the start the first cutoffs would be near zero, and every token would take every
    expert. Closed form: weights (1 - d) d^(age), divided by their sum. 1e-6: buffers are float32 in training."""
    router = ExpertChoiceRouter(DIM, EXPERTS, ExpertChoiceConfig(top_k=2, cutoff_decay=0.9, **LEAKING))
    values = [torch.full((EXPERTS,), v, dtype=torch.float64) for v in (0.5, 0.1, 0.3)]
    for value in values:
        router.after_step(torch.zeros(EXPERTS), value, BalanceConfig())
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    wanted = sum(w * v for w, v in zip(weights, values)) / sum(weights)
    torch.testing.assert_close((router.cutoff / router.cutoff_weight).double(), wanted, rtol=1e-6, atol=0)


def test_before_the_first_step_tokens_take_their_best():
    """Without cutoffs evaluation must neither take every expert nor none."""
    router = make_router()
    assert chosen(router, context(training=False)).sum(-1).tolist() == [2] * (ROWS * LENGTH)


def test_threshold_trains_by_cutoffs_after_its_warm_up():
    """A warm-up that never ends, or never starts; and a choice by cutoffs that depends on other tokens."""
    router = make_router(training="threshold", warmup_steps=3)
    router.after_step(torch.zeros(EXPERTS), torch.full((EXPERTS,), 0.3, dtype=torch.float64), BalanceConfig())
    pool, cutoffs = chosen(router, context(step=2)), chosen(router, context(step=3))
    assert torch.equal(pool, chosen(make_router(), context()))
    assert torch.equal(cutoffs, torch.softmax(X @ router.weight.T, -1) >= router.cutoff / router.cutoff_weight)
    assert not torch.equal(pool, cutoffs)
    changed = torch.cat([X[:3], torch.randn(13, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)])
    assert torch.equal(chosen(router, context(step=3), changed)[:3], cutoffs[:3])
    assert router.looks_at(training=True) != LooksAt.itself
    assert router.looks_at(training=False) == LooksAt.itself


def test_loads_are_known_where_the_pool_is_local():
    """The count that lets ranks skip the exchange of sizes must be the real one."""
    router = make_router()
    ctx = LayerContext(layer=0, batch_shape=(ROWS, LENGTH), forward=ForwardContext(no_padding=True))
    choice = router.route(router(X, ctx), ctx).choice
    assert choice.uniform_count == 8
    assert torch.bincount(choice.expert).tolist() == [8] * EXPERTS
    assert router.route(router(X, context()), context()).choice.uniform_count is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "global_batch"}, "router.pool=global_batch lets a token"),
        ({"training": "threshold", "pool": "global_batch", "warmup_steps": 5}, "own future"),
        ({"warmup_steps": 5}, "belongs to router.training=threshold"),
        ({"cutoff_decay": 1.0}, "router.cutoff_decay=1.0"),
        ({**LEAKING, "top_k": 3, "max_experts_per_token": 2}, "could not fill their places"),
        ({"max_experts_per_token": 9}, "needs router.training=pool and router.pool=micro_batch"),
    ],
)
def test_leaks_and_contradictions_are_refused(options, words):
    """A language model must not be trained on its own future by accident."""
    with pytest.raises(ValueError, match=words):
        ExpertChoiceConfig(**options)


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({**LEAKING, "pool_sequences": 3}, BatchShape(1, 1, 4, 8), r"legal values: \[1, 2, 4\]"),
        ({**LEAKING, "pool_sequences": None}, BatchShape(1, 1, 4, 8), "router.pool_sequences=null"),
        ({"pool": "data_parallel", "pool_sequences": 8, "allow_leak": True}, BatchShape(2, 1, 2, 8), "has 4 sequences"),
        ({"pool": "position"}, BatchShape(2, 3, 2, 8), "one micro-batch, but a step has 3"),
        ({"pool": "position"}, BatchShape(1, 1, 1, 8), "has 1 tokens"),
    ],
)
def test_pools_that_would_change_with_the_ranks_are_refused(options, shape, words):
    """The same options on other ranks must mean the same pools, or say that they cannot."""
    with pytest.raises(ValueError, match=words):
        ExpertChoiceConfig(top_k=2, **options).check_batch(shape, EXPERTS)


def test_position_pools_evaluate_with_as_many_experts_as_they_train():
    """Cutoffs as the mean of many small pools' lowest scores are too high: tokens had 1.4 experts instead of 2 in
    evaluation with pools of 8. With 4,096 scores the cutoff of all of them is off by a few of them: 2 %."""
    router = make_router(pool="position", pool_sequences=None)
    forward = ForwardContext()
    ctx = LayerContext(layer=0, batch_shape=(8, 128), forward=forward)
    x_TD = torch.randn(1024, DIM, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    routed = router.route(router(x_TD, ctx), ctx)
    assert routed.choice.expert.numel() == 2048
    router.after_step(torch.zeros(EXPERTS), routed.observed_E, BalanceConfig())
    ctx = LayerContext(layer=0, batch_shape=(8, 128), forward=ForwardContext(training=False))
    assert router.route(router(x_TD, ctx), ctx).choice.expert.numel() == pytest.approx(2048, rel=0.02)

"""Chains of experts against loops written out, and against the plain layer.

1. every kind of chain against a loop   2. one iteration is the plain layer   3. tied weights   4. a silent second pass
5. pressure and statistics   6. recompute   7. bad options
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.block import Block
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.chain import ChainBlock, ChainConfig, Renormalize, Residual
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import ForwardContext, LayerContext, LayerStats, Replay, normalized_counts
from tests.batches import make_batch

DIM, TOKENS = 8, 10


def architecture(chain: ChainConfig, balance: BalanceConfig | None = None, top_k: int = 2) -> Architecture:
    return Architecture(
        model=ModelConfig(dim=DIM, num_layers=3),
        attention=GroupedQueryConfig(num_heads=2),
        moe=MoEConfig(num_experts=4, expert_dim=6, chain=chain),
        router=TokenChoiceConfig(top_k=top_k),
        balance=balance or BalanceConfig(),
        vocab_size=11,
    )


def make_block(chain: ChainConfig, balance: BalanceConfig | None = None, top_k: int = 2, layer: int = 0) -> Block:
    """One decoder layer in float64 whose attention adds nothing, so that what is left is the chain."""
    block = Block(architecture(chain, balance, top_k), layer).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        block.attention.output.weight.zero_()
    return block


def batch() -> TokenBatch:
    return make_batch([[TOKENS]], TOKENS, 11)


def stream(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_block(
    block: Block, x_BSD: torch.Tensor, context: ForwardContext | None = None
) -> tuple[torch.Tensor, list[LayerStats]]:
    """On the batch of these tests; no other context than training alone by default."""
    return block(x_BSD, batch(), block.attention.plan(batch()), context or ForwardContext())


def one_pass(layer: MoELayer, x_TD: torch.Tensor, iteration: int) -> torch.Tensor:
    """A single pass, by a plain layer that owns the same modules."""
    plain = MoELayer(DIM, MoEConfig(num_experts=4, expert_dim=6), layer.router.config, BalanceConfig(), 0)
    routers = [layer.router, *layer.later_routers]  # not `layer.routers`, which is tested
    plain.router = routers[iteration] if layer.config.chain.own_routers else layer.router
    plain.experts, plain.shared = layer.experts, layer.shared
    if iteration > 0 and not layer.config.chain.shared_every_iteration:
        plain.shared = None
    return plain(x_TD, LayerContext(layer=0, batch_shape=(1, TOKENS)))[0]


def by_loop(block: Block, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition, iteration by iteration: what the block returns for a stream x."""
    chain, layer = block.ffn.config.chain, block.ffn
    normed = block.ffn_norm(x_TD)
    base = normed if chain.block is ChainBlock.reference else x_TD
    out, seen = torch.zeros_like(x_TD), normed
    for iteration in range(chain.iterations):
        y = one_pass(layer, seen, iteration)
        if iteration > 0 and chain.learned_scale:
            y = y * layer.later_scale[iteration - 1]
        out = out + y if chain.residual is Residual.inner else y
        if chain.renormalize is Renormalize.none:
            seen = out if chain.residual is Residual.outer else normed + out
        elif iteration + 1 < chain.iterations:
            per_iteration = chain.renormalize is Renormalize.per_iteration
            norm = block.later_norms[iteration] if per_iteration else block.ffn_norm
            seen = norm(out if chain.residual is Residual.outer else base + out)
    return base + out


KINDS = [
    ChainConfig(
        iterations=3, residual=residual, renormalize=renormalize, block=where, own_routers=own,
        shared_every_iteration=shared, learned_scale=scaled,
    )
    for residual, renormalize, where, own, shared, scaled in itertools.product(
        Residual, Renormalize, ChainBlock, (True, False), (True, False), (True, False)
    )
    if (residual, where) != (Residual.outer, ChainBlock.reference) and (not scaled or residual is Residual.inner)
]  # fmt: skip
"""All that are legal."""


@pytest.mark.parametrize("chain", KINDS, ids=lambda chain: "-".join(str(v) for v in dataclasses.asdict(chain).values()))
def test_every_kind_of_chain_equals_a_loop(chain):
    """A residual, norm, router or scale of the wrong iteration; gradients of weights that are used several times.

    1e-12: the same operations in float64; only sums of three gradients may be added in another order."""
    block = make_block(chain)
    x = stream().requires_grad_()
    got, stats = run_block(block, x)
    wanted = by_loop(block, x[0])[None]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert [s.iteration for s in stats] == list(range(chain.iterations))
    weights = [x, *(p for name, p in block.named_parameters() if not name.startswith("attention"))]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), weights) for out in (got, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ChainBlock)
def test_one_iteration_is_the_plain_layer(where):
    """A layer that is no chain must be one pass, added to the stream; in the published code's block to the normalized
    stream. A sum that starts at 0, or a loss divided once too often, would show. To the last bit."""
    block = make_block(ChainConfig(block=where), BalanceConfig(micro_batch_coefficient=0.3))
    layer, normed, context = block.ffn, block.ffn_norm(stream()[0]), LayerContext(layer=0, batch_shape=(1, TOKENS))
    routing, wanted_stats = layer.route(normed, layer.router, context)
    rows, ticket = layer.dispatcher.dispatch(normed, routing, context)
    rows = layer.experts(rows, ticket)
    added = layer.dispatcher.combine(rows, routing, ticket) + layer.shared(normed)
    base = normed if where is ChainBlock.reference else stream()[0]
    out, (stats,) = run_block(block, stream())
    assert torch.equal(out[0], base + added)
    assert torch.equal(stats.balance, wanted_stats.balance)
    assert not [name for name in block.state_dict() if "later" in name]


def test_the_gradient_of_a_tied_expert_is_a_sum_over_iterations():
    """Two plain layers with copies of the experts, one after the other, are what a chain of two unrolls to. If the
    chain lost the gradient of an iteration, or averaged, its experts would learn at half the rate; that shows in no
    output. 1e-12: sums of two in float64."""
    layer = make_block(ChainConfig(iterations=2)).ffn
    copies = [copy.deepcopy(layer), copy.deepcopy(layer)]
    x_TD = stream()[0]
    first = one_pass(copies[0], x_TD, 0)
    wanted = first + one_pass(copies[1], x_TD + first, 1)
    got, _ = layer(x_TD, LayerContext(layer=0, batch_shape=(1, TOKENS)))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    (got.square().sum() + wanted.square().sum()).backward()
    parts = [one.get_parameter("experts.down").grad for one in copies]
    assert float((parts[0] - parts[1]).abs().max()) > 1e-2, "iterations that agree would hide a sum of the wrong two"
    for name in ("experts.gate_up", "experts.down", "shared.gate_up.weight", "shared.down.weight"):
        a, b = (one.get_parameter(name).grad for one in copies)
        torch.testing.assert_close(layer.get_parameter(name).grad, a + b, rtol=1e-12, atol=1e-12)


def test_silent_experts_leave_the_stream_alone():
    """With expert outputs of zero and the inner residual every iteration must pass its input on."""
    block = make_block(ChainConfig(iterations=3))
    with torch.no_grad():
        block.ffn.experts.down.zero_()
        block.ffn.shared.down.weight.zero_()
    assert torch.equal(run_block(block, stream())[0], stream())


def test_linear_experts_compound():
    """One expert A for all, always chosen with weight 1: two iterations give (I + A)^2 x - x. SwiGLU is made linear by
    a gate so large that silu(g) = g, constant through a coordinate of x that is constant and that A does not touch."""
    layer = make_block(ChainConfig(iterations=2), top_k=4).ffn
    x_TD, a_DD = stream()[0].clone(), torch.zeros(DIM, DIM, dtype=torch.float64)
    x_TD[:, 0] = 1.0
    generator = torch.Generator().manual_seed(5)
    a_DD[1:7, 1:7] = torch.randn(6, 6, generator=generator, dtype=torch.float64) * 0.3
    with torch.no_grad():
        layer.shared.down.weight.zero_()
        layer.experts.gate_up.zero_()
        layer.experts.gate_up[:, :6, 0] = 50.0  # silu(50) = 50 in float64
        layer.experts.gate_up[:, 6:, 1:7] = torch.eye(6, dtype=torch.float64)
        layer.experts.down.zero_()
        layer.experts.down[:, 1:7] = a_DD[1:7, 1:7] / 50.0
    got = layer(x_TD, LayerContext(layer=0, batch_shape=(1, TOKENS)))[0]
    step = torch.eye(DIM, dtype=torch.float64) + a_DD
    torch.testing.assert_close(got, x_TD @ (step @ step).T - x_TD, rtol=1e-12, atol=1e-12)


def test_a_later_pass_of_scale_zero_is_silent():
    """What starts from a trained plain model must compute what it did, to the last bit, and the scale must learn."""
    plain, chain = make_block(ChainConfig()), make_block(ChainConfig(iterations=2, learned_scale=True))
    chain.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        chain.ffn.later_scale.zero_()
    out = run_block(chain, stream())[0]
    assert torch.equal(out, run_block(plain, stream())[0])
    out.square().sum().backward()
    assert float(chain.ffn.later_scale.grad.detach().abs()) > 1e-3


def test_a_scaled_chain_starts_as_the_plain_model():
    """The same for whole models as they are initialized: a scale that starts at 1, or parts of the chain that move the
    random numbers of other weights, would make a warm start a cold one. To the last bit."""
    logits = []
    for chain in (ChainConfig(), ChainConfig(iterations=3, learned_scale=True, renormalize=Renormalize.shared)):
        model = Transformer(dataclasses.replace(architecture(chain), model=ModelConfig(dim=DIM, num_layers=2)))
        init_weights(model, InitConfig(std=0.3), 7)
        logits.append(model(batch(), ForwardContext())[0])
    assert torch.equal(logits[0], logits[1])


def test_pressure_does_not_grow_with_iterations():
    """Losses that are summed over iterations press twice as hard at two. With one router for all and experts that
    give zero, both iterations are the same pass, so their losses together must be those of one. Exact up to a
    rounding of the halves."""
    balance = BalanceConfig(micro_batch_coefficient=0.3, z_coefficient=0.1)
    losses = []
    for chain in (ChainConfig(), ChainConfig(iterations=2, own_routers=False)):
        block = make_block(chain, balance)
        with torch.no_grad():
            block.ffn.experts.down.zero_()
            block.ffn.shared.down.weight.zero_()
        stats: list[LayerStats] = run_block(block, stream())[1]
        losses.append(sum(float(s.balance.detach()) for s in stats))
        assert all(float(s.balance_value) == float(stats[0].balance_value) for s in stats)
    assert losses[1] == pytest.approx(losses[0], rel=1e-14)


def test_statistics_are_kept_for_each_layer_and_iteration():
    """Counts of one iteration under the name of another steer the wrong bias; the global loss must take the prior of
    its own pass. Every iteration is compared with its own router on its own input, and given a prior of its own.
    Counts and their shares are exact."""
    block = make_block(ChainConfig(iterations=3), BalanceConfig(global_coefficient=0.1), layer=2)
    prior_LIE = torch.arange(5 * 3 * 4, dtype=torch.float64).view(5, 3, 4).square()
    stats = run_block(block, stream(), ForwardContext(prior_count_LIE=prior_LIE, prior_is_total=True))[1]
    normed, out = block.ffn_norm(stream()[0]), torch.zeros(TOKENS, DIM, dtype=torch.float64)
    counts = []
    for iteration, router in enumerate([block.ffn.router, *block.ffn.later_routers]):
        expert_TK = ((normed + out) @ router.weight.T).topk(2).indices
        counts.append(torch.bincount(expert_TK.flatten(), minlength=4))
        out = out + one_pass(block.ffn, normed + out, iteration)
        assert (stats[iteration].layer, stats[iteration].iteration) == (2, iteration)
        assert torch.equal(stats[iteration].count_E, counts[-1])
        assert torch.equal(stats[iteration].used_frequency_E, normalized_counts(prior_LIE[2, iteration]))
    assert len({tuple(count_E.tolist()) for count_E in counts}) == 3, "equal counts would hide an exchange"


def test_recompute_replays_every_iteration():
    """Between forward and recomputation the routers move: each iteration must find its own choice again, not that of
    another one, or gradients belong to another routing."""
    layer = make_block(ChainConfig(iterations=3), BalanceConfig(bias_rate=0.1)).ffn
    x_TD = stream()[0].requires_grad_()

    def run(x, replay=None):
        context = LayerContext(layer=0, batch_shape=(1, TOKENS), forward=ForwardContext(replay=replay))
        return layer(x, context)[0]

    wanted = torch.autograd.grad(run(x_TD).square().sum(), [x_TD, *layer.parameters()])
    out = checkpoint(run, x_TD, Replay(), use_reentrant=False)
    for number, router in enumerate(layer.routers):
        router.bias += torch.linspace(-9, 9, 4, dtype=torch.float64).roll(number)
    for a, b in zip(torch.autograd.grad(out.square().sum(), [x_TD, *layer.parameters()]), wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 0}, "moe.chain.iterations=0"),
        ({"residual": "outer"}, "moe.chain.residual=outer acts between iterations"),
        ({"own_routers": False}, "moe.chain.own_routers=false"),
        ({"iterations": 2, "residual": "outer", "block": "reference"}, "moe.chain.block=reference"),
        ({"iterations": 2, "residual": "initial", "learned_scale": True}, "moe.chain.residual=inner"),
    ],
)
def test_bad_options(options, words):
    """Options that would do nothing, or contradict each other, are refused by name."""
    with pytest.raises(ValueError, match=words):
        ChainConfig(**options)

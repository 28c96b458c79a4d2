"""The token-choice router on its kernels, in the interpreter: the same layer as in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.token_choice import RouterKernel, Score, TokenChoiceConfig, TokenChoiceRouter
from moe_parallel.moe.routing import ForwardContext, LayerContext, Replay

DIM, TOKENS = 16, 24
# Of the norm: float32, and exponentials that differ in the last bits. A term left out is 1e-2 of it.
CLOSE = 1e-6

CASES = {
    "softmax": ({"top_k": 2}, {}, {}),
    "deepseek v3": (
        {"top_k": 4, "score": Score.sigmoid, "normalize": True, "num_groups": 4, "top_groups": 2, "route_scale": 2.5},
        {"bias_rate": 0.1, "sequence_coefficient": 0.1},
        {},
    ),
    "capacity": ({"top_k": 2}, {"micro_batch_coefficient": 0.1, "z_coefficient": 0.1}, {"capacity_factor": 0.7}),
    "second by chance": ({"top_k": 2, "normalize": True, "random_second": True}, {}, {}),
    "rounded": ({"top_k": 2}, {}, {"token_rounding": "nearest", "token_rounding_tile": 4}),
}


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).norm() <= CLOSE * wanted.norm()


def layers(name: str) -> list[MoELayer]:
    """By kernels and in plain torch, with the same parameters."""
    router, balance, moe = CASES[name]
    made = []
    for kernel in (RouterKernel.triton, RouterKernel.torch):
        torch.manual_seed(0)
        config = MoEConfig(num_experts=12, expert_dim=8, **moe)
        layer = MoELayer(DIM, config, TokenChoiceConfig(kernel=kernel, **router), BalanceConfig(**balance), 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in layer.state_dict().values():  # the bias too
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
        made.append(layer)
    return made


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2)).requires_grad_()


def context(**forward) -> LayerContext:
    ids = torch.arange(TOKENS)
    return LayerContext(layer=0, batch_shape=(2, TOKENS // 2), token_id_T=ids, forward=ForwardContext(**forward))


def run(layer: MoELayer, x_TD: torch.Tensor, ctx: LayerContext) -> tuple[torch.Tensor, ...]:
    out_TD, (stats,) = layer(x_TD, ctx)
    return out_TD, stats.balance, stats.balance_value, stats.entropy, stats.count_E.float(), stats.dropped.float()


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_plain_torch(name):
    """The choice with the bias counted by losses, the order of kernels after drops, a gradient that the kernel gives
    but the router loses. Values and all gradients."""
    results = []
    for layer in layers(name):
        x_TD = inputs()
        outs = run(layer, x_TD, context())
        leaves = [x_TD, *layer.parameters()]
        loss = outs[0].square().sum() + outs[1]
        results.append([*outs, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        check(a, b)


def test_padding():
    """Padded tokens are chosen for by the kernel, whose counts of tiles must then not be used."""
    valid_T = torch.arange(TOKENS) % 3 > 0
    fused, plain = layers("softmax")
    ctx = replace(context(), valid_T=valid_T)
    for a, b in zip(run(fused, inputs(), ctx), run(plain, inputs(), ctx)):
        check(a, b)


def test_recompute_takes_the_first_choice(monkeypatch):
    """The bias moves between the two runs, which must not show: neither in the choice nor in what losses count. Saved
    tensors of another number or shape would stop the recomputation."""
    layer, _ = layers("deepseek v3")
    chosen = []
    route = TokenChoiceRouter.route
    monkeypatch.setattr(TokenChoiceRouter, "route", lambda *a: chosen.append(route(*a)) or chosen[-1])
    x_TD = inputs()
    wanted = torch.autograd.grad(sum(o.sum() for o in run(layer, x_TD, context())[:2]), [x_TD, *layer.parameters()])
    x_TD = inputs()
    outs = checkpoint(run, layer, x_TD, context(replay=Replay()), use_reentrant=False)
    layer.router.bias += torch.linspace(-9, 9, 12)
    got = torch.autograd.grad(outs[0].sum() + outs[1].sum(), [x_TD, *layer.parameters()])
    assert len(chosen) == 3
    assert torch.equal(chosen[1].choice.expert, chosen[2].choice.expert)
    assert torch.equal(chosen[1].counted.expert, chosen[2].counted.expert)
    assert chosen[1].choice.fused
    assert chosen[1].choice.tile_count is not None
    for a, b in zip(got, wanted):
        check(a, b)


def test_forced_balance_deals_out():
    """Experts in turn, whatever the kernel would choose."""
    config = TokenChoiceConfig(top_k=2, forced_balance=True, kernel=RouterKernel.triton)
    layer = MoELayer(DIM, MoEConfig(num_experts=12, expert_dim=8), config, BalanceConfig(), 0)
    routing, _ = layer.route(inputs(), layer.router, context())
    assert routing.count_E.tolist() == 12 * [4]


def test_a_router_with_scores_of_its_own_is_refused():
    """The kernel would compute a softmax instead, in silence."""

    class Squared(TokenChoiceRouter):
        def scores(self, logit_TE: torch.Tensor) -> torch.Tensor:
            return logit_TE.square()

    Squared(DIM, 12, TokenChoiceConfig(), False)
    with pytest.raises(ValueError, match=r"router.kernel=triton .* Squared.scores"):
        Squared(DIM, 12, TokenChoiceConfig(kernel=RouterKernel.triton), False)

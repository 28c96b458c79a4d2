"""What a router hands on to the next one: closed forms, gradients to the router that gave it, layouts, the probe.

The rows of `residual logits` in the parity suite hold the same on all layouts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_parallel import causality
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, Recompute, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import AttentionPlan, GroupedQueryConfig
from moe_parallel.model.counts import count_parameters, forward_flops_per_token
from moe_parallel.model.initialize import InitConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.plugin import PluginConfig
from moe_parallel.moe.routers.router import LooksAt
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter
from moe_parallel.moe.routing import ForwardContext, LayerContext
from moe_parallel.optim import OptimConfig
from tests.batches import make_batch
from tests.model.examples import GROUPED, VOCABULARY, build
from tests.parity.cases import Case, run_reference
from tests.parity.table import ALL_LOSSES, CHAIN, GLOBAL
from tests.parity.test_parity import check, run_cases
from tests.ranks import run_threads
from tests.runs import ROOT

RESIDUAL = TokenChoiceConfig(top_k=2, logit_residual=True)
PLUGIN = f"{ROOT}/tests/moe/recurrent_router.py:RecurrentConfig"
DIM, EXPERTS, TOKENS = 8, 6, 10


def architecture(chain: ChainConfig | None = None, **model: int) -> Architecture:
    sizes = {"dim": 32, "num_layers": 4, "first_dense_layers": 1, "ffn_dim": 48, **model}
    moe = replace(GROUPED.moe, chain=chain or ChainConfig())
    return replace(GROUPED, model=ModelConfig(**sizes), moe=moe, router=RESIDUAL)  # type: ignore[arg-type]


class Seen:
    """Inputs and logits of all passes of all routers, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[tuple[TokenChoiceRouter, Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, TokenChoiceRouter):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, LayerContext], output: Tensor) -> None:
        assert isinstance(module, TokenChoiceRouter)
        self.passes.append((module, args[0], output))


CHAINS = {
    "no chain": ChainConfig(),
    "own routers": ChainConfig(iterations=2),
    "one router": ChainConfig(iterations=2, own_routers=False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_logits_add_a_matrix_times_those_before(name: str) -> None:
    """Would catch: a carry that skips a layer or an iteration, that is what the layer before received instead of what
    it gave, or a first router with a matrix that nothing is multiplied with. Closed form of MoE++'s gating residuals,
    each pass from the one before; float64 sums of a few products."""
    with torch.no_grad():
        model = build(architecture(CHAINS[name]), torch.float64)
        seen = Seen(model)
        _, stats = model(make_batch([[7, 5]], 12, VOCABULARY), ForwardContext(training=False))
    assert len(seen.passes) == len(stats) == 3 * CHAINS[name].iterations
    before: Tensor | None = None
    for number, (router, x_TD, logit_TE) in enumerate(seen.passes):
        wanted_TE = x_TD @ router.weight.T
        if before is not None:
            assert router.residual is not None
            added_TE = before @ router.residual.T
            assert added_TE.abs().max() > 1e-2, "or nothing is tested"
            wanted_TE = wanted_TE + added_TE
        torch.testing.assert_close(logit_TE, wanted_TE, rtol=0, atol=1e-12)
        torch.testing.assert_close(stats[number].carry, logit_TE, rtol=0, atol=0)
        before = logit_TE
    has_matrix = [router.residual is not None for router, _, _ in seen.passes]
    assert has_matrix == [name == "one router", *[True] * (len(stats) - 1)]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("mtp_layers", [0, 2])
def test_counted_as_built(name: str, mtp_layers: int) -> None:
    """Would catch: a matrix that the plan of a run does not count, or counts for the first router. FLOPs of a pass are
    two for each of its weights."""
    shape = architecture(CHAINS[name], mtp_layers=mtp_layers)
    with torch.device("meta"):
        model = Transformer(shape)
    counts = count_parameters(shape)
    assert counts.total == sum(p.numel() for p in model.parameters())
    plain = replace(shape, router=replace(RESIDUAL, logit_residual=False))
    passes = (3 + mtp_layers) * CHAINS[name].iterations
    more = forward_flops_per_token(shape, 16) - forward_flops_per_token(plain, 16)
    assert more == 2 * 8**2 * (passes - (name != "one router"))


def pair() -> tuple[MoELayer, MoELayer]:
    layers = [
        MoELayer(DIM, MoEConfig(num_experts=EXPERTS, expert_dim=5), RESIDUAL, BalanceConfig(), i, first=i == 0)
        for i in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.double()
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layers[0], layers[1]


def test_gradient_reaches_the_router_that_handed_on() -> None:
    """Would catch: a carry that is detached, which is the worse method by the ablation of arXiv 2408.06793, or one that
    is rounded. Only the second layer's output counts here, so the first router learns by the carry alone. Central
    differences in float64 with steps of 1e-6 are good to 1e-8; no token is that near to another expert."""
    first, second = pair()
    x_TD, y_TD, grad_TD = torch.randn(3, TOKENS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = first.router.weight

    def loss() -> Tensor:
        context = LayerContext(layer=0, batch_shape=(1, TOKENS))
        carry = first(x_TD, context)[1][-1].carry
        return (second(y_TD, replace(context, layer=1, carry=carry))[0] * grad_TD).sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    assert grad.abs().max() > 1e-2
    numeric = torch.zeros_like(weight)
    with torch.no_grad():
        for place in range(weight.numel()):
            for sign in (1, -1):
                weight.data.view(-1)[place] += sign * 1e-6
                numeric.view(-1)[place] += sign * loss() / 2e-6
                weight.data.view(-1)[place] -= sign * 1e-6
    torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("width", "found", "declared"), [(2, r"\(10, 6\)", r"\(10, 2\)"), (0, r"\(10, 6\)", "None")])
def test_what_is_not_declared_is_refused(monkeypatch, width: int, found: str, declared: str) -> None:
    """Would catch: a pipeline that makes room for another width than what is sent."""
    first, _ = pair()
    monkeypatch.setattr(TokenChoiceConfig, "carry_width", lambda self, num_experts: width)
    with pytest.raises(ValueError, match=f"Routed.carry of shape {found}, but its carry_width declares {declared}"):
        first(torch.randn(TOKENS, DIM, dtype=torch.float64), LayerContext(layer=0, batch_shape=(1, TOKENS)))


# -- a router from outside -----------------------------------------------------------------------------------------


def plugin_case(name: str, world: int, **more: object) -> Case:
    router = {"plugin": PLUGIN, "options": {"width": 3}, "top_k": 2}
    return Case(name, world, kind="plugin", router=router, **more)  # type: ignore[arg-type]


PARITY = [
    plugin_case("recurrent plug-in, ep 2, full recompute", 2, ep=2, recompute="full", moe=CHAIN, balance=ALL_LOSSES),
    plugin_case("recurrent plug-in, cp 2, multi-token prediction", 2, cp=2, mtp_layers=1, balance=GLOBAL),
]


def types_in_bfloat16(recompute: str) -> set[tuple[str, torch.dtype]]:
    """What routers and attention get from an engine that computes in bfloat16."""
    parallel = ParallelConfig(recompute=Recompute(recompute))
    mesh = ParallelMesh(make_layout(parallel, 1, GROUPED.moe.num_experts), "cpu")
    shape = replace(architecture(), balance=BalanceConfig(global_coefficient=0.1))
    engine = NativeEngine(shape, mesh, parallel, OptimConfig(), torch.device("cpu"), torch.bfloat16)
    engine.init_weights(InitConfig(), 0)
    found: set[tuple[str, torch.dtype]] = set()

    def of_router(module: nn.Module, args: tuple[Tensor, LayerContext]) -> None:
        context = args[1]
        assert context.forward.prior_count_LIE is not None
        found.update({("stream", args[0].dtype), ("counts", context.forward.prior_count_LIE.dtype)})
        if context.carry is not None:
            found.add(("carry", context.carry.dtype))

    def of_attention(module: nn.Module, args: tuple[Tensor, AttentionPlan]) -> None:
        found.add(("rotation", args[1].rotation[0].dtype))

    for block in engine.model.blocks:
        block.attention.register_forward_pre_hook(of_attention)
    for layer in engine.layers:
        layer.router.register_forward_pre_hook(of_router)
    batch = make_batch([[12]], 12, VOCABULARY)
    engine.forward_backward([batch, batch], 0, 22, 24)
    return found


def test_layouts(parity_table) -> None:
    """Would catch: a carry of other tokens than the layer's where ranks share sequences, or another one in recompute.
    `check` has float64 and 1e-12."""
    wanted = [run_reference(case) for case in PARITY]
    for case, got, outcomes in zip(PARITY, run_threads(run_cases, 2, PARITY)[0], wanted, strict=True):
        check(case, got, outcomes, "threads", parity_table)


def test_what_stays_in_float32() -> None:
    """Would catch: FSDP casting what is in dataclasses among a block's arguments to the compute type. Logits in
    bfloat16 flip near-ties, counts above 256 are rounded, and so are positions."""
    kept = {("carry", torch.float32), ("counts", torch.float64), ("rotation", torch.float32)}
    assert run_threads(types_in_bfloat16, 1, "full")[0] == {*kept, ("stream", torch.bfloat16)}


@pytest.mark.parametrize("leak", [False, True])
def test_probe(leak: bool) -> None:
    """Would catch: a probe that hands nothing on, and so cannot see that what is handed on mixes tokens."""
    router = PluginConfig(top_k=2, plugin=PLUGIN, options={"leak": leak})
    moe = MoEConfig(num_experts=4, expert_dim=4)
    attention = GroupedQueryConfig(num_heads=2)
    shape = Architecture(ModelConfig(dim=16, num_layers=2), attention, moe, router, BalanceConfig(), vocab_size=13)
    for finding in causality.probe(shape, draws=2):
        assert finding.is_fine != leak, finding.what
        assert (LooksAt.future in finding.measured) == leak

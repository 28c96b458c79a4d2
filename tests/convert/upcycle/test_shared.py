"""The whole dense network as shared expert, slices as routed ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_parallel.convert.lazy import Lazy, whole
from moe_parallel.convert.upcycle.drop import DropConfig
from moe_parallel.convert.upcycle.granular import GranularConfig
from moe_parallel.convert.upcycle.map import Preserves, UpcycleConfig, make_plan
from moe_parallel.convert.upcycle.shared import RoutedStart, SharedConfig
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.expert_forms import ExpertForm
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.token_choice import Score
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts
from tests.convert.upcycle.networks import dense, experts, layer_pass, losses, swiglu

WHOLE = RoutedStart.whole


def plan_of(target, sources, **options: Any) -> dict[str, Lazy]:
    return make_plan(SharedConfig(**{"std": 0.2, **options}), sources, target, SEED)


@pytest.mark.parametrize("disciplines", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"first_dense_layers": 0},
        {"shared_expert_gate": True},
        {"router_normalize": False, "router_score": Score.sigmoid, "router_route_scale": 2.5},
        {"chain": ChainConfig(iterations=2, learned_scale=True), "first_dense_layers": 2},
    ],
)
def test_starts_as_the_general_model(disciplines: int, options: Any) -> None:
    """Would catch: a shared expert of gate and up swapped, of a discipline or of another layer; a gate that lets half
    of it through; routed experts that already say something. All but float64 is exact, twice a weight too."""
    sources = [pretrained(seed=seed) for seed in range(1 + disciplines)]
    target = with_experts(16, 12, 3, num_shared_experts=4, **options)
    assert SharedConfig().preserves([DENSE], target) is Preserves.exact
    assert relative(logits(target, plan_of(target, sources)), logits(DENSE, sources[0].weights)) < 1e-13


def test_any_router_and_multi_token_prediction() -> None:
    """Would catch: an exactness that hangs on the weights of one kind of router; later layers that are left out."""
    shape = replace(DENSE, model=replace(DENSE.model, mtp_layers=1))
    target = with_experts(8, 12, 3, num_shared_experts=4)
    target = replace(target, model=replace(shape.model, first_dense_layers=1), router=ExpertChoiceConfig(top_k=2))
    source = pretrained(shape)
    assert SharedConfig().preserves([shape], target) is Preserves.exact
    expected = losses(shape, source.weights)
    torch.testing.assert_close(losses(target, plan_of(target, [source])), expected, rtol=1e-12, atol=0)


def test_slices_of_a_discipline_are_its_network() -> None:
    """Would catch: slices of the general model or of another discipline, in another order, or that overlap."""
    sources = [pretrained(seed=seed) for seed in range(3)]
    target = with_experts(16, 12, 3, num_shared_experts=4)
    plan = plan_of(target, sources, routed_start=WHOLE)
    for layer in target.moe_layers:
        bank = experts(plan, layer)
        x_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        for copy in range(4):  # 16 experts are two copies of two disciplines
            total = sum(swiglu(x_TD, *expert) for expert in bank[copy * 4 : copy * 4 + 4])
            network = swiglu(x_TD, *dense(sources[1 + copy % 2].weights, layer))
            assert relative(total, network) < 1e-13
    alone = experts(plan_of(target, sources[:1], routed_start=WHOLE), 2)
    assert torch.equal(alone[5][0], dense(sources[0].weights, 2)[0][12:24])


def test_whole_slices_add_their_network() -> None:
    """Would catch: a promise that does not hold. With weights of 1 for all slices of the only discipline a layer adds
    the general network and that one. A router's logits of 1e-9 make weights that much unequal."""
    sources = [pretrained(seed=seed) for seed in range(2)]
    target = with_experts(4, 12, 4, num_shared_experts=4, first_dense_layers=0, router_route_scale=4.0)
    config = SharedConfig(routed_start=WHOLE)
    assert config.preserves([DENSE, DENSE], target) is Preserves.approximate
    for layer in range(3):
        x_TD, out_TD = layer_pass(target, plan_of(target, sources, routed_start=WHOLE, std=1e-10), layer)
        networks = [swiglu(x_TD, *dense(source.weights, layer)) for source in sources]
        assert relative(out_TD, networks[0] + networks[1]) < 1e-8


def test_gate_and_up_of_silent_experts_are_those_of_slices() -> None:
    """Would catch: routed experts that know nothing, so that the start at zero is a start from nothing."""
    sources = [pretrained(seed=seed) for seed in range(2)]
    target = with_experts(4, 12, 2, num_shared_experts=4)
    silent, speaking = (plan_of(target, sources, routed_start=start) for start in (RoutedStart.zero, WHOLE))
    assert torch.equal(*(whole(plan["layers.1.ffn.experts.gate_up"]) for plan in (silent, speaking)))
    assert not whole(silent["layers.1.ffn.experts.down"]).any()
    assert whole(speaking["layers.1.ffn.experts.down"]).any()


@pytest.mark.parametrize(
    ("sources", "target", "text"),
    [
        (
            1,
            with_experts(8, 12, 2, num_shared_experts=3),
            r"moe.num_shared_experts=3 must be 4: times moe.expert_dim=12",
        ),
        (1, with_experts(8, 20, 2, num_shared_experts=3), r"moe.expert_dim=20 must divide model.ffn_dim=48"),
        (3, with_experts(12, 12, 2, num_shared_experts=4), r"multiple of 8, 4 slices of each of 2 .* value: 16"),
        (0, with_experts(8, 12, 2, num_shared_experts=4), "init.sources is empty"),
    ],
)
def test_refused(sources: int, target, text: str) -> None:
    """Would catch: shapes that go into an assertion instead of a sentence."""
    with pytest.raises(ValueError, match=text):
        plan_of(target, [pretrained()] * sources)


def test_other_sources_are_refused() -> None:
    """Would catch: disciplines of other widths or with experts that are sliced all the same."""
    target = with_experts(8, 12, 2, num_shared_experts=4, first_dense_layers=0)
    wide = replace(DENSE, model=replace(DENSE.model, ffn_dim=96))
    with pytest.raises(ValueError, match=r"init.sources have model.ffn_dim=48, 96"):
        plan_of(target, [pretrained(), pretrained(wide)])
    with pytest.raises(ValueError, match=r"init.sources\[1\] is a model with 3 mixture-of-experts layers"):
        plan_of(target, [pretrained(), pretrained(target)])


@pytest.mark.parametrize("config", [GranularConfig(), DropConfig(), SharedConfig()])
def test_other_forms_of_experts_are_refused(config: UpcycleConfig) -> None:
    """Would catch: networks that are copied exactly into weights that are rounded before they are used."""
    with pytest.raises(ValueError, match=r"moe.expert_form=ternary is not what this map makes"):
        make_plan(config, [pretrained()], with_experts(4, 48, 2, expert_form=ExpertForm.ternary), SEED)

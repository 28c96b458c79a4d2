"""Several dense models into one, and one more into that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Lazy, whole
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.calibration import Calibration, Method, load_calibration
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.merge import MergeConfig
from moe_parallel.convert.upcycle.merge_domain import AddDomainConfig
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.domain import DomainConfig
from moe_parallel.moe.routing import LayerContext
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts

DIM, WIDTH = DENSE.model.dim, DENSE.model.ffn_dim
X = torch.randn(30, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SOURCES = [pretrained(seed=seed) for seed in (0, 1, 2)]
ONE_EXPERT = {"router_normalize": True, "router_logit_offset": True}
DOMAIN = DomainConfig(top_k=1, domain_dim=5, projection_dim=6)


def network(source: Pretrained, layer: int, x: Tensor) -> Tensor:
    """A dense network by hand."""
    gate, up, down = (whole(source.weights[f"layers.{layer}.ffn.{what}.weight"]).double() for what in _NAMES)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


_NAMES = ("gate", "up", "down")


def layer_output(model: Transformer, layer: int, x: Tensor) -> Tensor:
    """Of the mixture-of-experts layer alone."""
    with torch.no_grad():
        return model.blocks[layer].ffn(x, LayerContext(layer=layer, batch_shape=(1, len(x))))[0]


def choice(model: Transformer, layer: int, x: Tensor) -> Tensor:
    """The best expert of each token, by hand."""
    router = model.blocks[layer].ffn.router
    return (x @ router.weight.T + router.offset).argmax(-1)


def calibrated(path: Path, method: Method, experts: int) -> str:
    """A file of random numbers of the right shapes."""
    generator, tensors = torch.Generator().manual_seed(experts), {}
    for layer in range(DENSE.model.num_layers):
        tensors[f"layers.{layer}.weight"] = torch.randn(experts, DIM, generator=generator)
        if method is Method.ridge:
            tensors[f"layers.{layer}.offset"] = torch.randn(experts, generator=generator)
    if method is Method.domains:
        tensors = {"domains": torch.randn(experts, DOMAIN.domain_dim, generator=generator)}
    Calibration(method, [f"domain{e}" for e in range(experts)], tensors).save(path)
    return str(path)


@pytest.mark.parametrize("mix", [None, [0.2, 0.5, 0.3]])
def test_copies_of_one_model_are_that_model(mix: list[float] | None) -> None:
    """Would catch: shares that do not sum to 1, a layer from its neighbor, gate and up swapped. Thirds add up to 1 in
    float64 and are rounded to float32 once; the weights of two experts sum to 1 within an ulp of float64."""
    config = MergeConfig(sources=["same"] * 3, mix=mix)
    target, source = with_experts(3, WIDTH, 2), SOURCES[0]
    assert config.preserves([DENSE] * 3, target) is Preserves.exact
    plan = make_plan(config, [source] * 3, target, SEED)
    assert relative(logits(target, plan), logits(DENSE, source.weights)) < 1e-13


def test_weights_come_from_where_the_plan_says() -> None:
    """Would catch: experts in another order, averages with other shares, dense layers that are not averaged."""
    target, mix = with_experts(3, WIDTH, 2), [0.5, 0.2, 0.3]
    config = MergeConfig(sources=["a", "b", "c"], mix=mix)
    assert config.preserves([DENSE] * 3, target) is Preserves.none
    plan = make_plan(config, SOURCES, target, SEED)
    for name in ("layers.0.ffn.up.weight", "layers.2.attention.key.weight", "norm.weight", "embedding.weight"):
        wanted = sum(share * whole(source.weights[name]).double() for share, source in zip(mix, SOURCES))
        # The last bit of a float64 sum may turn a rounding to float32: one unit in the last place.
        torch.testing.assert_close(whole(plan[name]), wanted.float(), rtol=2e-7, atol=0)
    assert str(plan["layers.2.ffn.experts.down"]) == "stack({})".format(
        ", ".join(f"{place}:layers.2.ffn.down.weight" for place in range(3))
    )
    for expert, source in enumerate(SOURCES):
        parts = [whole(source.weights[f"layers.2.ffn.{what}.weight"]) for what in _NAMES]
        assert torch.equal(whole(plan["layers.2.ffn.experts.gate_up"])[expert], torch.cat(parts[:2]))
        assert torch.equal(whole(plan["layers.2.ffn.experts.down"])[expert], parts[2])


def test_with_one_expert_a_token_gets_the_output_of_its_model(tmp_path: Path) -> None:
    """Would catch: a weight that is not exactly 1, a router that is not the file's, experts in another order than its
    rows. Each token's model is chosen by hand. 1e-12: products of float64 in another order."""
    target = with_experts(3, WIDTH, 1, **ONE_EXPERT)
    file = calibrated(tmp_path / "ridge", Method.ridge, 3)
    config = MergeConfig(sources=["a", "b", "c"], router="ridge", calibration=file)
    model = build_model(target, make_plan(config, SOURCES, target, SEED), torch.float64).eval()
    for layer in (1, 2):
        expert_T = choice(model, layer, X)
        assert set(expert_T.tolist()) == {0, 1, 2}
        wanted = torch.stack([network(SOURCES[int(e)], layer, x) for e, x in zip(expert_T, X)])
        torch.testing.assert_close(layer_output(model, layer, X), wanted, rtol=1e-12, atol=1e-12)


def test_a_shared_source_is_added_for_every_token() -> None:
    """Would catch: a seed that is also routed, or that lies in another place of the list. With the plain weight of one
    expert: seed + weight * chosen."""
    target = with_experts(2, WIDTH, 1, num_shared_experts=1, router_logit_offset=True)
    config = MergeConfig(sources=["a", "seed", "c"], shared_source=1)
    assert config.preserves([DENSE] * 3, target) is Preserves.none
    model = build_model(target, make_plan(config, SOURCES, target, SEED), torch.float64).eval()
    router, expert_T = model.blocks[1].ffn.router, choice(model, 1, X)
    assert set(expert_T.tolist()) == {0, 1}
    weight_T = torch.softmax(X @ router.weight.T, -1).gather(1, expert_T.unsqueeze(1)).squeeze(1)
    routed = [SOURCES[0], SOURCES[2]]
    chosen = torch.stack([w * network(routed[int(e)], 1, x) for w, e, x in zip(weight_T, expert_T, X)])
    wanted = network(SOURCES[1], 1, X) + chosen
    torch.testing.assert_close(layer_output(model, 1, X), wanted, rtol=1e-12, atol=1e-12)


def test_routers_of_gates_and_domains(tmp_path: Path) -> None:
    """Would catch: a file that is read and not used, or for some layers only."""
    file = calibrated(tmp_path / "gates", Method.gates, 3)
    config = MergeConfig(sources=["a", "b", "c"], router="gates", calibration=file)
    plan = make_plan(config, SOURCES, with_experts(3, WIDTH, 2, router_input_norm="standardize"), SEED)
    stored = load_calibration(file, Method.gates).tensors
    for layer in (1, 2):
        assert torch.equal(whole(plan[f"layers.{layer}.ffn.router.weight"]), stored[f"layers.{layer}.weight"])
    file = calibrated(tmp_path / "domains", Method.domains, 3)
    config = MergeConfig(sources=["a", "b", "c"], router="domains", calibration=file)
    plan = make_plan(config, SOURCES, domain_model(3), SEED)
    embedded = load_calibration(file, Method.domains).tensors["domains"]
    assert all(torch.equal(whole(plan[f"layers.{layer}.ffn.router.domains"]), embedded) for layer in (1, 2))


def domain_model(experts: int, **options) -> Architecture:
    return replace(with_experts(experts, WIDTH, 1, **options), router=DOMAIN)


def test_a_new_domain_leaves_logits_of_the_others(tmp_path: Path) -> None:
    """Would catch: experts that change places, a network of rows that is drawn anew, a share of the wrong model. 1e-13:
    a product with one more row."""
    old_shape, target = domain_model(2), domain_model(3)
    old, new = pretrained(old_shape), SOURCES[1]
    config = AddDomainConfig(calibration=calibrated(tmp_path / "new", Method.domains, 1))
    plan = make_plan(config, [old, new], target, SEED)
    before, after = build_model(old_shape, old.weights, torch.float64), build_model(target, plan, torch.float64)
    for layer in (1, 2):
        context = LayerContext(layer=layer, batch_shape=(1, len(X)))
        one, two = (model.blocks[layer].ffn.router(X, context) for model in (before, after))
        torch.testing.assert_close(two[:, :2], one, rtol=1e-13, atol=1e-13)
        assert bool((two[:, 2] != 0).any())
        gate_up, down = (whole(plan[f"layers.{layer}.ffn.experts.{what}"]) for what in ("gate_up", "down"))
        assert torch.equal(gate_up[:2], whole(old.weights[f"layers.{layer}.ffn.experts.gate_up"]))
        parts = [whole(new.weights[f"layers.{layer}.ffn.{what}.weight"]) for what in _NAMES]
        assert torch.equal(gate_up[2], torch.cat(parts[:2]))
        assert torch.equal(down[2], parts[2])
    name = "layers.2.attention.output.weight"
    wanted = 2 / 3 * whole(old.weights[name]).double() + 1 / 3 * whole(new.weights[name]).double()
    # Shares of thirds differ in the last bit of float64, which may turn a float32 rounding: one unit in the last place.
    torch.testing.assert_close(whole(plan[name]), wanted.float(), rtol=2e-7, atol=0)


def test_one_more_is_as_all_at_once(tmp_path: Path) -> None:
    """Would catch: shares, rows or experts of an addition that differ from those of a merge of all. Two averages in
    turn are rounded twice: 1e-6 of float32 weights."""
    rows = torch.randn(3, DOMAIN.domain_dim, generator=torch.Generator().manual_seed(7))
    for name, part in (("all", slice(0, 3)), ("two", slice(0, 2)), ("third", slice(2, 3))):
        domains = ["a", "b", "c"][part]
        Calibration(Method.domains, domains, {"domains": rows[part].clone()}).save(tmp_path / name)
    shapes = {number: replace(with_experts(number, WIDTH, 1), router=DOMAIN) for number in (2, 3)}

    def merged(number: int, file: str) -> Pretrained:
        config = MergeConfig(sources=["a", "b", "c"][:number], router="domains", calibration=str(tmp_path / file))
        plan = make_plan(config, SOURCES[:number], shapes[number], SEED)
        return Pretrained(Path("merged"), shapes[number], plan)

    config = AddDomainConfig(sources=["two", "c"], calibration=str(tmp_path / "third"))
    added = make_plan(config, [merged(2, "two"), SOURCES[2]], shapes[3], SEED)
    wanted = merged(3, "all").weights
    assert added.keys() == wanted.keys()
    for name, lazy in wanted.items():
        torch.testing.assert_close(whole(added[name]), whole(lazy), rtol=1e-6, atol=1e-6)


def test_nothing_of_a_model_without_share(tmp_path: Path) -> None:
    """Would catch: a share that has no effect. With share 0 all that is not the new expert's is what it was, bit for
    bit."""
    old, target = pretrained(domain_model(2)), domain_model(3)
    file = calibrated(tmp_path / "new", Method.domains, 1)
    plan = make_plan(AddDomainConfig(calibration=file, new_share=0), [old, SOURCES[1]], target, SEED)
    for name, lazy in plan.items():
        if not name.endswith((".domains", ".gate_up", ".down")) or ".router." in name:
            same: Lazy = old.weights[name] if ".domains" not in name else lazy
            assert torch.equal(whole(lazy), whole(same)), name


MERGED = with_experts(3, WIDTH, 2)


@pytest.mark.parametrize(
    ("config", "target", "text"),
    [
        ({}, with_experts(4, WIDTH, 2), "moe.num_experts=4 must be 3: each source is one expert"),
        ({}, with_experts(3, 24, 2), "moe.expert_dim=24 must be 48"),
        ({}, with_experts(3, WIDTH, 2, expert_form="ternary"), "moe.expert_form=ternary is not what this map makes"),
        ({}, with_experts(3, WIDTH, 2, expert_form="delta", delta_rank=4), "moe.expert_form=delta is not what"),
        (
            {},
            with_experts(3, WIDTH, 2, num_shared_experts=1),
            "moe.num_shared_experts=1 must be 0: no source is a shared",
        ),
        ({"shared_source": 0}, with_experts(2, WIDTH, 2), "moe.num_shared_experts=0 must be 1"),
        ({"shared_source": 3}, MERGED, r"init.shared_source=3 must lie in 0..2"),
        ({"mix": [0.5, 0.5]}, MERGED, "has 2 shares for the 3 models"),
        ({"router": "ridge", "calibration": "x"}, MERGED, "needs router.logit_offset=true, not false"),
        ({"router": "gates", "calibration": "x"}, MERGED, "needs router.input_norm=standardize, not none"),
        ({"router": "domains", "calibration": "x"}, MERGED, "choose router=domain"),
        ({"router": "ridge", "calibration": "x"}, domain_model(3), "choose router=softmax"),
    ],
)
def test_refused(config: dict, target: Architecture, text: str) -> None:
    """Would catch: shapes that go into an assertion instead of a sentence, a start that has no effect."""
    with pytest.raises(ValueError, match=text):
        make_plan(MergeConfig(sources=["a", "b", "c"], **config), SOURCES, target, SEED)


def test_refused_options() -> None:
    """Would catch: shares that scale everything, a file that is ignored, a start without one."""
    for options, text in (
        ({"mix": [0.5, 0.6]}, "sums to 1.1"),
        ({"calibration": "x"}, "is not used by init.router=drawn"),
        ({"router": "gates"}, "needs init.calibration=FILE"),
    ):
        with pytest.raises(ValueError, match=text):
            MergeConfig(**options)
    with pytest.raises(ValueError, match=r"init\.new_share=2"):
        AddDomainConfig(new_share=2)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Would catch: rows of two experts in a router of three, a dense model in the place of one with experts, experts
    that are computed otherwise, adjugates and biases that are left out in silence."""
    file = calibrated(tmp_path / "two", Method.ridge, 2)
    config = MergeConfig(sources=["a", "b", "c"], router="ridge", calibration=file)
    with pytest.raises(ValueError, match=r"of the domains domain0, domain1 has \(2, 32\) for layers.1.weight"):
        make_plan(config, SOURCES, with_experts(3, WIDTH, 1, **ONE_EXPERT), SEED)
    config = AddDomainConfig(calibration=calibrated(tmp_path / "new", Method.domains, 1))
    for sources, target, text in (
        (SOURCES[:2], domain_model(3), "need router=domain"),
        ([pretrained(domain_model(2)), SOURCES[0]], domain_model(4), "moe.num_experts=4 must be 3"),
        ([pretrained(domain_model(2))], domain_model(3), "takes two"),
        ([pretrained(domain_model(2))] * 2, domain_model(3), "starts from a dense one"),
        (
            [pretrained(domain_model(2)), SOURCES[0]],
            domain_model(3, num_shared_experts=1),
            "moe.num_shared_experts=1 here, 0 there",
        ),
        ([pretrained(domain_model(2)), SOURCES[0]], domain_model(3, expert_form="ternary"), "ternary is not what this"),
        (
            [pretrained(domain_model(2, expert_form="ternary")), SOURCES[0]],
            domain_model(3),
            "full here, .*ternary there",
        ),
        ([pretrained(domain_model(2, adjugate_groups=2)), SOURCES[0]], domain_model(3), "adjugates.*no place for"),
        (
            [pretrained(replace(domain_model(2), balance=BalanceConfig(bias_rate=0.1))), SOURCES[0]],
            domain_model(3),
            r"router\.bias, .* no place for",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            make_plan(config, sources, target, SEED)

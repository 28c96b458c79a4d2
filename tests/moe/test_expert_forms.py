"""Forms of experts: closed forms, gradients, what is kept for the backward pass, options.

1. delta   2. ternary   3. what autograd keeps   4. whole models: counts, first values, memory   5. options
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_parallel import options
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Given
from moe_parallel.mesh import Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import Bytes, count_parameters, forward_flops_per_token, memory_per_rank
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.expert_forms import DeltaForm, Form, FullForm, TernaryForm, ternary
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routing import ForwardContext
from moe_parallel.relations import check
from tests.batches import make_batch
from tests.model.examples import GROUPED, VOCABULARY
from tests.moe.test_layer import DIM, context, make_layer, tokens

DELTA: dict[str, Any] = {"expert_form": "delta", "delta_rank": 3}
TERNARY: dict[str, Any] = {"expert_form": "ternary"}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""float64, sums of some ten terms in another order."""


def model_of(form: dict[str, Any]) -> Architecture:
    return replace(GROUPED, moe=replace(GROUPED.moe, **form))


def full_twin(layer: MoELayer) -> MoELayer:
    """The same layer with the matrices, as they are computed with, for parameters."""
    moe = replace(layer.config, expert_form="full", delta_rank=None)
    twin = MoELayer(DIM, moe, layer.router.config, layer.balance, 0).double()
    state = {name: value for name, value in layer.state_dict().items() if not name.startswith(("experts.", "base."))}
    gate_up, down = matrices(layer)
    twin.load_state_dict({**state, "experts.gate_up": gate_up, "experts.down": down})
    return twin


def matrices(layer: MoELayer) -> tuple[Tensor, Tensor]:
    """Of all experts, written out."""
    p = dict(layer.named_parameters())
    if layer.base is None:
        return tuple(torch.stack([rounded(m) for m in p[f"experts.{n}"]]) for n in ("gate_up", "down"))  # type: ignore
    experts = []
    for e in range(layer.config.num_experts):
        halves = [
            out @ into for out, into in zip(p["experts.gate_up_out"][e].chunk(2), p["experts.gate_up_in"][e].chunk(2))
        ]
        gate_up = p["base.gate_up.weight"] + torch.cat(halves)
        experts.append((gate_up, p["base.down.weight"] + p["experts.down_out"][e] @ p["experts.down_in"][e]))
    return tuple(torch.stack(each) for each in zip(*experts))  # type: ignore[return-value]


def rounded(matrix: Tensor) -> Tensor:
    """One expert's matrix, or its gate above its up, by the definition; gradients straight through."""
    parts = matrix.chunk(2) if matrix.shape[1] == DIM else (matrix,)
    out = []
    for part in parts:
        scale = part.detach().abs().mean()
        out.append(part + (scale * (part.detach() / scale).round().clip(-1, 1) - part.detach()))
    return torch.cat(out)


def gradients(layer: MoELayer, **at) -> dict[str, Tensor]:
    out_TD, _ = layer(tokens(20), context(20, **at))
    weight = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(7), dtype=out_TD.dtype)
    (out_TD * weight).sum().backward()
    return {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


# -- 1, 2. what is computed, and its gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("form", [DELTA, TERNARY], ids=["delta", "ternary"])
def test_layer_computes_with_the_matrices_that_the_form_defines(form) -> None:
    """Would catch: gate and up swapped or of one rank together, a scale over both or over all experts, a base that is
    added once for all, a gradient that is missing in one of the factors. Autograd through the definition is the oracle.
    """
    layer = make_layer(form)
    twin = full_twin(layer)
    torch.testing.assert_close(layer(tokens(20), context(20))[0], twin(tokens(20), context(20))[0], **EXACT)
    ours, theirs = gradients(layer), gradients(twin)
    gate_up, down = matrices(layer)
    wanted = torch.autograd.grad(
        (gate_up, down),
        [p for n, p in layer.named_parameters() if n.startswith(("experts.", "base."))],
        (theirs.pop("experts.gate_up"), theirs.pop("experts.down")),
    )
    names = [n for n, _ in layer.named_parameters() if n.startswith(("experts.", "base."))]
    assert ours.keys() == theirs.keys() | set(names)
    for name, value in {**theirs, **dict(zip(names, wanted))}.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}", **EXACT)


def test_full_rank_has_every_difference() -> None:
    """Would catch: a form that cannot express what full experts can."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10, 7, generator=generator), torch.randn(7, 5, generator=generator)
    wanted = torch.randn(4, 10, 7, generator=generator)
    into = torch.eye(5).expand(4, 5, 5).repeat(1, 2, 1)  # unit vectors: `out` is the difference, in the basis of rows
    gate = wanted - base[0]
    weights = {"gate_up_out": torch.eye(5).repeat(4, 2, 1), "gate_up_in": gate, "down_out": gate, "down_in": into}
    torch.testing.assert_close(DeltaForm(5).gate_up(weights, base), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ternary_has_three_values(dtype: torch.dtype) -> None:
    """Would catch: a value that is off by a rounding, the scale of another matrix, NaN for a matrix of zeros, a
    gradient that is clipped or scaled."""
    matrices = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrices[1] *= 100
    matrices[2] = 0
    matrices.requires_grad_()
    made = ternary(matrices)
    assert made.dtype is dtype
    scale = matrices.detach().to(torch.promote_types(dtype, torch.float32)).abs().mean((1, 2)).to(dtype)
    for matrix, s in zip(made[:2], scale):
        assert torch.equal(matrix.unique(), torch.stack([-s, torch.zeros_like(s), s]))
    assert not made[2].any()
    gradient = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    made.backward(gradient)
    assert torch.equal(matrices.grad, gradient)  # type: ignore[arg-type]


# -- 3. what autograd keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [DELTA, TERNARY], ids=["delta", "ternary"])
@pytest.mark.parametrize("keeps", [False, True])
def test_made_matrices_die_with_the_forward_pass(form, keeps: bool, monkeypatch) -> None:
    """Would catch: matrices of all layers in memory until the backward pass, where the form was to save memory; and
    an engine's switch that does nothing."""
    made: list[weakref.ref] = []
    kind: type[Form] = DeltaForm if "delta_rank" in form else TernaryForm
    for name in ("gate_up", "down"):
        plain = getattr(kind, name)

        def watched(self, weights, base, plain=plain):
            made.append(weakref.ref((out := plain(self, weights, base)).untyped_storage()))
            return out

        monkeypatch.setattr(kind, name, watched)
    layer = make_layer(form)
    layer.experts.keeps_made = keeps
    out_TD, _ = layer(tokens(), context())
    gc.collect()
    assert len(made) == 2
    assert all((each() is not None) is keeps for each in made)
    out_TD.sum().backward()
    assert len(made) == (2 if keeps else 4), "made once more for the backward pass"


# -- 4. whole models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [DELTA, TERNARY], ids=["delta", "ternary"])
def test_counts(form) -> None:
    """Would catch: a base that is forgotten or counted for each expert, FLOPs of factors that no token meets."""
    architecture = model_of(form)
    with torch.device("meta"):
        model = Transformer(architecture)
    counts, full = count_parameters(architecture), count_parameters(GROUPED)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.routed == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    moe, dim = architecture.moe, architecture.model.dim
    expert, held = (
        3 * dim * moe.expert_dim,
        3 * 3 * (dim + moe.expert_dim) if form is DELTA else 3 * dim * moe.expert_dim,
    )
    unused = (moe.num_experts - architecture.router.top_k) * held * architecture.num_moe_layers
    assert counts.total - counts.active == unused
    assert counts.expert_base == (expert * architecture.num_moe_layers if form is DELTA else 0)
    assert forward_flops_per_token(architecture, 16) == forward_flops_per_token(GROUPED, 16)
    assert counts.routed_products == full.routed_products == full.routed_active


def test_memory_is_that_of_factors_and_one_layer_of_matrices() -> None:
    """Would catch: weights and moments of matrices that nobody stores, or no room for those that are made."""
    size = Bytes(weight=4, gradient=4, optimizer=8, compute=4)
    few, full = (memory_per_rank(a, 64, size=size, recompute=Recompute.none) for a in (model_of(DELTA), GROUPED))
    stored = count_parameters(model_of(DELTA)).total
    assert (few.weights, few.optimizer) == (4 * stored, 8 * stored)
    expert = 3 * GROUPED.model.dim * GROUPED.moe.expert_dim
    assert few.temporary - full.temporary == 2 * 4 * GROUPED.moe.num_experts * expert  # matrices and their gradients
    one = memory_per_rank(model_of(TERNARY), 64, size=size)
    assert one.temporary - full.temporary == 4 * GROUPED.moe.num_experts * expert


def test_fresh_delta_experts_start_as_their_base() -> None:
    """Would catch: weights that no rule draws; factors that are zero on both sides, which would never learn."""
    model = Transformer(model_of(DELTA))
    init_weights(model, InitConfig(scale_output_by_depth=True), 0)
    state = model.state_dict()
    name = "layers.1.ffn."
    assert not any(state[f"{name}experts.{factor}"].any() for factor in ("gate_up_out", "down_out"))
    assert state[f"{name}experts.down_in"].std() == pytest.approx(0.02, rel=0.1)
    layers = GROUPED.model.num_layers
    assert state[f"{name}base.down.weight"].std() == pytest.approx(0.02 / (2 * layers) ** 0.5, rel=0.1)
    batch = make_batch([[16]], 16, VOCABULARY)
    model(batch, ForwardContext(), Output.loss)[0].sum().backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[f"{name}{what}"].grad.any() for what in ("experts.down_out", "base.down.weight"))


def test_evaluation_rounds_as_training_does() -> None:
    """Would catch: an evaluation with the weights that are trained instead of those that are computed with."""
    architecture = model_of(TERNARY)
    model = Transformer(architecture)
    init_weights(model, InitConfig(), 0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in list(state):
        if name.endswith("experts.gate_up"):
            state[name] = ternary(state[name].unflatten(1, (2, -1))).flatten(1, 2)
        elif name.endswith("experts.down"):
            state[name] = ternary(state[name])
    whole = build_model(GROUPED, {name: Given(value, name) for name, value in state.items()}, torch.float32)
    batch, at = make_batch([[9, 7]], 16, VOCABULARY), ForwardContext(training=False)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch, at)[0], whole.eval()(batch, at)[0])


# -- 5. options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"expert_form": "delta"}, "moe.expert_form=delta needs moe.delta_rank"),
        ({"delta_rank": 2}, "moe.delta_rank=2 is of moe.expert_form=delta, not of full"),
        ({"expert_form": "ternary", "delta_rank": 2}, "not of ternary; leave it out"),
        ({"expert_form": "delta", "delta_rank": 0}, r"moe.delta_rank=0 must lie in 1..moe.expert_dim=128"),
        ({"expert_form": "delta", "delta_rank": 129}, r"moe.delta_rank=129 must lie in 1..moe.expert_dim=128"),
    ],
)
def test_refused(given: dict[str, Any], text: str) -> None:
    """Would catch: a rank that does nothing, or that a matrix cannot have."""
    with pytest.raises(ValueError, match=text):
        MoEConfig(**given)


def test_relations_are_refused() -> None:
    """Would catch: what only the building of a model, or FSDP on many ranks, would find."""
    wide = replace(GROUPED.moe, expert_form="delta", delta_rank=GROUPED.model.dim + 1, expert_dim=GROUPED.model.dim + 1)
    with pytest.raises(ValueError, match=rf"moe.delta_rank={GROUPED.model.dim + 1} is more than model.dim"):
        replace(GROUPED, moe=wide)
    sizes = ["model=small_cpu", "moe.expert_form=delta", "moe.expert_dim=129", "parallel.ep=2"]
    for rank, legal in ((1, False), (4, True)):
        config = options.composed([*sizes, f"moe.delta_rank={rank}"], options.Path(__file__).parents[2] / "configs")
        if legal:
            check(config, 8)
            continue
        with pytest.raises(
            options.ConfigError, match=r"divide no side of its down_in \(1 x 129\); change moe.delta_rank=1"
        ):
            check(config, 8)


def test_full_form_makes_nothing() -> None:
    """Would catch: a copy of all experts where the parameters are the matrices."""
    weights = {"gate_up": torch.ones(2, 4, 3), "down": torch.ones(2, 3, 2)}
    assert FullForm().gate_up(weights, None) is weights["gate_up"]
    assert FullForm().down(weights, None) is weights["down"]

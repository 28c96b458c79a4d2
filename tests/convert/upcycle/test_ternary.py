"""Ternary experts beside the dense network that they come from."""

from __future__ import annotations

import pytest
import torch

from moe_parallel.convert.lazy import Constant, whole
from moe_parallel.convert.upcycle.map import Preserves, make_plan
from moe_parallel.convert.upcycle.ternary import TernaryConfig, TernaryStart
from moe_parallel.model.architecture import Architecture
from tests.convert.models import DENSE, SEED, logits, pretrained, relative, with_experts


def target(num_experts: int = 4, expert_dim: int = 24, num_shared_experts: int = 2, **options) -> Architecture:
    options = {"num_shared_experts": num_shared_experts, "expert_form": "ternary", **options}
    return with_experts(num_experts, expert_dim, 2, **options)


@pytest.mark.parametrize("gate", [False, True])
def test_the_dense_network_stays(gate: bool) -> None:
    """Would catch: a shared expert with halves swapped or that is rounded, or that its gate scales. Routed experts
    that return zero leave it as it was, to rounding; as they are, nothing is promised."""
    source, shape, config = pretrained(), target(shared_expert_gate=gate), TernaryConfig()
    plan, wanted = make_plan(config, [source], shape, SEED), logits(DENSE, source.weights)
    silent = {n: Constant(lazy.shape) if n.endswith("experts.down") else lazy for n, lazy in plan.items()}
    assert relative(logits(shape, silent), wanted) < 1e-13
    assert config.preserves([DENSE], shape) is Preserves.none
    assert relative(logits(shape, plan), wanted) > 1e-2


def test_routed_experts_are_slices_or_copies_or_new() -> None:
    """Would catch: slices of the wrong neurons, copies that are rounded before they are stored, an option that does
    nothing."""
    source = pretrained()
    gate, up, down = (whole(source.weights[f"layers.1.ffn.{what}.weight"]) for what in ("gate", "up", "down"))
    plan = make_plan(TernaryConfig(), [source], target(), SEED)
    gate_up, third = whole(plan["layers.1.ffn.experts.gate_up"]), whole(plan["layers.1.ffn.experts.down"])[3]
    assert torch.equal(gate_up[3], torch.cat([gate[24:], up[24:]]))
    assert torch.equal(third, down[:, 24:])
    copies = make_plan(TernaryConfig(), [source], target(3, 48, 1), SEED)
    assert torch.equal(whole(copies["layers.2.ffn.experts.down"])[2], whole(source.weights["layers.2.ffn.down.weight"]))
    drawn = make_plan(TernaryConfig(ternary_start=TernaryStart.drawn), [source], target(3), SEED)
    assert not torch.equal(whole(drawn["layers.1.ffn.experts.down"])[0], down[:, :24])


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (target(num_shared_experts=1), "moe.num_shared_experts=1 must be 2"),
        (target(num_experts=3), "moe.num_experts=3 must be a multiple of 2.*value: 4"),
        (target(expert_dim=36), "moe.expert_dim=36 must divide model.ffn_dim=48"),
        (target(expert_form="full"), "set moe.expert_form=ternary"),
    ],
)
def test_refused(shape: Architecture, text: str) -> None:
    """Would catch: shapes that go into an assertion instead of a sentence."""
    with pytest.raises(ValueError, match=text):
        TernaryConfig().check([DENSE], shape)

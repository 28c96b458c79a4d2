"""What maps from models with experts have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moe_parallel.convert.lazy import Lazy, expert_of, rows_of
from moe_parallel.convert.upcycle.map import check_one_source, check_same
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.expert_forms import ExpertForm
from moe_parallel.moe.routers.router import RouterConfig

_NOT_OF_THE_FUNCTION = (
    "capacity_factor", "drop_order", "renormalize_after_drop", "token_rounding", "token_rounding_tile", "expert_kernel",
    "kernel_table",
)  # fmt: skip
"""Options of `moe` that may always differ: how fast it is, and what only happens in training."""
_ONLY_IN_TRAINING = ("input_jitter", "random_second", "kernel")
"""The same of `router`."""
Network = tuple[Lazy, Lazy, Lazy]
"""Gate, up and down of a SwiGLU network: (F, D), (F, D), (D, F)."""


def check_has_experts(sources: Sequence[Architecture], kind: str) -> Architecture:
    """The only source. Raises ValueError if there are more or none, or it is dense."""
    source = check_one_source(sources, kind)
    if source.num_moe_layers == 0:
        raise ValueError(f"init.sources[0] is dense, but init={kind} starts from a model with experts")
    return source


def check_same_experts(source: Architecture, target: Architecture, ignore: Sequence[str]) -> None:
    """Raises ValueError where two models differ in more than the options of `moe` that `ignore` names."""
    # Without dense layers nobody has a use for their width.
    check_same([source], target, ignore=["model.ffn_dim"] if target.model.first_dense_layers == 0 else [])
    ours, theirs = target.model.first_dense_layers, source.model.first_dense_layers
    if ours != theirs:
        raise ValueError(f"model.first_dense_layers={ours} must be {theirs}, as in init.sources[0]")
    if type(source.router) is not type(target.router):
        raise ValueError(
            f"the router is {type(target.router).__name__} here, {type(source.router).__name__} in init.sources[0]; "
            "choose router as the source has it"
        )
    here, there = dataclasses.asdict(target.moe), dataclasses.asdict(source.moe)
    for name in sorted(here.keys() - set(_NOT_OF_THE_FUNCTION) - set(ignore)):
        if here[name] != there[name]:
            raise ValueError(
                f"moe.{name}={here[name]} here, {there[name]} in init.sources[0]; set it as the source has it"
            )


def check_nothing_is_lost(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Raises ValueError for weights of a source that the new model has no place for."""
    lost = sorted(theirs.keys() - ours.keys())
    if lost:
        raise ValueError(
            f"init.sources[0] has {', '.join(lost[:4])}, which this model has no place for; set router and balance as "
            "the source has them"
        )


def check_matrices(shape: Architecture, kind: str, where: str = "init.sources[0]") -> None:
    """Raises ValueError for experts that have no matrices of their own, or share networks."""
    if shape.moe.expert_form is ExpertForm.delta:
        raise ValueError(
            f"{where} has moe.expert_form=delta, but init={kind} works on experts' own matrices, which such have not"
        )
    if shape.moe.adjugate_groups > 0:
        raise ValueError(
            f"{where} has moe.adjugate_groups={shape.moe.adjugate_groups}, whose experts belong together; init={kind} "
            "is for experts without adjugates"
        )


def evaluated(router: RouterConfig, ignore: Sequence[str] = ()) -> dict[str, object]:
    """Options of a router that act in evaluation."""
    left_out = {*_ONLY_IN_TRAINING, *ignore}
    return {name: value for name, value in dataclasses.asdict(router).items() if name not in left_out}


def network_of(weights: Mapping[str, Lazy], network: str, expert: int) -> Network:
    """One routed expert of a layer, which is called like `layers.3.ffn`."""
    gate_up = expert_of(weights[f"{network}.experts.gate_up"], expert)
    width = gate_up.shape[0] // 2
    down = expert_of(weights[f"{network}.experts.down"], expert)
    return rows_of(gate_up, 0, width), rows_of(gate_up, width, width), down

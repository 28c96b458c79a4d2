"""What maps from models with experts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_parallel.convert.function import differences, function_of
from moe_parallel.convert.lazy import Lazy, expert_of, rows_of
from moe_parallel.convert.upcycle.map import check_one_source, check_same
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.expert_forms import ExpertForm

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
    check_same([source], target)
    if type(source.router) is not type(target.router):
        raise ValueError(
            f"the router is {type(target.router).__name__} here, {type(source.router).__name__} in init.sources[0]; "
            "choose router as the source has it"
        )
    here, there = function_of(target), function_of(source)
    may_differ = tuple(f"moe.{name}" for name in ignore)
    for name in dict.fromkeys((*here, *there)):
        compared = name == "model.first_dense_layers" or (name.startswith("moe.") and not name.startswith(may_differ))
        ours, theirs = here.get(name), there.get(name)
        if compared and ours != theirs:
            raise ValueError(f"{name}={ours} here, {theirs} in init.sources[0]; set it as the source has it")


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


def same_routing(one: Architecture, other: Architecture, ignore: Sequence[str] = ()) -> bool:
    """Options of their routers that act in evaluation are the same, but for those that `ignore` names."""
    left_out = [f"router.{name}" for name in ignore]
    return not [name for name in differences(one, other) if name.startswith("router") and name not in left_out]


def network_of(weights: Mapping[str, Lazy], network: str, expert: int) -> Network:
    """One routed expert of a layer, which is called like `layers.3.ffn`."""
    gate_up = expert_of(weights[f"{network}.experts.gate_up"], expert)
    width = gate_up.shape[0] // 2
    down = expert_of(weights[f"{network}.experts.down"], expert)
    return rows_of(gate_up, 0, width), rows_of(gate_up, width, width), down

"""One more domain for a model whose routers are made of embeddings of domains (Nexus, arXiv 2408.15901)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from moe_parallel.convert.lazy import Constant, Given, Joined, Stacked, Sum
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.between import check_nothing_is_lost
from moe_parallel.convert.upcycle.calibration import Method, load_calibration
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_dense,
    check_form,
    check_same,
    check_width,
    dense_network,
    moe_networks,
    outside_of_experts,
    without_chain,
)
from moe_parallel.convert.upcycle.merge import fitting, numbered
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.routers.domain import DomainConfig


@dataclass(kw_only=True)
class AddDomainConfig(UpcycleConfig):
    calibration: str = ""
    """File of scripts/calibrate.py --method domains: the new domain alone, by the model that embedded the others."""
    new_share: float | None = None
    """Share of the new model in the average outside of experts; null takes 1 / (experts afterwards)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_share is not None and not 0 <= self.new_share <= 1:
            raise ValueError(f"init.new_share={self.new_share} must lie in 0..1")

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        if len(sources) != 2:
            raise ValueError(
                f"init.sources has {len(sources)} models, but init=add_domain takes two: one with experts, then the "
                "dense one of the new domain"
            )
        old, new = sources
        if not (isinstance(old.router, DomainConfig) and isinstance(target.router, DomainConfig)):
            raise ValueError(
                "init=add_domain makes an expert's row of its domain's embedding: this model and init.sources[0] need "
                "router=domain"
            )
        check_dense(new, "init.sources[1]")
        if not self.calibration:
            raise ValueError(
                "init=add_domain needs init.calibration=FILE with the embedding of the new domain; "
                "scripts/calibrate.py --method domains writes it"
            )
        if old.router.logit_residual or target.router.logit_residual:
            raise ValueError("router.logit_residual=true has a matrix of all pairs of experts; set it to false")
        check_form(target)
        check_same(sources, target)
        check_width("model.mtp_layers", target.model.mtp_layers, 0, "multi-token prediction is not merged")
        check_width("moe.num_experts", target.moe.num_experts, old.moe.num_experts + 1, "one expert is added")
        check_width("moe.expert_dim", target.moe.expert_dim, new.model.ffn_dim, "the new expert is a dense network")
        ours, theirs = _rest(target), _rest(old)
        different = [f"{name}={ours[name]} here, {theirs[name]} there" for name in ours if ours[name] != theirs[name]]
        if different:
            raise ValueError(f"init.sources[0] is another model: {'; '.join(different)}")

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        return Preserves.approximate

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        old, new = (source.weights for source in numbered(sources))
        shapes = shapes_of(target)
        check_nothing_is_lost(old, shapes)
        share = 1 / target.moe.num_experts if self.new_share is None else self.new_share
        outside = outside_of_experts(list(shapes), target)
        plan: Plan = {name: Sum([old[name], new[without_chain(name)]], [1 - share, share]) for name in outside}
        calibration = load_calibration(self.calibration, Method.domains)
        assert isinstance(target.router, DomainConfig)
        row = fitting(calibration, "domains", (1, target.router.domain_dim), self.calibration)
        for name in shapes.keys() - plan.keys():
            if name not in old:  # a bias for loss-free balancing that comes with this run
                plan[name] = draw(name)
            elif name.endswith(".domains"):
                new_row = Given(row.to(old[name].dtype), f"embedding of {self.calibration}")
                plan[name] = Joined([old[name], new_row])
            elif name.endswith((".offset", ".bias")):
                plan[name] = Joined([old[name], Constant((1,), dtype=old[name].dtype)])
            else:
                plan[name] = old[name]
        for network in moe_networks(target):
            gate, up, down = dense_network(new, network)
            for what, weight in (("gate_up", Joined([gate, up])), ("down", down)):
                name = f"{network}.experts.{what}"
                plan[name] = Joined([old[name], Stacked([weight])])
        return plan


def _rest(shape: Architecture) -> dict[str, object]:
    """What must be the same in both, beside what dense models have."""
    moe = dataclasses.asdict(shape.moe)
    names = ("expert_dim", "expert_form", "num_shared_experts", "shared_expert_gate", "chain")
    router = dataclasses.asdict(shape.router)
    found = {f"moe.{name}": getattr(moe[name], "value", moe[name]) for name in names}
    found |= {f"router.{name}": router[name] for name in ("domain_dim", "projection_dim", "logit_offset")}
    return found | {"model.first_dense_layers": shape.model.first_dense_layers}

"""Several dense models become one with experts: their networks side by side, everything else averaged.

Source: Branch-Train-MiX (arXiv 2403.07816): a new router, learned afterwards. DUME (2603.29765), PHATGOOSE (2402.05859)
and Nexus (2408.15901) start with one that text has told of the domains; Nexus also keeps the models' common seed as a
shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.lazy import Given, Joined, Lazy, Stacked, Sum
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.calibration import Calibration, Method, load_calibration
from moe_parallel.convert.upcycle.map import (
    Draw,
    Plan,
    Preserves,
    UpcycleConfig,
    check_from_dense,
    check_width,
    dense_network,
    moe_networks,
    new_parts,
    outside_of_experts,
    passes_once,
    weights_sum_to_one,
    without_chain,
)
from moe_parallel.model.architecture import Architecture
from moe_parallel.moe.routers.domain import DomainConfig
from moe_parallel.moe.routers.router import RouterConfig
from moe_parallel.moe.routers.token_choice import InputNorm, TokenChoiceConfig


class RouterStart(str, Enum):
    drawn = "drawn"
    """As in a new model: to be trained (Branch-Train-MiX)."""
    ridge = "ridge"
    """By ridge regression of the domain on the layer's input (DUME): needs router.logit_offset."""
    gates = "gates"
    """A row for each model, of a gate trained on its own text (PHATGOOSE): needs router.input_norm=standardize."""
    domains = "domains"
    """Made of embeddings of the domains, by a network that is drawn (Nexus): needs router=domain."""


@dataclass(kw_only=True)
class MergeConfig(UpcycleConfig):
    mix: list[float] | None = None
    """Share of each source in the average outside of experts, summing to 1; null gives all the same."""
    shared_source: int | None = None
    """Place in init.sources, from 0, of the model whose networks become shared experts instead of routed ones; null for
    none."""
    router: RouterStart = RouterStart.drawn
    """What the routers start from."""
    calibration: str | None = None
    """File of scripts/calibrate.py that routers which are not drawn start from; one domain for each routed source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix is not None and not (min(self.mix, default=-1) >= 0 and abs(sum(self.mix) - 1) <= 1e-6):
            raise ValueError(
                f"init.mix={self.mix} sums to {sum(self.mix):g}; shares must not be negative, and sum to 1"
            )
        if self.router is RouterStart.drawn and self.calibration is not None:
            raise ValueError(
                f"init.calibration={self.calibration} is not used by init.router=drawn; choose ridge, gates or domains"
            )
        if self.router is not RouterStart.drawn and self.calibration is None:
            raise ValueError(
                f"init.router={self.router.value} needs init.calibration=FILE; scripts/calibrate.py --method "
                f"{self.router.value} writes it"
            )

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        number, shared = len(sources), self.shared_source
        if number < 2:
            raise ValueError(f"init.sources has {number} models, but init=merge starts from two or more")
        if self.mix is not None and len(self.mix) != number:
            raise ValueError(f"init.mix={self.mix} has {len(self.mix)} shares for the {number} models of init.sources")
        if shared is not None and not 0 <= shared < number:
            raise ValueError(f"init.shared_source={shared} must lie in 0..{number - 1}: a place in init.sources")
        check_from_dense(sources, target)
        moe = target.moe
        for source in sources:
            check_width("moe.expert_dim", moe.expert_dim, source.model.ffn_dim, "each expert is a whole dense network")
        check_width("model.mtp_layers", target.model.mtp_layers, 0, "multi-token prediction is not merged")
        routed = number - (shared is not None)
        check_width("moe.num_experts", moe.num_experts, routed, "each source is one expert")
        if shared is None:
            why = "no source is a shared one; name it by init.shared_source"
            check_width("moe.num_shared_experts", moe.num_shared_experts, 0, why)
        else:
            check_width("moe.num_shared_experts", moe.num_shared_experts, 1, "init.shared_source is one network")
        _check_router(self.router, target)

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        """Models that were trained apart need have nothing in common: their average may know nothing."""
        same = len(set(self.sources)) == 1 and self.shared_source is None
        exact = same and weights_sum_to_one(target) and passes_once(target)
        return Preserves.exact if exact else Preserves.none

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        sources = numbered(sources)
        mix = [1 / len(sources)] * len(sources) if self.mix is None else self.mix
        routed = [source for place, source in enumerate(sources) if place != self.shared_source]
        plan = new_parts(target, draw)
        for name in outside_of_experts(list(shapes_of(target)), target):
            plan[name] = Sum([source.weights[without_chain(name)] for source in sources], mix)
        for network in moe_networks(target):
            for what, parts in _networks(routed, network).items():
                plan[f"{network}.experts.{what}"] = Stacked(parts)
            if self.shared_source is not None:
                for what, (shared,) in _networks([sources[self.shared_source]], network).items():
                    plan[f"{network}.shared.{what}.weight"] = shared
        if self.calibration is not None:
            calibration = load_calibration(self.calibration, Method(self.router.value))
            plan |= _calibrated_routers(calibration, self.calibration, target)
        return plan


class Numbered(Lazy):
    """A tensor of one of several models, whose names are the same: a plan tells it by its place in init.sources."""

    def __init__(self, inner: Lazy, place: int) -> None:
        self.inner, self.place, self.shape, self.dtype = inner, place, inner.shape, inner.dtype

    def read(self, box: Box) -> Tensor:
        return self.inner.read(box)

    def moment(self, order: int) -> Lazy:
        return Numbered(self.inner.moment(order), self.place)

    def __str__(self) -> str:
        return f"{self.place}:{self.inner}"


def numbered(sources: Sequence[Pretrained]) -> list[Pretrained]:
    """The same models, with weights that say which of them they are of."""
    return [
        replace(source, weights={name: Numbered(lazy, place) for name, lazy in source.weights.items()})
        for place, source in enumerate(sources)
    ]


def _networks(sources: Sequence[Pretrained], network: str) -> dict[str, list[Lazy]]:
    """The networks of a layer as experts have them: gate and up in one."""
    parts = [dense_network(source.weights, network) for source in sources]
    return {"gate_up": [Joined([gate, up]) for gate, up, _ in parts], "down": [down for _, _, down in parts]}


def _check_router(start: RouterStart, target: Architecture) -> None:
    """Raises ValueError where routers of the target cannot start so."""
    router: RouterConfig = target.router
    named = f"init.router={start.value}"
    if start is RouterStart.drawn:
        return
    if target.moe.chain.iterations > 1:
        raise ValueError(
            f"{named} is about the first of moe.chain.iterations={target.moe.chain.iterations} only; set it to 1"
        )
    if start is RouterStart.domains:
        if not isinstance(router, DomainConfig):
            raise ValueError(f"{named} needs a router that is made of embeddings; choose router=domain")
        return
    if not isinstance(router, TokenChoiceConfig) or isinstance(router, DomainConfig) or router.logit_residual:
        raise ValueError(
            f"{named} needs a linear router by which tokens choose, without residual; choose router=softmax"
        )
    if start is RouterStart.ridge:
        wanted = {"router.logit_offset": (router.logit_offset, True), "router.input_norm": (router.input_norm, "none")}
    else:
        wanted = {"router.logit_offset": (router.logit_offset, False)}
        wanted |= {"router.input_norm": (router.input_norm, InputNorm.standardize)}
    for option, (value, right) in wanted.items():
        if value != right:
            raise ValueError(f"{named} needs {option}={_plain(right)}, not {_plain(value)}")


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


_CALIBRATED = {Method.ridge: ("weight", "offset"), Method.gates: ("weight",), Method.domains: ("domains",)}
"""Parameters and buffers of routers that come from a file."""


def _calibrated_routers(calibration: Calibration, path: str, target: Architecture) -> Plan:
    """What routers start with. Raises ValueError where the file is of another model or number of experts."""
    shapes = shapes_of(target)
    plan: Plan = {}
    for layer in target.moe_layers:
        for what in _CALIBRATED[calibration.method]:
            name = f"layers.{layer}.ffn.router.{what}"
            stored = what if what == "domains" else f"layers.{layer}.{what}"  # those of all layers are the same
            value = fitting(calibration, stored, shapes[name], path)
            plan[name] = Given(value, f"{calibration.method.value} of {path}")
    return plan


def fitting(calibration: Calibration, stored: str, shape: Sequence[int], path: str) -> Tensor:
    """A tensor of the file. Raises ValueError if it has not that shape, or is not there."""
    tensor = calibration.tensors.get(stored)
    if tensor is None or tuple(tensor.shape) != tuple(shape):
        found = "nothing" if tensor is None else f"{tuple(tensor.shape)}"
        raise ValueError(
            f"init.calibration={path} of the domains {', '.join(calibration.domains)} has {found} for {stored}, the "
            f"model {tuple(shape)}; calibrate with one text for each expert, in their order, and models of this width"
        )
    return tensor

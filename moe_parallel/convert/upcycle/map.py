"""What all maps from trained models to a new one have in common: options, what they promise, a plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_kernels.hashing import hash_key
from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.function import function_of
from moe_parallel.convert.lazy import Cast, Constant, Given, Lazy, Sum
from moe_parallel.convert.pretrained import Pretrained, buffers_of, shapes_of
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import InitConfig, init_buffer, init_part, normal_part
from moe_parallel.moe.chain import ChainBlock
from moe_parallel.moe.expert_forms import ExpertForm
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig

Plan = dict[str, Lazy]
"""All parameters and buffers of the new model by name."""
Draw = Callable[[str], Lazy]
"""What a weight of the new model is when it starts from nothing."""
_LATER_NORM = re.compile(r"\.later_norms\.\d+\.")


class Preserves(str, Enum):
    """How the new model's logits relate to the source's before the first step."""

    exact = "exact"
    """Equal but for rounding, whatever the new parts were drawn as."""
    approximate = "approximate"
    """Close, by how much depends on weights and text."""
    none = "none"
    """The source's knowledge is in there, its function is not."""


class OptimizerState(str, Enum):
    fresh = "fresh"
    """Moments start at zero."""
    source = "source"
    """Moments of the weights that a weight is made of, scaled as its gradient is; zeros for what is new."""


@dataclass(kw_only=True)
class UpcycleConfig(InitConfig):
    sources: list[str] = dataclasses.field(default_factory=list)
    """Models to start from: run folders, checkpoints or folders of Hugging Face models, in the order that counts."""
    optimizer_state: OptimizerState = OptimizerState.fresh
    """What AdamW knows at the first step."""

    def check(self, sources: Sequence[Architecture], target: Architecture) -> None:
        """Raises ValueError where these sources cannot become this model by this map, with the relation."""
        raise NotImplementedError

    def preserves(self, sources: Sequence[Architecture], target: Architecture) -> Preserves:
        """What the map promises for these models."""
        raise NotImplementedError

    def plan(self, sources: Sequence[Pretrained], target: Architecture, draw: Draw, seed: int) -> Plan:
        """Where every weight comes from. Reads nothing, or only small things.

        Args:
            draw: first values of what is new.
            seed: of whatever else is random.
        """
        raise NotImplementedError


def make_plan(config: UpcycleConfig, sources: Sequence[Pretrained], target: Architecture, seed: int) -> Plan:
    """The checked plan of a map.

    Raises ValueError where the models do not fit.
    """
    config.check([source.architecture for source in sources], target)
    shapes = shapes_of(target)
    plan = config.plan(sources, target, drawing(target, config, seed), seed)
    missing, unknown = shapes.keys() - plan.keys(), plan.keys() - shapes.keys()
    assert not missing, f"the plan misses {sorted(missing)}"
    assert not unknown, f"the plan has {sorted(unknown)}, which the model has not"
    for name, lazy in plan.items():
        assert lazy.shape == shapes[name], f"{name}: {lazy} has shape {lazy.shape}, not {shapes[name]}"
    return {name: plan[name] for name in shapes}


def drawing(architecture: Architecture, config: InitConfig, seed: int) -> Draw:
    """First values of all weights and buffers of a model that starts from nothing."""
    shapes, buffers = shapes_of(architecture), buffers_of(architecture)

    def draw(name: str) -> Lazy:
        if name not in buffers:
            return Drawn(name, shapes[name], architecture, config, seed)
        value = torch.empty_like(buffers[name], device="cpu")
        init_buffer(value, name, seed)
        return Given(value, "as new") if value.any() else Constant(shapes[name], dtype=value.dtype)

    return draw


class Drawn(Lazy):
    """A weight of a model that starts from nothing: the numbers that `init_weights` gives it on any layout."""

    dtype = torch.float32

    def __init__(
        self, name: str, shape: Sequence[int], architecture: Architecture, config: InitConfig, seed: int
    ) -> None:
        self.name, self.shape, self._config, self._seed = name, tuple(shape), config, seed
        self._num_layers = architecture.model.num_layers

    def read(self, box: Box) -> Tensor:
        out = torch.empty(box[1])
        init_part(out, self.name, self.shape, box[0], self._config, self._num_layers, self._seed)
        return out

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return "drawn"


class Noise(Lazy):
    """N(0, std^2), a function of the seed, a name and the place of the element."""

    dtype = torch.float32

    def __init__(self, shape: Sequence[int], std: float, seed: int, name: str) -> None:
        self.shape, self.std, self._key = tuple(shape), std, hash_key(seed, "upcycle", name)

    def read(self, box: Box) -> Tensor:
        out = torch.empty(box[1])
        normal_part(out, self.shape, box[0], self.std, self._key)
        return out

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return f"N(0, {self.std:.3g}^2)"


def with_noise(weight: Lazy, std: float, seed: int, name: str) -> Lazy:
    """A weight plus noise of that standard deviation, in its own type; the weight itself if that is 0."""
    if std == 0:
        return weight
    return Sum([weight, Cast(Noise(weight.shape, std, seed, name), weight.dtype)], [1, 1])


# -- what several maps need ----------------------------------------------------------------------------------------


def moe_networks(target: Architecture) -> list[str]:
    """What mixture-of-experts layers are called, in order: `layers.3.ffn`, and `mtp.0.ffn` after the decoder's last."""
    last = target.model.num_layers
    return [f"layers.{n}.ffn" if n < last else f"mtp.{n - last}.ffn" for n in target.moe_layers]


def outside_of_experts(names: Sequence[str], target: Architecture) -> list[str]:
    """Names of the weights that are not within a mixture-of-experts layer."""
    inside = tuple(f"{network}." for network in moe_networks(target))
    return [name for name in names if not name.startswith(inside)]


def without_chain(name: str) -> str:
    """What a weight starts as in a chain of experts: norms of later iterations as the layer's, all else as itself."""
    return _LATER_NORM.sub(".ffn_norm.", name)


def copied(source: Pretrained, target: Architecture) -> Plan:
    """Everything outside of mixture-of-experts layers, as it is."""
    return {name: source.weights[without_chain(name)] for name in outside_of_experts(list(shapes_of(target)), target)}


def new_parts(target: Architecture, draw: Draw) -> Plan:
    """Everything in mixture-of-experts layers but routed and shared experts, drawn: routers, gates, adjugates, what
    chains add."""
    names = list(shapes_of(target))
    inside = set(names) - set(outside_of_experts(names, target))
    return {
        name: draw(name) for name in names if name in inside and not re.search(r"\.ffn\.(experts\.\w+$|shared\.)", name)
    }


def check_one_source(sources: Sequence[Architecture], name: str) -> Architecture:
    """The only source. Raises ValueError if there are more or none."""
    if len(sources) != 1:
        raise ValueError(f"init.sources has {len(sources)} models, but init={name} starts from one")
    return sources[0]


def check_dense(source: Architecture, what: str = "init.sources") -> None:
    """Raises ValueError if a source has experts."""
    if source.num_moe_layers > 0:
        raise ValueError(
            f"{what} is a model with {source.num_moe_layers} mixture-of-experts layers, but this map starts from a "
            "dense one; see docs/upcycling.md for maps between models with experts"
        )


def check_same(sources: Sequence[Architecture], target: Architecture) -> None:
    """Raises ValueError where sources and target differ in what maps of experts leave as it is: width, depth,
    attention, vocabulary, norms, and dense layers where both have some."""
    ours = _outside(target)
    problems = []
    for number, source in enumerate(sources):
        theirs = _outside(source)
        problems += [
            f"{name}={ours[name]} here, {theirs[name]} in init.sources[{number}]"
            for name in ours
            if name in theirs and ours[name] != theirs[name]
        ]
    if problems:
        raise ValueError(f"the models differ: {'; '.join(problems)}; set these options as the sources have them")


def _outside(architecture: Architecture) -> dict[str, object]:
    kinds = ("model.", "attention", "vocab_size")
    found = {name: value for name, value in function_of(architecture).items() if name.startswith(kinds)}
    del found["model.first_dense_layers"]
    return found


def weights_sum_to_one(target: Architecture) -> bool:
    """In evaluation, the weights of a token's experts sum to 1."""
    router = target.router
    return isinstance(router, TokenChoiceConfig) and router.normalize and router.route_scale == 1


def passes_once(target: Architecture) -> bool:
    """Before the first step a layer adds what its experts return to the residual stream, once, as a dense one does."""
    chain = target.moe.chain
    return chain.block is ChainBlock.pre_norm and (chain.iterations == 1 or chain.learned_scale)


def check_width(option: str, value: int, wanted: int, why: str) -> None:
    """Raises ValueError where a width is not the one that a map needs."""
    if value != wanted:
        raise ValueError(f"{option}={value} must be {wanted}: {why}")


def dense_network(source: Mapping[str, Lazy], name: str) -> tuple[Lazy, Lazy, Lazy]:
    """Gate, up and down of a dense network: (F, D), (F, D), (D, F)."""
    return source[f"{name}.gate.weight"], source[f"{name}.up.weight"], source[f"{name}.down.weight"]


def check_form(target: Architecture, form: ExpertForm = ExpertForm.full) -> None:
    """Raises ValueError where experts are to have another form than a map makes."""
    found = target.moe.expert_form
    if found is not form:
        other = "" if found is ExpertForm.full else f", or choose init={found.value}"
        raise ValueError(
            f"moe.expert_form={found.value} is not what this map makes; set moe.expert_form={form.value}{other}"
        )


def check_from_dense(sources: Sequence[Architecture], target: Architecture, form: ExpertForm = ExpertForm.full) -> None:
    """Raises ValueError unless all sources are dense and differ from the target in experts alone, which have a form."""
    for number, source in enumerate(sources):
        check_dense(source, f"init.sources[{number}]")
    check_form(target, form)
    check_same(sources, target)

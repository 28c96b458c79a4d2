"""Which weights learn, and from which step on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.routers.router import Router
from moe_parallel.optim import OptimConfig


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Take the weights that `optim.frozen` names out of training, before they are sharded."""
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in config.frozen):
            parameter.requires_grad_(False)


def routers_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of all routers by name."""
    inside = {p for router in model.modules() if isinstance(router, Router) for p in router.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in inside}


def keep_router_gradients(model: nn.Module) -> None:
    """Drop all other gradients: an optimizer does not touch what has none, and a norm does not see it."""
    routers = set(routers_of(model).values())
    for parameter in model.parameters():
        if parameter not in routers:
            parameter.grad = None


def routers_learn(config: OptimConfig, architecture: Architecture) -> bool:
    """Whether `optim.frozen` leaves a weight of a router in training."""
    if not config.frozen:
        return True
    with torch.device("meta"):
        model = Transformer(architecture)
    freeze(model, config)
    return any(parameter.requires_grad for parameter in routers_of(model).values())


def learning_problems(config: OptimConfig, architecture: Architecture) -> list[str]:
    """What of `optim.frozen` and `optim.router_only_steps` this model has no use for."""
    if not config.frozen and config.router_only_steps == 0:
        return []
    with torch.device("meta"):
        model = Transformer(architecture)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, config)
    problems = [*_without_effect(config.frozen, names)]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append(f"optim.frozen={config.frozen} leaves nothing that learns; take a pattern out")
    routers = routers_of(model).values()
    if config.router_only_steps > 0 and not any(parameter.requires_grad for parameter in routers):
        why = "optim.frozen freezes all routers" if routers else "this model has no router with weights"
        problems.append(f"optim.router_only_steps={config.router_only_steps}, but {why}; set it to 0")
    return problems


def _without_effect(patterns: list[str], names: list[str]) -> Iterator[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            # Layers have the same names again and again: one of each kind is enough to choose from.
            kinds = {".".join("*" if part.isdigit() else part for part in name.split(".")): name for name in names}
            near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.0)
            yield f"optim.frozen: {pattern} matches no weight of this model; near names: {', '.join(near)}"

"""Optimizer, learning-rate schedule, and one gradient norm over all meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Schedule(str, Enum):
    cosine = "cosine"
    """Warm up, then half a cosine down to the final rate."""
    warmup_stable_decay = "warmup_stable_decay"
    """Warm up, stay at the peak, then a straight line down over the last decay_fraction of the steps."""
    constant = "constant"
    """Warm up, then stay at the peak."""


@dataclass(kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    schedule: Schedule = Schedule.cosine
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up from zero."""
    decay_fraction: float = 0.2
    """Part of the steps that warmup_stable_decay spends decaying."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and other vectors have none."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 only measures it."""
    schedule_start_step: int = 0
    """Steps that the schedule counts as done before the first one: those of the run that the weights come from, to go
    on with its learning rate instead of warming up anew. The schedule then ends after this and train.steps together."""
    frozen: list[str] = field(default_factory=list)
    """Weights that do not learn, as patterns of names such as `layers.*.ffn.shared.*` or `embedding.weight`."""
    router_only_steps: int = 0
    """Only routers learn in the first steps of a run; all else has no update, no moments and no decay then."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("final_fraction", 0, 1),
            ("decay_fraction", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"optim.{name}={getattr(self, name)} must lie in {low}..{high}")
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in (
            *("warmup_steps", "weight_decay", "max_gradient_norm"),
            *("schedule_start_step", "router_only_steps"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of the optimizer step with index `step`, from 0; a pure function, so that a resume needs no state."""
    step, total_steps = step + config.schedule_start_step, total_steps + config.schedule_start_step
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule is Schedule.constant:
        return peak
    if config.schedule is Schedule.warmup_stable_decay:
        start = max(config.warmup_steps, round(total_steps * (1 - config.decay_fraction)))
    else:
        start = config.warmup_steps
    progress = min(max(step + 1 - start, 0) / max(total_steps - start, 1), 1.0)
    if config.schedule is Schedule.warmup_stable_decay:
        return peak + (final - peak) * progress
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Frozen parameters are absent: no state, no decay."""
    return adamw(parameter_groups([(p, p.ndim) for p in model.parameters() if p.requires_grad], config), config)


def parameter_groups(parameters: list[tuple[nn.Parameter, int]], config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by what they have of weight decay; each comes with the dimensions of the whole of it."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p, dimensions in parameters if dimensions >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p, dimensions in parameters if dimensions < 2], "weight_decay": 0.0},
    ]
    # torch wants a group, even on a stage of a pipeline where nothing learns.
    return [group for group in groups if group["params"]] or groups[:1]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of these groups."""
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )


def _copies(gradient: Tensor, world: int) -> int:
    """Ranks that hold the same piece of this gradient, so that a sum over all ranks counts it once."""
    if not isinstance(gradient, DTensor):
        return world
    copies = world // gradient.device_mesh.size()
    for axis, placement in enumerate(gradient.placements):
        if placement.is_partial():
            raise RuntimeError("a gradient has not been reduced yet; its norm would be wrong")
        if placement.is_replicate():
            copies *= gradient.device_mesh.size(axis)
    return copies


def global_gradient_norm(
    parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, stage_ranks: int | None = None
) -> Tensor:
    """Euclidean norm of all gradients, dense and expert, whatever mesh they live on, with one all-reduce.

    torch's own `clip_grad_norm_` refuses parameters of different meshes, and a norm per group would clip experts
    and dense weights by different factors.

    Args:
        group: all ranks; None in a single process without a process group.
        stage_ranks: ranks that have parts of these parameters; None if all.
    """
    world = 1 if group is None else dist.get_world_size(group)
    sharing = world if stage_ranks is None else stage_ranks
    by_copies: dict[int, list[Tensor]] = {}
    some: nn.Parameter | None = None
    for parameter in parameters:
        some = parameter
        if parameter.grad is not None:
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            by_copies.setdefault(_copies(gradient, sharing), []).append(local)
    assert some is not None
    total = torch.zeros((), dtype=torch.promote_types(some.dtype, torch.float32), device=some.device)
    for copies, gradients in sorted(by_copies.items()):
        norms = torch.stack([n.to(total.dtype) for n in torch._foreach_norm(gradients)])
        total += norms.square().sum() / copies
    if group is not None and world > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by one common factor so that their global norm is at most `max_norm`; 0 does nothing."""
    if max_norm == 0:
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    if local:  # a stage of a pipeline may have nothing that learns
        torch._foreach_mul_(local, factor)

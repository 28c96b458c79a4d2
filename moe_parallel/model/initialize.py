"""First values of all weights: a function of the seed, the parameter's name and the element's place in it.

There is no generator whose state could differ: a shard draws exactly the numbers that the whole tensor would have
there, on any number of ranks, any device and in any order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe_kernels.hashing import hash_key, hashed_uniform
from moe_parallel.model.transformer import Transformer

_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
_RESIDUAL_OUTPUT = re.compile(r"(attention\.output|ffn(\.shared|\.base)?\.down)\.weight$|experts\.down$")
_NORM = re.compile(r"(norm|later_norms\.\d+)\.weight$")
_BIAS = re.compile(r"attention\.(query|key|value)_bias$")
_DOMAINS = re.compile(r"\.domains$")
_ZERO = ("later_scale", "adjugates.down", "experts.gate_up_out", "experts.down_out")
"""Experts that are differences from a base start as that."""
_OF_ROUTER = re.compile(r"ffn\.(router|later_routers\.\d+)\.\w+$")
_CPU_CHUNK = 1 << 16  # elements at once: fits the cache
_DEVICE_CHUNK = 1 << 24


@dataclass(kw_only=True)
class InitConfig:
    std: float = 0.02
    """Standard deviation of all weight matrices (0.006 in DeepSeek's models); norms start at 1."""
    scale_output_by_depth: bool = False
    """Divide it by sqrt(2 * model.num_layers) for the matrices that write to the residual stream (GPT-2)."""

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"init.std={self.std} must be positive")


@dataclass(kw_only=True)
class FreshConfig(InitConfig):
    weights: str | None = None
    """Model to take weights from, with a new optimizer: a run folder, a checkpoint, or a folder of a Hugging Face
    model. Of the same model, or of one with fewer parts, such as a plain layer for a chain of experts. What it does not
    have is drawn; null draws all."""


@torch.no_grad()
def init_weights(model: Transformer, config: InitConfig, seed: int) -> None:
    """Set every parameter and buffer of a Transformer.

    Args:
        model: on a real device; parameters are plain tensors, or DTensors of which only this rank's shard is drawn.
    Raises:
        ValueError: a parameter is on the meta device, or has a name that no rule covers.
    """
    num_layers = model.architecture.model.num_layers
    for wrapped_name, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", wrapped_name)
        if parameter.is_meta:
            raise ValueError(f"{name} has no memory yet; call model.to_empty(device=...) before init_weights")
        _fill(_local(parameter), name, parameter.shape, _held_indices(parameter), config, num_layers, seed)
    for wrapped_name, buffer in model.named_buffers():
        name = _WRAPPERS.sub("", wrapped_name)
        if _OF_ROUTER.search(name) is None:
            raise ValueError(f"no rule says how to initialize buffer {name}")
        init_buffer(_local(buffer), name, seed)


@torch.no_grad()
def init_buffer(buffer: Tensor, name: str, seed: int) -> None:
    """Set a buffer of a router: to zero, or to standard normal numbers if it embeds the domains of its experts."""
    buffer.zero_()
    if _DOMAINS.search(name) is not None:
        fill_normal(buffer, 1.0, hash_key(seed, name))


@torch.no_grad()
def init_part(
    part: Tensor,
    name: str,
    shape: Sequence[int],
    offsets: Sequence[int],
    config: InitConfig,
    num_layers: int,
    seed: int,
) -> None:
    """Set a box of a weight, for engines that cut weights in their own way.

    Args:
        part: the box, with real memory.
        name, shape: of the whole weight in a Transformer.
        offsets: of the box in it.
    """
    _fill(part, name, shape, _box_indices(part, offsets), config, num_layers, seed)


@torch.no_grad()
def normal_part(part: Tensor, shape: Sequence[int], offsets: Sequence[int], std: float, key: int) -> None:
    """Set a box of a tensor to N(0, std^2); element i of the whole is a hash of (key, i)."""
    if part.ndim == 1:  # a matrix of one row
        part, shape, offsets = part.unsqueeze(0), (1, *shape), (0, *offsets)
    _fill_normal(part, shape, _box_indices(part, offsets), std, key)


def _box_indices(part: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    return [torch.arange(first, first + size) for first, size in zip(offsets, part.shape, strict=True)]


def _fill(
    local: Tensor,
    name: str,
    shape: Sequence[int],
    held: list[Tensor],
    config: InitConfig,
    num_layers: int,
    seed: int,
) -> None:
    """First values of what is held of a weight, by its name: `held[dim]` are the indices of the whole along `dim`."""
    if _NORM.search(name) is not None:
        local.fill_(1.0)
    elif name.endswith(_ZERO) or _BIAS.search(name) or (len(shape) < 2 and _OF_ROUTER.search(name)):
        local.zero_()
    elif len(shape) >= 2:
        scaled = config.scale_output_by_depth and _RESIDUAL_OUTPUT.search(name) is not None
        std = config.std / math.sqrt(2 * num_layers) if scaled else config.std
        _fill_normal(local, shape, held, std, hash_key(seed, name))
    else:
        raise ValueError(f"no rule says how to initialize {name} of shape {tuple(shape)}")


def fill_normal(parameter: Tensor, std: float, key: int) -> None:
    """Fill this rank's shard with N(0, std^2); element i of the whole tensor is a hash of (key, i)."""
    _fill_normal(_local(parameter), parameter.shape, _held_indices(parameter), std, key)


def _fill_normal(local: Tensor, shape: Sequence[int], held: list[Tensor], std: float, key: int) -> None:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    _fill_rows(local, [index * stride for index, stride in zip(held, strides)], std, key)


def _fill_rows(local: Tensor, offsets: list[Tensor], std: float, key: int) -> None:
    """`offsets[dim][i]`: what index i along `dim` adds to the flat index in the whole tensor. int64, on the host."""
    if local.ndim > 2:
        for part, offset in zip(local, offsets[0].tolist()):
            _fill_rows(part, [offsets[1] + offset, *offsets[2:]], std, key)
        return
    if local.numel() == 0:
        return
    columns = offsets[1].to(local.device)
    limit = _CPU_CHUNK if local.device.type == "cpu" else _DEVICE_CHUNK
    rows_at_once = max(1, limit // local.shape[1])
    for rows, row_offsets in zip(local.split(rows_at_once), offsets[0].split(rows_at_once)):
        index = row_offsets.to(local.device).unsqueeze(1) + columns
        rows.copy_(hashed_normal(index, key).mul_(std))


def hashed_normal(index: Tensor, key: int) -> Tensor:
    """Standard normal numbers, float64: a function of (key, index) alone.

    All in float64, so that devices whose last bits differ still agree after rounding to float32, but for rare ties.
    """
    return hashed_uniform(index, key).mul_(2.0).sub_(1.0).erfinv_().mul_(math.sqrt(2.0))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data


def _held_indices(parameter: Tensor) -> list[Tensor]:
    """For each dimension the indices that this rank holds of it; int64, on the host.

    The index vectors are split just as the tensor was, which also covers a dimension that is split twice.
    """
    held = [torch.arange(size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return held
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            raise ValueError(f"cannot initialize a tensor that is placed as {placement}")
        pieces = held[placement.dim].chunk(parameter.device_mesh.size(axis))
        place = coordinate[axis]
        held[placement.dim] = pieces[place] if place < len(pieces) else held[placement.dim][:0]
    return held

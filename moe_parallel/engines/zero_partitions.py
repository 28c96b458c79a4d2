"""What one rank holds of weights and moments under ZeRO: flat ranges, the same view of all stages.

DeepSpeed flattens the parameters of a group and gives each rank a contiguous partition of float32 weights and moments.
Stages 1 and 2 cut the group as a whole, so that a rank holds most parameters whole or not at all; stage 3 cuts every
parameter. Everything here reads and writes partitions where they are: nothing is gathered.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.checkpoint.pieces import Box, FlatRange, Pieces
from moe_parallel.checkpoint.state import Entries


@dataclass(frozen=True)
class Held:
    """A parameter of this rank's model, and the range of it that this rank steps."""

    name: str
    """In a whole `Transformer`."""
    shape: torch.Size
    """There."""
    box: Box
    """The part of it that this rank's model has: its experts, or all."""
    start: int
    """First element of the range, in the flattened box."""
    count: int
    group: int
    """The flat buffer that holds the range."""
    offset: int
    """Place of the range in it."""

    def range_in(self, flat: Tensor) -> Tensor:
        """The range, of the buffer."""
        return flat.detach()[self.offset : self.offset + self.count]


class Partitions(ABC):
    """The flat buffers of a ZeRO optimizer.

    Args:
        optimizer: DeepSpeed's.
        whole: (name, shape of the whole, this rank's box) by parameter; others are left alone.
    """

    def __init__(self, optimizer: Any, whole: dict[nn.Parameter, tuple[str, torch.Size, Box]]) -> None:
        self.optimizer, self.whole = optimizer, whole
        held = [self._place(parameter) for parameter in whole]
        self.held = sorted(held, key=lambda h: (h.group, h.offset))
        self.device = next(iter(whole)).device

    @property
    @abstractmethod
    def groups(self) -> int:
        """How many buffers there are."""

    @abstractmethod
    def _place(self, parameter: nn.Parameter) -> Held: ...

    @abstractmethod
    def opened(self, group: int, write: bool) -> Any:
        """Context: a buffer of float32 weights, in memory and a key to `states`; written ones are taken over."""

    def in_files(self, group: int) -> bool:
        """Whether a buffer is in memory only while it is opened, in a place that others use after it."""
        return False

    @abstractmethod
    def published(self) -> Any:
        """Context: what has been written within it are the weights that compute, on all ranks, when it ends."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Of all gradients, as the next step will clip by it; NaN if it is not finite."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """As if there had been no backward pass since the last step."""

    @property
    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """Moments by buffer."""
        return self.optimizer.optimizer.state

    def visit(self, write: bool) -> Iterator[tuple[list[Held], Tensor, dict[str, Tensor]]]:
        """Buffer by buffer: the ranges in it, its weights, its moments."""
        for group in range(self.groups):
            with self.opened(group, write) as flat:
                yield [held for held in self.held if held.group == group], flat, self.states.setdefault(flat, {})

    def _held(self, parameter: nn.Parameter, start: int, count: int, group: int, offset: int) -> Held:
        return Held(*self.whole[parameter], start, count, group, offset)

    def _finite(self, norm: Tensor | float) -> Tensor:
        value = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        return torch.where(value < 0, torch.nan, value)  # DeepSpeed says -1 for infinite and NaN


class GroupPartitions(Partitions):
    """Of stages 1 and 2."""

    @property
    def groups(self) -> int:
        return len(self.optimizer.bit16_groups)

    def _place(self, parameter: nn.Parameter) -> Held:
        group = next(
            index for index, group in enumerate(self.optimizer.bit16_groups) if any(p is parameter for p in group)
        )
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        if found is None:  # all of it is other ranks'
            return self._held(parameter, 0, 0, group, 0)
        part, place = found.lp_fragment_address, found.hp_fragment_address
        return self._held(parameter, part.start, part.numel, group, place.start)

    @contextmanager
    def opened(self, group: int, write: bool) -> Iterator[Tensor]:
        yield self.optimizer.single_partition_of_fp32_groups[group]

    @contextmanager
    def published(self) -> Iterator[None]:
        yield
        self.optimizer.update_lp_params()

    def gradient_norm(self) -> Tensor:
        self.optimizer._wait_for_offload_copies()
        return self._finite(self.optimizer.scaled_global_norm())

    def drop_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer._wait_for_offload_copies()
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in kept:
                kept[group] = None
        optimizer.micro_step_id = -1
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()


class ParameterPartitions(Partitions):
    """Of stage 3."""

    @property
    def groups(self) -> int:
        return len(self.optimizer.fp16_groups)

    def _place(self, parameter: nn.Parameter) -> Held:
        zero: Any = parameter
        group, offset, padded = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = min(padded * dist.get_rank(zero.ds_process_group), zero.ds_numel)
        return self._held(parameter, start, min(padded, zero.ds_numel - start), group, offset)

    def in_files(self, group: int) -> bool:
        return self.optimizer._swappable_optimizer_subgroup(group)

    @contextmanager
    def opened(self, group: int, write: bool) -> Iterator[Tensor]:
        optimizer, swapped = self.optimizer, self.in_files(group)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        yield optimizer.fp32_partitioned_groups_flat[group]
        if write:
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if swapped:
            if write:
                optimizer._optimizer_states_and_gradient_swap_out(group)
            else:
                optimizer._release_swap_buffers(group)

    @contextmanager
    def published(self) -> Iterator[None]:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        yield
        if optimizer.persistent_parameters:  # those that every rank keeps whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def gradient_norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return self._finite(combine_grad_norm_groups(self.optimizer._get_norm_groups()))

    def drop_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        optimizer._post_step(set())


class ZeroState:
    """Weights, moments and buffers under ZeRO, for our checkpoints (`TrainingState`).

    Args:
        model: for its buffers.
    """

    prefixes = ("model.", "optimizer.")

    def __init__(self, partitions: Partitions, model: nn.Module) -> None:
        self.partitions, self.model = partitions, model

    def tensors(self) -> Entries:
        entries: Entries = dict(self._buffers())
        for ranges, flat, state in self.partitions.visit(write=False):
            for held in ranges:
                entries[f"model.{held.name}"] = self._saved(held, flat)
                for moment, value in state.items():
                    entry = value if moment == "step" else self._saved(held, value)
                    entries[f"optimizer.{held.name}.{moment}"] = entry
        return entries

    def _saved(self, held: Held, flat: Tensor) -> Pieces:
        values = held.range_in(flat)
        return _pieces(held, values.clone() if self.partitions.in_files(held.group) else values)

    def empty(self, metadata: Metadata) -> Entries:
        entries: Entries = dict(self._buffers())
        names = {held.name: held for held in self.partitions.held}
        for held in self.partitions.held:
            entries[f"model.{held.name}"] = _pieces(held, torch.zeros(held.count))
        for key, entry in metadata.state_dict_metadata.items():
            name, _, moment = key.removeprefix("optimizer.").rpartition(".")
            if not key.startswith("optimizer.") or name not in names or not isinstance(entry, TensorStorageMetadata):
                continue
            if moment == "step":
                entries[key] = torch.zeros((), dtype=entry.properties.dtype)
            else:
                held = names[name]
                entries[key] = _pieces(held, torch.zeros(held.count, dtype=entry.properties.dtype))
        return entries

    def load(self, tensors: Entries) -> None:
        with self.partitions.published():
            for ranges, flat, state in self.partitions.visit(write=True):
                for held in ranges:
                    if (weights := tensors.get(f"model.{held.name}")) is not None:
                        held.range_in(flat).copy_(_values(weights))
                if any(key.startswith("optimizer.") for key in tensors):
                    state.clear()
                    state.update(_moments(ranges, flat, tensors))

    def _buffers(self) -> dict[str, Tensor]:
        return {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}


def _pieces(held: Held, values: Tensor) -> Pieces:
    ranges = [FlatRange(values, held.start, held.box)] if held.count else []
    return Pieces(held.shape, values.dtype, ranges)


def _values(entry: Tensor | Pieces) -> Tensor:
    assert isinstance(entry, Pieces)
    (flat,) = entry.ranges or (FlatRange(torch.empty(0, dtype=entry.dtype), 0),)
    return flat.values


def _moments(ranges: list[Held], flat: Tensor, tensors: Entries) -> dict[str, Tensor]:
    """The optimizer's state of one buffer: moments of its ranges, and one number of steps for all of them: weights that
    have not begun, whose moments are zeros, take that of the others."""
    state: dict[str, Tensor] = {}
    steps: dict[float, str] = {}
    for held in ranges:
        prefix = f"optimizer.{held.name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        step = found.pop("step", None)
        if isinstance(step, Tensor):
            if step > 0:
                steps[float(step)] = held.name
            state["step"] = torch.maximum(step.to(flat.device), state.get("step", torch.zeros_like(step)))
        for moment, values in found.items():
            buffer = state.setdefault(moment, torch.zeros_like(flat.detach()))
            held.range_in(buffer).copy_(_values(values))
    if len(steps) > 1:
        (one, first), (other, second) = itertools.islice(steps.items(), 2)
        raise CheckpointError(
            f"the optimizer has taken {one:.0f} steps of {first} and {other:.0f} of {second}; DeepSpeed keeps one "
            "number for all weights of a group; resume with engine=native, or start from the weights (init.weights)"
        )
    return state

"""What a rank of Megatron-Core holds, under our names: first values, gradients, checkpoints.

A rank holds its part of each weight in the type of the computation, and of some of them, or of ranges of them with the
distributed optimizer, the float32 values that the optimizer steps, with their moments. Both are flat ranges of our
tensors (see `convert/megatron_weights.py`), which a checkpoint of ours writes and reads as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moe_parallel.checkpoint.pieces import FlatRange, Pieces, boxes
from moe_parallel.checkpoint.state import Entries
from moe_parallel.convert.megatron_weights import MegatronWeights, Segment, experts_of_rank
from moe_parallel.engines.megatron_model import ExpertLayer
from moe_parallel.model.initialize import InitConfig, init_part

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """Float32 values of a range of a weight, which this rank's optimizer steps."""

    parameter: nn.Parameter
    """What computes."""
    segments: list[Segment]
    """Of the whole of it that this rank computes with."""
    start: int
    """Of the range in it."""
    main: Tensor
    """The optimizer's own; the parameter itself where it is float32 and not cut."""
    optimizer: torch.optim.Optimizer

    def parts(self, values: Tensor) -> Iterator[tuple[Segment, FlatRange]]:
        """`values`, of this range, as ranges of our tensors."""
        yield from parts_of(self.segments, self.start, values.reshape(-1))


def parts_of(segments: Sequence[Segment], start: int, values: Tensor) -> Iterator[tuple[Segment, FlatRange]]:
    """Views of consecutive values of a weight from element `start`, each in one of our tensors."""
    begin, stop = 0, start + values.numel()
    for segment in segments:
        first, last = max(begin, start), min(begin + segment.count, stop)
        if first < last:
            part = values[first - start : last - start]
            yield segment, FlatRange(part, segment.start + first - begin, segment.box)
        begin += segment.count


def weights_of(chunks: Sequence[GPTModel], weights: MegatronWeights) -> dict[nn.Parameter, list[Segment]]:
    """Where each parameter of this rank lies in our tensors."""
    found: dict[nn.Parameter, list[Segment]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            name = _renumbered(name, chunk)
            ours = re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.layer\.(.+)", name)
            if ours is not None:
                found[parameter] = [experts_of_rank(f"layers.{ours[1]}.ffn.{ours[2]}", parameter.shape, weights)]
            else:
                found[parameter] = weights.segments(name)
            count = sum(segment.count for segment in found[parameter])
            assert count == parameter.numel(), f"{name} has {parameter.numel()} elements, expected {count}"
    return found


def _renumbered(name: str, chunk: GPTModel) -> str:
    """Layers as they are numbered in the whole model."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return name
    number = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def held_by(optimizer: MegatronOptimizer, places: dict[nn.Parameter, list[Segment]]) -> list[Held]:
    """All ranges that this rank's optimizers step."""
    held: list[Held] = []
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if part.is_stub_optimizer:
            continue
        for parameter, main in _pairs(part):
            sharded = isinstance(part, DistributedOptimizer)
            start = part._get_model_param_range_map(parameter)["param"].start if sharded else 0
            held.append(Held(parameter, places[parameter], start, main, part.optimizer))
    return held


def _pairs(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters that compute, and what the optimizer steps for them."""
    if isinstance(optimizer, DistributedOptimizer):
        model = [*optimizer.model_float16_groups, *optimizer.model_fp32_groups]
        main = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        model = [*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups]
        main = [*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups]
    else:
        model = main = [group["params"] for group in optimizer.param_groups]
    for group, main_group in zip(model, main, strict=True):
        yield from zip(group, main_group, strict=True)


def buffers_of(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    """What routers keep, by our names."""
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertLayer):
                for name, buffer in module.layer.named_buffers():
                    found[f"layers.{module.layer.layer}.ffn.{name}"] = buffer
    return found


@torch.no_grad()
def draw_weights(
    places: dict[nn.Parameter, list[Segment]], held: Sequence[Held], init: InitConfig, num_layers: int, seed: int
) -> None:
    """The same first values as those of any other engine; the optimizer's float32 values are not rounded."""
    ranges: dict[nn.Parameter, list[Held]] = {}
    for one in held:
        ranges.setdefault(one.parameter, []).append(one)
    for parameter, segments in places.items():
        values = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for segment, flat in parts_of(segments, 0, values):
            assert flat.box is not None
            offsets, sizes = flat.box
            taken = 0
            for at, size in boxes(flat.start, flat.start + flat.values.numel(), sizes):
                part = flat.values[taken : taken + math.prod(size)].view(size)
                place = [o + a for o, a in zip(offsets, at, strict=True)]
                init_part(part, segment.name, segment.shape, place, init, num_layers, seed)
                taken += part.numel()
        parameter.copy_(values.view_as(parameter))
        for one in ranges.get(parameter, []):
            main = one.main.detach()
            main.copy_(values[one.start : one.start + main.numel()].view_as(main))


class MegatronState:
    """See `TrainingState`. Weights are what the optimizer steps; `publish` copies them to what computes."""

    prefixes = ("model.", "optimizer.")

    def __init__(self, held: Sequence[Held], buffers: dict[str, Tensor], publish: Callable[[], None]) -> None:
        self._held, self._buffers, self._publish = held, buffers, publish
        self._fresh: list[tuple[Held, dict[str, Tensor]]] = []

    def tensors(self) -> Entries:
        entries = self._weights()
        for one in self._held:
            state = one.optimizer.state.get(one.main, {})
            for moment in _MOMENTS:
                if moment in state:
                    _collect(entries, one, f".{moment}", state[moment])
            if "step" in state:
                for segment in one.segments:
                    entries[f"optimizer.{segment.name}.step"] = state["step"]
        return _joined(entries)

    def _weights(self) -> dict[str, Any]:
        entries: dict[str, Any] = {f"model.{name}": buffer for name, buffer in self._buffers.items()}
        for one in self._held:
            _collect(entries, one, None, one.main.detach())
        return entries

    def empty(self, metadata: Metadata) -> Entries:
        entries, stored = self._weights(), metadata.state_dict_metadata
        self._fresh = []
        for one in self._held:
            state: dict[str, Tensor] = {}
            for moment in _MOMENTS:
                if f"optimizer.{one.segments[0].name}.{moment}" in stored:
                    state[moment] = torch.zeros_like(one.main.detach())
                    _collect(entries, one, f".{moment}", state[moment])
            first = stored.get(f"optimizer.{one.segments[0].name}.step")
            if isinstance(first, TensorStorageMetadata):
                # One count for all parts of a weight: Megatron steps them together.
                state["step"] = torch.zeros((), dtype=first.properties.dtype)
                for segment in one.segments:
                    entries[f"optimizer.{segment.name}.step"] = state["step"]
            self._fresh.append((one, state))
        return _joined(entries)

    @torch.no_grad()
    def load(self, tensors: Entries) -> None:
        moments = any(name.startswith("optimizer.") for name in tensors)
        for one, state in self._fresh:
            one.optimizer.state.pop(one.main, None)
            if moments and state:
                one.optimizer.state[one.main] = state
        self._publish()


def _collect(entries: dict[str, Any], one: Held, moment: str | None, values: Tensor) -> None:
    """Add the parts of a range to what there is of the same tensors."""
    for segment, flat in one.parts(values):
        key = f"model.{segment.name}" if moment is None else f"optimizer.{segment.name}{moment}"
        entries.setdefault(key, (segment.shape, values.dtype, []))[2].append(flat)


def _joined(entries: dict[str, Any]) -> Entries:
    return {name: Pieces(*entry) if isinstance(entry, tuple) else entry for name, entry in entries.items()}

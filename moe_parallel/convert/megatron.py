"""Weights of Megatron-Core's own checkpoints (`torch_dist`), in and out, on one process without Megatron-Core.

Such a checkpoint is one of torch.distributed.checkpoint with names and shapes that do not depend on the layout, a
`metadata.json` that names the format, and a `common.pt` with what is no tensor. Only tensors are read: nothing that is
pickled in it runs. Weights alone are converted: moments have names of their own for each of Megatron's optimizers.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_parallel.checkpoint.folder import UnusableCheckpointError
from moe_parallel.checkpoint.reader import IndexUnpickler, ReadPlanner, SafeReader
from moe_parallel.convert.megatron_weights import MegatronWeights, Segment
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.transformer import Transformer

_TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""May have more rows than there are words."""


class Layers(str, Enum):
    """Which of Megatron's two descriptions of a layer a checkpoint is for: they name one norm differently."""

    transformer_engine = "transformer_engine"
    local = "local"


def megatron_names(architecture: Architecture) -> Iterator[str]:
    """Names of a whole model's weights in Megatron, layer by layer.

    Raises ValueError for experts that compute with other matrices than are stored.
    """
    model, moe, attention = architecture.model, architecture.moe, architecture.attention
    if architecture.num_moe_layers and moe.form.makes_weights:
        raise ValueError(
            f"moe.expert_form={moe.expert_form.value}: Megatron-Core's experts compute with the matrices that are "
            "stored, and so have a place for moe.expert_form=full only"
        )
    assert isinstance(attention, GroupedQueryConfig)
    yield "embedding.word_embeddings.weight"
    for layer in range(model.num_layers):
        names = ["input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
        if attention.qkv_bias:
            names.append("self_attention.linear_qkv.bias")
        if attention.qk_norm.value == "head":
            names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
        names.append("pre_mlp_layernorm.weight")
        if layer < model.first_dense_layers:
            names += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
        else:
            names += ["mlp.router.weight", *(["mlp.router.expert_bias"] if architecture.balance.bias_rate > 0 else [])]
            names += ["mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"]
            if moe.num_shared_experts > 0:
                names += ["mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"]
            if moe.shared_expert_gate:
                names.append("mlp.shared_experts.gate_weight")
        yield from (f"decoder.layers.{layer}.{name}" for name in names)
    yield "decoder.final_layernorm.weight"
    if not model.tie_embeddings:
        yield "output_layer.weight"


def to_megatron(architecture: Architecture, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters and buffers by name -> Megatron's, layer by layer.

    Raises ValueError for what it has no place for.
    """
    weights, used, found = MegatronWeights(architecture), set(), {}
    for name in megatron_names(architecture):
        segments = weights.segments(name)
        used |= {segment.name for segment in segments}
        found[name] = torch.cat([_range_of(ours[segment.name], segment) for segment in segments]).view(_shape(segments))
    _refuse_rest(set(ours) - used)
    return found


def from_megatron(architecture: Architecture, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's weights, layer by layer -> our parameters and buffers by name, in float32."""
    weights = MegatronWeights(architecture)
    found: dict[str, Tensor] = {}
    for name in megatron_names(architecture):
        segments, value = weights.segments(name), theirs[name]
        expected = _shape(segments)
        if name in _PADDED and value.shape[0] > expected[0]:
            value = value[: expected[0]]
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint, but {expected} in this model; give the "
                "options of the model that it was trained as"
            )
        parts = value.detach().float().flatten().split([segment.count for segment in segments])
        for segment, part in zip(segments, parts, strict=True):
            whole = found.setdefault(segment.name, torch.empty(segment.shape))
            _box(whole, segment).view(-1)[segment.start : segment.start + segment.count] = part
    with torch.device("meta"):
        names = set(Transformer(architecture).state_dict())
    _refuse_rest(names - set(found) - ({"head.weight"} if architecture.model.tie_embeddings else set()))
    return found


def _refuse_rest(names: set[str]) -> None:
    if names:
        raise ValueError(f"Megatron-Core's layers have no place for {', '.join(sorted(names)[:4])}")


def _range_of(whole: Tensor, segment: Segment) -> Tensor:
    if tuple(whole.shape) != segment.shape:
        raise ValueError(f"{segment.name} has shape {tuple(whole.shape)}, expected {segment.shape}")
    return _box(whole, segment).flatten()[segment.start : segment.start + segment.count]


def _box(whole: Tensor, segment: Segment) -> Tensor:
    """Here always all of it: nothing is cut."""
    assert segment.box == ((0,) * whole.ndim, tuple(whole.shape))
    return whole


def _shape(segments: Sequence[Segment]) -> tuple[int, ...]:
    first = segments[0]
    if len(segments) == 1 and first.count == math.prod(first.shape):
        return first.shape
    row = first.shape[1:]
    return (sum(segment.count for segment in segments) // math.prod(row), *row)


class _Unread:
    """Stands for objects of the index that describe no tensor, such as the plan by which Megatron has saved."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __hash__(self) -> int:
        return 0


class _Unpickler(IndexUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except UnusableCheckpointError:
            return _Unread


class _MegatronReader(SafeReader):
    """Reads what describes tensors and makes nothing of the rest of the index: no class that it names is used."""

    unpickler = _Unpickler


# -- files ---------------------------------------------------------------------------------------------------------


def read_megatron(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The weights of a `torch_dist` checkpoint by name, layer by layer.

    Args:
        folder: that of one iteration, or the one above it, whose latest iteration is taken.
    Raises:
        UnusableCheckpointError: it is none, of another format, or lacks a weight of this model.
    """
    folder = _iteration(folder)
    reader = _MegatronReader(folder, {path.name for path in folder.glob("*.distcp")})
    index = reader.read_metadata().state_dict_metadata
    stacks: dict[str, Tensor] = {}

    def read(key: str) -> Tensor:
        entry = index[key]
        assert isinstance(entry, TensorStorageMetadata)
        value = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({key: value}, storage_reader=reader, planner=ReadPlanner(), no_dist=True)
        return value

    found: dict[str, Tensor] = {}
    for name in megatron_names(architecture):
        for key, layer in _keys(name):
            if not isinstance(index.get(key), TensorStorageMetadata):
                continue
            if layer is not None and key not in stacks:
                stacks[key] = read(key)
            found[name] = read(key) if layer is None else stacks[key][layer]
            break
        else:
            tried = ", ".join(key for key, _ in _keys(name))
            raise UnusableCheckpointError(f"{folder} has no weight {name} (looked for {tried}); other model options?")
    return found


def _keys(name: str) -> Iterator[tuple[str, int | None]]:
    """Under which names a weight may lie, and which layer of them it is if all layers are one tensor."""
    names = [_stored(name, layers) for layers in Layers]
    for stored in dict.fromkeys(names):
        yield stored, None
        place = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", stored)
        if place is not None:
            yield f"decoder.layers.{place[2]}", int(place[1])


def _stored(name: str, layers: Layers) -> str:
    """Norms are named as parts of the projections after them, as which TransformerEngine computes them."""
    name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if layers is Layers.local:
        name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    return name


def write_megatron(folder: Path, weights: Mapping[str, Tensor], num_dense: int, layers: Layers) -> Path:
    """Write a `torch_dist` checkpoint that Megatron loads as one to start from (`release`).

    Args:
        weights: Megatron's, layer by layer.
        num_dense: first layers that have a dense network.
    """
    final = folder / _RELEASE
    final.mkdir(parents=True)
    state: dict[str, Any] = {_written(name, num_dense, layers): value.contiguous() for name, value in weights.items()}
    for name, value in weights.items():
        state |= _extra_states(name, value)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(final, single_file_per_rank=True), no_dist=True)
    common: dict[str, Any] = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    }
    torch.save(common, final / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (final / "metadata.json").write_text(json.dumps(form))
    (folder / _TRACKER).write_text(_RELEASE)
    return final


def _extra_states(name: str, value: Tensor) -> dict[str, list[io.BytesIO]]:
    """Megatron's linear layers ask for a state besides their weights, which is nothing: one for each expert."""
    if re.search(r"\.linear_\w+\.weight$", name) is None:
        return {}
    nothing = io.BytesIO()
    torch.save(None, nothing)
    count = len(value) if value.ndim == 3 else 1
    return {f"{name.removesuffix('weight')}_extra_state/shard_{i}_{count}": [nothing] for i in range(count)}


def _written(name: str, num_dense: int, layers: Layers) -> str:
    place = re.match(r"decoder\.layers\.(\d+)\.", name)
    is_dense = place is not None and int(place[1]) < num_dense
    return _stored(name, Layers.local if is_dense else layers)  # both name dense layers alike


def _iteration(folder: Path) -> Path:
    tracker = folder / _TRACKER
    if tracker.is_file():
        latest = tracker.read_text().strip()
        folder = folder / (latest if latest == _RELEASE else f"iter_{int(latest):07d}")
    form = folder / "metadata.json"
    if not form.is_file():
        raise UnusableCheckpointError(f"{folder} is no checkpoint of Megatron-Core: it has no metadata.json")
    backend = json.loads(form.read_text()).get("sharded_backend")
    if backend != "torch_dist":
        raise UnusableCheckpointError(
            f"{folder} has the format {backend!r}; convert it by Megatron's own tools "
            "(--ckpt-convert-format torch_dist)"
        )
    return folder

"""Training state as one flat dict of tensors, and back.

Keys: `model.<parameter or buffer>`, `optimizer.<parameter>.<moment>`, `trainer.<name>`. A value is a DTensor
(each rank writes its part) or a plain tensor, which must be the same on all ranks. No key depends on
the number of ranks, so any layout reads any other.

torch's own get_optimizer_state_dict is not used: it steps an untouched optimizer to make state appear (a step
count of 1 before the first step), and restores the learning rate of the file over that of the configuration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_REFERENCE = "__tensor__"


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without names of wrappers; a tied tensor appears once."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    # Through state_dict rather than named_parameters: its hooks put gathered parameters back into shards.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}; only tensors can be saved with a model")
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[f"model.{name}"] = tensor
    return state


def optimizer_state(optimizer: Optimizer, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments and step counts of the parameters that have any. `model` is the result of model_state."""
    state = {}
    for name, parameter in _owned(optimizer, model).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            key = f"optimizer.{name}.{moment}"
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{key} is a {type(value).__name__}; only tensors can be saved")
            if moment != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}; "
                    "only state of the parameter's shape can be saved"
                )
            state[key] = value
    return state


def empty_optimizer_state(optimizer: Optimizer, model: dict[str, Tensor], metadata: Metadata) -> dict[str, Tensor]:
    """Zeros for every `optimizer.` entry of a checkpoint, laid out as this run's parameters are.

    Raises:
        UnusableCheckpointError: the checkpoint has state of parameters that this optimizer does not train.
    """
    owned = _owned(optimizer, model)
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state, unknown = {}, []
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith("optimizer.") or not isinstance(entry, TensorStorageMetadata):
            continue
        name, _, moment = key.removeprefix("optimizer.").rpartition(".")
        parameter = owned.get(name)
        if parameter is None:
            unknown.append(key)
        elif moment == "step":
            device = parameter.device if on_device[id(parameter)] else torch.device("cpu")
            state[key] = torch.zeros((), dtype=entry.properties.dtype, device=device)
        else:
            state[key] = torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
    if unknown:
        raise UnusableCheckpointError(
            "the checkpoint has optimizer state of parameters that this run does not train: "
            f"{listing(unknown)}; train the same parameters, or load the model without its optimizer"
        )
    return state


def set_optimizer_state(optimizer: Optimizer, model: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    """Replace the optimizer's state. Hyper-parameters of its groups stay those of the configuration."""
    owned = _owned(optimizer, model)
    optimizer.state.clear()
    for key, value in loaded.items():
        name, _, moment = key.removeprefix("optimizer.").rpartition(".")
        optimizer.state[owned[name]][moment] = value


def check_entries(wanted: dict[str, Tensor], metadata: Metadata, with_optimizer: bool) -> None:
    """Compare names, shapes and types with those of a checkpoint.

    Raises:
        UnusableCheckpointError: lists what is missing, unexpected or different.
    """
    stored = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("model.") or (with_optimizer and key.startswith("optimizer."))
    }
    problems = []
    if missing := sorted(wanted.keys() - stored.keys()):
        problems.append(f"missing from the checkpoint: {listing(missing)}")
    if unexpected := sorted(stored.keys() - wanted.keys()):
        problems.append(f"unknown to this run: {listing(unexpected)}")
    different = []
    for key in sorted(wanted.keys() & stored.keys()):
        entry, tensor = stored[key], wanted[key]
        if not isinstance(entry, TensorStorageMetadata):
            different.append(f"{key} is not a tensor in the checkpoint")
        elif (tuple(entry.size), entry.properties.dtype) != (tuple(tensor.shape), tensor.dtype):
            different.append(
                f"{key} is {entry.properties.dtype} {tuple(entry.size)} in the checkpoint, "
                f"{tensor.dtype} {tuple(tensor.shape)} in this run"
            )
    if different:
        problems.append(f"different: {listing(different)}")
    if problems:
        raise UnusableCheckpointError("the checkpoint does not fit the model: " + "; ".join(problems))


def common_entries(wanted: dict[str, Tensor], metadata: Metadata) -> dict[str, Tensor]:
    """Those of `wanted` that a checkpoint has.

    Raises:
        UnusableCheckpointError: it has weights that are not wanted, or others of the same name.
    """
    common = {key: tensor for key, tensor in wanted.items() if key in metadata.state_dict_metadata}
    check_entries(common, metadata, with_optimizer=False)
    return common


def split_extra(extra: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """(extra with each tensor replaced by a reference, tensors by `trainer.` key).

    Raises:
        CheckpointError: a value would not come back from JSON as it went in (a tuple, an object, a key that
            is not a string).
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[f"trainer.{path}"] = value
            return {_REFERENCE: f"trainer.{path}"}
        if type(value) is dict:
            for name in value:
                if type(name) is not str or name == _REFERENCE:
                    raise CheckpointError(f"extra state {path}: {name!r} cannot be a key; use another string")
            return {name: plain(item, f"{path}.{name}" if path else name) for name, item in value.items()}
        if type(value) is list:
            return [plain(item, f"{path}.{index}") for index, item in enumerate(value)]
        if value is None or type(value) in (str, int, float, bool):
            return value
        raise CheckpointError(
            f"extra state {path} is a {type(value).__name__}; use dicts, lists, numbers, strings, None or tensors"
        )

    return plain(extra, ""), tensors


def join_extra(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo split_extra."""
    if isinstance(plain, dict):
        if set(plain) == {_REFERENCE}:
            return tensors[plain[_REFERENCE]]
        return {name: join_extra(item, tensors) for name, item in plain.items()}
    if isinstance(plain, list):
        return [join_extra(item, tensors) for item in plain]
    return plain


def empty_extra(metadata: Metadata) -> dict[str, Tensor]:
    """Zeros on the CPU for every `trainer.` entry of a checkpoint."""
    return {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("trainer.") and isinstance(entry, TensorStorageMetadata)
    }


def size_bytes(state: dict[str, Tensor]) -> int:
    """Upper estimate of what all ranks together write for `state`: each element once, a header per part."""
    parts = sum(t.device_mesh.size() if isinstance(t, DTensor) else 1 for t in state.values())
    # A part is a zip archive of its own (1.2 KiB) with an entry of some 200 bytes in the index.
    return sum(t.numel() * t.element_size() for t in state.values()) + 2048 * (parts + 8)


def listing(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _owned(optimizer: Optimizer, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's parameters by name."""
    names = {id(tensor): key.removeprefix("model.") for key, tensor in model.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in names]
    if foreign:
        raise CheckpointError(
            f"the optimizer holds {len(foreign)} tensors that are no parameters of the model, "
            f"shapes {foreign[:4]}; build the optimizer after the model has been sharded"
        )
    return {names[id(parameter)]: parameter for parameter in parameters}

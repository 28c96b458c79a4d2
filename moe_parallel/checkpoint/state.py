"""Training state as one flat dict of tensors, and back.

Keys: `model.<parameter or buffer>`, `optimizer.<parameter>.<moment>`, `trainer.<name>`. A value is a DTensor or
`Pieces` (each rank writes its part), or a plain tensor, which must be the same on all ranks that have the key. Ranks
may have different keys: stages of a pipeline hold layers of their own. No key depends on the number of ranks, so any
layout reads any other.

torch's own get_optimizer_state_dict is not used: it steps an untouched optimizer to make state appear (a step
count of 1 before the first step), and restores the learning rate of the file over that of the configuration.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.checkpoint.pieces import Pieces

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_REFERENCE = "__tensor__"
Entries = dict[str, Tensor | Pieces]


class TrainingState(Protocol):
    """What one rank holds of a model and its optimizer, in whatever form its engine keeps it."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What it takes from a checkpoint: all entries of `model.`, or those of `optimizer.` as well."""

    def tensors(self) -> Entries:
        """This rank's entries, to be saved."""

    def empty(self, metadata: Metadata) -> Entries:
        """Entries of a checkpoint to be read on this rank, in its layout; weights may be the live ones.

        Args:
            metadata: the index of the checkpoint. Moments that it lacks are not wanted; weights that it lacks are.
        """

    def load(self, tensors: Entries) -> None:
        """Take over what `empty` gave, now filled; `model.` entries that the checkpoint lacked may be absent."""


class TorchState:
    """A module and a torch optimizer.

    Args:
        model: parameters and persistent buffers; plain tensors or DTensors on any meshes. Loaded in place.
        optimizer: its moments and step counts; learning rate and other hyper-parameters are the configuration's.
            None saves and loads the model alone.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer

    @property
    def prefixes(self) -> tuple[str, ...]:
        return ("model.",) if self.optimizer is None else ("model.", "optimizer.")

    def tensors(self) -> Entries:
        model = model_state(self.model)
        entries: Entries = dict(model)
        if self.optimizer is not None:
            entries.update(optimizer_state(self.optimizer, model))
        return entries

    def empty(self, metadata: Metadata) -> Entries:
        model = model_state(self.model)
        entries: Entries = dict(model)
        if self.optimizer is not None:
            entries.update(empty_optimizer_state(self.optimizer, model, metadata))
        return entries

    def load(self, tensors: Entries) -> None:
        if self.optimizer is not None:
            set_optimizer_state(self.optimizer, model_state(self.model), tensors)


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
    """Zeros for the `optimizer.` entries of a checkpoint of this optimizer, laid out as its parameters are."""
    owned = _owned(optimizer, model)
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith("optimizer.") or not isinstance(entry, TensorStorageMetadata):
            continue
        name, _, moment = key.removeprefix("optimizer.").rpartition(".")
        parameter = owned.get(name)
        if parameter is None:
            continue
        if moment == "step":
            device = parameter.device if on_device[id(parameter)] else torch.device("cpu")
            state[key] = torch.zeros((), dtype=entry.properties.dtype, device=device)
        else:
            state[key] = torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
    return state


def set_optimizer_state(optimizer: Optimizer, model: dict[str, Tensor], loaded: Entries) -> None:
    """Replace the optimizer's state by the `optimizer.` entries. Hyper-parameters of its groups stay as configured."""
    owned = _owned(optimizer, model)
    optimizer.state.clear()
    for key, value in loaded.items():
        if key.startswith("optimizer."):
            name, _, moment = key.removeprefix("optimizer.").rpartition(".")
            optimizer.state[owned[name]][moment] = value


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


def host_copy(tensors: Entries) -> Entries:
    """A copy in host memory that training does not change."""
    pieces = {name: entry.on_host() for name, entry in tensors.items() if isinstance(entry, Pieces)}
    others = {name: entry for name, entry in tensors.items() if name not in pieces}
    # Without its options the stager makes a plain copy before it returns.
    copy = DefaultStager(StagingOptions(False, False, False, False)).stage(others)
    assert isinstance(copy, dict)
    return copy | pieces


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

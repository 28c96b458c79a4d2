"""The folder of a Hugging Face model as a model that exists, and a model of ours as the contents of such a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_parallel.convert.huggingface.families import architecture_of_config, config_of_architecture
from moe_parallel.convert.huggingface.files import CONFIG, SafetensorsFolder, read_json
from moe_parallel.convert.huggingface.weights import FLOAT32, config_of_weights, export_weights, import_weights
from moe_parallel.convert.lazy import Cast, Lazy
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.model.architecture import Architecture


def is_model(path: Path) -> bool:
    """A folder that describes a model as the Hub's do."""
    return (path / CONFIG).is_file()


def open_model(path: Path) -> Pretrained:
    """The model of a folder, checked to have every weight that its config.json speaks of; reads headers only, and two
    heads where there should be one.

    Raises:
        ValueError: an architecture that has no counterpart here, or files that do not fit; says what.
    """
    theirs = SafetensorsFolder(path).weights()
    config = config_of_weights(read_json(path / CONFIG), theirs)
    return Pretrained(path, architecture_of_config(config), import_weights(config, theirs))


def contents(
    architecture: Architecture, weights: Mapping[str, Lazy], dtype: torch.dtype, family: str | None = None
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """What config.json is to say of a model, and its weights by their public names in a type.

    Args:
        family: a model_type; None takes any class.
    Raises:
        ValueError: no class, or not this one, expresses the model; names the options in the way.
    """
    config = config_of_architecture(architecture, family)
    theirs = export_weights(architecture, config, weights)
    cast: dict[str, Lazy] = {
        name: Cast(lazy, torch.float32 if FLOAT32.search(name) else dtype) for name, lazy in theirs.items()
    }
    # `dtype` of transformers 5 by the name that older versions and other programs know too.
    return config | {"torch_dtype": str(dtype).removeprefix("torch.")}, cast

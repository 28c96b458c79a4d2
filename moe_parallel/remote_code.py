"""Folders for Hugging Face's `transformers` of models that no public class expresses.

config.json has our options and names the classes of `moe_parallel.causal_lm`, by way of a file that does nothing but
import them. transformers runs that file only for who says trust_remote_code=True, and it needs this package. To read
such a folder back here runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_parallel.convert.huggingface.families import most_positions
from moe_parallel.convert.huggingface.files import CONFIG, SafetensorsFolder, read_json
from moe_parallel.convert.lazy import Cast, Lazy
from moe_parallel.convert.pretrained import Pretrained, buffers_of, shapes_of
from moe_parallel.model.architecture import Architecture
from moe_parallel.options import architecture_of, plain_architecture

MODEL_TYPE = "moe_parallel"
CODE_FILE = "modeling_moe_parallel.py"
CODE = """# Needs the package moe-parallel, of the version that wrote this folder or a later one.
from moe_parallel.causal_lm import MoEParallelConfig, MoEParallelForCausalLM

__all__ = ["MoEParallelConfig", "MoEParallelForCausalLM"]
"""
"""What lies in the folder as CODE_FILE."""
_PREFIX = "transformer."
_ROUTERS = (".router.", ".later_routers.")
_OF_MACHINE = (("attention", "core"), ("moe", "expert_kernel"), ("moe", "kernel_table"), ("router", "kernel"))
"""Options that say how the same is computed: another machine may have no such kernels, and no such file."""


def has_remote_code(path: Path) -> bool:
    """A folder that names the classes here."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).get("model_type") == MODEL_TYPE


def open_remote(path: Path) -> Pretrained:
    """The model of such a folder. Raises ConfigError or ValueError if it is none."""
    shape = described(read_json(path / CONFIG).get("options"), str(path / CONFIG))
    stored = SafetensorsFolder(path).weights()
    weights = {name.removeprefix(_PREFIX): Cast(lazy, torch.float32) for name, lazy in stored.items()}
    shapes = shapes_of(shape)
    wrong = [f"{name} in one of them only" for name in sorted(weights.keys() ^ shapes.keys())]
    wrong += [
        f"{name} is {lazy.shape}, not {shapes[name]}"
        for name, lazy in weights.items()
        if lazy.shape != shapes.get(name, lazy.shape)
    ]
    if wrong:
        raise ValueError(f"{path} is not the model that its {CONFIG} describes: {'; '.join(wrong[:4])}")
    return Pretrained(path, shape, weights)


def described(options: Any, where: str) -> Architecture:
    """The model of such a config.json, which may come from anyone: what would run a file that it names is refused.

    Raises:
        ValueError: no options of a model, or those of a plug-in. ConfigError for another version's.
    """
    if not isinstance(options, dict) or type(options.get("vocab_size")) is not int:
        raise ValueError(f"{where} has no options of a model")
    for name, section in options.items():
        if name != "vocab_size" and not isinstance(section, dict):
            raise ValueError(f"{where}: {name}={section} is no section of options")
    if "plugin" in options.get("router", {}):
        raise ValueError(f"{where} is refused: its router.plugin={options['router']['plugin']} would run a file")
    return architecture_of(options, where)


def contents_with_code(
    shape: Architecture, weights: Mapping[str, Lazy], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """What config.json is to say of a model, and its weights by the names of its class. Routers stay in float32.

    Raises:
        ValueError: its router is a plug-in, whose code is in no package.
    """
    if hasattr(shape.router, "plugin"):
        raise ValueError(
            f"router.plugin={shape.router.plugin} lies in a file of yours, which --remote-code does not copy: the "
            "model would not load anywhere else"
        )
    model, kept, options = shape.model, buffers_of(shape), plain_architecture(shape)
    for section, name in _OF_MACHINE:  # what is not there has its default
        options[section].pop(name, None)
    config = {
        "architectures": ["MoEParallelForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{Path(CODE_FILE).stem}.MoEParallelConfig",
            "AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.MoEParallelForCausalLM",
        },
        "options": options,
        "vocab_size": shape.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": shape.attention.num_heads,
        "max_position_embeddings": most_positions(shape),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    cast: dict[str, Lazy] = {}
    for name, lazy in weights.items():
        wide = name in kept or any(part in name for part in _ROUTERS)
        cast[_PREFIX + name] = Cast(lazy, torch.float32 if wide else dtype)
    return config, cast

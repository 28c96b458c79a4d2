"""Where a run's weights come from: nothing, a model that exists, or a map from models that exist."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import Tokenizer, TokenizerConfig, TokenizerKind, build_tokenizer
from moe_parallel.checkpoint import folder as folders
from moe_parallel.convert.checkpoint_source import MOMENTS, steps_of_optimizer, weights_of_checkpoint
from moe_parallel.convert.function import differences
from moe_parallel.convert.huggingface.folder import is_model, open_model
from moe_parallel.convert.lazy import Constant, is_zero
from moe_parallel.convert.pretrained import Pretrained, shapes_of
from moe_parallel.convert.upcycle.map import OptimizerState, Plan, UpcycleConfig, drawing, make_plan
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import FreshConfig, InitConfig
from moe_parallel.options import ConfigError, architecture_of, load_config
from moe_parallel.remote_code import has_remote_code, open_remote

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a model and its optimizer are filled with before the first step."""

    weights: Plan
    moments: Plan | None
    """None for an optimizer that knows nothing."""
    checkpoints: tuple[Path, ...]
    """Those of our own format that it reads from."""


def open_pretrained(option: str, value: str) -> Pretrained:
    """The model that an option names: of a run (its newest checkpoint), a checkpoint, or a Hugging Face folder.

    Raises ConfigError if it is none, ValueError for a folder whose model has no counterpart here.
    """
    path = Path(value).expanduser()
    if (path / "checkpoints").is_dir():
        found = folders.complete(path / "checkpoints", log.warning)
        if not found:
            raise ConfigError([f"{option}={value} is a run without a complete checkpoint; train it first"])
        path = found[-1]
    if (path / folders.META).is_file():
        meta = folders.read_meta(path)
        plugin = meta["identity"].get("router", {}).get("plugin", "")
        if Path(plugin).name != plugin:  # ours have names only; it would be run, and a checkpoint may be anyone's
            raise ConfigError([f"{option}={value} is refused: its router.plugin={plugin} names a file in a folder"])
        shape = architecture_of(meta["identity"], str(path))
        return Pretrained(path, shape, weights_of_checkpoint(path), steps_of_optimizer(path))
    if has_remote_code(path):
        return open_remote(path)
    if is_model(path):
        return open_model(path)
    near = sorted(path.glob("**/step_*/meta.json"))
    hint = f"did you mean {near[-1].parent}?" if near else "give a run folder, its step_00001000, or a model's folder"
    raise ConfigError([f"{option}={value} is not a checkpoint; {hint}"])


def tokenizer_of(path: Path) -> Tokenizer:
    """Of a checkpoint, whose run says it, or of a model's folder. Raises ValueError if there is none."""
    # What a config.yaml names may be run, and a folder of a model may be anyone's.
    for folder in () if is_model(path) else (path, *path.parents[:2]):
        if (folder / "config.yaml").is_file():
            config = load_config(folder / "config.yaml")
            return build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    if (path / "tokenizer.json").is_file():
        return build_tokenizer(TokenizerConfig(kind=TokenizerKind.file, path=str(path)))
    raise ValueError(f"{path} has no tokenizer: neither a tokenizer.json, nor a config.yaml of the run that it is of")


def open_sources(config: UpcycleConfig) -> list[Pretrained]:
    """The models that a map starts from. Raises ConfigError where one is none."""
    return [open_pretrained(f"init.sources.{number}", value) for number, value in enumerate(config.sources)]


def start(config: InitConfig, shape: Architecture, seed: int) -> Start | None:
    """What a run starts from besides drawn weights; None if that is all.

    Raises ValueError where a source does not fit.
    """
    if isinstance(config, UpcycleConfig):
        sources = open_sources(config)
        weights = make_plan(config, sources, shape, seed)
        moments = _moments(weights, sources) if config.optimizer_state is OptimizerState.source else None
        return Start(weights, moments, _checkpoints(sources))
    assert isinstance(config, FreshConfig)
    if config.weights is None:
        return None
    source = open_pretrained("init.weights", config.weights)
    return Start(_same_model(config, source, shape, seed), None, _checkpoints([source]))


def _checkpoints(sources: list[Pretrained]) -> tuple[Path, ...]:
    return tuple(source.path for source in sources if (source.path / folders.META).is_file())


def _same_model(config: InitConfig, source: Pretrained, shape: Architecture, seed: int) -> Plan:
    """Weights by name; those that the source does not have are drawn."""
    shapes, theirs = shapes_of(shape), source.weights
    unknown = sorted(theirs.keys() - shapes.keys())
    different = [
        f"{name} is {theirs[name].shape} there and {wanted} here"
        for name, wanted in shapes.items()
        if name in theirs and theirs[name].shape != wanted
    ]
    if unknown or different:
        told = [f"unknown to this run: {', '.join(unknown[:4])}"] if unknown else []
        raise ValueError(f"{source.path} does not fit the model: {'; '.join(told + different[:4])}")
    new = [name for name in shapes if name not in theirs]
    log.info("weights from %s; new: %s", source.path, ", ".join(new) or "none")
    if told := [
        f"{name}={ours}, there {theirs}" for name, (ours, theirs) in differences(shape, source.architecture).items()
    ]:
        log.warning("the weights are of a model that computes something else: %s", "; ".join(told))
    draw = drawing(shape, config, seed)
    return {name: theirs[name] if name in theirs else draw(name) for name in shapes}


def _moments(weights: Plan, sources: list[Pretrained]) -> Plan:
    counted = [source.steps for source in sources]
    if None in counted:
        where = sources[counted.index(None)].path
        raise ValueError(
            f"init.optimizer_state=source, but {where} has no optimizer state; set init.optimizer_state=fresh"
        )
    steps = min(count for count in counted if count is not None)
    found: Plan = {}
    for name, lazy in weights.items():
        found |= {f"{name}.{moment}": lazy.moment(order) for order, moment in MOMENTS.items()}
        # What has no past counts from 0: zeros are no means of many steps, and first updates would be of another size.
        found[f"{name}.step"] = Constant((), 0 if is_zero(lazy.moment(1)) else steps)
    return found

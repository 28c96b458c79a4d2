"""Every option in one place: composed by Hydra, converted once to dataclasses, checked before any process starts.

This is the only module that knows Hydra and OmegaConf; nothing below it ever sees a DictConfig.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass as plain_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from moe_data.loader import DataConfig
from moe_data.tokenizers import TokenizerConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from moe_parallel.checkpoint.checkpointer import CheckpointConfig
from moe_parallel.mesh import Layout, ParallelConfig, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import AttentionConfig, GroupedQueryConfig
from moe_parallel.model.initialize import InitConfig
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import RouterConfig
from moe_parallel.optim import OptimConfig
from moe_parallel.tracking import TrackingConfig
from moe_parallel.trainer import EvaluationConfig, TrainConfig


@dataclass(kw_only=True)
class RunConfig:
    name: str | None = None
    """Name of the run; null takes the model's name. A sweep adds its overrides."""
    dir: str = "runs"
    """Folder that run folders lie in."""


@plain_dataclass
class Config:
    """The whole configuration. Top-level keys are also the names of Hydra's groups."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attention: AttentionConfig = MISSING
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    resume: str = "never"
    """Where to start: `never` from new weights, `auto` from the run's newest checkpoint if there is one, or a path."""
    dry_run: bool = False
    """Build the model without memory, print its size, cost and memory per rank, and end."""


class ConfigError(ValueError):
    """One or more mistakes in the configuration, each with its remedy. Ends the program with code 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def register() -> None:
    """Tell Hydra the schema, so that names and types are checked while it composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="attention", name="gqa_schema", node=GroupedQueryConfig)
    store.store(group="attention", name="mla_schema", node=LatentConfig)


# -- composed config -> dataclasses --------------------------------------------------------------------------------


def to_config(composed: DictConfig) -> Config:
    """Convert once, with every section's own checks. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        try:
            node = composed[field.name]
            values[field.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except ValidationError as error:
            problems += [_pydantic_text(field.name, e) for e in error.errors()]
        except (ValueError, OmegaConfBaseException) as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return Config(**values)


def _pydantic_text(section: str, error: Any) -> str:
    original = error.get("ctx", {}).get("error")
    if original is not None:  # raised by a __post_init__ of ours, which names the option itself
        return str(original)
    name = ".".join([section, *(str(part) for part in error["loc"])])
    return f"{name}={error['input']!r}: {error['msg']}"


def architecture(config: Config, tokenizer_vocabulary: int | None) -> Architecture:
    """The model's part of the config. A vocabulary given by the model must hold the tokenizer's."""
    size = config.model.vocab_size or tokenizer_vocabulary
    if size is None:
        raise ConfigError(["model.vocab_size=null takes the tokenizer's size, which is not known in a dry run; set it"])
    if tokenizer_vocabulary is not None and size < tokenizer_vocabulary:
        raise ConfigError(
            [
                f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_vocabulary} tokens; raise it or set null"
            ]
        )
    return Architecture(
        model=config.model,
        attention=config.attention,
        moe=config.moe,
        router=config.router,
        balance=config.balance,
        vocab_size=size,
    )


def check(config: Config, ranks: int) -> Layout:
    """The relations between sections, for this number of processes. Raises ConfigError with all problems at once."""
    problems: list[str] = []
    layout: Layout | None = None
    has_experts = config.model.first_dense_layers < config.model.num_layers
    try:
        layout = make_layout(config.parallel, ranks, config.moe.num_experts)
        if layout.ep > 1 and not has_experts:
            problems.append(
                f"parallel.ep={layout.ep} splits experts, but model.first_dense_layers={config.model.first_dense_layers} "
                f"leaves none of model.num_layers={config.model.num_layers}; set parallel.ep=1"
            )
    except ValueError as error:
        problems.append(str(error))
    try:
        config.router.check_experts(config.moe.num_experts)
    except ValueError as error:
        problems.append(str(error))
    try:
        _, size = config.train.micro_batches(ranks)
        slots = size * config.train.sequence_tokens * config.router.top_k
        if config.router.forced_balance and slots % config.moe.num_experts != 0:
            problems.append(
                f"router.forced_balance=true deals {slots} slots of a micro-batch to moe.num_experts="
                f"{config.moe.num_experts} experts, which is uneven; change train.micro_batch_sequences"
            )
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    assert layout is not None
    return layout


def plain(value: Any) -> Any:
    """Nested dataclasses-as-dicts with enums as their values: what JSON and YAML can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def config_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(dataclasses.asdict(config))))


def load_config(path: Path) -> Config:
    """Read back the resolved configuration that a run wrote."""
    if not path.is_file():
        raise ConfigError([f"{path} does not exist: this is not the folder of a run"])
    saved = OmegaConf.load(path)
    assert isinstance(saved, DictConfig)
    schema = OmegaConf.structured(Config)
    # The file does not say which kind of attention its options are of; only one kind has them all.
    kinds = (GroupedQueryConfig, LatentConfig)
    schema.attention = OmegaConf.structured(next(k for k in kinds if _field_names(k) == set(saved.attention)))
    merged = OmegaConf.merge(schema, saved)
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def _field_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def plain_architecture(shape: Architecture) -> dict[str, Any]:
    """What makes a model another model, for its checkpoints."""
    return plain(dataclasses.asdict(shape))


def config_folders(arguments: list[str]) -> list[Path]:
    """Folders that the command line adds with --config-dir."""
    found = []
    for index, argument in enumerate(arguments):
        if argument.startswith("--config-dir="):
            found.append(Path(argument.split("=", 1)[1]))
        elif argument in ("--config-dir", "-cd") and index + 1 < len(arguments):
            found.append(Path(arguments[index + 1]))
    return found


# -- messages ------------------------------------------------------------------------------------------------------


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one plain line, with the option that was probably meant."""
    text = str(error)
    match = re.search(r"Key '([^']+)' (?:is )?not in '", text)
    if match:
        full = re.search(r"full_key: (\S+)", text)
        wrong = full.group(1) if full else match.group(1)
        near = difflib.get_close_matches(wrong, option_names(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `--help` lists all options"
        return f"unknown option {wrong}{hint}"
    cause = error.__cause__
    if isinstance(error, ConfigError) or cause is None:
        return re.sub(r"\s*\n\s*(full_key|object_type|reference_type)[:=][^\n]*", "", text)
    return f"{text} ({str(cause).splitlines()[0]})"


@plain_dataclass(frozen=True)
class Option:
    """One option as `--help` shows it."""

    name: str
    type: str
    default: str
    text: str
    choices: tuple[tuple[str, str], ...]


def option_names() -> list[str]:
    """Full names of all options."""
    return [option.name for option in options()]


@cache
def options() -> tuple[Option, ...]:
    """All options with their texts, taken from the dataclasses themselves."""
    found: list[Option] = []
    sections: dict[str, list[type]] = {}
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        sections[field.name] = [GroupedQueryConfig, LatentConfig] if field.name == "attention" else [kind]
    texts = _field_texts(Config)
    for name, kinds in sections.items():
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                found += _section_options(name, kind)
            else:
                default = next(f for f in dataclasses.fields(Config) if f.name == name).default
                found.append(Option(name, kind.__name__, str(default), texts[name], ()))
    return tuple(dict.fromkeys(found))


def _section_options(prefix: str, kind: type) -> list[Option]:
    found: list[Option] = []
    hints = typing.get_type_hints(kind)
    texts = _field_texts(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        inner = _inner_dataclass(hint)
        if inner is not None and typing.get_origin(hint) is not list:
            found += _section_options(name, inner)
            continue
        if inner is not None:
            found += _section_options(f"{name}[]", inner)
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
        shown = default.value if isinstance(default, Enum) else "null" if default is None else default
        found.append(Option(name, _type_text(hint), str(shown), texts.get(field.name, ""), _choices(hint)))
    return found


def _inner_dataclass(hint: Any) -> type | None:
    kinds = [hint, *typing.get_args(hint)]
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _type_text(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("NoneType", "null").replace("None", "null").split(".")[-1]


def _choices(hint: Any) -> tuple[tuple[str, str], ...]:
    kinds = [hint, *typing.get_args(hint)]
    enum = next((k for k in kinds if isinstance(k, type) and issubclass(k, Enum)), None)
    if enum is None:
        return ()
    texts = _field_texts(enum)
    return tuple((str(member.value), texts.get(member.name, "")) for member in enum)


@cache
def _field_texts(kind: type) -> dict[str, str]:
    """The string under each field, base classes first."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for before, after in zip(body, body[1:]):
            target: ast.expr | None = before.target if isinstance(before, ast.AnnAssign) else None
            if isinstance(before, ast.Assign):
                target = before.targets[0]
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(target, ast.Name) and isinstance(text, str):
                texts[target.id] = " ".join(text.split())
    return texts


def help_text(config_folders: list[Path]) -> str:
    """What `--help` prints: how to run, the choices of each group, and every option with its text."""
    lines = [
        "Train a mixture-of-experts language model.",
        "",
        "  python train.py [group=choice] [option=value]                 one process",
        "  torchrun --nproc-per-node 2 train.py parallel.ep=2 [...]      several, experts split over them",
        "  python train.py --cfg job [...]                               show the composed configuration",
        "  python train.py --config-dir DIR [...]                        add configs of your own",
        "  python train.py -m router.top_k=2,4 [...]                     sweep",
        "",
        "Groups and their choices",
    ]
    for group in sorted({g for folder in config_folders for g in _groups(folder)}):
        names = sorted({p.stem for folder in config_folders for p in (folder / group).glob("*.yaml")})
        lines.append(f"  {group}={'|'.join(names)}")
    section = ""
    for option in options():
        head = option.name.split(".")[0] if "." in option.name else ""
        if head != section:
            section = head
            lines += ["", f"{section}" if section else "Top level"]
        lines.append(f"  {option.name}={option.default}  ({option.type})")
        lines += textwrap.wrap(option.text, 104, initial_indent="      ", subsequent_indent="      ")
        for value, text in option.choices:
            lines += textwrap.wrap(f"{value}: {text}" if text else value, 100, initial_indent="        ")
    return "\n".join(lines)


def _groups(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.yaml"))]

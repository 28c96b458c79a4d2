"""Every option in one place: composed by Hydra, converted once to dataclasses, checked before any process starts.

This is the only module that knows Hydra and OmegaConf; nothing below it ever sees a DictConfig.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass as plain_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from moe_data.loader import DataConfig
from moe_data.tokenizers import TokenizerConfig
from moe_parallel import option_texts
from moe_parallel.checkpoint.checkpointer import CheckpointConfig
from moe_parallel.convert.upcycle.adjugate import AdjugateStartConfig
from moe_parallel.convert.upcycle.chain import ChainStartConfig
from moe_parallel.convert.upcycle.delta import DeltaConfig
from moe_parallel.convert.upcycle.densify import DensifyConfig
from moe_parallel.convert.upcycle.drop import DropConfig
from moe_parallel.convert.upcycle.granular import GranularConfig
from moe_parallel.convert.upcycle.merge import MergeConfig
from moe_parallel.convert.upcycle.merge_domain import AddDomainConfig
from moe_parallel.convert.upcycle.resize import ResizeConfig
from moe_parallel.convert.upcycle.shared import SharedConfig
from moe_parallel.convert.upcycle.sparse import SparseConfig
from moe_parallel.convert.upcycle.ternary import TernaryConfig
from moe_parallel.engines.config import EngineConfig, NativeEngineConfig
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.engines.megatron_config import MegatronConfig
from moe_parallel.mesh import ParallelConfig
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import AttentionConfig, GroupedQueryConfig
from moe_parallel.model.initialize import FreshConfig, InitConfig
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.dispatch.deepep import DeepEPConfig
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig
from moe_parallel.moe.dispatch.two_hop import TwoHopConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.bi_level import BiLevelConfig
from moe_parallel.moe.routers.domain import DomainConfig
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.hash import HashConfig
from moe_parallel.moe.routers.plugin import PluginConfig
from moe_parallel.moe.routers.random import RandomConfig
from moe_parallel.moe.routers.router import RouterConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig
from moe_parallel.option_texts import KINDS, Option, describe, did_you_mean
from moe_parallel.tracking import TrackingConfig
from moe_parallel.train_options import EvaluationConfig, TrainConfig

T = TypeVar("T")

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)
"""What Hydra raises while it reads and composes files and command line; `explain` puts it into words."""


@dataclass(kw_only=True)
class RunConfig:
    name: str | None = None
    """Name of the run and its folder; null takes the model's name. A sweep adds a folder for each of its jobs."""
    dir: str = "runs"
    """Folder that run folders lie in."""


ATTENTIONS = {"gqa": GroupedQueryConfig, "mla": LatentConfig}
ROUTERS = {
    "token_choice": TokenChoiceConfig,
    "expert_choice": ExpertChoiceConfig,
    "bi_level": BiLevelConfig,
    "random": RandomConfig,
    "hash": HashConfig,
    "domain": DomainConfig,
    "plugin": PluginConfig,
}
DISPATCHES: dict[str, type] = {"all_to_all": AllToAllConfig, "two_hop": TwoHopConfig}
DISPATCHES |= {"least_loaded": LeastLoadedConfig, "deepep": DeepEPConfig}
ENGINES: dict[str, type] = {"native": NativeEngineConfig, "deepspeed": DeepSpeedConfig, "megatron": MegatronConfig}
INITS: dict[str, type] = {"fresh": FreshConfig, "upcycle": SparseConfig}
INITS |= {"upcycle_granular": GranularConfig, "upcycle_drop": DropConfig, "upcycle_shared": SharedConfig}
INITS["chain"] = ChainStartConfig
INITS |= {"delta": DeltaConfig, "ternary": TernaryConfig}
INITS |= {"merge": MergeConfig, "add_domain": AddDomainConfig}
INITS |= {"resize": ResizeConfig, "densify": DensifyConfig, "adjugate": AdjugateStartConfig}
GROUPS_OF_KINDS: dict[str, dict[str, type]] = {"attention": ATTENTIONS, "router": ROUTERS, "dispatch": DISPATCHES}
GROUPS_OF_KINDS |= {"engine": ENGINES, "init": INITS}
"""A dataclass for each kind of a section. No two have the same names of options: saved ones are told apart by them."""


@plain_dataclass
class Config:
    """The whole configuration. Top-level keys are also the names of Hydra's groups."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    attention: AttentionConfig = dataclasses.field(default=MISSING, metadata={KINDS: ATTENTIONS})
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    router: RouterConfig = dataclasses.field(default=MISSING, metadata={KINDS: ROUTERS})
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    dispatch: DispatchConfig = dataclasses.field(default=MISSING, metadata={KINDS: DISPATCHES})
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    engine: EngineConfig = dataclasses.field(default=MISSING, metadata={KINDS: ENGINES})
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    init: InitConfig = dataclasses.field(default=MISSING, metadata={KINDS: INITS})
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
        super().__init__("\nerror: ".join(problems))
        self.problems = problems


def register() -> None:
    """Tell Hydra the schema, so that names and types are checked while it composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, kinds in GROUPS_OF_KINDS.items():
        for name, kind in kinds.items():
            node = OmegaConf.structured(kind)
            if kind is PluginConfig:  # its options are not known here: any name may be given
                OmegaConf.set_struct(node.options, False)
            store.store(group=group, name=f"{name}_schema", node=node)


def composed(overrides: list[str], folder: Path) -> Config:
    """The configuration as train.py makes it of these overrides, from a folder of configs. Raises ConfigError."""
    register()
    try:
        with initialize_config_dir(str(folder), version_base=None):
            return to_config(compose("train", overrides=overrides))
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error, overrides)) from error


# -- composed config -> dataclasses --------------------------------------------------------------------------------


def to_config(composed: DictConfig) -> Config:
    """Convert once, with every section's own checks. Raises ConfigError with all problems at once."""
    problems = [_unknown_option(name) for name in _appended(composed, Config, "")]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        try:
            node = composed[field.name]
            values[field.name] = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        except ValidationError as error:
            problems += [_pydantic_text(field.name, e) for e in error.errors()]
        except (ValueError, OmegaConfBaseException) as error:
            problems += explain(error, [])
    if problems:
        raise ConfigError(problems)
    return Config(**values)


def _appended(node: Any, kind: Any, prefix: str) -> list[str]:
    """Names of keys that no dataclass has: `+key=value` puts them past Hydra's own check."""
    found = []
    fields = _field_names(kind) if dataclasses.is_dataclass(kind) else None
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if fields is not None and key not in fields:
            found.append(f"{prefix}{key}")
        elif OmegaConf.is_config(child := node._get_node(key)) and not child._is_none() and not child._is_missing():
            found += _appended(child, OmegaConf.get_type(child), f"{prefix}{key}.")
    return found


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
        raise ConfigError([
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_vocabulary} tokens; raise or null it"
        ])  # fmt: skip
    return Architecture(
        model=config.model,
        attention=config.attention,
        moe=config.moe,
        router=config.router,
        balance=config.balance,
        vocab_size=size,
    )


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
    return _read_back(saved, str(path))


def _read_back(saved: DictConfig, where: str) -> Config:
    schema = OmegaConf.structured(Config)
    for group, kinds in GROUPS_OF_KINDS.items():  # the file does not say which kind: only one has these names
        saved.setdefault(group, {})  # runs before there was a choice have the kind that needs no options
        fitting = [kind for kind in kinds.values() if _field_names(kind) >= set(saved[group])]
        # An older version may lack options that came since; those have their defaults, like in other sections.
        kind = min(fitting, key=lambda kind: len(_field_names(kind)), default=None)
        if kind is None:
            raise ConfigError(
                [f"{where}: no kind of {group} has the options {sorted(saved[group])}; an older version?"]
            )
        schema[group] = OmegaConf.structured(kind)
    merged = OmegaConf.merge(schema, saved)
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def architecture_of(identity: dict[str, Any], where: str) -> Architecture:
    """The model that a checkpoint was made of, from what `plain_architecture` gave. Raises ConfigError for another
    version's."""
    saved = OmegaConf.create({name: value for name, value in identity.items() if name != "vocab_size"})
    try:
        config = _read_back(saved, where)
    except COMPOSITION_ERRORS as error:
        raise ConfigError([f"{where}: {line}" for line in explain(error, [])]) from error
    return dataclasses.replace(architecture(config, identity["vocab_size"]), vocab_size=identity["vocab_size"])


def plain_architecture(shape: Architecture) -> dict[str, Any]:
    """What makes a model another model, for its checkpoints."""
    values = plain(dataclasses.asdict(shape))
    del values["model"]["mtp_coefficient"]  # may be lowered within a run, as DeepSeek-V3's was
    if "plugin" in values["router"]:  # the file may have moved
        values["router"]["plugin"] = Path(values["router"]["plugin"]).name
    return values


def swept_name(overrides: list[str], arguments: list[str]) -> str:
    """What tells a job of a sweep from the others, as a folder's name; "" outside of sweeps.

    Args:
        overrides: of the job, as Hydra keeps them.
        arguments: the command line of the whole sweep.
    """
    parse = OverridesParser.create().parse_overrides
    given = parse([a for a in arguments if "=" in a and not a.startswith("-")])
    fixed = {override.key_or_group for override in given if not override.is_sweep_override()}
    unresolved: Any = OmegaConf.to_container(OmegaConf.create(overrides), resolve=False)
    swept = [override for override in parse(unresolved) if override.key_or_group not in fixed]
    return ",".join(str(override.input_line) for override in swept).replace("/", "_")


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


def explain(error: Exception, arguments: list[str]) -> list[str]:
    """What Hydra or OmegaConf did not like while composing, one plain line for each mistake.

    Args:
        arguments: the command line. Hydra stops at the first name it does not know; here all are named.
    """
    text = str(error)
    details = str(error.__cause__ or text)
    key = re.search(r"full_key: (\S+)", details)
    place = re.match(r"In '([^']+)'", text)
    where = f" in {place.group(1)}.yaml" if place else ""
    if unknown := re.search(r"Key '([^']+)' (?:is )?not in '", details):
        named = [] if place else _unknown_names(arguments)
        return named or [_unknown_option(key.group(1) if key else unknown.group(1), where)]
    if choice := re.search(r"Could not find '(.+)/([^/']*)'", text):
        group, name = choice.groups()
        found = re.findall(r"^\t(\w+)$", text.split("Config search path")[0], re.MULTILINE)
        choices = [name for name in found if not name.endswith("_schema")]  # those are what choices are made of
        return [
            f"{group}={name}{where if where != ' in train.yaml' else ''}: there is no such choice"
            f"{did_you_mean(name, choices) or ';'} choices: {', '.join(choices) or 'none'}"
        ]
    if given := re.match(r"Error merging override (.+)", text):
        return [f"{given.group(1)}: {_one_line(details)}; `--help` lists types and choices"]
    if isinstance(error, OverrideParseException):
        return [f"{_one_line(text)}; give options as name=value, special characters in quotes"]
    subject = f"{key.group(1) if key else ''}{where}".strip()
    return [f"{subject}: {_one_line(details)}" if subject else _one_line(details)]


def _unknown_names(arguments: list[str]) -> list[str]:
    """Options on the command line that do not exist."""
    known = {re.sub(r"\[\]", "", option.name) for option in options()} | _field_names(Config)
    given = [match.group(1) for a in arguments if (match := re.match(r"\+{0,2}([\w.]+)=", a))]
    names = [name for name in given if not name.startswith("hydra.")]
    names = [name for name in names if not name.startswith("router.options.")]  # a plugin's own
    return [_unknown_option(name) for name in names if re.sub(r"\.\d+(?=\.|$)", "", name) not in known]


def _unknown_option(name: str, where: str = "") -> str:
    names = [option.name for option in options()]
    if name in names:  # of another choice
        section = name.split(".")[0]
        return f"option {name}{where} is not one of the chosen {section}; choose another {section}, or leave it out"
    hint = did_you_mean(name, names if "." in name else [*names, *_field_names(Config)])
    elsewhere = "`--help` lists all options" if "." in name else "`--help` lists all, --config-dir adds groups of yours"
    return f"unknown option {name}{where}{hint or '; ' + elsewhere}"


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _one_line(text: str) -> str:
    """Without the places in Hydra's own objects, and without line breaks."""
    lines = [line.strip() for line in text.splitlines()]
    noise = re.compile(r"(full_key|object_type|reference_type)[:=]|See https://|.* raised while composing config:$|$")
    return "; ".join(line for line in lines if not noise.match(line))


@cache
def options() -> tuple[Option, ...]:
    """All options with their texts."""
    return describe(Config)


def help_text(config_folders: list[Path]) -> str:
    """What `--help` prints."""
    return option_texts.help_text(Config, config_folders)

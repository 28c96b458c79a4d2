"""Take a Hugging Face model in: say what it is, write a preset that trains on from it, or a run that holds it.

python scripts/import_hf.py /models/OLMoE-1B-7B-0924                              only look and check
python scripts/import_hf.py /models/OLMoE-1B-7B-0924 --config-to my_configs --name olmoe
torchrun --nproc-per-node 2 train.py --config-dir my_configs model=olmoe          each rank reads what it owns
python scripts/import_hf.py /models/OLMoE-1B-7B-0924 --run runs/olmoe             for generate.py, as init.weights=...

The folder is one on this machine: config.json and safetensors files, as `hf download` makes it. Nothing in it is run,
and pickles are not opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moe_data.tokenizers import TokenizerConfig, TokenizerKind, build_tokenizer
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.convert.huggingface.files import CONFIG, read_json
from moe_parallel.convert.huggingface.folder import is_model, open_model
from moe_parallel.convert.huggingface.tokenizer import has_tokenizer, imported
from moe_parallel.convert.lazy_state import LazyState
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import count_parameters
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.options import (
    Config,
    RunConfig,
    architecture,
    composed,
    config_yaml,
    plain,
    plain_architecture,
)
from moe_parallel.remote_code import has_remote_code
from moe_parallel.run_folder import RunFolder, describe_environment, write_text_atomic

CONFIGS = Path(__file__).parents[1] / "configs"
SECTIONS = ("model", "attention", "moe", "router", "balance")


def main() -> None:
    """Print what the model is, write what is asked for, and say how to go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder with config.json and safetensors files")
    parser.add_argument("--config-to", type=Path, help="folder of your configs; model/NAME.yaml is written there")
    parser.add_argument("--name", help="of the preset; default: the folder's name")
    parser.add_argument("--run", type=Path, help="run folder to make, such as runs/olmoe, with the weights as step 0")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json or a folder with one; default: the model's")
    parser.add_argument("--end-of-document", help="text of the token that ends a document; default: end of sequence")
    arguments = parser.parse_args()
    try:
        for line in take_in(arguments):
            print(line)
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def take_in(arguments: argparse.Namespace) -> list[str]:
    """What to print."""
    source = arguments.model.expanduser().resolve()
    if not is_model(source):
        raise ValueError(
            f"{arguments.model} has no {CONFIG}; give the folder of a model on this machine. One of the Hub comes with "
            "`hf download NAME --local-dir FOLDER`"
        )
    if has_remote_code(source):
        raise ValueError(
            f"{arguments.model} was written by export_hf.py --remote-code: give it as init.weights or init.sources, "
            "with the options that the model was trained with"
        )
    found = open_model(source)
    tokenizer = _tokenizer(source, arguments)
    lines = _facts(found, tokenizer)
    if tokenizer is not None:
        try:
            _check_tokenizer(found.architecture, tokenizer)
        except ValueError as error:
            if arguments.config_to is not None or arguments.run is not None:
                raise
            lines.append(f"warning     {error}")  # who only looks need not have one
    if arguments.config_to is not None:
        name = arguments.name or re.sub(r"\W+", "_", source.name).strip("_").lower()
        lines += ["", *_write_preset(arguments.config_to, name, found, tokenizer)]
        lines.append(
            f"train on    torchrun --nproc-per-node 2 train.py --config-dir {arguments.config_to} model={name}"
        )
    if arguments.run is not None:
        lines += ["", *_write_run(arguments.run, found, tokenizer)]
    return lines


def _tokenizer(source: Path, arguments: argparse.Namespace) -> TokenizerConfig | None:
    """The options of the model's tokenizer; None if it came without one."""
    path = arguments.tokenizer
    if path is None and not has_tokenizer(source):
        return None
    where = source if path is None else path.expanduser().resolve()
    if not where.exists():
        raise ValueError(f"--tokenizer {path} does not exist")
    return TokenizerConfig(kind=TokenizerKind.file, path=str(where), end_of_document=arguments.end_of_document)


def _check_tokenizer(shape: Architecture, options: TokenizerConfig) -> None:
    try:
        tokenizer = build_tokenizer(options)
    except ValueError as error:
        raise ValueError(f"{error}; or give another tokenizer.json by --tokenizer") from error
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1:,}, the embedding {shape.vocab_size:,} rows; give "
            "the tokenizer that the model was trained with by --tokenizer"
        )


def _facts(found: Pretrained, tokenizer: TokenizerConfig | None) -> list[str]:
    config, counts = read_json(found.path / CONFIG), count_parameters(found.architecture)
    kinds = sorted({str(file.suffix) for file in found.path.iterdir() if file.suffix in (".py", ".bin", ".pt")})
    size = sum(math.prod(lazy.shape) for lazy in found.weights.values())
    lines = [
        f"model       {found.path}",
        f"class       {', '.join(config.get('architectures') or ['?'])} (model_type={config['model_type']})",
        f"parameters  {counts.total:,} total, {counts.active:,} active per token",
        f"in float32  {4 * size / 1e9:,.2f} GB",
        f"tokenizer   {tokenizer.path if tokenizer is not None else 'none in the folder'}",
    ]
    for section in SECTIONS:
        options = ", ".join(_in_words(_changed(getattr(found.architecture, section))))
        lines.append(f"{section:11s} {options or 'as by default'}")
    if kinds or "auto_map" in config:
        lines.append(f"not used    code and pickles in the folder ({', '.join(kinds) or 'auto_map'})")
    return lines


def _changed(section: Any) -> dict[str, Any]:
    """Options that differ from their defaults."""
    usual, changed = type(section)(), {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            if inner := _changed(value):
                changed[field.name] = inner
        elif value != getattr(usual, field.name):
            changed[field.name] = plain(value)
    return changed


def _in_words(options: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _in_words(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


def _write_preset(folder: Path, name: str, found: Pretrained, tokenizer: TokenizerConfig | None) -> list[str]:
    """The model's options, and where its weights lie: a choice of `init`, so that another one takes its place."""
    files = {group: folder / group / f"{name}.yaml" for group in ("model", "init")}
    for group, file in files.items():
        if file.exists():
            raise ValueError(f"{file} exists already; give another --name, or remove it")
        if (CONFIGS / group / file.name).exists():
            raise ValueError(
                f"{group}={name} is a file of this project, which would be taken instead of yours; give another --name"
            )
    shape = found.architecture
    attention = "mla" if isinstance(shape.attention, LatentConfig) else "gqa"
    # Choices whose files set nothing but defaults.
    choices = {"attention": attention, "router": "softmax", "balance": "none", "init": name}
    values = {name: options for name in SECTIONS if (options := _changed(getattr(shape, name)))}
    if tokenizer is not None:
        choices["tokenizer"] = "file"
        values["tokenizer"] = {"path": tokenizer.path, "end_of_document": tokenizer.end_of_document}
    text = (
        f"# @package _global_\n# {found.path}, as scripts/import_hf.py read it. No balance loss: choose balance=... .\n"
        "defaults:\n"
        + "".join(f"  - override /{group}: {choice}\n" for group, choice in choices.items())
        + yaml.safe_dump(values, sort_keys=False)
    )
    weights = yaml.safe_dump({"defaults": ["fresh"], "weights": str(found.path)}, sort_keys=False)
    write_text_atomic(files["init"], f"# Chosen by model={name}.\n{weights}")
    write_text_atomic(files["model"], text)
    lines = [f"preset      {files['model']}"]
    if tokenizer is None:
        lines.append("            without a tokenizer: choose the one that the model was trained with, tokenizer=file")
    return lines


def _write_run(path: Path, found: Pretrained, tokenizer: TokenizerConfig | None) -> list[str]:
    if path.exists():
        raise ValueError(f"{path} exists already; name a new folder")
    if tokenizer is None:
        raise ValueError(f"{found.path} has no tokenizer, and a run needs one; give it by --tokenizer")
    try:
        checkpoint = _fill_run(RunFolder(path), found, tokenizer)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return [
        f"checkpoint  {checkpoint}",
        f"generate    python scripts/generate.py {path}",
        f"train on    python train.py ... init.weights={checkpoint}",
    ]


def _fill_run(folder: RunFolder, found: Pretrained, tokenizer: TokenizerConfig) -> Path:
    """Tokenizer, checkpoint, and the configuration last; the checkpoint's folder."""
    shape = found.architecture
    tokenizer = imported(Path(str(tokenizer.path)), folder.path / "tokenizer", tokenizer)
    config: Config = dataclasses.replace(
        composed([], CONFIGS),
        **{name: getattr(shape, name) for name in SECTIONS},
        tokenizer=tokenizer,
        run=RunConfig(name=folder.path.name, dir=str(folder.path.parent)),
    )
    architecture(config, build_tokenizer(tokenizer).vocab_size)  # that the copy is whole, and fits
    checkpointer = Checkpointer(folder.checkpoints, CheckpointConfig(asynchronous=False))
    checkpoint = checkpointer.save(0, LazyState(found.weights), {}, plain_architecture(shape))
    folder.write_environment(describe_environment("cpu"))
    folder.write_config(config_yaml(config))
    return checkpoint


if __name__ == "__main__":
    main()

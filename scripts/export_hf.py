"""Write a trained model as a folder that transformers and others read: weights, config, tokenizer; in one process.

python scripts/export_hf.py runs/small_cpu exported
python scripts/export_hf.py runs/small_cpu/checkpoints/step_00001000 exported --dtype float32 --jobs 4

A tensor is read, rounded and written 16 MiB at a time. A model that no public class expresses is refused, with the
options that are in the way; --remote-code writes it all the same, for programs that have this package and run its code.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import Tokenizer, TokenizerConfig, TokenizerKind, build_tokenizer
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import META, CheckpointError
from moe_parallel.convert.huggingface.folder import contents, is_model
from moe_parallel.convert.huggingface.tokenizer import has_tokenizer, loads_otherwise, special_ids, write_tokenizer
from moe_parallel.convert.huggingface.write_files import GB, write_folder
from moe_parallel.convert.lazy import Lazy
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.options import load_config
from moe_parallel.remote_code import CODE, CODE_FILE, contents_with_code
from moe_parallel.run_folder import RunFolder
from moe_parallel.start import open_pretrained


def main() -> None:
    """Write the folder and say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint), or a checkpoint")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--family", help="model_type to write, such as qwen3_moe; default: the first that fits")
    parser.add_argument("--remote-code", action="store_true", help="name a class of this package, for any model")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="most of one file, in 1e9 bytes")
    parser.add_argument("--jobs", type=int, default=1, help="threads that read and write")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's checksums first")
    arguments = parser.parse_args()
    try:
        for line in export(arguments):
            print(line)
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def export(arguments: argparse.Namespace) -> list[str]:
    """What to print."""
    for name, value in (("shard-gigabytes", arguments.shard_gigabytes), ("jobs", arguments.jobs)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be a number above 0")
    source = open_pretrained("run", str(arguments.run))
    shape = source.architecture
    config, weights = _contents(source, getattr(torch, arguments.dtype), arguments)
    if (source.path / META).is_file() and not arguments.no_verify:
        Checkpointer(source.path.parent, CheckpointConfig()).verify(source.path)
    options = _tokenizer_options(source.path)
    tokenizer = None if options is None else _build(options, source.path)

    def add_files(folder: Path) -> None:
        if arguments.remote_code:
            (folder / CODE_FILE).write_text(CODE)
        if options is not None and tokenizer is not None:
            write_tokenizer(folder, options, tokenizer, shape.model.max_sequence_tokens)
            config.update(special_ids(folder, tokenizer))
            ids = {name: value for name, value in special_ids(folder, tokenizer).items() if value is not None}
            (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")

    write_folder(arguments.out, config, weights, add_files, int(arguments.shard_gigabytes * GB), arguments.jobs)
    lines = [f"written     {arguments.out}: {config['architectures'][0]} in {arguments.dtype}, from {source.path}"]
    if tokenizer is None:
        lines.append(f"tokenizer   none: {source.path} lies in no run's folder; copy its tokenizer there")
    elif (found := loads_otherwise(arguments.out, tokenizer)) is not None:
        lines.append(
            f"warning     with this tokenizer and model_type={config['model_type']} AutoTokenizer {found}; load it by "
            f"PreTrainedTokenizerFast.from_pretrained('{arguments.out}')"
        )
    return lines


def _contents(
    source: Pretrained, dtype: torch.dtype, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """config.json and weights."""
    if arguments.remote_code:
        if arguments.family is not None:
            raise ValueError(f"--family {arguments.family} is a public class; leave --remote-code out")
        return contents_with_code(source.architecture, source.weights, dtype)
    try:
        return contents(source.architecture, source.weights, dtype, arguments.family)
    except ValueError as error:
        raise ValueError(f"{error}. --remote-code writes any model, to be loaded with trust_remote_code=True") from None


def _tokenizer_options(path: Path) -> TokenizerConfig | None:
    """Of a checkpoint's run, or of a Hugging Face folder; None where there is none."""
    if is_model(path):
        return TokenizerConfig(kind=TokenizerKind.file, path=str(path)) if has_tokenizer(path) else None
    run = RunFolder(path.resolve().parents[1])
    return load_config(run.config).tokenizer if run.config.is_file() else None


def _build(options: TokenizerConfig, path: Path) -> Tokenizer:
    if options.kind is not TokenizerKind.bpe:
        return build_tokenizer(options)
    data: Any = load_config(RunFolder(path.resolve().parents[1]).config).data
    return build_tokenizer(options, bpe_trainer(data.sources, data.cache_dir))


if __name__ == "__main__":
    main()

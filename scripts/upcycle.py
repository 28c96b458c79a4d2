"""Make a model of others that exist, look at the plan first, and measure what became of them.

python scripts/upcycle.py init=upcycle 'init.sources=[runs/dense]' moe.expert_dim=256 run.name=moe --plan
python scripts/upcycle.py init=upcycle 'init.sources=[runs/dense]' moe.expert_dim=256 run.name=moe
python scripts/upcycle.py init=... --text README.md --text docs/log.md --tokens 4096

Options are those of train.py, which takes the same ones to start training directly. Without --plan the model is written
as runs/NAME with checkpoint step_00000000, part by part, in one process: train from it by init.weights=runs/NAME. Then
it is compared with its sources on text and the report is written beside it; for that both are in memory.

Exit codes: 0 done, 1 the map promises the same function and the text shows another, 2 a mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_data.batch import TokenBatch
from moe_data.loader import ValidationData
from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import Tokenizer, build_tokenizer
from moe_parallel import options
from moe_parallel.checkpoint import folder as folders
from moe_parallel.checkpoint.checkpointer import Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.lazy_state import LazyState
from moe_parallel.convert.plan_text import plan_text
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.map import OptimizerState, Plan, Preserves, UpcycleConfig, make_plan
from moe_parallel.convert.verify import Verification, batches_of_text, verify
from moe_parallel.model.architecture import Architecture
from moe_parallel.options import Config
from moe_parallel.plan import model_facts
from moe_parallel.relations import check
from moe_parallel.run_folder import RunFolder, describe_environment, write_text_atomic
from moe_parallel.start import open_sources

CONFIGS = Path(__file__).parents[1] / "configs"
DONE, BROKEN, BAD_INPUT = 0, 1, 2


@dataclass(frozen=True)
class Conversion:
    """What was asked for, checked, before anything is read."""

    config: Config
    tokenizer: Tokenizer
    sources: list[Pretrained]
    target: Architecture
    plan: Plan
    promise: Preserves


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", help="options of train.py, such as init=upcycle model.dim=512")
    parser.add_argument("--plan", action="store_true", help="print what goes where and what the map promises; no more")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="file to compare on, may be given again (default: the "
        "validation data of the options)"
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="of all texts together; 0 compares nothing (%(default)s)"
    )
    return parser.parse_intermixed_args(arguments)


def prepare(overrides: list[str]) -> Conversion:
    """Raises ValueError for mistakes in the options, and where the models do not fit."""
    config = options.composed(overrides, CONFIGS)
    if not isinstance(config.init, UpcycleConfig):
        maps = ", ".join(name for name, kind in options.INITS.items() if issubclass(kind, UpcycleConfig))
        raise ValueError(f"the options ask for no map; add one of init={maps}")
    if config.init.optimizer_state is OptimizerState.source:
        raise ValueError(
            "init.optimizer_state=source is for a start of training: give the same options to train.py; what is "
            "written here has no optimizer"
        )
    check(config, config.parallel.ranks or 1)
    sources = open_sources(config.init)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    target = options.architecture(config, tokenizer.vocab_size)
    plan = make_plan(config.init, sources, target, config.train.seed)
    promise = config.init.preserves([source.architecture for source in sources], target)
    return Conversion(config, tokenizer, sources, target, plan, promise)


def write(conversion: Conversion, folder: RunFolder) -> Path:
    """The model as a run that has not begun. A part of a tensor is in memory at a time."""
    config = conversion.config
    checkpointer = Checkpointer(folder.checkpoints, replace(config.checkpoint, asynchronous=False))
    for source in conversion.sources:
        if (source.path / folders.META).is_file():
            checkpointer.verify(source.path)
    folder.write_config(options.config_yaml(config))
    folder.write_environment(describe_environment("cpu"))
    folder.write_model(model_facts(config, check(config, config.parallel.ranks or 1), conversion.target))
    identity = options.plain_architecture(conversion.target)
    return checkpointer.save(0, LazyState(conversion.plan), {}, identity)


def text_of(conversion: Conversion, files: list[Path], most_tokens: int) -> list[TokenBatch]:
    """Batches of the files, or of the validation data: from each domain equally many, and one sequence at least."""
    config, vocabulary = conversion.config, conversion.target.vocab_size
    length = config.train.sequence_tokens
    rows = max(1, 2048 // length)
    if files:
        texts = [file.read_text() for file in files]
        return batches_of_text(texts, conversion.tokenizer, length, most_tokens, rows)
    data = ValidationData(config.data, conversion.tokenizer, length, vocabulary)
    if not data.domains:
        raise ValueError("the options hold no validation data out; give --text FILE, or --tokens 0 to compare nothing")
    found = []
    each = most_tokens // len(data.domains)
    rows = max(1, min(rows, each // length))
    for domain in data.domains:
        left = max(each, rows * length)
        for batch in data.batches(domain, 0, 1, rows):
            left -= batch.num_valid
            if left < 0:
                break
            found.append(batch)
    return found


def report(conversion: Conversion, verification: Verification, folder: RunFolder, command: list[str]) -> None:
    """To the screen and beside the model."""
    told = f"# {folder.path.name}\n\n`python scripts/upcycle.py {' '.join(command)}`\n\n{verification.markdown()}"
    write_text_atomic(folder.path / "upcycle.md", f"{told}\n```\n{plan_text(conversion.plan)}\n```\n")
    write_text_atomic(folder.path / "upcycle.json", json.dumps(verification.as_json(), indent=1) + "\n")
    print(f"\n{verification.markdown()}\nreport      {folder.path / 'upcycle.md'}")


def run(command: list[str]) -> int:
    """All of it; the exit code."""
    given = parse(command)
    if given.tokens < 0:
        raise ValueError(f"--tokens {given.tokens} must not be negative; 0 compares nothing")
    conversion = prepare(given.overrides)
    print(plan_text(conversion.plan))
    print(f"promise: {conversion.promise.value}")
    if given.plan:
        return DONE
    name = conversion.config.run.name
    if name is None:
        raise ValueError("run.name is not set; give the new model one, such as run.name=moe")
    folder = RunFolder(Path(conversion.config.run.dir) / name)
    if any(folder.checkpoints.glob("step_*")):
        raise ValueError(f"{folder.path} has checkpoints already; choose another run.name, or delete it")
    # Before anything is written: texts may be missing.
    batches = text_of(conversion, given.text, given.tokens) if given.tokens > 0 else []
    if given.tokens > 0 and not sum(batch.num_targets for batch in batches):
        raise ValueError("the text has no token to predict; give more of it, or --tokens 0 to compare nothing")
    path = write(conversion, folder)
    print(f"\nmodel       {path}")
    print(f"train       python train.py <the same options but init and run.name> init.weights={folder.path}")
    if not batches:
        return DONE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # What was written and not what was planned: it is what will be used.
    found = verify(
        conversion.target, weights_of_checkpoint(path), conversion.sources, conversion.promise, batches, device
    )
    report(conversion, found, folder, command)
    if found.is_kept:
        return DONE
    difference = found.against[0].logits_relative_difference
    print(
        f"error: init promises the same function, but logits differ by {difference:.3g} of their size", file=sys.stderr
    )
    return BROKEN


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a broken promise, 2 a mistake in what was given."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except (OSError, ValueError, CheckpointError) as error:
        if os.environ.get("MOE_PARALLEL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

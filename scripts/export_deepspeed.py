"""Write a checkpoint of any engine in DeepSpeed's own format, with the optimizer's state, for DeepSpeed's tools.

torchrun --nproc-per-node 2 scripts/export_deepspeed.py runs/small_cpu exported --stage 2 --ep 2
python -m deepspeed.checkpoint.ds_to_universal --input_folder exported/step_00001000 --output_folder universal
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import build_tokenizer
from moe_parallel import launch
from moe_parallel.checkpoint.checkpointer import Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.engines.build import build_engine
from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.launch import Launch
from moe_parallel.mesh import ParallelConfig
from moe_parallel.options import architecture, load_config, plain_architecture
from moe_parallel.relations import check
from moe_parallel.run_folder import RunFolder


def main() -> None:
    """Load the newest checkpoint of a run, or the one that is named, into DeepSpeed, and let it save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, such as runs/small_cpu")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--checkpoint", type=Path, help="a step folder; default: the run's newest complete one")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO: 1, 2 or 3")
    parser.add_argument("--ep", type=int, default=1, help="ranks that the experts of a layer are split over")
    arguments = parser.parse_args()
    here = launch.start(timeout_seconds=600)
    try:
        path = export(arguments, here)
    except (OSError, ValueError, CheckpointError) as error:
        here.report(error)
        sys.exit(2)
    launch.say(f"written to {path}")
    launch.finish()


def export(arguments: argparse.Namespace, here: Launch) -> Path:
    """The folder that DeepSpeed's checkpoint is in."""
    folder = RunFolder(arguments.run)
    config = dataclasses.replace(
        load_config(folder.config),
        parallel=ParallelConfig(ep=arguments.ep),
        engine=DeepSpeedConfig(stage=arguments.stage),
    )
    config.train.micro_batch_sequences = None  # nothing is trained: any number of ranks will do
    config.train.global_batch_tokens = config.train.sequence_tokens * here.world
    layout = check(config, here.world, here.device.type)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    shape = architecture(config, tokenizer.vocab_size)
    dtype = config.train.compute_type(here.device.type)
    setting = EngineSetting(shape, layout, config.parallel, config.dispatch, config.optim, here.device.type, dtype)
    from moe_parallel.engines.deepspeed import DeepSpeedEngine

    engine = build_engine(config.engine, setting, here.device, dtype, config.train.seed)
    assert isinstance(engine, DeepSpeedEngine)
    checkpointer = Checkpointer(folder.checkpoints, config.checkpoint, engine.group)
    path = arguments.checkpoint or checkpointer.latest()
    if path is None:
        raise ValueError(f"{folder.checkpoints} has no complete checkpoint; train first, or name one by --checkpoint")
    checkpointer.load(path, engine.checkpoint_state(), plain_architecture(shape))
    checkpointer.close()
    engine.save_own(arguments.out, path.name)
    engine.close()
    return Path(arguments.out) / path.name


if __name__ == "__main__":
    main()

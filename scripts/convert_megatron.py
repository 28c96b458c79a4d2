"""Weights between a run of this toolkit and a checkpoint of Megatron-Core (format torch_dist), in one process.

python scripts/convert_megatron.py export runs/small_cpu megatron/
python scripts/convert_megatron.py import megatron/ converted/ model=olmoe_1b_7b attention.qk_norm=head

What is imported is a checkpoint to start from: python train.py init.weights=converted/step_00000000 ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import build_tokenizer
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.convert.megatron import Layers, from_megatron, read_megatron, to_megatron, write_megatron
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer
from moe_parallel.options import Config, architecture, composed, load_config, plain_architecture
from moe_parallel.run_folder import RunFolder

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Convert what is asked for, and say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    ways = parser.add_subparsers(dest="way", required=True)
    outwards = ways.add_parser("export", help="from a run to Megatron-Core")
    outwards.add_argument("run", type=Path, help="run folder, such as runs/small_cpu")
    outwards.add_argument("folder", type=Path, help="folder to make, Megatron's --load")
    outwards.add_argument("--checkpoint", type=Path, help="a step folder; default: the run's newest complete one")
    outwards.add_argument(
        "--layers", type=Layers, choices=list(Layers), default=Layers.transformer_engine,
        help="Megatron's description of layers that is to load it: they name one norm differently",
    )  # fmt: skip
    inwards = ways.add_parser("import", help="from Megatron-Core to a checkpoint of this toolkit")
    inwards.add_argument("megatron", type=Path, help="Megatron's --save, or the folder of one iteration")
    inwards.add_argument("folder", type=Path, help="folder for step_00000000")
    inwards.add_argument(
        "overrides", nargs="*", help="options of the model, as of train.py: model=..., moe.num_experts=8"
    )
    arguments = parser.parse_args()
    try:
        print(export_run(arguments) if arguments.way == "export" else import_weights(arguments))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def export_run(arguments: argparse.Namespace) -> Path:
    """Write a run's weights as Megatron's; the folder of the checkpoint."""
    folder = RunFolder(arguments.run)
    config = load_config(folder.config)
    checkpointer = Checkpointer(folder.checkpoints, config.checkpoint)
    path = arguments.checkpoint or checkpointer.latest()
    if path is None:
        raise ValueError(f"{folder.checkpoints} has no complete checkpoint; train first, or name one by --checkpoint")
    shape = _shape(config)
    model = Transformer(shape)
    checkpointer.load(path, TorchState(model, None), plain_architecture(shape))
    weights = to_megatron(shape, dict(model.state_dict()))
    return write_megatron(arguments.folder, weights, shape.model.first_dense_layers, arguments.layers)


def import_weights(arguments: argparse.Namespace) -> Path:
    """Write Megatron's weights as a checkpoint of step 0; its folder."""
    shape = _shape(composed(arguments.overrides, CONFIGS))
    with torch.device("meta"):
        model = Transformer(shape)
    weights = from_megatron(shape, read_megatron(arguments.megatron, shape))
    if shape.model.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    model.to_empty(device="cpu")  # ties again what belongs together
    model.load_state_dict(weights)
    checkpointer = Checkpointer(arguments.folder, CheckpointConfig(asynchronous=False))
    return checkpointer.save(0, TorchState(model, None), {}, plain_architecture(shape))


def _shape(config: Config) -> Architecture:
    if config.model.vocab_size is not None:
        return architecture(config, None)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    return architecture(config, tokenizer.vocab_size)


if __name__ == "__main__":
    main()

"""Continue a text with a trained model, in one process.

python scripts/generate.py runs/small_cpu --prompt "def " --tokens 200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import build_tokenizer
from moe_parallel import launch
from moe_parallel.checkpoint.checkpointer import Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.model.generate import generate, logits_of
from moe_parallel.model.transformer import Transformer
from moe_parallel.options import architecture, load_config, plain_architecture
from moe_parallel.run_folder import RunFolder


def main() -> None:
    """Load the newest checkpoint of a run, or the one that is named, and print the continued text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, such as runs/small_cpu")
    parser.add_argument("--checkpoint", type=Path, help="a step folder; default: the run's newest complete one")
    parser.add_argument("--prompt", default="def ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")
    arguments = parser.parse_args()
    try:
        print(continue_text(arguments))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")


def continue_text(arguments: argparse.Namespace) -> str:
    """The prompt and what the model adds."""
    folder = RunFolder(arguments.run)
    config = load_config(folder.config)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    shape = architecture(config, tokenizer.vocab_size)
    device = launch.start(timeout_seconds=60).device
    with torch.device("meta"):
        model = Transformer(shape)
    model.to_empty(device=device)
    checkpointer = Checkpointer(folder.checkpoints, config.checkpoint)
    path = arguments.checkpoint or checkpointer.latest()
    if path is None:
        raise ValueError(f"{folder.checkpoints} has no complete checkpoint; train first, or name one by --checkpoint")
    checkpointer.load(path, TorchState(model, None), plain_architecture(shape))
    prompt = [int(token) for token in tokenizer.encode(arguments.prompt)]
    ids = generate(
        logits_of(model),
        prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        allowed_ids=tokenizer.vocab_size,
    )
    launch.finish()
    return tokenizer.decode([*prompt, *ids])


if __name__ == "__main__":
    main()

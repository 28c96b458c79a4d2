"""What a run would be: size of the model, its cost, memory of a rank; for model.json and dry runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import build_tokenizer
from moe_parallel import launch
from moe_parallel.mesh import Layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import count_parameters, training_flops_per_token
from moe_parallel.model.transformer import Transformer
from moe_parallel.options import Config, architecture
from moe_parallel.planner.formulas import stage_memory, stages_of
from moe_parallel.run_folder import RunFolder
from moe_parallel.train_options import DType


def model_facts(config: Config, layout: Layout, shape: Architecture) -> dict[str, Any]:
    """Size, cost and memory of the fullest rank by formulas, for model.json and dry runs."""
    counts = count_parameters(shape)
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    compute = 4 if config.train.dtype is DType.float32 else 2
    if config.train.dtype is DType.auto and not torch.cuda.is_available() and not config.dry_run:
        compute = 4
    stages = stages_of(config, shape, micro_batches)
    memory = max(
        (stage_memory(config, layout, stage, compute) for stage in stages), key=lambda estimate: estimate.total
    )
    return {
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "flops_per_token": training_flops_per_token(shape, config.train.sequence_tokens),
        "memory_per_rank_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "layout": dataclasses.asdict(layout),
    }


def report_plan(config: Config, layout: Layout, folder: RunFolder) -> None:
    """Print and write what a run would be, without building weights or joining ranks."""
    shape = architecture(config, None if config.model.vocab_size else _vocabulary_of(config))
    facts = model_facts(config, layout, shape)
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(shape).parameters())
    if built != facts["parameters_total"]:
        raise RuntimeError(f"the built model has {built} parameters, its count says {facts['parameters_total']}")
    if launch.read_environment()[0] != 0:
        return
    folder.write_model(facts)
    gib = {k: v / 2**30 for k, v in facts["memory_per_rank_bytes"].items()}
    print(f"parameters            {facts['parameters_total']:,} total, {facts['parameters_active']:,} active per token")
    print(f"FLOPs per token       {facts['flops_per_token']:.4g} (forward and backward)")
    print(
        f"layout                {layout.ranks} ranks: dense {layout.replicate} x replicated, {layout.shard} x sharded; "
        f"experts ep {layout.ep}, {layout.expert_replicate} x replicated, {layout.expert_shard} x sharded"
    )
    print(f"memory per rank       {gib['total']:.2f} GiB, of which")
    for part in ("weights", "gradients", "optimizer", "gathered", "activations", "temporary"):
        print(f"  {part:19s} {gib[part]:.2f} GiB")
    print(f"written to            {folder.model}")


def _vocabulary_of(config: Config) -> int:
    return build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir)).vocab_size

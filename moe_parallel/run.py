"""One run from configuration to exit code: check, build, train, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_data.loader import TrainingData, ValidationData
from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import Tokenizer, build_tokenizer

from moe_parallel import launch
from moe_parallel.checkpoint.checkpointer import Checkpointer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import Layout, ParallelMesh
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import Bytes, count_parameters, memory_per_rank, training_flops_per_token
from moe_parallel.model.generate import generate
from moe_parallel.options import Config, ConfigError, architecture, check, config_yaml, plain, plain_architecture
from moe_parallel.run_folder import RunFolder, describe_environment, git_revision
from moe_parallel.tracking import NullTracker, Tracker
from moe_parallel.trainer import DType, Meter, NonfiniteError, Stopped, StopSignal, Trainer, TrainerConfig

DONE, FAULT, BAD_INPUT, REQUEUE = 0, 1, 2, 75
"""Exit codes. REQUEUE: a signal stopped the run, a checkpoint is written, please start it again."""

# Dense bf16 peak of one device, FLOP/s, without sparsity; from the vendor's data sheets.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "B100": 1750e12, "L40S": 362e12}

log = logging.getLogger(__name__)


def run(config: Config, default_name: str) -> int:
    """Run on this rank and return the exit code. Raises ConfigError for mistakes that the options alone show."""
    _, world, _ = launch.read_environment()
    name = config.run.name or default_name
    folder = RunFolder(Path(config.run.dir) / name)
    if config.dry_run:
        ranks = config.parallel.ranks or world
        return report_plan(config, check(config, ranks), folder)
    layout = check(config, world)
    with StopSignal().installed() as stop:
        here = launch.start(config.parallel.timeout_seconds)
        try:
            logging.getLogger().setLevel(logging.INFO if here.is_first else logging.ERROR)
            code = _train(config, layout, folder, name, here, stop)
        except (ValueError, OSError, CheckpointError) as error:
            return _refuse(error, here.rank)
        except NonfiniteError as error:
            log.error("error: %s", error)
            return FAULT
        launch.finish()
    return code


def _refuse(error: Exception, rank: int) -> int:
    """One line for what the user can mend; every rank meets the same error, rank 0 speaks."""
    if os.environ.get("MOE_PARALLEL_TRACEBACK"):
        raise error
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return BAD_INPUT


def _train(config: Config, layout: Layout, folder: RunFolder, name: str, here: launch.Launch, stop: StopSignal) -> int:
    start_from = _place_to_start(config, folder)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    shape = architecture(config, tokenizer.vocab_size)
    identity = plain_architecture(shape)
    checkpointer = Checkpointer(
        folder.checkpoints,
        config.checkpoint,
        dist.group.WORLD,
        about={"layout": dataclasses.asdict(layout), "git": git_revision()},
        warn=log.warning,
    )
    path = start_from if start_from is not None else None
    if config.resume == "auto":
        path = checkpointer.latest()
        if path is not None and _is_finished(folder, config.train.steps):
            log.info("%s is finished at step %d; raise train.steps to go on", folder.path, config.train.steps)
            checkpointer.close()
            return DONE
    data, validation = _load_data(config, tokenizer, shape.vocab_size)
    engine = NativeEngine(
        shape, ParallelMesh(layout, here.device.type), config.parallel, config.optim, here.device, _dtype(config, here)
    )
    extra: dict[str, Any] | None = None
    if path is None:
        engine.init_weights(config.init, config.train.seed)
    else:
        extra = checkpointer.load(path, engine.model, engine.optimizer, identity)
        log.info("resuming from %s at step %d", path, extra["step"])
    tracker = _tracker(config, folder, name, here, layout, extra, shape)
    trainer = Trainer(
        config=TrainerConfig(
            config.train, config.optim, config.evaluation, config.checkpoint, config.tracking, config.data.prefetch_steps
        ),
        engine=engine,
        data=data,
        validation=validation,
        tracker=tracker,
        checkpointer=checkpointer,
        identity=identity,
        meter=_meter(shape, config, here),
        stop=stop,
    )  # fmt: skip
    if extra is not None:
        trainer.restore(extra)
    code = FAULT
    try:
        trainer.fit()
        _finish(config, trainer, tokenizer, folder, here)
        code = DONE
    except Stopped:
        checkpointer.wait()
        tracker.warning(f"stopped by a signal at step {trainer.state.step}; the checkpoint is written")
        if here.is_first:
            _ask_for_requeue(trainer.state.step)
        code = REQUEUE
    finally:
        tracker.finish(code)
    checkpointer.close()
    return code


def _place_to_start(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint that `resume` names; refuses to write over another run's checkpoints."""
    if config.resume == "auto":
        return None
    if config.resume == "never":
        if folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step_*")):
            raise ConfigError([
                f"resume=never, but {folder.path} has checkpoints already; resume=auto continues it, "
                "another run.name starts beside it"
            ])  # fmt: skip
        return None
    path = Path(config.resume)
    if not path.is_dir():
        raise ConfigError([f"resume={config.resume} is no folder; use never, auto, or a path to step_00001000"])
    return path


def _load_data(config: Config, tokenizer: Tokenizer, vocabulary: int) -> tuple[TrainingData, ValidationData]:
    train = config.train
    data = TrainingData(
        config.data, tokenizer, train.sequence_tokens, train.global_batch_sequences, train.seed, vocabulary
    )
    return data, ValidationData(config.data, tokenizer, train.sequence_tokens, vocabulary)


def _dtype(config: Config, here: launch.Launch) -> torch.dtype:
    if config.train.dtype is DType.auto:
        return torch.bfloat16 if here.device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.dtype is DType.bfloat16 else torch.float32


def _tracker(
    config: Config,
    folder: RunFolder,
    name: str,
    here: launch.Launch,
    layout: Layout,
    extra: dict[str, Any] | None,
    shape: Architecture,
) -> Tracker | NullTracker:
    """Write the run folder's facts and open the tracker, on rank 0."""
    hosts: list[Any] = [None] * here.world
    dist.all_gather_object(hosts, socket.gethostname())
    if not here.is_first:
        return NullTracker()
    device = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu"
    folder.write_config(config_yaml(config))
    folder.write_environment({**describe_environment(device, hosts), "layout": dataclasses.asdict(layout)})
    folder.write_model(model_facts(config, layout, shape))
    return Tracker(
        folder.path,
        config.tracking,
        extra["tracking"] if extra is not None else None,
        name=name,
        total_steps=config.train.steps,
        run_config=plain(dataclasses.asdict(config)),
        label="forced balance: a benchmark, not training" if config.router.forced_balance else None,
    )


def _meter(shape: Architecture, config: Config, here: launch.Launch) -> Meter:
    peak = None
    if here.device.type == "cuda" and _dtype(config, here) is torch.bfloat16:
        name = torch.cuda.get_device_name(here.device)
        one = next((flops for key, flops in _PEAK_BF16.items() if key in name), None)
        peak = one * here.world if one is not None else None
    return Meter(training_flops_per_token(shape, config.train.sequence_tokens), peak)


def _ask_for_requeue(step: int) -> None:
    """Tell the batch script that work is left. The exit code cannot: torchrun replaces it with its own."""
    mark = os.environ.get("REQUEUE_MARK")
    if mark:
        Path(mark).write_text(f"step {step}\n")


# -- the end of a run ----------------------------------------------------------------------------------------------


def _is_finished(folder: RunFolder, steps: int) -> bool:
    if not folder.result.exists():
        return False
    return int(json.loads(folder.result.read_text())["step"]) >= steps


def _finish(config: Config, trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder, here: launch.Launch) -> None:
    """Evaluate, sample, write result.json, say where things lie and what to do next."""
    metrics = trainer.evaluate()
    sample = _sample(config, trainer, tokenizer)
    trainer.checkpointer.wait()
    step, tracker = trainer.state.step, trainer.tracker
    checkpoint = trainer.checkpointer.latest()
    if not here.is_first:
        return
    folder.write_result({"step": step, "tokens": trainer.state.tokens, "checkpoint": str(checkpoint), **metrics})
    tracker.log(step, trainer.state.tokens, {**trainer.last_metrics, **metrics})
    if sample is not None:
        tracker.text(step, [sample])
    lines = ["", f"finished at step {step}, {trainer.state.tokens:,} tokens"]
    for key, value in metrics.items():
        lines.append(f"  {key:45s} {value:.4f}")
    if sample is not None:
        lines += ["", "sample:", *(f"  {line}" for line in sample.splitlines())]
    lines += [
        "",
        f"checkpoint  {checkpoint}",
        f"metrics     {folder.metrics}",
        f"generate    python scripts/generate.py {folder.path}",
        f"train on    the same command with resume=auto train.steps={2 * step}",
    ]
    for line in lines:
        tracker.info(line)


def _sample(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> str | None:
    """Continue the prompt; every rank takes part, for each may own experts that the text needs."""
    evaluation = config.evaluation
    if evaluation.sample_tokens == 0:
        return None
    prompt = [int(token) for token in tokenizer.encode(evaluation.sample_prompt)]
    if not prompt:
        raise ValueError(f"evaluation.sample_prompt={evaluation.sample_prompt!r} has no token; give some text")
    ids = generate(
        trainer.engine.model,
        prompt,
        evaluation.sample_tokens,
        temperature=evaluation.sample_temperature,
        seed=config.train.seed,
        allowed_ids=tokenizer.vocab_size,
        context=trainer.engine.evaluation_context,
    )
    return tokenizer.decode([*prompt, *ids])


# -- plans ---------------------------------------------------------------------------------------------------------


def model_facts(config: Config, layout: Layout, shape: Architecture) -> dict[str, Any]:
    """Size, cost and memory per rank, for model.json and dry runs."""
    counts = count_parameters(shape)
    _, micro_batch = config.train.micro_batches(layout.ranks)
    compute = 4 if config.train.dtype is DType.float32 else 2
    if config.train.dtype is DType.auto and not torch.cuda.is_available() and not config.dry_run:
        compute = 4
    memory = memory_per_rank(
        shape,
        micro_batch * config.train.sequence_tokens,
        shard=layout.shard,
        ep=layout.ep,
        expert_shard=layout.expert_shard,
        recompute=config.parallel.recompute,
        size=Bytes(compute=compute),
    )
    return {
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "flops_per_token": training_flops_per_token(shape, config.train.sequence_tokens),
        "memory_per_rank_bytes": {**dataclasses.asdict(memory), "total": memory.total},
        "layout": dataclasses.asdict(layout),
    }


def report_plan(config: Config, layout: Layout, folder: RunFolder) -> int:
    """Print and write what a run would be, without building weights or joining ranks."""
    shape = architecture(config, None if config.model.vocab_size else _vocabulary_of(config))
    facts = model_facts(config, layout, shape)
    with torch.device("meta"):
        from moe_parallel.model.transformer import Transformer

        built = sum(p.numel() for p in Transformer(shape).parameters())
    if built != facts["parameters_total"]:
        raise RuntimeError(f"the built model has {built} parameters, its count says {facts['parameters_total']}")
    if launch.read_environment()[0] != 0:
        return DONE
    folder.write_model(facts)
    gib = {k: v / 2**30 for k, v in facts["memory_per_rank_bytes"].items()}
    print(f"parameters            {facts['parameters_total']:,} total, {facts['parameters_active']:,} active per token")
    print(f"FLOPs per token       {facts['flops_per_token']:.4g} (forward and backward)")
    print(
        f"layout                {layout.ranks} ranks: dense {layout.replicate} x replicated, {layout.shard} x sharded; "
        f"experts ep {layout.ep}, {layout.expert_replicate} x replicated, {layout.expert_shard} x sharded"
    )
    print(f"memory per rank       {gib['total']:.2f} GiB, of which")
    for part in ("weights", "gradients", "optimizer", "gathered", "activations"):
        print(f"  {part:19s} {gib[part]:.2f} GiB")
    print(f"written to            {folder.model}")
    return DONE


def _vocabulary_of(config: Config) -> int:
    return build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir)).vocab_size

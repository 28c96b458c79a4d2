"""One run from configuration to exit code: check, build, train, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
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
from moe_parallel.convert.fill import load
from moe_parallel.engines.build import build_engine
from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.engine import Engine
from moe_parallel.launch import Launch
from moe_parallel.mesh import Layout
from moe_parallel.meter import Meter, peak_flops_per_second
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import count_parameters, training_flops_per_token
from moe_parallel.model.generate import generate
from moe_parallel.options import Config, ConfigError, architecture, config_yaml, plain, plain_architecture
from moe_parallel.plan import model_facts, report_plan
from moe_parallel.relations import check
from moe_parallel.run_folder import RunFolder, describe_environment, git_revision
from moe_parallel.start import start as starting_point
from moe_parallel.stop import Stopped, StopSignal
from moe_parallel.tracking import NullTracker, Tracker
from moe_parallel.trainer import NonfiniteError, Trainer, TrainerConfig

DONE, FAULT, BAD_INPUT, REQUEUE = 0, 1, 2, 75
"""Exit codes. REQUEUE: a signal stopped the run, a checkpoint is written, please start it again."""

log = logging.getLogger(__name__)


def run(config: Config, name: str, job: int = 0) -> int:
    """Run on this rank and return the exit code. Raises ConfigError for mistakes that show before ranks meet.

    Args:
        name: of the run and of its folder in run.dir.
        job: number of the run within this process.
    """
    _, world, _ = launch.read_environment()
    folder = RunFolder(Path(config.run.dir) / name)
    if config.dry_run:
        planned = check(config, config.parallel.ranks or world)
        try:
            report_plan(config, planned, folder)
        except (ValueError, OSError) as error:  # of the tokenizer, or of the folder
            raise ConfigError([str(error)]) from error
        return DONE
    layout = check(config, world, launch.device_type())
    here = launch.start(config.parallel.timeout_seconds, job)
    logging.getLogger().setLevel(logging.INFO if here.is_first else logging.ERROR)
    try:
        with StopSignal().installed() as stop:
            code = _Run(config, layout, folder, name, here, stop).train()
    except (ValueError, OSError, CheckpointError) as error:
        if os.environ.get("MOE_PARALLEL_TRACEBACK"):
            raise
        here.report(_with_place(error, folder))
        code = BAD_INPUT
    except NonfiniteError as error:
        here.report(error)
        code = FAULT
    launch.finish(together=code in (DONE, REQUEUE))
    return code


def conclude(codes: dict[str, int]) -> int:
    """The exit code for all runs of this process, by what tells them apart; says which runs of a sweep have failed."""
    failed = [f"{name} (code {code})" for name, code in codes.items() if code != DONE]
    if len(codes) > 1 and failed:
        launch.say(f"sweep: {len(failed)} of {len(codes)} runs failed: {', '.join(failed)}")
    return max(codes.values(), default=DONE)


def _with_place(error: Exception, folder: RunFolder) -> Exception:
    """A full disk is told without the file's name by the system; what lies elsewhere has its own words."""
    if isinstance(error, OSError) and error.filename is None and error.strerror == os.strerror(error.errno or 0):
        return OSError(f"{folder.path} cannot be written: {error.strerror}; free some space, or set another run.dir")
    return error


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every part of a run needs to know. All ranks call every method in the same order."""

    config: Config
    layout: Layout
    folder: RunFolder
    name: str
    here: Launch
    stop: StopSignal

    def train(self) -> int:
        """From data to the last line; the exit code."""
        launch.on_first(self._refuse_to_overwrite)
        about = {"layout": dataclasses.asdict(self.layout), "git": git_revision()}
        checkpointer = Checkpointer(
            self.folder.checkpoints, self.config.checkpoint, dist.group.WORLD, about=about, warn=log.warning
        )
        try:
            path = self._checkpoint_to_load(checkpointer)
            if path is not None and launch.on_first(self._is_finished):
                steps = self.config.train.steps
                log.info("%s is finished at step %d; raise train.steps to go on", self.folder.path, steps)
                return DONE
            try:
                tokenizer, data, validation = launch.together(self._load_data)
            except Stopped:
                log.warning("stopped by a signal while the data was prepared; there was nothing to save")
                return self._requeue("before training")
            return self._train(checkpointer, path, tokenizer, data, validation)
        finally:
            checkpointer.close()

    def _train(
        self,
        checkpointer: Checkpointer,
        path: Path | None,
        tokenizer: Tokenizer,
        data: TrainingData,
        validation: ValidationData,
    ) -> int:
        config, here = self.config, self.here
        _prompt(config, tokenizer, self.layout.sequence_ranks)
        shape = architecture(config, tokenizer.vocab_size)
        identity = plain_architecture(shape)
        dtype = config.train.compute_type(here.device.type)
        setting = EngineSetting(
            shape, self.layout, config.parallel, config.dispatch, config.optim, here.device.type, dtype
        )
        engine = build_engine(config.engine, setting, here.device, dtype, config.train.seed)
        checkpointer.about |= _size(shape) | {"engine": engine.name}
        extra: dict[str, Any] | None = None
        if path is None:
            engine.init_weights(config.init, config.train.seed)
            self._take_over(engine, checkpointer)
        else:
            extra = checkpointer.load(path, engine.checkpoint_state(), identity)
            if "data" not in extra:
                raise ConfigError([f"{path} is a model without a training state; start with init.weights={path}"])
            data.load_state_dict(extra["data"])  # before anything is written: it may be of other data
            log.info("resuming from %s at step %d", path, extra["step"])
        self._say_what_computes(engine)
        tracker = self._tracker(extra, shape)
        code = FAULT
        try:
            trainer = Trainer(
                config=TrainerConfig(
                    *(config.train, config.optim, config.evaluation, config.checkpoint, config.tracking),
                    prefetch_steps=config.data.prefetch_steps,
                ),
                engine=engine,
                data=data,
                validation=validation,
                tracker=tracker,
                checkpointer=checkpointer,
                identity=identity,
                meter=self._meter(shape),
                stop=self.stop,
            )
            if extra is not None:
                trainer.restore(extra)
            code = self._fit(trainer, tokenizer)
        finally:
            tracker.finish(code)
            engine.close()
        return code

    def _take_over(self, engine: Engine, checkpointer: Checkpointer) -> None:
        """Fill the model with what `init` names; each rank reads what it holds."""
        start = launch.together(lambda: starting_point(self.config.init, engine.architecture, self.config.train.seed))
        if start is None:
            return
        for path in start.checkpoints:
            checkpointer.verify(path)
        launch.together(lambda: load(engine.checkpoint_state(), start.weights, start.moments))

    def _say_what_computes(self, engine: Engine) -> None:
        train = self.config.train
        if engine.layers:
            tokens = train.micro_batches(self.layout.batch_ranks)[1] * train.sequence_tokens
            rows = tokens // self.layout.sequence_ranks * self.config.router.top_k
            choice = engine.layers[0].experts.choice(self.here.device, train.compute_type(self.here.device.type), rows)
            log.info("experts are computed by %s: %s", choice.how.value, choice.why)

    def _fit(self, trainer: Trainer, tokenizer: Tokenizer) -> int:
        try:
            trainer.fit()
            _finish(self.config, trainer, tokenizer, self.folder, self.here)
        except Stopped:
            trainer.checkpointer.wait()
            step = trainer.state.step
            trainer.tracker.warning(f"stopped by a signal at step {step}; the checkpoint is written")
            return self._requeue(f"step {step}")
        return DONE

    def _requeue(self, where: str) -> int:
        """Tell the batch script that work is left. The exit code cannot: torchrun replaces it with its own."""
        mark = os.environ.get("REQUEUE_MARK")
        if mark and self.here.is_first:
            Path(mark).parent.mkdir(parents=True, exist_ok=True)
            Path(mark).write_text(f"{where}\n")
        return REQUEUE

    def _refuse_to_overwrite(self) -> None:
        """Only a run that goes on from them may write beside checkpoints, and prune them."""
        resume, mine = self.config.resume, self.folder.checkpoints
        goes_on = resume == "auto" or (resume != "never" and mine.resolve() in Path(resume).resolve().parents)
        if not goes_on and any(mine.glob("step_*")):
            raise ConfigError([
                f"resume={resume}, but {self.folder.path} has checkpoints already; resume=auto continues it, "
                "another run.name starts beside it"
            ])  # fmt: skip

    def _checkpoint_to_load(self, checkpointer: Checkpointer) -> Path | None:
        """The checkpoint that `resume` stands for; None starts from new weights."""
        resume = self.config.resume
        if resume == "never":
            return None
        if resume == "auto":
            return checkpointer.latest()
        return _checkpoint(resume)

    def _is_finished(self) -> bool:
        if self.config.resume != "auto" or not self.folder.result.exists():
            return False
        return int(json.loads(self.folder.result.read_text())["step"]) >= self.config.train.steps

    def _load_data(self) -> tuple[Tokenizer, TrainingData, ValidationData]:
        """Tokenize what is not in the cache yet, which may take hours and is safe to interrupt."""
        config, train = self.config, self.config.train
        with self.stop.at_once():
            tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
            vocabulary = architecture(config, tokenizer.vocab_size).vocab_size
            sequences = train.global_batch_sequences
            data = TrainingData(config.data, tokenizer, train.sequence_tokens, sequences, train.seed, vocabulary)
            return tokenizer, data, ValidationData(config.data, tokenizer, train.sequence_tokens, vocabulary)

    def _tracker(self, extra: dict[str, Any] | None, shape: Architecture) -> Tracker | NullTracker:
        """Write the run folder's facts and open the tracker, on rank 0."""
        hosts: list[Any] = [None] * self.here.world
        dist.all_gather_object(hosts, socket.gethostname())

        def open_tracker() -> Tracker | NullTracker:
            try:
                return self._open_tracker(extra, shape, hosts)
            except OSError as error:
                raise _with_place(error, self.folder) from error

        return launch.together(open_tracker)

    def _open_tracker(
        self, extra: dict[str, Any] | None, shape: Architecture, hosts: list[str]
    ) -> Tracker | NullTracker:
        config, here, folder = self.config, self.here, self.folder
        if not here.is_first:
            return NullTracker()
        device = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu"
        facts = model_facts(config, self.layout, shape)
        folder.write_config(config_yaml(config))
        folder.write_environment({**describe_environment(device, hosts), "layout": dataclasses.asdict(self.layout)})
        folder.write_model(facts)
        tracker = Tracker(
            folder.path,
            config.tracking,
            extra["tracking"] if extra is not None else None,
            name=self.name,
            total_steps=config.train.steps,
            run_config=plain(dataclasses.asdict(config)),
            label="forced balance: a benchmark, not training" if config.router.forced_balance else None,
        )
        tracker.info(
            f"{folder.path}: {facts['parameters_total']:,} parameters, {facts['parameters_active']:,} of them active "
            f"for a token; {here.world} x {device}"
        )
        return tracker

    def _meter(self, shape: Architecture) -> Meter:
        peak = peak_flops_per_second(self.here.device, self.config.train.compute_type(self.here.device.type))
        return Meter(
            training_flops_per_token(shape, self.config.train.sequence_tokens),
            peak * self.here.world if peak is not None else None,
        )


def _checkpoint(value: str) -> Path:
    """The checkpoint that `resume` names."""
    path = Path(value)
    if not (path / "meta.json").is_file():
        found = sorted(path.glob("**/step_*/meta.json"))
        hint = f"did you mean {found[-1].parent}?" if found else "use never, auto, or a path to step_00001000"
        raise ConfigError([f"resume={value} is not a checkpoint; {hint}"])
    return path


def _size(shape: Architecture) -> dict[str, int]:
    counts = count_parameters(shape)
    return {"parameters_total": counts.total, "parameters_active": counts.active}


# -- the end of a run ----------------------------------------------------------------------------------------------


def _finish(config: Config, trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder, here: Launch) -> None:
    """Evaluate, sample, write result.json, say where things lie and what to do next."""
    metrics = trainer.log_step(evaluate=True)
    sample = _sample(config, trainer, tokenizer)
    step, tracker = trainer.state.step, trainer.tracker
    checkpoint = trainer.checkpointer.latest()
    if not here.is_first:
        return
    folder.write_result({"step": step, "tokens": trainer.state.tokens, "checkpoint": str(checkpoint), **metrics})
    if sample is not None:
        tracker.text(step, [sample])
    lines = ["", f"finished at step {step}, {trainer.state.tokens:,} tokens"]
    for key, value in metrics.items():
        lines.append(f"  {key:45s} {value:.4f}")
    if sample is not None:
        # An untrained model writes any bytes, among them those that reprogram a terminal.
        shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in sample)
        lines += ["", "sample:", *(f"  {line}" for line in shown.split("\n"))]
    lines += [
        "",
        f"checkpoint  {checkpoint}",
        f"metrics     {folder.metrics}",
        f"generate    python scripts/generate.py {folder.path}",
        f"train on    the same command with resume=auto train.steps={2 * step}",
    ]
    for line in lines:
        tracker.info(line)


def _prompt(config: Config, tokenizer: Tokenizer, parts: int) -> list[int]:
    """Tokens that the sample starts from; refuses, before any training, a sample that cannot be made.

    Args:
        parts: equal parts that every sequence is cut into, after padding.
    """
    evaluation, limit = config.evaluation, config.model.max_sequence_tokens
    prompt = [int(token) for token in tokenizer.encode(evaluation.sample_prompt)]
    if evaluation.sample_tokens and not prompt:
        raise ValueError(f"evaluation.sample_prompt={evaluation.sample_prompt!r} has no token; give some text")
    length = len(prompt) + evaluation.sample_tokens
    if evaluation.sample_tokens and limit is not None and length + -length % parts > limit:
        raise ValueError(
            f"evaluation.sample_tokens={evaluation.sample_tokens} after a prompt of {len(prompt)} tokens is more than "
            f"model.max_sequence_tokens={limit}; lower sample_tokens, or set it to 0 for no sample"
        )
    return prompt


def _sample(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> str | None:
    """Continue the prompt; every rank takes part, for each may own experts that the text needs."""
    evaluation = config.evaluation
    if evaluation.sample_tokens == 0:
        return None
    prompt = _prompt(config, tokenizer, trainer.engine.layout.sequence_ranks)
    try:
        ids = generate(
            trainer.engine.logits,
            prompt,
            evaluation.sample_tokens,
            temperature=evaluation.sample_temperature,
            seed=config.train.seed,
            allowed_ids=tokenizer.vocab_size,
        )
    except FloatingPointError as error:  # on all ranks: they have the same logits
        trainer.tracker.warning(f"no sample: {error}")
        return None
    return tokenizer.decode([*prompt, *ids])

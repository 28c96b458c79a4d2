"""The training loop: one step you can read from top to bottom, evaluation, and stopping together."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_data.batch import TokenBatch
from moe_data.loader import TrainingData, ValidationData, merge_states
from moe_data.prefetch import Prefetcher
from moe_parallel import launch
from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.engines.engine import Engine
from moe_parallel.meter import Meter, peak_memory_bytes
from moe_parallel.optim import OptimConfig, learning_rate
from moe_parallel.statistics import StepSums, expert_metrics
from moe_parallel.stop import Stopped, StopSignal
from moe_parallel.tracking import NullTracker, Tracker, TrackingConfig
from moe_parallel.train_options import EvaluationConfig, Nonfinite, TrainConfig


class BadData(ValueError):
    """Some rank could not read its part of a batch; raised on all ranks with that rank's words."""


class NonfiniteError(RuntimeError):
    """A NaN or infinite loss or gradient, with the first layer that produced one."""


@dataclass
class TrainState:
    """What changes from step to step besides weights and optimizer."""

    step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class TrainerConfig:
    """The option sections that the loop reads."""

    train: TrainConfig
    optim: OptimConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    prefetch_steps: int


class Trainer:
    """Runs the loop on one rank. All ranks call every method in the same order."""

    def __init__(
        self,
        *,
        config: TrainerConfig,
        engine: Engine,
        data: TrainingData,
        validation: ValidationData,
        tracker: Tracker | NullTracker,
        checkpointer: Checkpointer,
        identity: dict[str, Any],
        meter: Meter,
        stop: StopSignal,
    ) -> None:
        self.config = config
        self.engine = engine
        self.data = data
        self.validation = validation
        self.tracker = tracker
        self.checkpointer = checkpointer
        self.identity = identity
        self.meter = meter
        self.stop = stop
        self.rank, self.world = engine.layout.batch_rank(dist.get_rank()), engine.layout.batch_ranks
        """Which part of each batch this rank reads, and how many parts there are."""
        self.copies = engine.layout.ranks // self.world
        """Ranks that read the same part."""
        self.num_micro_batches, self.micro_batch_sequences = config.train.micro_batches(self.world)
        self.state = TrainState()
        self.data_state = data.state_dict()
        self.unlogged: dict[str, float] = {}
        """Metrics of a step that is still to be evaluated: its one line in metrics.jsonl has both."""
        self._saved_step: int | None = None

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the current state to the last step and save; the last step is left to be evaluated and logged.

        Raises:
            Stopped: when told to leave, after saving.
            ValueError: data of a later step cannot be read; steps taken until then are saved.
        """
        state, total, first_step = self.state, self.config.train.steps, self.state.step
        prefetcher = Prefetcher(
            self.data,
            start_step=first_step,
            end_step=total,
            rank=self.rank,
            world=self.world,
            micro_batch_sequences=self.micro_batch_sequences,
            num_micro_batches=self.num_micro_batches,
            depth=self.config.prefetch_steps,
        )
        try:
            if self.config.evaluation.at_start and first_step == 0 and self._saved_step is None:
                self.tracker.log(0, 0, self.evaluate())
            if self.unlogged and first_step < total:  # an earlier run ended between the step and its evaluation
                self.log_step(evaluate=True)
            while state.step < total:
                started = time.perf_counter()
                batches, num_targets, num_valid = self._next(prefetcher)
                if state.step == first_step and self.config.train.dry_batch:
                    # A pipeline works on all of them at once, and its schedule needs so many.
                    self._dry_batch(batches if self.engine.layout.pp > 1 else batches[:1])
                    started = time.perf_counter()
                metrics = self.train_step(batches, num_targets, num_valid)
                self.data_state = prefetcher.state_dict()
                self.meter.add(num_valid, time.perf_counter() - started)
                self._after_step(metrics)
        except Stopped:
            self.save()
            raise
        except BadData:
            if state.step > first_step:
                self.save()
            raise
        finally:
            prefetcher.close()
        self.save()

    def train_step(self, batches: list[TokenBatch], num_targets: int, num_valid: int) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: whole sequences, on the host.
            num_targets, num_valid: of the whole global batch.
        Returns:
            Metrics, equal on all ranks.
        """
        state, engine, config = self.state, self.engine, self.config
        sums, estimate_error = engine.forward_backward(batches, state.step, num_targets, num_valid)
        totals = sums.summed(engine.group)
        norm = engine.gradient_norm()
        rate = learning_rate(config.optim, state.step, config.train.steps)
        loss, norm_value = float(totals.cross_entropy) / num_targets, float(norm)
        token_loss = float(engine.architecture.model.token_loss(totals.losses)) / num_targets
        if math.isfinite(loss) and math.isfinite(norm_value):
            engine.step(rate, norm)
            engine.update_routers(totals)
            state.skipped_in_a_row = 0
        else:
            engine.zero_grad()
            self._nonfinite(loss, norm_value, batches)
        state.step += 1
        state.tokens += num_valid
        metrics = {
            "loss/cross_entropy_nats": loss,
            "loss/total_nats": token_loss + float(totals.balance) / num_valid,
            "grad/norm": norm_value,
            "optim/learning_rate": rate,
            **expert_metrics(totals, num_valid, engine.pass_names()),
        }
        for number, further in enumerate(totals.mtp_cross_entropy_M.tolist(), start=1):
            metrics[f"loss/mtp_{number}_nats"] = further / num_targets
        if engine.architecture.balance.global_coefficient > 0 and engine.architecture.num_moe_layers > 0:
            metrics["balance/global_estimate_error"] = float(estimate_error)
        self._heat_map(totals)
        return metrics

    def _after_step(self, metrics: dict[str, float]) -> None:
        """Evaluate, log, save: whatever is due. The last step is saved before it is evaluated."""
        step, config = self.state.step, self.config
        last = step == config.train.steps
        self.checkpointer.poll()
        every = config.evaluation.every_steps
        evaluate = last or (every > 0 and step % every == 0)
        if evaluate or config.tracking.log_due(step, config.train.steps):
            metrics |= self.meter.take()
            metrics["memory/peak_GiB"] = self._most(peak_memory_bytes(self.engine.device) / 2**30)
            self.unlogged = metrics
        if last:
            return
        if self.unlogged:
            self.log_step(evaluate)
        if self.checkpointer.due(step):
            self.save()

    def log_step(self, evaluate: bool) -> dict[str, float]:
        """Write the line of the current step; returns what the evaluation found."""
        validation = self.evaluate() if evaluate else {}
        self.tracker.log(self.state.step, self.state.tokens, {**self.unlogged, **validation})
        self.unlogged = {}
        if (loss := validation.get("validation/cross_entropy_nats")) is not None:
            self.checkpointer.evaluated(self.state.step, loss)
        return validation

    def _dry_batch(self, batches: list[TokenBatch]) -> None:
        """Forward and backward without any effect but memory, so that a lack of it shows before step 1."""
        engine = self.engine
        before = engine.previous_count_LIE
        engine.forward_backward(batches, self.state.step, 1, 1)
        engine.previous_count_LIE = before
        engine.zero_grad()
        self._sum()

    def _nonfinite(self, loss: float, norm: float, batches: list[TokenBatch]) -> None:
        state = self.state
        state.skipped_in_a_row += 1
        where = None
        for batch in batches:
            where = where or self.engine.first_nonfinite_module(batch)
        place = f"first in {where}" if where else "in the backward pass only"
        what = f"step {state.step + 1}: loss {loss}, gradient norm {norm}, {place}"
        if self.config.train.nonfinite is Nonfinite.stop:
            raise NonfiniteError(f"{what}; resume with a lower optim.learning_rate, or set train.nonfinite=skip")
        if state.skipped_in_a_row >= 10:
            raise NonfiniteError(f"{what}; ten steps in a row were skipped")
        self.tracker.warning(f"{what}; skipped")

    # -- agreement -----------------------------------------------------------------------------------------------

    def _next(self, prefetcher: Prefetcher) -> tuple[list[TokenBatch], int, int]:
        """This rank's micro-batches of the next step; targets and valid tokens of the global batch.

        Raises on all ranks: Stopped if any of them was asked to stop, BadData if any could not read its part.
        """
        batches: list[TokenBatch] | None = None
        error: Exception | None = None
        try:
            batches = prefetcher.next(self.stop.requested)
        except (ValueError, OSError) as found:
            error = found
        mine = batches or []
        targets, valid, failed = self._sum(
            sum(b.num_targets for b in mine), sum(b.num_valid for b in mine), error is not None
        )
        if failed:
            raise BadData(launch.first_text(error))
        assert batches is not None
        return batches, targets // self.copies, valid // self.copies

    def _sum(self, *numbers: int) -> list[int]:
        """Sums over all ranks. Raises Stopped on all of them if any was asked to stop."""
        totals = torch.tensor([*numbers, self.stop.requested()], dtype=torch.float64)
        dist.all_reduce(totals)
        if totals[-1] > 0:
            raise Stopped
        return [int(total) for total in totals[:-1]]

    def _most(self, number: float) -> float:
        """The largest of all ranks."""
        most = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint of the current state; a step that is saved already is not saved again."""
        state, engine = self.state, self.engine
        if self._saved_step == state.step:
            return
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.data_state)
        parts = {self.engine.layout.batch_rank(rank): state for rank, state in enumerate(states)}
        extra = {
            "step": state.step,
            "tokens": state.tokens,
            "data": merge_states(list(parts.values())),
            "tracking": self.tracker.state(state.step - 1 if self.unlogged else state.step),
            "unlogged": self.unlogged,
            "previous_count": engine.previous_count_LIE,
        }
        progress = {"tokens": state.tokens, "next_sequence": state.step * self.config.train.global_batch_sequences}
        self.checkpointer.save(state.step, engine.checkpoint_state(), extra, self.identity, progress=progress)
        self._saved_step = state.step

    def restore(self, extra: dict[str, Any]) -> None:
        """Continue from what `save` kept besides model, optimizer and the place in the data."""
        self.state = TrainState(step=extra["step"], tokens=extra["tokens"])
        self._saved_step = self.state.step
        self.unlogged = extra["unlogged"]
        previous_LIE = self.engine.previous_count_LIE
        self.engine.previous_count_LIE = extra["previous_count"].to(self.engine.device).view_as(previous_LIE)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Validation loss per domain and over all; equal on all ranks. Raises Stopped between batches."""
        metrics: dict[str, float] = {}
        all_losses, all_targets = torch.zeros(1, dtype=torch.float64), 0
        for domain in self.validation.domains:
            losses, targets = self._domain_losses(domain)
            metrics[f"validation/{domain}/cross_entropy_nats"] = float(losses[0]) / targets
            all_losses, all_targets = all_losses + losses, all_targets + targets
        if all_targets:
            loss, *further = (all_losses / all_targets).tolist()
            metrics["validation/cross_entropy_nats"] = loss
            metrics |= {f"validation/mtp_{k}_cross_entropy_nats": value for k, value in enumerate(further, start=1)}
        return metrics

    def _domain_losses(self, domain: str) -> tuple[torch.Tensor, int]:
        """As `StepSums.losses`, of all ranks, and the number of targets."""
        sums = torch.zeros(2 + self.engine.architecture.model.mtp_layers, dtype=torch.float64)
        for batch in self.validation.batches(domain, self.rank, self.world, self.micro_batch_sequences):
            self._sum()
            part: StepSums = self.engine.evaluate(batch)
            sums[:-1] += part.losses.cpu()
            sums[-1] += batch.num_targets / self.copies
        dist.all_reduce(sums)
        return sums[:-1], round(float(sums[-1]))

    def _heat_map(self, totals: StepSums) -> None:
        if self.engine.architecture.num_moe_layers and self.config.tracking.heatmap_due(self.state.step):
            count_LE = totals.count_LE.cpu()
            load_LE = count_LE / count_LE.mean(-1, keepdim=True).clamp(min=1e-30)
            self.tracker.image(self.state.step, "experts/load", load_LE.tolist())

"""What every engine does for the loop: forward and backward over micro-batches, a norm, a step, routers, evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_data.batch import TokenBatch
from moe_parallel.checkpoint.state import TrainingState
from moe_parallel.collectives import gather_over, sum_over
from moe_parallel.mesh import Layout, ParallelMesh
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import InitConfig
from moe_parallel.moe.balance import GlobalEstimator
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routers.router import Router
from moe_parallel.moe.routing import ForwardContext, LayerStats, Ranks, normalized_counts
from moe_parallel.statistics import StepSums


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


class Engine(ABC):
    """Owns a model and its optimizer on this rank. All ranks call every method in the same order."""

    name: ClassVar[str]
    """What a checkpoint says of the engine that wrote it."""
    architecture: Architecture
    layout: Layout
    device: torch.device
    group: dist.ProcessGroup
    """All ranks of the run."""
    model: nn.Module
    """This rank's part of the model. Parameters have the names that they have in a whole `Transformer`."""
    layers: list[MoELayer]
    """MoE layers of this rank's part, in order."""
    optimizer: Optimizer
    previous_count_LIE: Tensor
    """float64: slots per expert of the previous step over all ranks, for the look-ahead of the global balance loss."""
    seed: int
    """Of random routing."""
    data: Ranks
    rows: Ranks
    sequence: Ranks
    """See `ForwardContext`."""
    stages: Ranks = Ranks()
    """Ranks that have the other layers of this one's tokens: the stages of its pipeline."""

    @abstractmethod
    def init_weights(self, init: InitConfig, seed: int) -> None:
        """Draw all weights; the same ones on every layout and engine."""

    @abstractmethod
    def forward_backward(
        self, batches: Sequence[TokenBatch], step: int, num_targets: int, num_valid: int
    ) -> tuple[StepSums, Tensor]:
        """Gradients of one global batch.

        Args:
            batches: micro-batches of this rank's `layout.batch_rank`: whole sequences, on the host.
            num_targets, num_valid: targets and valid tokens of the global batch, over all ranks and micro-batches.
        Returns:
            This rank's sums, and the mean error of the global loss's frequency estimate (L1, 0 to 2; 0 if unused).
        """

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients."""

    @abstractmethod
    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Clip by `norm`, take one optimizer step, drop the gradients."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def checkpoint_state(self) -> TrainingState:
        """What this rank holds of model and optimizer, for saving and loading."""

    @abstractmethod
    def evaluate(self, batch: TokenBatch) -> StepSums:
        """Sums of one batch, whole sequences on the host, without gradient; every rank must call it equally often."""

    @abstractmethod
    def logits(self, batch: TokenBatch) -> Tensor:
        """(B, S, V) on every rank, of the same batch on every rank; for generation."""

    @abstractmethod
    def first_nonfinite_module(self, batch: TokenBatch) -> str | None:
        """Name of the first module whose output is not finite on any rank, in the order of execution."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing but memory
        """Let go of what outlives the object, before the process group is left. Waits for no other rank."""

    def update_routers(self, totals: StepSums) -> None:
        """Move what routers keep from step to step: the bias of loss-free balancing, the cutoffs of thresholds.

        Args:
            totals: sums of the whole step over all ranks.
        """
        for layer in self.layers:
            rows: dict[Router, list[int]] = {}
            for iteration, router in enumerate(layer.routers):  # iterations may share one
                rows.setdefault(router, []).append(self.row(layer.layer, iteration))
            for router, mine in rows.items():
                observed_E = totals.observed_LE[mine].sum(0) / totals.observations_L[mine].sum().clamp(min=1)
                router.after_step(totals.count_LE[mine].sum(0), observed_E, self.architecture.balance)

    def context(self, step: int, training: bool) -> ForwardContext:
        """What all micro-batches of a step know."""
        return ForwardContext(
            step=step, training=training, data=self.data, rows=self.rows, sequence=self.sequence, seed=self.seed
        )

    def evaluation_context(self) -> ForwardContext:
        """Context of a pass that learns nothing and counts nothing for training."""
        return self.context(step=0, training=False)

    @property
    def counts_first(self) -> bool:
        """Several micro-batches need a pass that only counts, before the first that learns."""
        balance = self.architecture.balance
        return balance.global_coefficient > 0 and balance.global_estimator is GlobalEstimator.exact

    def row(self, layer: int, iteration: int) -> int:
        """Which row of `StepSums` a pass has."""
        return self.architecture.moe_layers.index(layer) * self.architecture.moe.chain.iterations + iteration

    def pass_names(self) -> list[str]:
        """Names of the passes of all mixture-of-experts layers of the model, in the order of the rows of `StepSums`."""
        iterations = self.architecture.moe.chain.iterations
        suffixes = [""] if iterations == 1 else [f"/iteration_{i}" for i in range(iterations)]
        return [f"layer_{layer}{suffix}" for layer in self.architecture.moe_layers for suffix in suffixes]

    def zero_sums(self) -> StepSums:
        """Empty sums of the right shape."""
        passes = self.architecture.num_moe_layers * self.architecture.moe.chain.iterations
        sizes = passes, self.architecture.moe.num_experts
        return StepSums.zeros(*sizes, self.device, self.architecture.model.mtp_layers)

    def add(self, sums: StepSums, cross_entropy: Tensor, stats: list[LayerStats]) -> None:
        """Add one micro-batch of this rank to `sums`."""
        sums.add(cross_entropy, stats, [self.row(s.layer, s.iteration) for s in stats])

    def zero_counts(self) -> Tensor:
        """float64 zeros: a number for each layer, iteration and expert."""
        moe = self.architecture.moe
        shape = (self.architecture.num_blocks, moe.chain.iterations, moe.num_experts)
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def ranks_by_tokens(mesh: ParallelMesh) -> tuple[Ranks, Ranks, Ranks]:
    """`data`, `rows` and `sequence` of `ForwardContext`."""
    data = ranks_of(mesh.stage_group)
    if mesh.layout.sequence_ranks == 1:
        return data, data, Ranks()
    return data, ranks_of(mesh.row_group), ranks_of(mesh.sequence_group)


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    """The ranks of a group, as routers and losses see them."""
    return Ranks(sum_over(group), gather_over(group), dist.get_rank(group), dist.get_world_size(group))


class StepPass:
    """One global batch: what each micro-batch may know of the others, and what they add up to on this rank."""

    def __init__(
        self,
        engine: Engine,
        batches: Sequence[TokenBatch],
        step: int,
        num_targets: int,
        num_valid: int,
        total_LIE: Tensor | None,
    ) -> None:
        """
        Args:
            batches: whole sequences of this rank's `batch_rank`.
            total_LIE: counts of the whole step, where they are known before it (`Engine.counts_first`).
        """
        self.sums = engine.zero_sums()
        self._engine, self._total_LIE = engine, total_LIE
        self._num_batches, self._num_targets, self._num_valid = len(batches), num_targets, num_valid
        self._seen_LIE = torch.zeros_like(engine.previous_count_LIE)
        self._used: list[tuple[tuple[int, int], Tensor]] = []
        num_tokens = sum(batch.token_BS.numel() for batch in batches) * engine.layout.batch_ranks
        self._context = replace(engine.context(step, training=True), no_padding=num_valid == num_tokens)

    def context(self, index: int) -> ForwardContext:
        """For the forward pass of a micro-batch. Those before it must have been counted."""
        if self._total_LIE is not None:
            return replace(self._context, prior_count_LIE=self._total_LIE, prior_is_total=True)
        remaining = (self._num_batches - index - 1) / self._num_batches
        prior_LIE = self._seen_LIE + self._engine.previous_count_LIE * remaining
        return replace(self._context, prior_count_LIE=prior_LIE)

    def count(self, cross_entropy: Tensor, stats: list[LayerStats]) -> Tensor:
        """Add what a micro-batch found on this rank; returns its part of the loss of the step, with gradient.

        Args:
            cross_entropy: as `Output.loss` gives it.
        """
        self._engine.add(self.sums, cross_entropy, stats)
        self._seen_LIE = self._seen_LIE.clone()
        loss = self._engine.architecture.model.token_loss(cross_entropy) / self._num_targets
        for layer in stats:
            loss = loss + layer.balance / self._num_valid
            if layer.step_count_E is not None:
                self._seen_LIE[layer.layer, layer.iteration] += layer.step_count_E
            if layer.used_frequency_E is not None:
                self._used.append(((layer.layer, layer.iteration), layer.used_frequency_E))
        return loss

    def finish(self) -> Tensor:
        """Keep this step's counts for the look-ahead of the next one. The mean L1 distance of the shares that the
        global loss used from those of the whole step."""
        stages = self._engine.stages
        seen_LIE = stages.sum(self._seen_LIE)
        self._engine.previous_count_LIE = seen_LIE
        true_LIE = normalized_counts(seen_LIE)
        errors = [(share_E - true_LIE[place]).abs().sum() for place, share_E in self._used]
        error, number = stages.sum(torch.stack([sum(errors, seen_LIE.new_zeros(())), seen_LIE.new_tensor(len(errors))]))
        return error / number.clamp(min=1)


class NonfiniteWatch:
    """Notes the first module of a forward pass whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.found: str | None = None
        self._handles = [m.register_forward_hook(self._hook(n)) for n, m in model.named_modules() if n]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
            if self.found is None and any(not bool(torch.isfinite(t).all()) for t in tensors):
                self.found = name

        return hook

    def first(self, group: dist.ProcessGroup, stage_of: Callable[[str], int] = lambda name: 0) -> str | None:
        """The first of all ranks' finds, in the order of the stages and then of the ranks. Ends the watch.

        Args:
            stage_of: number of the pipeline stage that a module is in.
        """
        for handle in self._handles:
            handle.remove()
        names: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, self.found, group=group)
        return min((name for name in names if name is not None), key=stage_of, default=None)

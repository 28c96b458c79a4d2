"""One rank of a run of any size: the real engine takes one real step under a watch, on fake tensors or on real ones.

Shapes, types, sharding, recomputation, autograd, FSDP and the optimizer are those of a run. On fake tensors collectives
return at once and nothing has a value, so a step that waits for the device fails here. The process must have no other
process group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from moe_data.batch import TokenBatch
from moe_kernels import moe_mlp
from moe_kernels.choice import PLAIN, Choice, ExpertKernel, Problem
from moe_parallel.engines.native import NativeEngine
from moe_parallel.engines.stages import legal_micro_batches, stage_plan
from moe_parallel.mesh import Compile, Layout, ParallelMesh, PipelineSchedule
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.options import Config, architecture
from moe_parallel.planner.cluster import ClusterConfig, Device
from moe_parallel.planner.live_bytes import Kind, Timeline, local, replaced
from moe_parallel.planner.watch import Phase, Watch, Watching, WithoutMemory
from moe_parallel.relations import check

DEEP = 32
"""Ranks with more layers take one micro-batch, to save time: the last, which finds the gradients of earlier ones.
Others take two at most: the first, and the last. A pipeline takes as many as fill it."""


@dataclass(frozen=True)
class Weight:
    """Shapes around one parameter."""

    name: str
    whole: tuple[int, ...]
    local: tuple[int, ...]
    gradient: tuple[int, ...] | None = None
    moments: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class RankTrace:
    """What one rank was seen to hold and to do in a step."""

    layout: Layout
    rank: int
    sequences: int
    """Of a micro-batch."""
    micro_batches: int
    """Of a step."""
    taken: int
    """Micro-batches that were run; the phases are theirs, and the last ones those of the last of the step."""
    weights: list[Weight]
    timeline: Timeline
    phases: list[Phase]
    kept_bytes: int = 0
    """What a micro-batch of a pipeline takes for the whole step: torch's schedules have buffers for each."""

    @property
    def peak_bytes(self) -> int:
        """Most that is alive at once, with all micro-batches of the step."""
        return self.timeline.peak_bytes + (self.micro_batches - self.taken) * self.kept_bytes


class WatchedEngine(NativeEngine):
    """An engine whose storages are seen from the first weight on.

    Meshes and shards are made outside of the mode, which they do not survive; memory is given within.
    """

    def __init__(self, mode: Watching | WithoutMemory, *args: Any, **kwargs: Any) -> None:
        self.mode, self.watch = mode, mode.watch
        super().__init__(*args, **kwargs)
        self.watch.purposes = group_purposes(self.mesh)

    def materialize(self) -> None:
        with self.mode:
            super().materialize()
        for parameter in self.model.parameters():
            self.watch.live.tag(parameter, Kind.weights)

    def _mine(self, batch: TokenBatch) -> TokenBatch:
        with _disable_current_modes():  # a part counts its targets, which needs values
            batch = super()._mine(batch)
        return _copied(batch)

    def make_optimizer_state(self) -> None:
        """As a first step would; leaves gradients of zeros behind."""
        with self.mode:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        self.tag_optimizer_state()

    def tag_optimizer_state(self) -> None:
        for state in self.optimizer.state.values():
            for tensor in state.values():
                self.watch.live.tag(tensor, Kind.optimizer)

    def watched_step(self, batches: list[TokenBatch], step: int) -> dict[str, tuple[int, ...]]:
        """One whole step, as the trainer takes it. Returns the shapes of the gradients."""
        targets = sum(batch.num_targets for batch in batches) * self.layout.batch_ranks
        valid = sum(batch.num_valid for batch in batches) * self.layout.batch_ranks
        began = 0

        def forward(*_: Any) -> None:
            nonlocal began
            self.watch.phase(f"forward {began}")
            began += 1

        passed: list[nn.Module] = [self.model] if self.pipeline is None else list(self.pipeline.stages.values())
        handles = [module.register_forward_pre_hook(forward, prepend=True) for module in passed]
        for module in passed:
            handles.append(module.register_forward_hook(lambda *_: self.watch.phase(f"backward {began - 1}")))
        with ExitStack() as stack:
            if self.pipeline is not None:
                finish = self.pipeline._add_shared_gradients

                def after_all_passes() -> None:
                    self.watch.phase("end")
                    finish()

                stack.enter_context(replaced(self.pipeline, "_add_shared_gradients", after_all_passes))
            stack.enter_context(self.mode)
            stack.enter_context(self.watch.on())
            if self.pipeline is not None:
                self.watch.phase("start")
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.watch.live.tag(parameter.grad, Kind.gradients)
            sums, _ = self.forward_backward(batches, step, targets, valid)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.watch.live.tag(parameter.grad, Kind.gradients)
            self.watch.phase("optimizer")
            totals, norm = sums.summed(self.group), self.gradient_norm()
            gradients = {n: tuple(local(p.grad).shape) for n, p in self.model.named_parameters() if p.grad is not None}
            self.step(self.optim.learning_rate, norm)
            self.update_routers(totals)
        for handle in handles:
            handle.remove()
        return gradients

    def weight(self, name: str, gradient: tuple[int, ...] | None = None) -> Weight:
        """Shapes of what this rank holds of a parameter."""
        parameter = self.model.get_parameter(name)
        state = self.optimizer.state.get(parameter, {})
        moments = tuple(tuple(local(t).shape) for t in state.values() if t.ndim > 0)
        return Weight(name, tuple(parameter.shape), tuple(local(parameter).shape), gradient, moments)


def group_purposes(mesh: ParallelMesh) -> Mapping[tuple[str, str], str]:
    """What each collective among a group of the mesh is for; of groups of the same ranks torch may make one."""
    tp, cp, stages = mesh.tp_group.group_name, mesh.cp_group.group_name, mesh.pp_group.group_name
    named: dict[tuple[str, str], str] = {(op, tp): "tp" for op in ("all_gather", "reduce_scatter")}
    named[("all_to_all", cp)] = "cp"
    return named | {("all_to_all", mesh.ep.get_group().group_name): "experts", ("send", stages): "stages"}


def plan_rank(
    config: Config, cluster: ClusterConfig, rank: int, *, imbalance: float = 1.0, run: bool = True
) -> RankTrace:
    """Run one rank of `config` on the ranks that it names, on fake tensors.

    Args:
        imbalance: rows of this rank's experts over the mean of the ranks.
        run: take a step; otherwise only build and shard.
    """
    ranks = config.parallel.ranks
    assert ranks is not None
    layout = check(config, ranks)
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        config = plannable(config)
        watch = Watch(cluster)
        engine = build(WithoutMemory(watch), config, layout, cluster)
        sequences, length = balanced_sequences(config, layout), config.train.sequence_tokens
        taken = micro_batches_to_run(config, layout, len(engine.model.blocks))
        gradients: dict[str, tuple[int, ...]] = {}
        if run:
            engine.make_optimizer_state()
            if taken == micro_batches or layout.pp > 1:
                engine.zero_grad()
            with stand_ins(cluster.device, imbalance):
                batches = [even_batch(sequences, length) for _ in range(taken)]
                gradients = engine.watched_step(batches, step=1)
        weights = [engine.weight(name, gradients.get(name)) for name, _ in engine.model.named_parameters()]
        timeline = watch.live.timeline() if run else Timeline([], {}, [], 0, {}, 0)
        kept = watch.live.kept_bytes() // taken if run and layout.pp > 1 else 0
        return RankTrace(layout, rank, sequences, micro_batches, taken, weights, timeline, watch.phases, kept)
    finally:
        dist.destroy_process_group()


def micro_batches_to_run(config: Config, layout: Layout, layers: int) -> int:
    """Enough to see what a step holds and does."""
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    if layout.pp == 1:
        return min(micro_batches, 1 if layers > DEEP else 2)
    # With two more, gradients of the first wait while as many as ever are in flight.
    fills = layout.pp * (1 if config.parallel.schedule is PipelineSchedule.one_f_one_b else 2) + 2
    legal = (n for n in range(min(fills, micro_batches), micro_batches) if legal_micro_batches(config.parallel, n))
    return next(legal, micro_batches)


def layers_to_run(config: Config, layout: Layout, rank: int) -> int:
    """Layers times micro-batches: what a run of one rank costs."""
    part = stage_plan(config.parallel, config.model.num_layers).part_of(rank // layout.stage_ranks)
    return len(part.layers) * micro_batches_to_run(config, layout, len(part.layers))


def plannable(config: Config) -> Config:
    """The same with slots dealt out evenly, which the host knows without asking a device, and nothing compiled."""
    return dataclasses.replace(
        config,
        router=dataclasses.replace(config.router, forced_balance=True),
        parallel=dataclasses.replace(config.parallel, compile=Compile.none),
    )


def build(mode: Watching | WithoutMemory, config: Config, layout: Layout, cluster: ClusterConfig) -> WatchedEngine:
    """The engine as a run makes it."""
    return WatchedEngine(
        mode,
        architecture(config, tokenizer_vocabulary=None if config.model.vocab_size else 257),
        ParallelMesh(layout, "cpu"),
        config.parallel,
        config.optim,
        torch.device("cpu"),
        config.train.compute_type(cluster.device.value),
        dispatch=config.dispatch,
        seed=config.train.seed,
    )


def balanced_sequences(config: Config, layout: Layout) -> int:
    """Sequences of a micro-batch: the config's, or the next number whose slots all experts can share evenly."""
    _, sequences = config.train.micro_batches(layout.batch_ranks)
    tokens = config.train.sequence_tokens // layout.sequence_ranks
    while sequences * tokens * config.router.top_k % config.moe.num_experts != 0:
        sequences += 1
    return sequences


def even_batch(rows: int, length: int) -> TokenBatch:
    """One document a sequence; without padding."""
    table, column = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return TokenBatch(
        token_BS=table,
        target_BS=table,
        position_BS=table,
        document_BS=table,
        sequence_B=column,
        source_B=column,
        document_lengths=((length,),) * rows,
        num_targets=rows * length,
        num_valid=rows * length,
    )


def _copied(batch: TokenBatch) -> TokenBatch:
    """A batch of the host, as it arrives on a device."""
    moved: dict[str, Any] = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **moved, whole=None if batch.whole is None else _copied(batch.whole))


# -- where a GPU would run another operation than the CPU that plans for it ----------------------------------------


@contextmanager
def stand_ins(device: Device, imbalance: float) -> Iterator[None]:
    """Let fake tensors on a CPU meet what a GPU runs, and this rank's experts more rows than others."""
    with ExitStack() as stack:
        if device is Device.cuda:
            stack.enter_context(replaced(moe_mlp, "choose", _grouped_mm))
            stack.enter_context(replaced(F, "rms_norm", lambda x, shape, weight, eps: _Norm.apply(x, weight)))
        _make_schedules_plannable(stack)
        if imbalance != 1:
            even = AllToAllDispatcher._sizes

            def uneven(self: AllToAllDispatcher, routing: Any) -> Any:
                sizes = even(self, routing)
                arriving = [[[round(imbalance * n) for n in row] for row in chunk] for chunk in sizes.arriving]
                return dataclasses.replace(sizes, arriving=arriving)

            stack.enter_context(replaced(AllToAllDispatcher, "_sizes", uneven))
        yield


def _grouped_mm(how: ExpertKernel, problem: Problem, table: object) -> Choice:
    """What a GPU takes for bf16; alignment is checked by the fake kernel itself."""
    return Choice(ExpertKernel.grouped_mm, PLAIN, "for a plan")


class _Norm(torch.autograd.Function):
    """Memory and traffic of the one kernel that `rms_norm` is on a GPU; its values are not those of a norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.addcmul(grad, x, x), weight.new_zeros(weight.shape)


class _Sent:
    """A message on its way, which keeps its tensors as a real one does."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def wait(self, *_: Any) -> bool:
        return True


def _make_schedules_plannable(stack: ExitStack) -> None:
    """Without the one value that torch's schedules ask a tensor for: a vote on shapes, which are known here. Messages
    hold what they send."""

    def all_static(self: Any, stages: list[Any], *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    send = dist.ProcessGroup.send

    def held(group: Any, tensors: list[Tensor], *args: Any) -> Any:
        send(group, tensors, *args)
        return _Sent(tensors)

    stack.enter_context(replaced(dist.ProcessGroup, "send", held))
    for schedule in (PipelineScheduleSingle, PipelineScheduleMulti):
        stack.enter_context(replaced(schedule, "_warmup_p2p", all_static))

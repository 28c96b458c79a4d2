"""One rank of a run of any size, without memory: a fake process group for its ranks, fake tensors for its numbers.

Shapes, types, sharding, autograd, FSDP and the optimizer are the real ones; collectives return at once. A fake tensor
has no value, so a step that waits for the device fails here. Call `run` in a process without another process group.
"""

from __future__ import annotations

import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_data.batch import TokenBatch
from moe_kernels import moe_mlp
from moe_kernels.choice import PLAIN, Choice, ExpertKernel, Problem
from moe_parallel import options, relations
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import Layout, ParallelMesh

CONFIGS = Path(__file__).parents[2] / "configs"
DEEP = 32
"""Models of more layers run one micro-batch, to save time; others two at most: the first, which waits, and the last."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: overrides as on the command line, and which of the ranks."""

    name: str
    overrides: tuple[str, ...]
    place: float = 0.0
    """0 is the first rank, 1 the last."""
    few_ranks: bool = False
    """The config names no number of ranks: take the fewest that split and shard the experts, and one sequence each."""
    step: bool = True
    """Run a step; otherwise only build and shard."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shapes around one parameter."""

    name: str
    whole: tuple[int, ...]
    local: tuple[int, ...]
    gradient: tuple[int, ...] | None = None
    moments: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Planned:
    """What was seen on one rank."""

    config: options.Config
    layout: Layout
    rank: int
    rows: int
    """Sequences of a micro-batch."""
    micro_batches: int
    weights: list[Weight]
    sent_bytes: list[int]
    """Bytes that each all-to-all sent, in order."""
    gathered_bytes: list[int]
    """Bytes of each all-gather."""
    reduced_bytes: list[int]
    """Bytes of each reduce-scatter."""
    peak_bytes: int
    """Most bytes of tensors that were alive at once."""
    seconds: float


def load(overrides: tuple[str, ...]) -> options.Config:
    """Compose and convert exactly as train.py does."""
    return options.composed(list(overrides), CONFIGS)


def load_plan(plan: Plan) -> options.Config:
    """The config of a plan, with its number of ranks."""
    config = load(plan.overrides)
    if not plan.few_ranks:
        return config
    ep = next(d for d in range(2, config.moe.num_experts + 1) if config.moe.num_experts % d == 0)
    ranks, length = 2 * ep, config.train.sequence_tokens
    return load((
        *plan.overrides, f"parallel.ranks={ranks}", f"parallel.ep={ep}", f"train.global_batch_tokens={ranks * length}"
    ))  # fmt: skip


class PlannedEngine(NativeEngine):
    """Meshes and shards are made outside of the fake mode, which they do not survive; memory is given within."""

    def materialize(self) -> None:
        self.without_memory = WithoutMemory()
        with self.without_memory:
            super().materialize()


def run(plan: Plan) -> Planned:
    """Build, shard, and run one optimizer step."""
    started = time.perf_counter()
    config = load_plan(plan)
    ranks = config.parallel.ranks
    assert ranks is not None
    layout = relations.check(config, ranks)
    rank = round(plan.place * (ranks - 1))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        # Splits that the host knows: a fake tensor has none to tell. Not in the shipped config, hence set after checks.
        config = dataclasses.replace(config, router=dataclasses.replace(config.router, forced_balance=True))
        engine = PlannedEngine(
            options.architecture(config, tokenizer_vocabulary=257),
            ParallelMesh(layout, "cpu"),
            config.parallel,
            config.optim,
            torch.device("cpu"),
            torch.bfloat16,
            dispatch=config.dispatch,
        )
        rows, accumulated = balanced_rows(config, ranks), config.train.micro_batches(ranks)[0]
        count = min(accumulated, 1 if config.model.num_layers > DEEP else 2)
        if plan.step:
            weights = _step(engine, config, rows, count)
            if count == 1 < accumulated:  # later micro-batches find the gradients of earlier ones
                engine.without_memory.measured_bytes += 4 * sum(math.prod(weight.local) for weight in weights)
        else:
            weights = [_weight(engine, name) for name, _ in engine.model.named_parameters()]
    finally:
        dist.destroy_process_group()
    seen = engine.without_memory
    seconds = time.perf_counter() - started
    return Planned(
        config,
        layout,
        rank,
        rows,
        count,
        weights,
        seen.sent_bytes,
        seen.gathered_bytes,
        seen.reduced_bytes,
        seen.measured_bytes,
        seconds,
    )


def balanced_rows(config: options.Config, ranks: int) -> int:
    """Sequences of a micro-batch: the config's, or the next number whose slots all experts can share evenly."""
    _, rows = config.train.micro_batches(ranks)
    while rows * config.train.sequence_tokens * config.router.top_k % config.moe.num_experts != 0:
        rows += 1
    return rows


def _step(engine: PlannedEngine, config: options.Config, rows: int, count: int) -> list[Weight]:
    length, ranks = config.train.sequence_tokens, engine.mesh.layout.ranks
    tokens = count * rows * length * ranks
    on_gpu = mock.patch.object(moe_mlp, "choose", _choose_for_gpu)
    seen = engine.without_memory
    with seen.measuring(), on_gpu:
        sums, _ = engine.forward_backward([_batch(rows, length) for _ in range(count)], 0, tokens, tokens)
        totals, norm = sums.summed(engine.group), engine.gradient_norm()
        gradients = {name: _shape(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
    with seen:
        engine.step(config.optim.learning_rate, norm)
        engine.update_routers(totals)
    # Adam's moments exist from the first step on, so every later forward pass runs beside them.
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.ndim > 0]
    seen.measured_bytes += sum(_local(t).nbytes for t in moments)
    return [_weight(engine, name, gradients.get(name)) for name, _ in engine.model.named_parameters()]


def _choose_for_gpu(how: ExpertKernel, problem: Problem, table: object) -> Choice:
    """What a GPU takes for bf16; alignment is checked by the fake kernel itself."""
    return Choice(ExpertKernel.grouped_mm, PLAIN, "for a plan")  # not a mock, which would keep its arguments alive


def _batch(rows: int, length: int) -> TokenBatch:
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


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(_local(tensor).shape)


def _weight(engine: NativeEngine, name: str, gradient: tuple[int, ...] | None = None) -> Weight:
    parameter = engine.model.get_parameter(name)
    state = engine.optimizer.state.get(parameter, {})
    moments = tuple(_shape(t) for t in state.values() if t.ndim > 0)
    return Weight(name, tuple(parameter.shape), _shape(parameter), gradient, moments)


class WithoutMemory(FakeTensorMode):
    """Makes tensors that have no memory, and counts what they would take; also what all-to-alls send.

    Views count once. Allocators, collectives and kernels would take more.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.measured_bytes = 0
        """Most that was alive at once while measuring."""
        self.sent_bytes: list[int] = []
        """Of each all-to-all, in order."""
        self.gathered_bytes: list[int] = []
        """Of each all-gather, all ranks together."""
        self.reduced_bytes: list[int] = []
        """Of each reduce-scatter, before it."""
        self._now = self._peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The mode, and an eye on FSDP, which empties storages without an operator that tells of it."""
        self._peak = self._now
        with self, ExitStack() as stack:
            for module in (_fsdp_param, _fsdp_param_group):
                for name in ("free_storage", "alloc_storage"):
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, self._resizing(getattr(module, name))))
            yield
        self.measured_bytes = self._peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.c10d.alltoall_base_.default:
            self.sent_bytes.append(args[1].nbytes)
        elif func is torch.ops.c10d._allgather_base_.default:
            self.gathered_bytes.append(args[0].nbytes)
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced_bytes.append(args[1].nbytes)
        for one in out if isinstance(out, list | tuple) else (out,):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage not in self._sizes:
            size = self._sizes[storage] = [0]
            weakref.finalize(storage, self._set, size, 0)
            self._set(size, storage.nbytes())

    def _set(self, size: list[int], value: int) -> None:
        self._now += value - size[0]
        size[0] = value
        self._peak = max(self._peak, self._now)

    def _resizing(self, resize: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def call(tensor: Tensor) -> None:
            resize(tensor)
            storage = tensor.untyped_storage()
            self._set(self._sizes[storage], storage.nbytes())

        return call

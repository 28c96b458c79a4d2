"""What a rank does, operation by operation: bytes alive, messages by group of ranks, FLOPs and traffic of its memory.

`Watching` looks on while a real step runs. `WithoutMemory` makes tensors that have a shape and no memory, so that a
step of any size runs anywhere; it looks on in the same way.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moe_parallel.measured import FORMULAS
from moe_parallel.planner.cluster import ClusterConfig
from moe_parallel.planner.live_bytes import Kind, LiveBytes, storage_bytes, tensors_in

_c10d = torch.ops.c10d
COLLECTIVES: dict[Any, tuple[str, int, int]] = {
    _c10d.alltoall_base_.default: ("all_to_all", 1, 2),
    _c10d._allgather_base_.default: ("all_gather", 0, 2),
    _c10d.allgather_.default: ("all_gather", 0, 2),
    _c10d._reduce_scatter_base_.default: ("reduce_scatter", 1, 2),
    _c10d.allreduce_.default: ("all_reduce", 0, 1),
    _c10d.broadcast_.default: ("broadcast", 0, 1),
    _c10d.send.default: ("send", 0, 1),
}
"""Name, and which arguments are the tensors whose bytes count and the group: what a gather returns, a scatter or sum
takes, an all-to-all or send sends."""

_FREE = ("prim", "profiler", "c10d", "aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")
"""Operations that touch no number. Views are told by their own property."""
_LOOKUPS = ("aten.embedding.", "aten.index_select", "aten.gather", "aten.index.")
"""Operations that read of their first operand only what they return."""


@dataclass(frozen=True)
class Message:
    """One kind of collective among one group of ranks."""

    op: str
    purpose: str
    """What for: a name of `purposes`, or "sums" for the small ones of counts and norms."""
    ranks: tuple[int, ...]


@dataclass
class Amount:
    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0
    sizes: Counter[int] = field(default_factory=Counter)
    """Calls by their bytes."""

    def add(self, num_bytes: int, seconds: float) -> None:
        self.calls, self.bytes, self.seconds = self.calls + 1, self.bytes + num_bytes, self.seconds + seconds
        self.sizes[num_bytes] += 1


@dataclass
class Operations:
    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    """Read and written, without caches."""
    seconds: float = 0.0


@dataclass
class Phase:
    """A forward or backward pass of a micro-batch, or the optimizer's step."""

    name: str
    operations: dict[str, Operations] = field(default_factory=lambda: defaultdict(Operations))
    """By kind: matmul, attention, experts, other."""
    messages: dict[Message, Amount] = field(default_factory=lambda: defaultdict(Amount))

    @property
    def compute_seconds(self) -> float:
        return sum(part.seconds for part in self.operations.values())


class Watch:
    """Keeps the account of one rank."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.live = LiveBytes()
        self.phases: list[Phase] = []
        self.purposes: Mapping[tuple[str, str], str] = {}
        """Of a collective among a process group, by their names. What FSDP does is known without."""
        self._on = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count in here; storages are seen outside as well."""
        self.phases, self._on = [], True
        with self.live.with_fsdp():
            yield
        self._on = False

    def phase(self, name: str) -> None:
        """What follows belongs to it."""
        self.live.phase(name)
        self.phases.append(Phase(name))

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation that was run."""
        if self.live.in_theory:
            return
        self.live.time += 1
        for tensor in tensors_in(out):
            self.live.see(tensor)
        if func in COLLECTIVES:
            self._message(func, args)
        elif self._on and self.phases and not (func.is_view or str(func).startswith(_FREE)):
            self._operation(func, args, kwargs or {}, out)

    def _message(self, func: Any, args: Any) -> None:
        op, place, group_place = COLLECTIVES[func]
        group = dist.ProcessGroup.unbox(args[group_place])
        ranks = tuple(dist.get_process_group_ranks(group))
        purpose = "weights" if self.live.in_fsdp else self.purposes.get((op, group.group_name), "sums")
        for tensor in tensors_in(args[:group_place]):
            self.live.mark_exchanged(tensor)
            if purpose == "weights":
                self.live.tag(tensor, Kind.gathered)
        if self._on and self.phases:
            num_bytes = sum(t.numel() * t.element_size() for t in tensors_in(args[place]))
            # The fullest rank of experts gets more than it sends, or sends more: the larger way takes the time.
            most = max(num_bytes, args[0].nbytes) if op == "all_to_all" else num_bytes
            seconds = self.cluster.collective_seconds(op, most, self.cluster.span(ranks))
            self.phases[-1].messages[Message(op, purpose, ranks)].add(num_bytes, seconds)

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        kind, flops = _work(func, args, kwargs, out)
        outputs = list(tensors_in(out))
        if str(func).startswith(_LOOKUPS):
            num_bytes = sum(2 * storage_bytes(t) for t in outputs)
        else:
            touched = {id(t): t for t in (*tensors_in(args), *tensors_in(list(kwargs.values())), *outputs)}
            num_bytes = sum(storage_bytes(t) for t in touched.values())
        cluster = self.cluster
        efficiency = {"attention": cluster.attention_efficiency, "experts": cluster.expert_efficiency}
        element_bytes = outputs[0].element_size() if outputs else 2
        products = cluster.product_seconds(flops, efficiency.get(kind, cluster.matmul_efficiency), element_bytes)
        total = self.phases[-1].operations[kind]
        total.calls += 1
        total.flops += flops
        total.bytes += num_bytes
        total.seconds += max(products, cluster.memory_seconds(num_bytes), cluster.kernel_microseconds * 1e-6)


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, float]:
    """Kind and FLOPs of an operation. Causal attention is half of the square that torch counts."""
    packet = func._overloadpacket
    formula: Callable[..., int] | None = flop_registry.get(packet)
    if formula is not None:
        return "matmul", formula(*args, **kwargs, out_val=out)
    if packet not in FORMULAS:
        return "other", 0.0
    shapes = [_shape(value) for value in args]
    count: Any = FORMULAS[packet]
    flops = count(*shapes, out_shape=_shape(out))
    if "attention" not in str(packet):
        return "experts", flops
    place = 7 if "backward" in str(packet) else 4
    causal = args[place] if len(args) > place else kwargs.get("is_causal", False)
    return "attention", flops / 2 if causal else flops


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return [_shape(item) for item in value] if isinstance(value, list | tuple) else value


class Watching(TorchDispatchMode):
    """Looks on at what really runs."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch.saw(func, args, kwargs, out)
        return out


class WithoutMemory(FakeTensorMode):
    """Runs without memory and without values, and looks on."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.watch.saw(func, args, kwargs, out)
        return out

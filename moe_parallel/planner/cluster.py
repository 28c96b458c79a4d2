"""What a plan must know of the machines: their number, their rates, and how long a collective takes on them.

Rates are those of data sheets, in their units (GB: 10^9 bytes); efficiencies say what of them is reached. Both are
options: measured rates take the place of the sheet's with an efficiency of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from enum import Enum

from pydantic.dataclasses import dataclass

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6


class Device(str, Enum):
    cuda = "cuda"
    """NVIDIA GPUs: bfloat16 where train.dtype=auto; experts by grouped_mm, norms by one kernel."""
    cpu = "cpu"
    """Processes of a CPU: float32 where train.dtype=auto."""


@dataclass(kw_only=True)
class ClusterConfig:
    device: Device = Device.cuda
    """What computes."""
    name: str = "unnamed"
    """What to call it in reports."""
    nodes: int = 1
    """Machines."""
    ranks_per_node: int = 8
    """GPUs, or processes, of a machine."""
    memory_GB: float = 80.0
    """Memory of one rank, in 10^9 bytes."""
    usable_memory: float = 0.9
    """Part of it that a plan may fill: the rest is the allocator's slack, buffers of collectives, the context."""
    memory_GB_per_second: float = 1000.0
    """What one rank reads and writes of its memory."""
    bfloat16_TFLOPS: float = 100.0
    """10^12 floating-point operations of dense bfloat16 products a second and rank."""
    float32_TFLOPS: float = 10.0
    """The same in float32, without reduced precision."""
    link_GB_per_second: float = 100.0
    """Of one rank to the others of its node, in one direction (NVLink with NVSwitch)."""
    network_GB_per_second: float = 10.0
    """Of one rank to other nodes, in one direction."""
    link_microseconds: float = 5.0
    """Latency of a message within a node."""
    network_microseconds: float = 15.0
    """Latency of a message between nodes."""
    message_microseconds: float = 0.5
    """What each further message of an all-to-all costs its sender."""
    kernel_microseconds: float = 4.0
    """Least time of an operation, however small."""
    matmul_efficiency: float = 0.7
    """Part of the peak that large matrix products reach."""
    attention_efficiency: float = 0.5
    """Part of the peak that attention reaches."""
    expert_efficiency: float = 0.6
    """Part of the peak that grouped products of the experts reach."""
    memory_efficiency: float = 0.8
    """Part of the memory's rate that element-wise operations reach."""
    link_efficiency: float = 0.8
    """Part of the links' rate that collectives reach."""
    network_efficiency: float = 0.8
    """Part of the network's rate that collectives reach."""
    overlap: float = 0.8
    """Part of the computation beside which collectives of weights and gradients can run."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        for name, value in vars(self).items():
            fraction = name.endswith("_efficiency") or name in ("usable_memory", "overlap")
            if fraction and not 0 < value <= 1:
                raise ValueError(f"cluster.{name}={value} must lie in 0..1, and above 0; it is a part of the whole")
            if name.endswith(("_second", "_TFLOPS", "_GB")) and value <= 0:
                raise ValueError(f"cluster.{name}={value} must be positive")
            if name.endswith("_microseconds") and value < 0:
                raise ValueError(f"cluster.{name}={value} must not be negative")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def usable_bytes(self) -> float:
        """Of one rank."""
        return self.memory_GB * GIGA * self.usable_memory

    def span(self, ranks: Sequence[int]) -> Span:
        """Where the ranks of a group are."""
        nodes = {rank // self.ranks_per_node for rank in ranks}
        return Span(len(ranks), len(nodes))

    def strided(self, ranks: int, stride: int) -> Span:
        """Where so many ranks are, each `stride` after the one before."""
        nodes = ranks if stride >= self.ranks_per_node else (ranks - 1) * stride // self.ranks_per_node + 1
        return Span(ranks, nodes)

    def product_seconds(self, flops: float, efficiency: float, element_bytes: int = 2) -> float:
        """Of a matrix product whose operands come from the memory fast enough."""
        peak = self.bfloat16_TFLOPS if element_bytes == 2 else self.float32_TFLOPS
        return flops / (peak * TERA * efficiency)

    def memory_seconds(self, num_bytes: float) -> float:
        """To read or write so much."""
        return num_bytes / (self.memory_GB_per_second * GIGA * self.memory_efficiency)

    def collective_seconds(self, op: str, num_bytes: float, span: Span) -> float:
        """Of one collective, when nothing else uses the links.

        Within a node and between nodes at once, each way at its own rate; the slower one decides. Gathers, scatters and
        sums share the network adapters of a node among the group's ranks there, as hierarchical rings do; their latency
        grows with the logarithm of the group. An all-to-all sends each rank's part over its own adapter.

        Args:
            op: a name of `Traffic`.
            num_bytes: of the whole tensor: what a gather returns, a scatter or sum takes, a rank sends.
        """
        if span.ranks == 1:
            return 0.0
        link = self.link_GB_per_second * GIGA * self.link_efficiency
        network = self.network_GB_per_second * GIGA * self.network_efficiency
        here = span.ranks / span.nodes  # ranks of the group on a node
        latency = MICRO * (self.network_microseconds if span.nodes > 1 else self.link_microseconds)
        if op == "send":
            return latency + num_bytes / (network if span.nodes > 1 else link)
        outside = num_bytes * (span.nodes - 1) / span.nodes
        if op == "all_to_all":
            inside = num_bytes * (here - 1) / span.ranks
            messages = MICRO * self.message_microseconds * (span.ranks - 1)
            return latency + messages + max(inside / link, outside / network)
        rounds = 2 if op == "all_reduce" else 1
        inside = num_bytes * (span.ranks - 1) / span.ranks
        once = max(inside / link, outside / (network * here))
        return rounds * (latency * math.ceil(math.log2(span.ranks)) + once)


@plain_dataclass(frozen=True)
class Span:
    """How far a group of ranks reaches."""

    ranks: int
    nodes: int

    @property
    def link(self) -> str:
        """What its traffic crosses."""
        return "itself" if self.ranks == 1 else "within a node" if self.nodes == 1 else "across nodes"

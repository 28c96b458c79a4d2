"""Degrees of parallelism -> named axes. Dense and expert weights see the same ranks through two views.

dense view    (replicate, shard)                    replicate * shard = ranks
expert view   (expert_replicate, expert_shard, ep)  their product     = ranks

Every rank sees other tokens, so both views together are the data-parallel ranks; `ep` divides them again for the
experts. Gradients are summed over all ranks that hold the same weights, in either view.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass as plain_dataclass
from enum import Enum

import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Recompute(str, Enum):
    none = "none"
    """Keep every activation."""
    selective = "selective"
    """Compute the hidden activations of the routed experts again; repeats no communication."""
    full = "full"
    """Keep only the input of each block and compute the rest again; routing is replayed, not chosen again."""


class Compile(str, Enum):
    none = "none"
    """Run every operator by itself."""
    blocks = "blocks"
    """Fuse norms, projections, rotation and residual sum around the attention kernel of each block."""


@dataclass(kw_only=True)
class ParallelConfig:
    ranks: int | None = None
    """Processes this config is made for; null takes what the launcher starts. `dry_run` plans for this number."""
    ep: int = 1
    """Ranks that the experts of a layer are split over (expert parallelism)."""
    shard: int | None = None
    """Ranks that dense weights, gradients and optimizer state are split over (FSDP2); null means all, 1 replicates."""
    reshard_after_forward: bool = True
    """Free gathered weights after a block's forward pass and gather them again for backward, and reduce gradients over
    shards after every micro-batch instead of the last one: less memory, more traffic."""
    recompute: Recompute = Recompute.none
    """Which activations are computed again in the backward pass instead of kept."""
    compile: Compile = Compile.none
    """What torch.compile makes of the model. Results differ by rounding; the first steps take a minute more, and a
    compiler must be there: of C++ on a CPU, Triton on a GPU."""
    timeout_seconds: float = 600.0
    """A collective that waits longer than this ends the run with an error."""

    def check_compiler(self, device_type: str) -> None:
        """ValueError if a compiler is asked for that is not there."""
        if self.compile is Compile.none:
            return
        if device_type == "cpu":
            compiler = os.environ.get("CXX", "g++")
            missing = None if shutil.which(compiler) else f"the C++ compiler {compiler}; install it or set CXX"
        else:
            missing = None if importlib.util.find_spec("triton") else "the package triton; install it"
        if missing:
            raise ValueError(
                f"parallel.compile={self.compile.value} needs {missing}, or set parallel.compile={Compile.none.value}"
            )


@plain_dataclass(frozen=True)
class Layout:
    """Degrees that multiply to the number of ranks, in both views."""

    ranks: int
    replicate: int
    shard: int
    expert_replicate: int
    expert_shard: int
    ep: int


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def make_layout(config: ParallelConfig, ranks: int, num_experts: int) -> Layout:
    """Work out all degrees, or say which relation does not hold and what would.

    Args:
        ranks: processes that run.
        num_experts: routed experts of a layer, which `ep` must divide.
    """
    if config.ranks is not None and config.ranks != ranks:
        raise ValueError(
            f"parallel.ranks={config.ranks} but the launcher started {ranks} processes; start {config.ranks} "
            "(torchrun --nproc-per-node, sbatch --nodes) or set parallel.ranks=null"
        )
    ep, shard = config.ep, ranks if config.shard is None else config.shard
    for name, degree in (("ep", ep), ("shard", shard)):
        if degree < 1 or ranks % degree != 0:
            raise ValueError(
                f"parallel.{name}={degree} does not divide the {ranks} ranks; legal values: {_divisors(ranks)}"
            )
    if num_experts % ep != 0:
        both = [d for d in _divisors(ranks) if num_experts % d == 0]
        raise ValueError(
            f"moe.num_experts={num_experts} is not divisible by parallel.ep={ep}; legal values of parallel.ep on "
            f"{ranks} ranks: {both}"
        )
    if shard % ep != 0 and ep % shard != 0:
        legal = [d for d in _divisors(ranks) if d % ep == 0 or ep % d == 0]
        raise ValueError(
            f"parallel.shard={shard} and parallel.ep={ep}: one must divide the other, so that experts and dense "
            f"weights can share the same ranks; legal values of parallel.shard: {legal}"
        )
    expert_shard = max(1, shard // ep)
    return Layout(
        ranks=ranks,
        replicate=ranks // shard,
        shard=shard,
        expert_replicate=ranks // (ep * expert_shard),
        expert_shard=expert_shard,
        ep=ep,
    )


class ParallelMesh:
    """The two views as device meshes. Needs an initialized process group of `layout.ranks` ranks."""

    def __init__(self, layout: Layout, device_type: str) -> None:
        self.layout = layout
        self._dense = init_device_mesh(
            device_type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard")
        )
        self._expert = init_device_mesh(
            device_type,
            (layout.expert_replicate, layout.expert_shard, layout.ep),
            mesh_dim_names=("expert_replicate", "expert_shard", "ep"),
        )

    @property
    def dense(self) -> DeviceMesh:
        """Mesh that FSDP uses for dense weights: 1-D, or 2-D with replicas."""
        return self._dense if self.layout.replicate > 1 else self._dense["shard"]

    @property
    def expert(self) -> DeviceMesh:
        """Mesh that FSDP uses for the experts of one `ep` rank: 1-D, or 2-D with replicas."""
        if self.layout.expert_replicate > 1:
            return self._expert["expert_replicate", "expert_shard"]
        return self._expert["expert_shard"]

    @property
    def ep(self) -> DeviceMesh:
        """The axis that experts are split over."""
        return self._expert["ep"]

    def node_groups(self, ranks_per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The two groups that divide `ep` by nodes: across them, ranks of this one's place in each, and within its own.

        `ep` is the innermost axis, so neighbors share a node. Every rank must call this; each call makes new groups.
        """
        layout = self.layout
        shape = (layout.ranks // layout.ep, layout.ep // ranks_per_node, ranks_per_node)
        nodes = init_device_mesh(
            self._expert.device_type, shape, mesh_dim_names=("expert_copy", "across_nodes", "within_node")
        )
        return nodes.get_group("across_nodes"), nodes.get_group("within_node")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """All ranks that see different tokens: all of them."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

"""Degrees of parallelism -> named axes. All weights and tokens see the same ranks, each through a view of its own.

                                                     the product of each is `ranks`
tokens          (pp, batch, cp, tp)                   who computes which tokens
split weights   (pp, replicate, shard, tp)            attention and dense networks
whole weights   (pp, replicate, shard * tp)           norms, routers, shared experts, embedding, head
experts         (pp, expert_replicate, expert_shard, ep)

`pp` cuts the model into stages. Within a stage every rank works on other tokens of the residual stream: `batch` divides
the rows of a batch, `cp` and `tp` divide each of its sequences. So the views of weights may cut the ranks of a stage in
any way, and experts need not know how attention is split (Megatron-Core calls it parallel folding, arXiv 2504.14960).
Gradients are summed over all ranks of a stage that hold the same weights, in every view.
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
    """Fuse norms, projections, rotation and residual sum around the attention kernel of each block. With tp > 1 the
    projections stand alone: their weights are gathered in between."""


class PipelineSchedule(str, Enum):
    one_f_one_b = "one_f_one_b"
    """torch's 1F1B: one forward, one backward, a stage on each rank."""
    interleaved = "interleaved"
    """torch's Interleaved1F1B (arXiv 2104.04473): several stages on each rank, smaller bubbles, more messages."""
    interleaved_zero_bubble = "interleaved_zero_bubble"
    """torch's InterleavedZeroBubble (arXiv 2401.10241): gradients of weights wait, and fill bubbles."""
    zero_bubble_v = "zero_bubble_v"
    """torch's ZBVZeroBubble (arXiv 2401.10241): the same, with the first stage and the last one on the first rank."""
    dual_pipe_v = "dual_pipe_v"
    """torch's DualPipeV (DeepSeek-V3): the same places, a forward of one micro-batch beside a backward of another."""

    @property
    def is_v(self) -> bool:
        """Stages go down the ranks and up again; otherwise in turns."""
        return self in (PipelineSchedule.zero_bubble_v, PipelineSchedule.dual_pipe_v)

    @property
    def splits_backward(self) -> bool:
        """Gradients of inputs and of weights are computed apart."""
        return self not in (PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved)


@dataclass(kw_only=True)
class ParallelConfig:
    ranks: int | None = None
    """Processes this config is made for; null takes what the launcher starts. `dry_run` plans for this number."""
    ep: int = 1
    """Ranks that the experts of a layer are split over (expert parallelism)."""
    pp: int = 1
    """Groups of ranks that the layers are divided over (pipeline parallelism); each micro-batch passes them in turn."""
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b
    """In which order the stages of a pipeline work on the micro-batches of a step."""
    stages_per_rank: int | None = None
    """Stages that each rank of a pipeline has; null means 1 with one_f_one_b, 2 with other schedules."""
    stage_layers: list[int] | None = None
    """Layers of each stage, in order. null means equally many; of what is left over, inner stages get one each, then
    the first, which has the embedding as well, and never the last, which has the head."""
    tp: int = 1
    """Ranks that share the heads of attention and the width of dense networks (tensor parallelism); between these, each
    has its own part of every sequence (sequence parallelism)."""
    cp: int = 1
    """Ranks that share the tokens of each sequence, in attention its heads (context parallelism by all-to-all)."""
    shard: int | None = None
    """Ranks that dense weights, gradients and optimizer state are split over (FSDP2), of the ranks / pp / tp that have
    the same weights; null means all, 1 replicates."""
    reshard_after_forward: bool = True
    """Free gathered weights after a block's forward pass and gather them again for backward, and reduce gradients over
    shards after every micro-batch instead of the last one: less memory, more traffic. In a pipeline gradients are
    always reduced after the last one, and schedules but one_f_one_b say themselves when weights are gathered."""
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
    """Degrees that multiply to the number of ranks, in every view."""

    ranks: int
    replicate: int
    shard: int
    expert_replicate: int
    expert_shard: int
    ep: int
    pp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.ranks // self.pp

    @property
    def sequence_ranks(self) -> int:
        """Ranks of a stage that have parts of the same sequences."""
        return self.cp * self.tp

    @property
    def batch_ranks(self) -> int:
        """Groups of ranks that have rows of the batch of their own."""
        return self.stage_ranks // self.sequence_ranks

    def batch_rank(self, rank: int) -> int:
        """Which of the `batch_ranks` parts of a batch a rank works on."""
        return rank % self.stage_ranks // self.sequence_ranks


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
    left, whose = ranks, f"the {ranks} ranks"
    for name in ("pp", "tp", "cp"):
        degree = getattr(config, name)
        if degree < 1 or left % degree != 0:
            raise ValueError(f"parallel.{name}={degree} does not divide {whose}; legal values: {_divisors(left)}")
        left //= degree
        whose = f"the {left} that are left of {ranks} ranks by parallel.{name}={degree}" if degree > 1 else whose
    stage, weights = ranks // config.pp, left * config.cp
    ep, shard = config.ep, weights if config.shard is None else config.shard
    of_stage = f"the {stage} ranks" + (f" of a stage (parallel.pp={config.pp})" if config.pp > 1 else "")
    of_weights = of_stage if config.tp == 1 else f"the {weights} ranks of {stage} that parallel.tp={config.tp} leaves"
    for name, degree, among, text in (("ep", ep, stage, of_stage), ("shard", shard, weights, of_weights)):
        if degree < 1 or among % degree != 0:
            raise ValueError(f"parallel.{name}={degree} does not divide {text}; legal values: {_divisors(among)}")
    if num_experts % ep != 0:
        both = [d for d in _divisors(stage) if num_experts % d == 0]
        raise ValueError(
            f"moe.num_experts={num_experts} is not divisible by parallel.ep={ep}; legal values of parallel.ep on "
            f"{stage} ranks: {both}"
        )
    shared = shard * config.tp
    if shared % ep != 0 and ep % shared != 0:
        legal = [d for d in _divisors(weights) if d * config.tp % ep == 0 or ep % (d * config.tp) == 0]
        product = f"parallel.shard={shard}" + (f" * parallel.tp={config.tp}" if config.tp > 1 else "")
        raise ValueError(
            f"{product} and parallel.ep={ep}: one must divide the other, so that experts and dense "
            f"weights can share the same ranks; legal values of parallel.shard: {legal}"
        )
    expert_shard = max(1, shared // ep)
    return Layout(
        ranks=ranks,
        replicate=weights // shard,
        shard=shard,
        expert_replicate=stage // (ep * expert_shard),
        expert_shard=expert_shard,
        ep=ep,
        pp=config.pp,
        cp=config.cp,
        tp=config.tp,
    )


class ParallelMesh:
    """The views as device meshes. Needs an initialized process group of `layout.ranks` ranks.

    A view is made when it is first asked for, by all ranks alike: its groups cost time on thousands of ranks. An axis
    of stages is in it only where there are several.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        self.layout = layout
        self.device_type = device_type
        self._made: dict[tuple[str, ...], DeviceMesh] = {}

    def _view(self, **degrees: int) -> DeviceMesh:
        named = {"pp": self.layout.pp, **degrees} if self.layout.pp > 1 or "stage" in degrees else degrees
        names = tuple(named)
        if names not in self._made:
            self._made[names] = init_device_mesh(self.device_type, tuple(named.values()), mesh_dim_names=names)
        return self._made[names]

    @property
    def _split(self) -> DeviceMesh:
        layout = self.layout
        return self._view(replicate=layout.replicate, shard=layout.shard, tp=layout.tp)

    @property
    def _whole(self) -> DeviceMesh:
        return self._view(replicate=self.layout.replicate, shard=self.layout.shard * self.layout.tp)

    @property
    def _expert(self) -> DeviceMesh:
        layout = self.layout
        return self._view(expert_replicate=layout.expert_replicate, expert_shard=layout.expert_shard, ep=layout.ep)

    @property
    def _tokens(self) -> DeviceMesh:
        return self._view(batch=self.layout.batch_ranks, cp=self.layout.cp, tp=self.layout.tp)

    @property
    def _sequences(self) -> DeviceMesh:
        return self._view(batch=self.layout.batch_ranks, sequence=self.layout.sequence_ranks)

    @property
    def _stages(self) -> DeviceMesh:
        return self._view(stage=self.layout.stage_ranks)

    @property
    def whole(self) -> DeviceMesh:
        """Mesh that FSDP uses for weights that no axis splits: 1-D, or 2-D with replicas."""
        return self._with_replicas(self._whole, "replicate", "shard")

    @property
    def split(self) -> DeviceMesh:
        """Mesh that FSDP uses for what `tp` leaves of a weight: 1-D, or 2-D with replicas."""
        return self._with_replicas(self._split, "replicate", "shard")

    @property
    def expert(self) -> DeviceMesh:
        """Mesh that FSDP uses for the experts of one `ep` rank: 1-D, or 2-D with replicas."""
        return self._with_replicas(self._expert, "expert_replicate", "expert_shard")

    def _with_replicas(self, mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
        return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]

    @property
    def ep(self) -> DeviceMesh:
        """The axis that experts are split over."""
        return self._expert["ep"]

    @property
    def tp(self) -> DeviceMesh:
        """The axis that attention and dense networks are split over. The weights' own: not that of `tokens`."""
        return self._split["tp"]

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that share the tokens of each sequence, apart from `tp`."""
        return self._tokens["cp"].get_group()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share the tokens of each part of a sequence that `cp` makes."""
        return self._tokens["tp"].get_group()

    @property
    def row_group(self) -> dist.ProcessGroup:
        """Ranks of this stage that have the same part of other sequences."""
        return self._sequences["batch"].get_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """The ranks at this one's place in each stage, in the order of the stages."""
        return self._stages["pp"].get_group()

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """All ranks of this stage that have parts of the same sequences, in the order of the parts."""
        return self._sequences["sequence"].get_group()

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """All ranks of this stage: all that see different tokens of the same layers."""
        return self.world if self.layout.pp == 1 else self._stages["stage"].get_group()

    def node_groups(self, ranks_per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The two groups that divide `ep` by nodes: across them, ranks of this one's place in each, and within its own.

        `ep` is the innermost axis, so neighbors share a node. Every rank must call this; each call makes new groups.
        """
        layout = self.layout
        shape = (layout.ranks // layout.ep, layout.ep // ranks_per_node, ranks_per_node)
        nodes = init_device_mesh(self.device_type, shape, mesh_dim_names=("expert_copy", "across_nodes", "within_node"))
        return nodes.get_group("across_nodes"), nodes.get_group("within_node")

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD

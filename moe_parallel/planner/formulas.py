"""Memory and step time of a layout by formulas, in a millisecond: what sorts thousands of layouts before a few are run.

Weights, products and large messages are counted as the engine does them; element-wise operations are estimated by their
traffic. A trace of the same layout replaces all of it (`trace_time.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from moe_parallel.engines.stages import stage_plan, stages_per_rank
from moe_parallel.mesh import Layout, ParallelConfig, PipelineSchedule, Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import (
    Bytes,
    MemoryEstimate,
    ParameterCounts,
    count_parameters,
    forward_flops_per_token,
    made_weights,
    memory_per_rank,
    padded_experts,
)
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.options import Config
from moe_parallel.planner.cluster import MICRO, ClusterConfig
from moe_parallel.planner.step_time import Hiding, Pass, StageTime, stage_time

ROW_PASSES, TOKEN_PASSES, LAYER_OPERATIONS = 14, 50, 80
"""What element-wise operations of a layer's forward pass come to: how often they touch the rows of experts, how often
the residual stream, and how many they are. Fitted to traces by eye; tests/planner compares."""
MASTER_BYTES = 4
"""Of a weight and of its gradient as they are reduced."""


@dataclass(frozen=True)
class Stage:
    """What one rank of a pipeline has of the model, as a model of its own; the whole one without a pipeline."""

    architecture: Architecture
    embedding: bool
    head: bool
    in_flight: int
    """Micro-batches whose activations it holds at once."""


def stages_of(config: Config, architecture: Architecture, micro_batches: int) -> list[Stage]:
    """What each rank of the pipeline has."""
    model, parallel, found = architecture.model, config.parallel, []
    plan = stage_plan(parallel, model.num_layers)
    for rank in range(parallel.pp):
        part = plan.part_of(rank)
        dense = sum(layer < model.first_dense_layers for layer in part.layers)
        own = replace(
            model,
            num_layers=len(part.layers),
            first_dense_layers=dense,
            mtp_layers=model.mtp_layers if part.last else 0,
        )
        held = min(micro_batches, in_flight(parallel, rank))
        found.append(Stage(replace(architecture, model=own), part.first, part.last, held))
    return found


def in_flight(parallel: ParallelConfig, rank: int) -> int:
    """Micro-batches that a rank of the pipeline holds before its first backward pass, in whole ones of its layers."""
    pp, each = parallel.pp, stages_per_rank(parallel)
    if parallel.schedule.is_v:  # twice as many passes of half of the layers, on all ranks
        return pp + (parallel.schedule is PipelineSchedule.dual_pipe_v)
    if each == 1:
        return pp - rank
    return math.ceil((2 * (pp - rank - 1) + (each - 1) * pp + 1) / each)


def micro_batch_tokens(config: Config, layout: Layout) -> int:
    """Tokens that a rank computes at once."""
    _, sequences = config.train.micro_batches(layout.batch_ranks)
    return sequences * config.train.sequence_tokens // layout.sequence_ranks


def stage_memory(
    config: Config, layout: Layout, stage: Stage, compute_bytes: int, imbalance: float = 1.0
) -> MemoryEstimate:
    """Peak of a rank of one stage."""
    parallel = config.parallel
    micro_batches, _ = config.train.micro_batches(layout.batch_ranks)
    estimate = memory_per_rank(
        stage.architecture,
        micro_batch_tokens(config, layout),
        shard=layout.shard,
        ep=layout.ep,
        expert_shard=layout.expert_shard,
        tp=layout.tp,
        recompute=parallel.recompute,
        reshard=parallel.reshard_after_forward,
        gradients_wait=micro_batches > 1 and (layout.pp > 1 or not parallel.reshard_after_forward),
        embedding=stage.embedding,
        head=stage.head,
        in_flight=stage.in_flight,
        imbalance=imbalance,
        size=Bytes(compute=compute_bytes),
    )
    if layout.pp == 1:
        return estimate
    # torch's schedules have a buffer for what each micro-batch receives: the stream, or its gradient, of each stage.
    received = 2 * stages_per_rank(parallel) - stage.embedding - stage.head
    stream = micro_batch_tokens(config, layout) * stage.architecture.model.dim * compute_bytes
    return replace(estimate, activations=estimate.activations + micro_batches * received * stream)


def estimated_time(
    config: Config, layout: Layout, stage: Stage, cluster: ClusterConfig, compute_bytes: int, imbalance: float = 1.0
) -> StageTime:
    """Time of one stage."""
    work = _Work(config, layout, stage, cluster, compute_bytes, imbalance)
    again = config.parallel.recompute is Recompute.full
    forward = work.compute()
    replay = forward if again else {}
    if config.parallel.recompute is Recompute.selective:
        replay = {"experts": forward["experts"] * 2 / 3}  # all but the down-projection
    backward = {name: 2 * seconds + replay.get(name, 0.0) for name, seconds in forward.items()}
    forward["other"] += work.copies_seconds()
    backward["other"] += work.copies_seconds() + work.accumulation_seconds()
    rows, sequences = work.rows_seconds(), work.sequence_seconds()
    gather, reduce, replicas = work.weights_seconds()
    several = config.parallel.reshard_after_forward
    between = {"stages": work.stage_seconds()}
    there = Pass(
        forward, {"rows": rows, "sequences": sequences, "weights": gather, "sums": work.sums_seconds(), **between}
    )
    back = Pass(
        backward,
        {
            "rows": rows * (2 if again else 1),
            "sequences": sequences * (2 if again else 1),
            "weights": (gather + reduce) * several,
            **between,
        },
    )
    last_only = {"weights": replicas + (0.0 if several else reduce)}
    optimizer = Pass({"other": cluster.memory_seconds(work.held_weights() * 28)}, {})
    return stage_time(
        there, back, last_only, optimizer, hiding(config, layout, stage.architecture, cluster, compute_bytes)
    )


def hiding(
    config: Config, layout: Layout, architecture: Architecture, cluster: ClusterConfig, compute_bytes: int
) -> Hiding:
    """What hides the exchanges of a stage."""
    model, moe = architecture.model, architecture.moe
    flops = 6 * model.dim * moe.num_shared_experts * moe.expert_dim * micro_batch_tokens(config, layout)
    return Hiding(
        overlap=cluster.overlap,
        ways=2 * architecture.num_moe_layers * moe.chain.iterations if layout.ep > 1 else 0,
        chunks=config.dispatch.chunks if isinstance(config.dispatch, AllToAllConfig) else 1,
        shared_seconds=cluster.product_seconds(flops, cluster.matmul_efficiency, compute_bytes),
    )


@dataclass(frozen=True)
class _Work:
    config: Config
    layout: Layout
    stage: Stage
    cluster: ClusterConfig
    compute_bytes: int
    imbalance: float

    @cached_property
    def counts(self) -> ParameterCounts:
        return count_parameters(self.stage.architecture)

    @cached_property
    def tokens(self) -> int:
        return micro_batch_tokens(self.config, self.layout)

    @property
    def rows(self) -> float:
        """Rows of this rank's experts in one layer."""
        shape = self.stage.architecture
        more = self.imbalance if self.layout.ep > 1 else 1.0
        return self.tokens * shape.router.top_k * shape.moe.chain.iterations * more

    def compute(self) -> dict[str, float]:
        """Seconds of a forward pass."""
        shape, cluster, tokens = self.stage.architecture, self.cluster, self.tokens
        model, counts = shape.model, self.counts
        sequence = self.config.train.sequence_tokens
        total = forward_flops_per_token(shape, sequence) * tokens
        attention = total - forward_flops_per_token(shape, 0) * tokens  # without what one token costs itself
        routed = 2.0 * counts.routed_products * tokens
        head = 0 if self.stage.head else 2.0 * (counts.head or counts.embedding) * tokens
        experts = (
            routed / shape.router.top_k * (self.rows / tokens / max(1, shape.moe.chain.iterations)) if routed else 0.0
        )
        seconds = cluster.product_seconds
        traffic: float = model.num_layers * TOKEN_PASSES * tokens * model.dim
        traffic += shape.num_moe_layers * ROW_PASSES * self.rows * (model.dim + shape.moe.expert_dim)
        dense, held = self._whole_weights()
        made = made_weights(shape) // self.layout.ep  # once for each micro-batch, written and read again
        experts += 2.0 * made * (shape.moe.delta_rank or 0)
        launches = LAYER_OPERATIONS * shape.num_blocks * cluster.kernel_microseconds * MICRO
        return {
            "matmul": max(
                seconds(total - attention - routed - head, cluster.matmul_efficiency, self.compute_bytes),
                cluster.memory_seconds(dense / self.layout.tp * self.compute_bytes),
            ),
            "attention": seconds(attention, cluster.attention_efficiency, self.compute_bytes),
            "experts": max(
                seconds(experts, cluster.expert_efficiency, self.compute_bytes),
                cluster.memory_seconds((held + 2 * made) * self.compute_bytes),
            ),
            "other": cluster.memory_seconds(traffic * self.compute_bytes) + launches,
        }

    def copies_seconds(self) -> float:
        """Gathered weights, taken apart after their collective."""
        if not self.config.parallel.reshard_after_forward or self.layout.shard * self.layout.tp == 1:
            return 0.0
        return self.cluster.memory_seconds(2 * sum(self._whole_weights()) * self.compute_bytes)

    def accumulation_seconds(self) -> float:
        """Gradients of weights of one micro-batch, added to those before it or packed to be reduced."""
        micro_batches, _ = self.config.train.micro_batches(self.layout.batch_ranks)
        waits = micro_batches > 1 and (self.layout.pp > 1 or not self.config.parallel.reshard_after_forward)
        touched = self.compute_bytes + (2 if waits else 1) * MASTER_BYTES
        return self.cluster.memory_seconds(touched * sum(self._whole_weights()))

    def rows_seconds(self) -> float:
        """Exchange of rows in one forward pass, there and back, at the fullest rank."""
        shape, layout = self.stage.architecture, self.layout
        if layout.ep == 1:
            return 0.0
        num_bytes = int(self.rows * shape.model.dim * self.compute_bytes)
        return 2 * shape.num_moe_layers * self._collective("all_to_all", num_bytes, 1, layout.ep)

    def sequence_seconds(self) -> float:
        """Gathers and scatters of tp, all-to-alls of cp, in one forward pass."""
        shape, layout, size = self.stage.architecture, self.layout, self.tokens * self.compute_bytes
        model, attention = shape.model, shape.attention
        total: float = 0
        if layout.tp > 1:
            once = sum(
                self._collective(op, size * model.dim * layout.tp, 1, layout.tp)
                for op in ("all_gather", "reduce_scatter")
            )
            total += (shape.num_blocks + model.first_dense_layers) * once
        if layout.cp > 1:
            width = getattr(attention, "query_head_dim", None) or attention.head_width(model.dim)  # type: ignore[attr-defined]
            heads = attention.num_heads * width * size
            total += shape.num_blocks * 2 * self._collective("all_to_all", 2 * heads, layout.tp, layout.cp)
        return total

    def weights_seconds(self) -> tuple[float, float, float]:
        """Gathering all weights once, reducing their gradients over shards, and those over replicas."""
        layout = self.layout
        dense, routed = self._whole_weights()
        routed = int(routed * padded_experts(self.stage.architecture, layout.ep, layout.expert_shard))
        whole, parts, here = layout.shard * layout.tp, layout.expert_shard, layout.ep * layout.expert_shard

        def by_layer(
            op: str, dense_bytes: int, whole_groups: tuple[int, int], routed_bytes: int, groups: tuple[int, int]
        ) -> float:
            layers = self.stage.architecture.num_blocks
            once = self._collective(op, dense_bytes / layers, *whole_groups)
            return layers * (once + self._collective(op, routed_bytes / layers, *groups))

        size, shards, copies = self.compute_bytes, (1, whole), (whole, layout.replicate)
        own, own_copies = (layout.ep, parts), (here, layout.expert_replicate)
        gather = by_layer("all_gather", dense * size, shards, routed * size, own)
        reduce = by_layer("reduce_scatter", dense * MASTER_BYTES, shards, routed * MASTER_BYTES, own)
        held = dense // whole * MASTER_BYTES, routed // parts * MASTER_BYTES
        return gather, reduce, by_layer("all_reduce", held[0], copies, held[1], own_copies)

    def stage_seconds(self) -> float:
        """Activations to the next stage, or their gradients to the one before."""
        if self.layout.pp == 1:
            return 0.0
        num_bytes = self.tokens * self.stage.architecture.model.dim * self.compute_bytes
        return self._collective("send", num_bytes, self.layout.stage_ranks, 2)

    def sums_seconds(self) -> float:
        """Counts of experts over all ranks, for a balance loss."""
        balance = self.config.balance
        if not (balance.global_coefficient or balance.data_parallel_coefficient):
            return 0.0
        shape = self.stage.architecture
        once = self._collective("all_reduce", 8 * shape.moe.num_experts, 1, self.layout.stage_ranks)
        return shape.num_moe_layers * shape.moe.chain.iterations * once

    def held_weights(self) -> float:
        """Weights whose optimizer state this rank has."""
        dense, routed = self._whole_weights()
        return dense / (self.layout.shard * self.layout.tp) + routed / self.layout.expert_shard

    def _whole_weights(self) -> tuple[int, int]:
        """Weights that this rank works with: dense ones, and routed experts of its place in `ep`."""
        stage, counts = self.stage, self.counts
        dense = (
            counts.total
            - counts.routed
            - (0 if stage.embedding else counts.embedding)
            - (0 if stage.head else counts.head)
        )
        return dense, counts.routed // self.layout.ep

    def _collective(self, op: str, num_bytes: float, stride: int, ranks: int) -> float:
        return self.cluster.collective_seconds(op, num_bytes, self.cluster.strided(ranks, stride))

"""The topologies that are proven. One line each; the suite prints them with their errors."""

from __future__ import annotations

from moe_parallel.moe.balance import GlobalEstimator
from moe_parallel.moe.capacity import DropOrder
from moe_parallel.moe.routers.token_choice import GroupScore, Score
from tests.parity.cases import Case

ALL_LOSSES = {
    "sequence_coefficient": 0.1,
    "data_parallel_coefficient": 0.1,
    "global_coefficient": 0.1,
    "z_coefficient": 0.01,
}
GLOBAL = {"global_coefficient": 0.3}
EXACT = {"global_coefficient": 0.3, "global_estimator": GlobalEstimator.exact}
BIAS = {"bias_rate": 0.05, "sequence_coefficient": 0.1}
SIGMOID = {"score": Score.sigmoid, "normalize": True, "route_scale": 2.5}
GROUPS = {"score": Score.sigmoid, "normalize": True, "num_groups": 2, "top_groups": 1}
GROUPS_MAX = {"num_groups": 4, "top_groups": 2, "group_score": GroupScore.max}
CAPACITY = {"capacity_factor": 0.8}
CAPACITY_BY_WEIGHT = {"capacity_factor": 0.7, "drop_order": DropOrder.weight, "renormalize_after_drop": True}
GATED = {"num_shared_experts": 2, "shared_expert_gate": True}
BARE = {"num_shared_experts": 0}

ONE = [
    Case("one rank", 1, balance=ALL_LOSSES),
    Case("one rank, 4 micro-batches, full recompute", 1, micro_batches=4, recompute="full", balance=GLOBAL),
]

TWO = [
    Case("replicated", 2, shard=1, balance=ALL_LOSSES),
    Case("sharded", 2, balance=ALL_LOSSES),
    Case("ep 2", 2, ep=2, balance=ALL_LOSSES),
    Case("ep 2, dense replicated", 2, ep=2, shard=1, balance=ALL_LOSSES),
    Case("ep 2, 4 micro-batches, look-ahead", 2, ep=2, micro_batches=4, balance=GLOBAL),
    Case("ep 2, 4 micro-batches, exact", 2, ep=2, micro_batches=4, balance=EXACT),
    Case("ep 2, full recompute", 2, ep=2, recompute="full", micro_batches=2, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    Case("ep 2, selective recompute", 2, ep=2, recompute="selective", balance=ALL_LOSSES),
    Case("ep 2, sigmoid, bias", 2, ep=2, router=SIGMOID, balance=BIAS),
    Case("ep 2, groups, bias", 2, ep=2, router=GROUPS, balance=BIAS, num_experts=8),
    Case("ep 2, capacity by position", 2, ep=2, moe=CAPACITY, micro_batches=2),
    Case("ep 2, capacity, full recompute", 2, ep=2, moe=CAPACITY_BY_WEIGHT, recompute="full"),
    Case("ep 2, idle rank", 2, ep=2, idle_rank=True, balance=ALL_LOSSES),
    Case("ep 2, idle rank, capacity", 2, ep=2, idle_rank=True, moe=CAPACITY),
    Case("ep 2, no token for the second rank", 2, ep=2, starved_rank=True, balance=BIAS),
    Case("sharded, no token, full recompute", 2, recompute="full", starved_rank=True, balance=BIAS),
    Case("ep 2, forced balance", 2, ep=2, router={"forced_balance": True}, balance=GLOBAL),
    Case("ep 2, latent attention, tied", 2, ep=2, latent_attention=True, tied=True, balance=GLOBAL),
    Case("ep 2, gated shared experts", 2, ep=2, moe=GATED, balance=GLOBAL),
    Case("ep 2, no shared expert, top 1", 2, ep=2, moe=BARE, router={"top_k": 1}, balance=GLOBAL),
    Case("ep 2, 3 experts a rank", 2, ep=2, num_experts=6, rows=3, balance=ALL_LOSSES),
    Case("ep 2, micro-batch loss", 2, ep=2, micro_batches=2, balance={"micro_batch_coefficient": 0.3}),
]  # fmt: skip

FOUR = [
    Case("ep 4", 4, ep=4, balance=ALL_LOSSES),
    Case("ep 2 x expert shard 2", 4, ep=2, balance=ALL_LOSSES),
    Case("ep 2 x replicas 2", 4, ep=2, shard=2, balance=ALL_LOSSES),
    Case("ep 4, dense replicated", 4, ep=4, shard=1, balance=ALL_LOSSES),
    Case("ep 4, dense shard 2", 4, ep=4, shard=2, balance=ALL_LOSSES, micro_batches=2),
    Case("ep 2, all replicated", 4, ep=2, shard=1, balance=ALL_LOSSES),
    Case("12 experts on 4 ranks, groups by maximum", 4, ep=4, num_experts=12, router=GROUPS_MAX, balance=GLOBAL),
    Case("ep 4, full recompute, 4 micro-batches", 4, ep=4, recompute="full", micro_batches=4, balance={**GLOBAL, "bias_rate": 0.05}),
    Case("ep 4, idle rank, look-ahead", 4, ep=4, idle_rank=True, micro_batches=2, balance=GLOBAL),
    Case("ep 4, capacity", 4, ep=4, moe=CAPACITY_BY_WEIGHT, micro_batches=2),
    Case("ep 4, three ranks without a token", 4, ep=4, num_experts=8, starved_rank=True, balance=BIAS),
    Case("hsdp 2 x 2, no ep, selective", 4, shard=2, recompute="selective", balance=ALL_LOSSES),
]  # fmt: skip

EIGHT = [
    Case("replicas 2 x expert shard 2 x ep 2", 8, ep=2, shard=4, num_experts=8, balance=ALL_LOSSES),
    Case("expert shard 2 x ep 4", 8, ep=4, num_experts=8, balance=ALL_LOSSES, micro_batches=2),
    Case("ep 8", 8, ep=8, num_experts=8, balance=ALL_LOSSES),
    Case("replicas 4 x ep 2", 8, ep=2, shard=2, num_experts=8, balance=ALL_LOSSES),
    Case("ep 8, dense replicated, full recompute", 8, ep=8, shard=1, num_experts=8, recompute="full", balance=GLOBAL),
]  # fmt: skip

BFLOAT16 = [
    Case("bf16, sharded", 2, dtype="bfloat16", balance=ALL_LOSSES, rows=2),
    Case("bf16, ep 2, 2 micro-batches", 2, ep=2, dtype="bfloat16", balance=ALL_LOSSES, micro_batches=2),
    Case("bf16, ep 2, full recompute", 2, ep=2, dtype="bfloat16", recompute="full", balance=ALL_LOSSES, rows=2),
]

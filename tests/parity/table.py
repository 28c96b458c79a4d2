"""The topologies that are proven. One line each; the suite prints them with their errors."""

from __future__ import annotations

from moe_parallel.moe.balance import GlobalEstimator
from moe_parallel.moe.capacity import DropOrder
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig
from moe_parallel.moe.dispatch.two_hop import TwoHopConfig
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
    Case("ep 2, forced balance, idle rank", 2, ep=2, router={"forced_balance": True}, idle_rank=True),
    Case("ep 2, forced balance, no padding", 2, ep=2, router={"forced_balance": True}, whole_rows=True),
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

CHAIN = {"chain": ChainConfig(iterations=2)}
THREE = {
    "chain": ChainConfig(iterations=3, renormalize="per_iteration", residual="initial", shared_every_iteration=False)
}
SHARED_CHAIN = {"chain": ChainConfig(iterations=2, own_routers=False, renormalize="shared", block="reference")}
SCALED_CHAIN = {"chain": ChainConfig(iterations=3, learned_scale=True)}
OUTER_CHAIN = {"chain": ChainConfig(iterations=2, residual="outer")}
POOL = {"pool": "micro_batch", "pool_sequences": 1, "allow_leak": True}
WHOLE = {"pool": "global_batch", "allow_leak": True}
EVERYWHERE = {"pool": "data_parallel", "pool_sequences": 4, "allow_leak": True}
THRESHOLD = {"training": "threshold", "pool": "data_parallel", "pool_sequences": 4, "score": Score.sigmoid}
DEVICES = {"sequence_coefficient": 0.1, "device_coefficient": 0.2, "communication_coefficient": 0.3, "num_devices": 2}
ONE_ROUTER = {"chain": ChainConfig(iterations=2, own_routers=False)}
RESIDUAL = {"logit_residual": True}

DOMAINS = {"domain_dim": 3, "projection_dim": 4}
OFFSETS = {"logit_offset": True, "input_norm": "standardize"}

ROUTERS_ONE = [
    Case("one rank, delta experts", 1, moe={"expert_form": "delta", "delta_rank": 2}, balance=ALL_LOSSES, micro_batches=2),
    Case("one rank, ternary experts, full recompute", 1, moe={"expert_form": "ternary"}, recompute="full", balance=GLOBAL),
    Case("one rank, chain of 3, full recompute", 1, moe=THREE, recompute="full", micro_batches=2, balance=ALL_LOSSES),
    Case("one rank, expert choice, sequences", 1, kind="expert_choice", router=POOL, rows=2, whole_rows=True),
    Case("one rank, expert choice, global batch", 1, kind="expert_choice", router=WHOLE, rows=3, recompute="full"),
    Case("one rank, threshold, 2 micro-batches", 1, kind="expert_choice", router=THRESHOLD, rows=4, micro_batches=2),
    Case("one rank, bi-level", 1, kind="bi_level", balance=ALL_LOSSES, micro_batches=2),
    Case("one rank, random", 1, kind="random", recompute="full"),
    Case("one rank, hash", 1, kind="hash"),
    Case("one rank, switch", 1, moe=CAPACITY, router={"top_k": 1, "input_jitter": 0.1}, recompute="full"),
    Case("one rank, gshard", 1, router={"normalize": True, "random_second": True}, balance=GLOBAL),
    Case("one rank, bi-level, a router per node", 1, kind="bi_level", router={"local_router_per_node": True}, balance=ALL_LOSSES),
    Case("one rank, losses over devices", 1, balance=DEVICES, micro_batches=2),
    Case("one rank, adjugates", 1, moe={"adjugate_groups": 2, "adjugate_dim": 6}, router={"top_k": 3}, whole_rows=True, recompute="full"),
    Case("one rank, domains, full recompute", 1, kind="domain", router=DOMAINS, balance=EXACT, micro_batches=2, recompute="full"),
    Case("one rank, multi-token prediction", 1, mtp_layers=2, rows=2, balance=ALL_LOSSES, micro_batches=2),
    Case("one rank, residual logits, chain of 2, full recompute", 1, router=RESIDUAL, moe=CHAIN, mtp_layers=1, rows=2, recompute="full", balance=EXACT, micro_batches=2),
]  # fmt: skip

ROUTERS_TWO = [
    Case("chain of 2, ep 2", 2, ep=2, moe=CHAIN, micro_batches=2, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    Case("chain of 2, ep 2, full recompute", 2, ep=2, moe=CHAIN, recompute="full", micro_batches=2, balance=ALL_LOSSES),
    Case("chain of 3, norms, initial residual", 2, ep=2, moe=THREE, balance=ALL_LOSSES),
    Case("chain of 2, one router, reference block", 2, ep=2, moe=SHARED_CHAIN, balance={**GLOBAL, "bias_rate": 0.05}),
    Case("chain of 3, learned scale, sharded", 2, moe=SCALED_CHAIN, balance=GLOBAL, micro_batches=2),
    Case("chain of 2, outer residual, replicated", 2, ep=2, shard=1, moe=OUTER_CHAIN, balance=GLOBAL),
    Case("expert choice, sequences, ep 2", 2, ep=2, kind="expert_choice", router=POOL, rows=2),
    Case("expert choice, sequences, full recompute", 2, ep=2, kind="expert_choice", router=POOL, recompute="full", micro_batches=2),
    Case("expert choice, sequences, no padding", 2, ep=2, kind="expert_choice", router=POOL, rows=2, whole_rows=True),
    Case("expert choice, global batch, ep 2", 2, ep=2, kind="expert_choice", router=WHOLE, rows=2),
    Case("expert choice, all ranks, full recompute", 2, ep=2, kind="expert_choice", router=EVERYWHERE, rows=2, micro_batches=2, recompute="full"),
    Case("expert choice, position, ep 2", 2, ep=2, kind="expert_choice", router={"pool": "position"}, rows=3),
    Case("expert choice, idle rank", 2, ep=2, kind="expert_choice", router=WHOLE, rows=2, idle_rank=True),
    Case("expert choice, capped", 2, ep=2, kind="expert_choice", router={**POOL, "max_experts_per_token": 3}),
    Case("threshold, ep 2, 2 micro-batches", 2, ep=2, kind="expert_choice", router=THRESHOLD, rows=2, micro_batches=2),
    Case("threshold, chain of 2", 2, ep=2, kind="expert_choice", router=THRESHOLD, rows=2, moe=CHAIN),
    Case("bi-level, ep 2", 2, ep=2, kind="bi_level", balance=ALL_LOSSES, micro_batches=2),
    Case("bi-level, a router per node, top 2 nodes", 2, ep=2, kind="bi_level", router={"local_router_per_node": True, "top_nodes": 2, "num_nodes": 4}, num_experts=8, balance=ALL_LOSSES),
    Case("domains, ep 2", 2, ep=2, kind="domain", router=DOMAINS, balance={**ALL_LOSSES, "bias_rate": 0.05}, micro_batches=2),
    Case("offsets, standardized input, ep 2, full recompute", 2, ep=2, router=OFFSETS, recompute="full", balance=ALL_LOSSES, micro_batches=2),
    Case("random, ep 2, full recompute", 2, ep=2, kind="random", recompute="full", micro_batches=2),
    Case("hash, ep 2", 2, ep=2, kind="hash"),
    Case("switch", 2, ep=2, moe=CAPACITY, router={"top_k": 1, "input_jitter": 0.1}, recompute="full"),
    Case("gshard", 2, ep=2, router={"normalize": True, "random_second": True}, balance=GLOBAL, recompute="full"),
    Case("losses over devices and communication", 2, ep=2, router=GROUPS_MAX, num_experts=8, balance=DEVICES, micro_batches=2),
    Case("losses over devices of all ranks", 2, ep=2, balance={**DEVICES, "device_scope": "data_parallel"}),
    Case("multi-token prediction, ep 2", 2, ep=2, mtp_layers=2, micro_batches=2, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    Case("multi-token prediction, tied, full recompute", 2, ep=2, mtp_layers=1, tied=True, latent_attention=True, recompute="full", balance=EXACT, micro_batches=2),
    Case("multi-token prediction, replicated, chain of 2", 2, shard=1, mtp_layers=1, moe=CHAIN, balance=GLOBAL),
    Case("residual logits, ep 2", 2, ep=2, router=RESIDUAL, balance=ALL_LOSSES, micro_batches=2),
    Case("residual logits, chain of 2, full recompute", 2, ep=2, router=RESIDUAL, moe=CHAIN, recompute="full", balance=ALL_LOSSES),
    Case("residual logits, one router, multi-token prediction", 2, router=RESIDUAL, moe=ONE_ROUTER, mtp_layers=1, recompute="selective", balance=ALL_LOSSES),
]  # fmt: skip

ROUTERS_FOUR = [
    Case("chain of 2, ep 4", 4, ep=4, moe=CHAIN, balance=ALL_LOSSES),
    Case("chain of 2, ep 2 x expert shard 2, full recompute", 4, ep=2, moe=CHAIN, recompute="full", balance=ALL_LOSSES),
    Case("chain of 3, ep 2 x replicas 2", 4, ep=2, shard=2, moe=THREE, balance=GLOBAL, micro_batches=2),
    Case("multi-token prediction, ep 2 x expert shard 2", 4, ep=2, mtp_layers=2, balance=ALL_LOSSES, micro_batches=2),
    Case("residual logits, idle rank, full recompute", 4, ep=4, router=RESIDUAL, mtp_layers=1, idle_rank=True, recompute="full", balance=GLOBAL),
    Case("expert choice, sequences, ep 4", 4, ep=4, kind="expert_choice", router=POOL, rows=2),
    Case("expert choice, global batch, ep 4", 4, ep=4, kind="expert_choice", router=WHOLE, rows=2),
    Case("expert choice, position, ep 2 x expert shard 2", 4, ep=2, kind="expert_choice", router={"pool": "position"}, rows=2),
    Case("domains, ep 2 x expert shard 2", 4, ep=2, kind="domain", router={**DOMAINS, **OFFSETS}, balance=ALL_LOSSES, micro_batches=2),
    Case("threshold, ep 4", 4, ep=4, kind="expert_choice", router={**THRESHOLD, "pool_sequences": 4}),
    Case("expert choice, capped, ep 4", 4, ep=4, kind="expert_choice", router={**POOL, "max_experts_per_token": 3}, rows=2),
    Case("switch, ep 4", 4, ep=4, moe=CAPACITY, router={"top_k": 1, "input_jitter": 0.1}, micro_batches=2),
    Case("gshard, ep 4", 4, ep=4, moe=CAPACITY, router={"normalize": True, "random_second": True}),
    Case("bi-level, a router per node, ep 4", 4, ep=4, kind="bi_level", router={"local_router_per_node": True}, balance=ALL_LOSSES),
    Case("bi-level, ep 4", 4, ep=4, kind="bi_level", num_experts=8, balance=ALL_LOSSES),
    Case("random, ep 4", 4, ep=4, kind="random"),
    Case("hash, ep 4, idle rank", 4, ep=4, kind="hash", idle_rank=True),
    Case("expert choice, sequences, no padding, ep 4", 4, ep=4, kind="expert_choice", router=POOL, whole_rows=True),
    Case("losses over devices, ep 4", 4, ep=4, router=GROUPS_MAX, num_experts=8, balance=DEVICES),
]  # fmt: skip

SPILL = LeastLoadedConfig(threshold=1.0, min_chunk_rows=1)
TWO_NODES = TwoHopConfig(ranks_per_node=2)
FOUR_NODES = TwoHopConfig(ranks_per_node=1)
CHUNKS_2, CHUNKS_4 = AllToAllConfig(chunks=2), AllToAllConfig(chunks=4)

ADJUGATES = {"adjugate_groups": 2, "adjugate_dim": 6, "adjugate_scale": 0.5}
FOUR_ADJUGATES = {**ADJUGATES, "adjugate_groups": 4}

DISPATCH_TWO = [
    Case("least loaded, ep 2", 2, ep=2, dispatch=SPILL, balance=ALL_LOSSES, micro_batches=2),
    Case("least loaded, no token for the second rank", 2, ep=2, dispatch=SPILL, starved_rank=True, balance=BIAS),
    Case("least loaded, full recompute", 2, ep=2, dispatch=SPILL, starved_rank=True, balance=BIAS, recompute="full", micro_batches=2),
    Case("least loaded, chain of 2, selective recompute", 2, ep=2, dispatch=SPILL, moe=CHAIN, recompute="selective", balance=GLOBAL),
    Case("least loaded, threshold router", 2, ep=2, dispatch=SPILL, kind="expert_choice", router=THRESHOLD, rows=2),
    Case("two hops, two nodes of one rank", 2, ep=2, dispatch=FOUR_NODES, balance=ALL_LOSSES, micro_batches=2),
    Case("2 chunks, gated shared experts", 2, ep=2, dispatch=CHUNKS_2, moe=GATED, balance=ALL_LOSSES, micro_batches=2),
    Case("2 chunks, full recompute", 2, ep=2, dispatch=CHUNKS_2, recompute="full", balance={**ALL_LOSSES, "bias_rate": 0.05}, micro_batches=2),
    Case("2 chunks, chain of 2, selective recompute", 2, ep=2, dispatch=CHUNKS_2, moe=CHAIN, recompute="selective", balance=GLOBAL),
    Case("2 chunks, chain of 3, full recompute", 2, ep=2, dispatch=CHUNKS_2, moe=THREE, recompute="full", balance=GLOBAL),
    Case("2 chunks, forced balance", 2, ep=2, dispatch=CHUNKS_2, router={"forced_balance": True}, balance=GLOBAL),
    Case("2 chunks, forced balance, no padding", 2, ep=2, dispatch=CHUNKS_2, router={"forced_balance": True}, whole_rows=True),
    Case("2 chunks, no token for the second rank", 2, ep=2, dispatch=CHUNKS_2, starved_rank=True, balance=BIAS),
    Case("4 chunks, expert choice, idle rank", 2, ep=2, num_experts=8, dispatch=CHUNKS_4, kind="expert_choice", router=WHOLE, rows=2, idle_rank=True),
    Case("adjugates, ep 2, no padding", 2, ep=2, moe=ADJUGATES, whole_rows=True, router={"top_k": 3}, balance=ALL_LOSSES, micro_batches=2),
    Case("adjugates, ep 2, full recompute", 2, ep=2, moe=ADJUGATES, recompute="full", balance={**ALL_LOSSES, "bias_rate": 0.05}, micro_batches=2),
    Case("adjugates, sharded, selective recompute", 2, moe=ADJUGATES, whole_rows=True, recompute="selective", balance=GLOBAL),
    Case("adjugates, replicated, capacity, full recompute", 2, ep=2, shard=1, moe={**ADJUGATES, **CAPACITY_BY_WEIGHT}, recompute="full"),
    Case("adjugates, chain of 2, one router", 2, ep=2, moe={**ADJUGATES, **SHARED_CHAIN}, whole_rows=True, balance=GLOBAL),
    Case("adjugates, expert choice", 2, ep=2, moe=ADJUGATES, kind="expert_choice", router=POOL, rows=2),
    Case("adjugates, least loaded", 2, ep=2, moe=ADJUGATES, dispatch=SPILL, starved_rank=True, balance=BIAS, recompute="full", micro_batches=2),
    Case("adjugates, 2 chunks within groups", 2, ep=2, moe=ADJUGATES, dispatch=CHUNKS_2, balance=GLOBAL, micro_batches=2),
    Case("adjugates, 2 chunks of whole groups, forced balance", 2, ep=2, moe=FOUR_ADJUGATES, num_experts=8, dispatch=CHUNKS_2, router={"forced_balance": True}, whole_rows=True),
    Case("adjugates, tp 2, ep 2", 2, tp=2, ep=2, moe=ADJUGATES, rows=2, balance=GLOBAL),
]  # fmt: skip

DISPATCH_FOUR = [
    Case("least loaded, ep 4, three ranks without a token", 4, ep=4, dispatch=SPILL, num_experts=8, starved_rank=True, balance=BIAS),
    Case("least loaded, ep 2 x expert shard 2", 4, ep=2, dispatch=SPILL, starved_rank=True, balance=BIAS),
    Case("least loaded, ep 2 x replicas 2, capacity", 4, ep=2, shard=2, dispatch=SPILL, moe=CAPACITY, micro_batches=2),
    Case("least loaded, below its threshold", 4, ep=4, dispatch=LeastLoadedConfig(threshold=100.0), balance=GLOBAL),
    Case("least loaded, bi-level, idle rank", 4, ep=4, dispatch=SPILL, kind="bi_level", idle_rank=True, balance=GLOBAL),
    Case("two hops, 2 nodes of 2", 4, ep=4, dispatch=TWO_NODES, balance=ALL_LOSSES),
    Case("two hops, bi-level, full recompute", 4, ep=4, dispatch=TWO_NODES, kind="bi_level", recompute="full", balance=ALL_LOSSES, micro_batches=2),
    Case("two hops, top 4 of 8, groups", 4, ep=4, dispatch=TWO_NODES, num_experts=8, router={**GROUPS_MAX, "top_k": 4}, balance=GLOBAL),
    Case("two hops, 4 nodes of 1, capacity", 4, ep=4, dispatch=FOUR_NODES, moe=CAPACITY_BY_WEIGHT, micro_batches=2),
    Case("two hops, expert choice", 4, ep=4, dispatch=TWO_NODES, kind="expert_choice", router=POOL, rows=2),
    Case("two hops, expert choice, no padding", 4, ep=4, dispatch=TWO_NODES, kind="expert_choice", router=POOL, whole_rows=True),
    Case("two hops, chain of 2, three ranks without a token", 4, ep=4, dispatch=TWO_NODES, moe=CHAIN, num_experts=8, starved_rank=True, balance=BIAS),
    Case("two hops, idle rank, dense replicated", 4, ep=4, shard=1, dispatch=TWO_NODES, idle_rank=True, balance=GLOBAL),
    Case("2 chunks, ep 4, shared experts, full recompute", 4, ep=4, num_experts=8, dispatch=CHUNKS_2, moe=GATED, recompute="full", balance=ALL_LOSSES, micro_batches=2),
    Case("4 chunks, ep 2 x expert shard 2", 4, ep=2, num_experts=8, dispatch=CHUNKS_4, balance=ALL_LOSSES, micro_batches=2),
    Case("2 chunks, ep 2 x replicas 2, capacity", 4, ep=2, shard=2, dispatch=CHUNKS_2, moe=CAPACITY_BY_WEIGHT, micro_batches=2),
    Case("adjugates, ep 4", 4, ep=4, moe=FOUR_ADJUGATES, num_experts=8, router={"top_k": 3}, whole_rows=True, balance=ALL_LOSSES, micro_batches=2),
    Case("adjugates, ep 2 x expert shard 2, full recompute", 4, ep=2, moe=ADJUGATES, recompute="full", balance=ALL_LOSSES),
    Case("adjugates, two hops, top 3 of 8", 4, ep=4, moe=FOUR_ADJUGATES, num_experts=8, router={"top_k": 3}, dispatch=TWO_NODES, whole_rows=True, balance=GLOBAL),
]  # fmt: skip

FULL_NORM, HEAD_NORM = {"qk_norm": "full"}, {"qk_norm": "head"}
BIASED = {"qkv_bias": True}
FEW_KEYS = {"num_kv_heads": 1}
SIX_HEADS = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
PLAIN_QUERY = {"q_rank": None}
FOUR_LATENT = {"num_heads": 4}
RANDOM_SECOND = {"normalize": True, "random_second": True}

SEQUENCES_TWO = [
    Case("tp 2", 2, tp=2, balance=ALL_LOSSES),
    Case("cp 2", 2, cp=2, balance=ALL_LOSSES),
    Case("tp 2, ep 2, 2 micro-batches", 2, tp=2, ep=2, rows=2, micro_batches=2, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    Case("cp 2, ep 2, 2 micro-batches", 2, cp=2, ep=2, rows=2, micro_batches=2, balance={**ALL_LOSSES, "bias_rate": 0.05}),
    Case("tp 2, ep 2, full recompute", 2, tp=2, ep=2, recompute="full", micro_batches=2, balance=EXACT),
    Case("cp 2, ep 2, full recompute, replicated", 2, cp=2, ep=2, shard=1, recompute="full", balance=ALL_LOSSES),
    Case("tp 2, latent attention, tied", 2, tp=2, ep=2, latent_attention=True, tied=True, balance=GLOBAL),
    Case("cp 2, latent attention, plain queries", 2, cp=2, latent_attention=True, attention=PLAIN_QUERY, balance=GLOBAL),
    Case("tp 2, latent attention, plain queries", 2, tp=2, latent_attention=True, attention=PLAIN_QUERY, rows=2),
    Case("tp 2, norm of all heads", 2, tp=2, ep=2, attention=FULL_NORM, recompute="selective", balance=GLOBAL),
    Case("tp 2, norm of each head", 2, tp=2, attention=HEAD_NORM, moe=GATED, balance=GLOBAL),
    Case("cp 2, norm of all heads", 2, cp=2, attention=FULL_NORM, balance=GLOBAL),
    Case("tp 2, biased and normed queries, selective recompute", 2, tp=2, ep=2, attention={**BIASED, **FULL_NORM}, recompute="selective", balance=GLOBAL),
    Case("cp 2, biased queries, keys and values", 2, cp=2, ep=2, attention=BIASED, recompute="full", balance=GLOBAL),
    Case("cp 2, one key head for all", 2, cp=2, ep=2, attention=FEW_KEYS, balance={"micro_batch_coefficient": 0.3}),
    Case("cp 2, 6 query heads on 3 key heads", 2, cp=2, attention=SIX_HEADS, balance=DEVICES),
    Case("tp 2, losses over devices of a micro-batch", 2, tp=2, rows=2, balance={**DEVICES, "device_scope": "micro_batch"}),
    Case("tp 2, losses over devices of all ranks", 2, tp=2, ep=2, balance={**DEVICES, "device_scope": "data_parallel"}),
    Case("cp 2, chain of 3, norms", 2, cp=2, ep=2, moe=THREE, balance=ALL_LOSSES),
    Case("tp 2, chain of 2, one router, full recompute", 2, tp=2, ep=2, moe=SHARED_CHAIN, recompute="full", balance=GLOBAL),
    Case("tp 2, expert choice, sequences", 2, tp=2, ep=2, kind="expert_choice", router=POOL, rows=2),
    Case("cp 2, expert choice, two sequences a pool", 2, cp=2, ep=2, kind="expert_choice", router={**POOL, "pool_sequences": 2}, rows=4, recompute="full"),
    Case("cp 2, expert choice, no padding", 2, cp=2, kind="expert_choice", router=POOL, rows=2, whole_rows=True),
    Case("cp 2, expert choice, global batch", 2, cp=2, ep=2, kind="expert_choice", router=WHOLE, rows=2),
    Case("tp 2, expert choice, position", 2, tp=2, ep=2, kind="expert_choice", router={"pool": "position"}, rows=3),
    Case("tp 2, threshold", 2, tp=2, ep=2, kind="expert_choice", router=THRESHOLD, rows=4, micro_batches=2),
    Case("cp 2, bi-level", 2, cp=2, ep=2, kind="bi_level", balance=ALL_LOSSES, rows=2),
    Case("tp 2, random", 2, tp=2, ep=2, kind="random", recompute="full"),
    Case("cp 2, hash", 2, cp=2, ep=2, kind="hash"),
    Case("tp 2, gshard", 2, tp=2, ep=2, router=RANDOM_SECOND, balance=GLOBAL, recompute="full"),
    Case("tp 2, forced balance, padding on one rank", 2, tp=2, ep=2, rows=3, router={"forced_balance": True}),
    Case("tp 2, least loaded", 2, tp=2, ep=2, dispatch=SPILL, balance=ALL_LOSSES, micro_batches=2),
    Case("cp 2, 2 chunks, gated shared experts", 2, cp=2, ep=2, dispatch=CHUNKS_2, moe=GATED, balance=ALL_LOSSES),
    Case("cp 2, multi-token prediction, residual logits", 2, cp=2, ep=2, router=RESIDUAL, mtp_layers=2, rows=2, balance=ALL_LOSSES),
    Case("tp 2, multi-token prediction, residual logits", 2, tp=2, ep=2, router=RESIDUAL, mtp_layers=2, rows=2, recompute="full", balance=GLOBAL),
]  # fmt: skip

SEQUENCES_FOUR = [
    Case("tp 2 x cp 2, ep 4", 4, tp=2, cp=2, ep=4, rows=2, balance=ALL_LOSSES),
    Case("tp 2 x shard 2, ep 4, bias", 4, tp=2, ep=4, balance={**ALL_LOSSES, "bias_rate": 0.05}, micro_batches=2),
    Case("tp 2 x shard 2, ep 2 x expert shard 2", 4, tp=2, ep=2, balance=ALL_LOSSES, recompute="full"),
    Case("tp 2 x replicas 2, ep 2 x expert replicas 2", 4, tp=2, ep=2, shard=1, balance=ALL_LOSSES),
    Case("cp 2 x shard 2, ep 4", 4, cp=2, ep=4, balance=ALL_LOSSES, micro_batches=2),
    Case("cp 2 x replicas 2, no ep", 4, cp=2, shard=2, balance=ALL_LOSSES, rows=2),
    Case("cp 4, one key head for all, ep 2", 4, cp=4, ep=2, attention=FEW_KEYS, balance=ALL_LOSSES),
    Case("tp 2 x cp 2, latent attention, full recompute", 4, tp=2, cp=2, ep=2, latent_attention=True, attention=FOUR_LATENT, recompute="full", balance=GLOBAL),
    Case("tp 2 x cp 2, norm of all heads", 4, tp=2, cp=2, ep=2, attention=FULL_NORM, balance=GLOBAL),
    Case("tp 2 x shard 2, biased queries, keys and values", 4, tp=2, ep=2, attention=BIASED, balance=GLOBAL),
    Case("tp 2 x cp 2, expert choice, sequences", 4, tp=2, cp=2, ep=4, kind="expert_choice", router=POOL, rows=2),
    Case("tp 2, expert choice, all ranks", 4, tp=2, ep=4, kind="expert_choice", router=EVERYWHERE, rows=2, recompute="full"),
    Case("cp 2, expert choice, position", 4, cp=2, ep=2, kind="expert_choice", router={"pool": "position"}, rows=2),
    Case("tp 2, two hops, bi-level", 4, tp=2, ep=4, dispatch=TWO_NODES, kind="bi_level", balance=ALL_LOSSES),
    Case("cp 2, least loaded, no token for half", 4, cp=2, ep=4, num_experts=8, dispatch=SPILL, starved_rank=True, balance=BIAS),
    Case("tp 2, idle rank", 4, tp=2, ep=2, idle_rank=True, balance=ALL_LOSSES),
    Case("tp 2 x cp 2, multi-token prediction, residual logits", 4, tp=2, cp=2, ep=2, router=RESIDUAL, mtp_layers=2, balance=ALL_LOSSES),
    Case("cp 4, multi-token prediction, full recompute", 4, cp=4, ep=2, mtp_layers=3, recompute="full", balance=ALL_LOSSES),
]  # fmt: skip

SEQUENCES_EIGHT = [
    Case("tp 2 x cp 2 x shard 2, ep 8", 8, tp=2, cp=2, ep=8, num_experts=8, balance=ALL_LOSSES),
    Case("tp 2 x cp 2 x replicas 2, ep 4 x expert replicas 2", 8, tp=2, cp=2, ep=4, shard=2, balance=ALL_LOSSES, recompute="full"),
    Case("cp 4 x shard 2, ep 2 x expert shard 4", 8, cp=4, ep=2, attention=FEW_KEYS, balance=GLOBAL, micro_batches=2),
]  # fmt: skip

ROUTERS, EXPERTS = ["*router*"], ["*.experts.*"]
ALL_BUT_ROUTERS = ["embedding.*", "head.*", "*norm.weight", "*.attention.*", "layers.0.ffn.*", "*.experts.*", "*.shared.*"]  # fmt: skip
BELOW = ["embedding.*", "layers.0.*", "layers.1.*"]
"""What a pipeline of two stages has in the first one, and more."""

FROZEN_TWO = [
    Case("frozen routers, ep 2", 2, ep=2, frozen=ROUTERS, micro_batches=2, balance=ALL_LOSSES),
    Case("frozen experts, ep 2, full recompute", 2, ep=2, frozen=EXPERTS, recompute="full", balance=EXACT, micro_batches=2),
    Case("frozen experts, ep 2, selective recompute", 2, ep=2, frozen=EXPERTS, recompute="selective", balance=GLOBAL),
    Case("all but routers frozen, sharded", 2, frozen=ALL_BUT_ROUTERS, micro_batches=2, balance=ALL_LOSSES),
    Case("all but routers frozen, ep 2, full recompute", 2, ep=2, frozen=ALL_BUT_ROUTERS, recompute="full", balance=BIAS),
    Case("half of the experts' weights frozen, replicated", 2, ep=2, shard=1, frozen=["*.gate_up"], balance=ALL_LOSSES),
    Case("frozen dense part, tp 2, ep 2", 2, tp=2, ep=2, frozen=["*.attention.*", "layers.0.ffn.up.*"], balance=ALL_LOSSES),
    Case("frozen layers below, cp 2, weights kept", 2, cp=2, frozen=BELOW, reshard_after_forward=False, micro_batches=2, balance=GLOBAL),
    Case("frozen embedding and head, multi-token prediction", 2, ep=2, tied=True, mtp_layers=1, frozen=["embedding.*"], balance=GLOBAL),
    Case("frozen experts, chain of 2, one router", 2, ep=2, moe=SHARED_CHAIN, frozen=EXPERTS, balance=GLOBAL),
    Case("frozen experts, least loaded", 2, ep=2, dispatch=SPILL, frozen=EXPERTS, starved_rank=True, balance=BIAS),
    Case("half of the experts' weights frozen, 2 chunks", 2, ep=2, dispatch=CHUNKS_2, frozen=["*.down"], balance=GLOBAL),
    Case("routers first, ep 2", 2, ep=2, router_only_steps=1, micro_batches=2, balance=ALL_LOSSES),
    Case("routers first, frozen shared experts, tp 2", 2, tp=2, router_only_steps=1, frozen=["*.shared.*"], balance=GLOBAL),
    Case("routers first, chain of 2, full recompute", 2, ep=2, moe=CHAIN, router_only_steps=1, recompute="full", balance=GLOBAL),
]  # fmt: skip

FROZEN_FOUR = [
    Case("frozen experts, ep 2 x expert shard 2", 4, ep=2, frozen=EXPERTS, micro_batches=2, balance=ALL_LOSSES),
    Case("all but routers frozen, ep 2 x replicas 2", 4, ep=2, shard=2, frozen=ALL_BUT_ROUTERS, micro_batches=2, balance=ALL_LOSSES),
    Case("frozen layers below, tp 2 x shard 2, ep 4", 4, tp=2, ep=4, frozen=BELOW, balance=ALL_LOSSES),
    Case("routers first, ep 2 x replicas 2", 4, ep=2, shard=2, router_only_steps=1, balance=ALL_LOSSES),
]  # fmt: skip

DELTA, TERNARY = {"expert_form": "delta", "delta_rank": 2}, {"expert_form": "ternary"}

FORMS_TWO = [
    Case("delta experts, sharded", 2, moe=DELTA, balance=ALL_LOSSES, micro_batches=2),
    Case("delta experts, ep 2", 2, ep=2, moe=DELTA, balance=ALL_LOSSES),
    Case("delta experts, ep 2, full recompute", 2, ep=2, moe=DELTA, recompute="full", balance=EXACT, micro_batches=2),
    Case("delta experts, ep 2, selective recompute, weights kept", 2, ep=2, moe=DELTA, recompute="selective", reshard_after_forward=False, balance=GLOBAL, micro_batches=2),
    Case("delta experts, replicated", 2, ep=2, shard=1, moe=DELTA, balance=ALL_LOSSES),
    Case("delta experts, chain of 2", 2, ep=2, moe={**DELTA, **CHAIN}, balance=GLOBAL, micro_batches=2),
    Case("delta experts, chain of 2, one router, full recompute", 2, ep=2, moe={**DELTA, **SHARED_CHAIN}, recompute="full"),
    Case("delta experts, least loaded", 2, ep=2, dispatch=SPILL, moe=DELTA, starved_rank=True, balance=BIAS, micro_batches=2),
    Case("delta experts, 2 chunks, adjugates", 2, ep=2, dispatch=CHUNKS_2, moe={**DELTA, **ADJUGATES}, balance=GLOBAL),
    Case("delta experts, no token for the second rank", 2, ep=2, moe=DELTA, starved_rank=True, balance=BIAS),
    Case("delta experts, frozen base", 2, ep=2, moe=DELTA, frozen=["*.ffn.base.*"], balance=ALL_LOSSES),
    Case("delta experts, all but the base frozen", 2, ep=2, moe=DELTA, frozen=EXPERTS, balance=GLOBAL),
    Case("delta experts, tp 2, ep 2", 2, tp=2, ep=2, moe=DELTA, balance=ALL_LOSSES),
    Case("delta experts, cp 2, multi-token prediction", 2, cp=2, ep=2, moe=DELTA, mtp_layers=1, balance=ALL_LOSSES),
    Case("ternary experts, sharded", 2, moe=TERNARY, balance=ALL_LOSSES, micro_batches=2),
    Case("ternary experts, ep 2, full recompute", 2, ep=2, moe=TERNARY, recompute="full", balance=EXACT, micro_batches=2),
    Case("ternary experts, replicated, selective recompute", 2, ep=2, shard=1, moe=TERNARY, recompute="selective", balance=GLOBAL),
    Case("ternary experts, chain of 2, 2 chunks", 2, ep=2, dispatch=CHUNKS_2, moe={**TERNARY, **CHAIN}, balance=GLOBAL, micro_batches=2),
    Case("ternary experts, least loaded", 2, ep=2, dispatch=SPILL, moe=TERNARY, starved_rank=True, balance=BIAS),
    Case("ternary experts, tp 2, ep 2", 2, tp=2, ep=2, moe=TERNARY, balance=ALL_LOSSES),
]  # fmt: skip

FORMS_FOUR = [
    Case("delta experts, ep 4", 4, ep=4, moe=DELTA, balance=ALL_LOSSES),
    Case("delta experts, ep 2 x expert shard 2", 4, ep=2, moe=DELTA, balance=ALL_LOSSES, micro_batches=2),
    Case("delta experts, ep 2 x replicas 2, chain of 2", 4, ep=2, shard=2, moe={**DELTA, **CHAIN}, balance=GLOBAL),
    Case("delta experts, two hops, idle rank", 4, ep=4, dispatch=TWO_NODES, moe=DELTA, idle_rank=True, balance=GLOBAL),
    Case("delta experts, tp 2 x shard 2, ep 2", 4, tp=2, ep=2, moe=DELTA, recompute="full", balance=ALL_LOSSES),
    Case("ternary experts, ep 4", 4, ep=4, moe=TERNARY, balance=ALL_LOSSES),
    Case("ternary experts, ep 2 x expert shard 2", 4, ep=2, moe=TERNARY, balance=ALL_LOSSES, micro_batches=2),
    Case("ternary experts, least loaded, ep 4", 4, ep=4, dispatch=SPILL, moe=TERNARY, num_experts=8, starved_rank=True, balance=BIAS),
]  # fmt: skip

INTERLEAVED, ZERO_BUBBLE = {"schedule": "interleaved"}, {"schedule": "interleaved_zero_bubble"}
V, DUAL = {"schedule": "zero_bubble_v"}, {"schedule": "dual_pipe_v"}
EVERYTHING = {**ALL_LOSSES, "bias_rate": 0.05}
RESIDUAL = {"logit_residual": True}

PIPELINE_TWO = [
    Case("pp 2", 2, pp=2, micro_batches=3, balance=EVERYTHING),
    Case("pp 2, layers 1 and 2, as few micro-batches as stages", 2, pp=2, stage_layers=[1, 2], micro_batches=2, balance=EVERYTHING),
    Case("pp 2, interleaved", 2, pp=2, **INTERLEAVED, num_layers=5, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, interleaved, 3 stages a rank", 2, pp=2, **INTERLEAVED, stages_per_rank=3, num_layers=6, micro_batches=2, balance=EVERYTHING),
    Case("pp 2, interleaved, full recompute", 2, pp=2, **INTERLEAVED, num_layers=4, micro_batches=4, recompute="full", balance=EVERYTHING),
    Case("pp 2, zero bubble", 2, pp=2, **ZERO_BUBBLE, num_layers=5, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, zero bubble, a stage a rank", 2, pp=2, **ZERO_BUBBLE, stages_per_rank=1, num_layers=5, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, zero bubble, selective recompute", 2, pp=2, **ZERO_BUBBLE, num_layers=4, micro_batches=2, recompute="selective", balance=EVERYTHING),
    Case("pp 2, zero-bubble V", 2, pp=2, **V, num_layers=5, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, zero-bubble V, one micro-batch", 2, pp=2, **V, num_layers=5, balance=EVERYTHING),
    Case("pp 2, DualPipeV", 2, pp=2, **DUAL, num_layers=5, micro_batches=5, balance=EVERYTHING),
    Case("pp 2, DualPipeV, latent attention", 2, pp=2, **DUAL, num_layers=4, latent_attention=True, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, tied embeddings", 2, pp=2, tied=True, micro_batches=2, balance=EVERYTHING),
    Case("pp 2, two further tokens", 2, pp=2, mtp_layers=2, micro_batches=2, balance=EVERYTHING),
    Case("pp 2, zero bubble, tied embeddings", 2, pp=2, **ZERO_BUBBLE, num_layers=4, tied=True, micro_batches=2, balance=EVERYTHING),
    Case("pp 2, zero bubble, a further token", 2, pp=2, **ZERO_BUBBLE, num_layers=4, mtp_layers=1, micro_batches=2, balance=EVERYTHING),
    Case("pp 2, exact counts", 2, pp=2, micro_batches=2, balance=EXACT),
    Case("pp 2, adjugates", 2, pp=2, micro_batches=2, moe=ADJUGATES, recompute="full", balance=GLOBAL),
    Case("pp 2, full recompute", 2, pp=2, micro_batches=3, recompute="full", balance=EVERYTHING),
    Case("pp 2, chain of 2", 2, pp=2, micro_batches=2, moe=CHAIN, balance=GLOBAL),
    Case("pp 2, chain of 2, one router, selective recompute", 2, pp=2, micro_batches=2, moe=SHARED_CHAIN, recompute="selective", balance=GLOBAL),
    Case("pp 2, expert choice, global batch", 2, pp=2, micro_batches=2, rows=2, kind="expert_choice", router=WHOLE),
    Case("pp 2, carry", 2, pp=2, num_layers=4, micro_batches=3, router=RESIDUAL, balance=EVERYTHING),
    Case("pp 2, delta experts", 2, pp=2, micro_batches=3, moe=DELTA, balance=EVERYTHING),
    Case("pp 2, delta experts, zero bubble", 2, pp=2, **ZERO_BUBBLE, num_layers=5, moe=DELTA, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, ternary experts, zero-bubble V", 2, pp=2, **V, num_layers=5, moe=TERNARY, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, DualPipeV, carry", 2, pp=2, **DUAL, num_layers=4, micro_batches=4, router=RESIDUAL, balance=EVERYTHING),
]  # fmt: skip

FROZEN_PIPELINE_TWO = [
    Case("pp 2, nothing learns on the first stage", 2, pp=2, frozen=BELOW, micro_batches=3, balance=EVERYTHING),
    Case("pp 2, nothing learns on the last stage", 2, pp=2, frozen=["layers.2.*", "norm.*", "head.*"], micro_batches=2),
    Case("pp 2, all but routers frozen, interleaved", 2, pp=2, **INTERLEAVED, num_layers=5, frozen=ALL_BUT_ROUTERS, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, frozen layers below, carry, full recompute", 2, pp=2, num_layers=4, frozen=BELOW, router=RESIDUAL, recompute="full", micro_batches=2, balance=EVERYTHING),
    Case("pp 2, frozen experts, zero bubble", 2, pp=2, **ZERO_BUBBLE, num_layers=5, frozen=EXPERTS, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, frozen layers below, zero-bubble V", 2, pp=2, **V, num_layers=5, frozen=BELOW, micro_batches=4, balance=EVERYTHING),
    Case("pp 2, all but routers frozen, DualPipeV", 2, pp=2, **DUAL, num_layers=5, frozen=ALL_BUT_ROUTERS, micro_batches=5, balance=EVERYTHING),
    Case("pp 2, frozen tied embeddings", 2, pp=2, tied=True, frozen=["embedding.*"], micro_batches=2, balance=EVERYTHING),
    Case("pp 2, routers first, tied embeddings", 2, pp=2, tied=True, router_only_steps=1, micro_batches=2, balance=EVERYTHING),
]  # fmt: skip

PIPELINE_FOUR = [
    Case("pp 4", 4, pp=4, num_layers=5, micro_batches=5, balance=EVERYTHING),
    Case("pp 4, interleaved", 4, pp=4, **INTERLEAVED, num_layers=8, micro_batches=4, balance=EVERYTHING),
    Case("pp 2 x ep 2", 4, pp=2, ep=2, micro_batches=3, balance=EVERYTHING),
    Case("pp 2 x tp 2, ep 2", 4, pp=2, tp=2, ep=2, micro_batches=2, balance=EVERYTHING),
    Case("pp 2 x cp 2, ep 2", 4, pp=2, cp=2, ep=2, micro_batches=2, balance=EVERYTHING),
    Case("pp 2 x shard 2", 4, pp=2, micro_batches=3, balance=EVERYTHING),
    Case("pp 2 x shard 2, weights kept", 4, pp=2, reshard_after_forward=False, micro_batches=3, balance=EVERYTHING),
    Case("pp 2 x replicas 2", 4, pp=2, shard=1, micro_batches=2, balance=EVERYTHING),
    Case("pp 2 x shard 2, tied embeddings", 4, pp=2, tied=True, micro_batches=2, balance=EVERYTHING),
    Case("pp 2 x tp 2, tied, a further token", 4, pp=2, tp=2, tied=True, mtp_layers=1, micro_batches=2, balance=EVERYTHING),
    Case("pp 2 x ep 2, exact counts, full recompute", 4, pp=2, ep=2, recompute="full", micro_batches=2, balance=EXACT),
    Case("pp 2 x ep 2, interleaved, full recompute", 4, pp=2, ep=2, **INTERLEAVED, num_layers=5, recompute="full", micro_batches=4, balance=EVERYTHING),
    Case("pp 2 x shard 2, zero bubble", 4, pp=2, **ZERO_BUBBLE, num_layers=4, micro_batches=4, balance=EVERYTHING),
    Case("pp 2 x ep 2, zero bubble, least loaded", 4, pp=2, ep=2, **ZERO_BUBBLE, num_layers=4, dispatch=SPILL, starved_rank=True, micro_batches=4, balance=BIAS),
    Case("pp 2 x ep 2, zero bubble, carry, 2 chunks", 4, pp=2, ep=2, **ZERO_BUBBLE, num_layers=4, dispatch=CHUNKS_2, moe=GATED, micro_batches=4, router=RESIDUAL, balance=EVERYTHING),
    Case("pp 2 x ep 2, zero-bubble V, idle rank", 4, pp=2, ep=2, **V, num_layers=4, idle_rank=True, micro_batches=4, balance=EVERYTHING),
    Case("pp 2 x tp 2, ep 2, DualPipeV", 4, pp=2, tp=2, ep=2, **DUAL, num_layers=4, micro_batches=4, balance=EVERYTHING),
    Case("pp 2 x ep 2, DualPipeV, bi-level", 4, pp=2, ep=2, **DUAL, num_layers=4, kind="bi_level", micro_batches=4, balance=ALL_LOSSES),
    Case("pp 2 x ep 2, chain of 2", 4, pp=2, ep=2, micro_batches=2, moe=CHAIN, balance=GLOBAL),
]  # fmt: skip

PIPELINE_EIGHT = [
    Case("pp 2 x tp 2 x cp 2, ep 4, interleaved", 8, pp=2, tp=2, cp=2, ep=4, **INTERLEAVED, num_layers=4, micro_batches=4, balance=EVERYTHING),
    Case("pp 4 x ep 2, zero bubble", 8, pp=4, ep=2, **ZERO_BUBBLE, num_layers=8, micro_batches=8, balance=EVERYTHING),
    Case("pp 4 x shard 2, DualPipeV, carry", 8, pp=4, **DUAL, num_layers=8, micro_batches=8, router=RESIDUAL, balance=EVERYTHING),
    Case("pp 2 x ep 2 x expert shard 2, tied, a further token", 8, pp=2, ep=2, tied=True, mtp_layers=1, micro_batches=2, balance=EVERYTHING),
]  # fmt: skip

PIPELINE_BFLOAT16 = [
    Case("bf16, pp 2", 2, pp=2, dtype="bfloat16", rows=2, micro_batches=2, balance=ALL_LOSSES),
    Case("bf16, pp 2, full recompute, tied, carry", 2, pp=2, dtype="bfloat16", rows=2, micro_batches=2, tied=True, router=RESIDUAL, recompute="full", balance=GLOBAL),
    Case("bf16, pp 2, DualPipeV", 2, pp=2, **DUAL, num_layers=4, dtype="bfloat16", rows=2, micro_batches=4, balance=ALL_LOSSES),
]  # fmt: skip

BFLOAT16 = [
    Case("bf16, sharded", 2, dtype="bfloat16", balance=ALL_LOSSES, rows=2),
    Case("bf16, ep 2, 2 micro-batches", 2, ep=2, dtype="bfloat16", balance=ALL_LOSSES, micro_batches=2),
    Case("bf16, chain of 2, one router", 2, ep=2, dtype="bfloat16", moe=SHARED_CHAIN, balance=GLOBAL, rows=2),
    Case(
        "bf16, chain of 2, full recompute",
        2,
        ep=2,
        dtype="bfloat16",
        moe=CHAIN,
        recompute="full",
        balance=GLOBAL,
        rows=2,
    ),
    Case(
        "bf16, 2 chunks, full recompute",
        2,
        ep=2,
        dtype="bfloat16",
        dispatch=CHUNKS_2,
        recompute="full",
        balance=GLOBAL,
        rows=2,
    ),
    Case("bf16, domains", 2, ep=2, dtype="bfloat16", kind="domain", router=DOMAINS, balance=ALL_LOSSES, rows=2),
    Case(
        "bf16, offsets, standardized input",
        2,
        ep=2,
        dtype="bfloat16",
        router=OFFSETS,
        balance=ALL_LOSSES,
        rows=2,
        micro_batches=2,
    ),
    Case("bf16, delta experts", 2, ep=2, dtype="bfloat16", moe=DELTA, balance=GLOBAL, rows=2),
    Case("bf16, ternary experts", 2, ep=2, dtype="bfloat16", moe=TERNARY, balance=GLOBAL, rows=2),
    Case("bf16, adjugates", 2, ep=2, dtype="bfloat16", moe=ADJUGATES, balance=GLOBAL, rows=2),
    Case("bf16, least loaded", 2, ep=2, dtype="bfloat16", dispatch=SPILL, balance=GLOBAL, rows=2),
    Case(
        "bf16, residual logits, multi-token prediction",
        2,
        ep=2,
        dtype="bfloat16",
        router=RESIDUAL,
        mtp_layers=1,
        balance=GLOBAL,
        rows=2,
    ),
    Case("bf16, frozen experts and attention, ep 2", 2, ep=2, dtype="bfloat16", frozen=[*EXPERTS, "*.attention.*"]),
    Case("bf16, tp 2, ep 2", 2, tp=2, ep=2, dtype="bfloat16", balance=GLOBAL, rows=2),
    Case("bf16, cp 2, ep 2", 2, cp=2, ep=2, dtype="bfloat16", balance=ALL_LOSSES, rows=2),
    Case("bf16, ep 2, full recompute", 2, ep=2, dtype="bfloat16", recompute="full", balance=ALL_LOSSES, rows=2),
]

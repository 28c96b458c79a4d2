"""The router's kernels with the sizes of known models, as jobs for the compiler."""

from __future__ import annotations

from moe_kernels.counting_sort import tile_tokens
from moe_kernels.router_topk import rows_of
from moe_kernels.triton_support import block_of
from tests.kernels.compiled.build import Job


def topk(
    name: str, experts: int, groups: int, top_k: int, sigmoid: bool, biased: bool, capability: int, given: bool = False
) -> Job:
    members = experts // groups
    block = block_of(groups) * block_of(members)
    return Job(
        name, "moe_kernels.router_topk", "router_topk_kernel",
        {"logit_ptr": "*fp32", "bias_ptr": "*fp32", "given_ptr": "*i64", "score_ptr": "*fp32", "weight_ptr": "*fp32",
         "expert_ptr": "*i64", "unbiased_ptr": "*i64", "count_ptr": "*i32", "num_tokens": "i32"},
        {"E": experts, "M": members, "BLOCK_G": block_of(groups), "BLOCK_M": block_of(members), "K": top_k,
         "BLOCK_K": block_of(top_k), "TOP_GROUPS": max(groups // 2, 1), "GROUP_BEST": 2 if groups > 1 else 1,
         "SIGMOID": sigmoid, "NORMALIZE": True, "BIASED": biased, "GIVEN": given, "TILE": tile_tokens(top_k),
         "BINS": block_of(experts + 2), "ROWS": min(rows_of(block), tile_tokens(top_k))},
        4, 3, capability, uses_tensor_cores=False, unaligned=("num_tokens",),
    )  # fmt: skip


def topk_backward(name: str, experts: int, top_k: int, capability: int) -> Job:
    return Job(
        name, "moe_kernels.router_topk", "router_topk_backward_kernel",
        {"score_ptr": "*fp32", "expert_ptr": "*i64", "grad_score_ptr": "*fp32", "grad_weight_ptr": "*fp32",
         "grad_logit_ptr": "*fp32", "num_tokens": "i32"},
        {"E": experts, "BLOCK_E": block_of(experts), "K": top_k, "BLOCK_K": block_of(top_k), "SIGMOID": False,
         "NORMALIZE": True, "HAS_SCORE": True, "HAS_WEIGHT": True, "ROWS": rows_of(block_of(experts))},
        4, 3, capability, uses_tensor_cores=False, unaligned=("num_tokens",),
    )  # fmt: skip


def sort(name: str, experts: int, top_k: int, capability: int) -> list[Job]:
    slots = tile_tokens(top_k) * top_k
    sizes = {"E": experts, "BINS": block_of(experts + 2), "SLOTS": slots}
    return [
        Job(f"{name} {kernel}", "moe_kernels.counting_sort", kernel, types, constants, warps, 3, capability,
            uses_tensor_cores=False, unaligned=("num_slots", "num_tiles"))
        for kernel, types, constants, warps in (
            ("tile_counts_kernel", {"expert_ptr": "*i64", "count_ptr": "*i32", "num_slots": "i32"},
             {**sizes, "BLOCK": block_of(slots)}, 4),
            ("tile_starts_kernel",
             {"count_ptr": "*i32", "before_ptr": "*i32", "total_ptr": "*i64", "num_tiles": "i32"},
             {"E": experts, "TILES": 128, "COLUMNS": 16}, 4),
            ("place_slots_kernel",
             {"expert_ptr": "*i64", "before_ptr": "*i32", "total_ptr": "*i64", "order_ptr": "*i64",
              "inverse_ptr": "*i64", "num_slots": "i32"}, {**sizes, "BLOCK": 64}, 4),
        )
    ]  # fmt: skip


def take_highest(name: str, capability: int) -> Job:
    return Job(
        name, "moe_kernels.token_rounding", "take_highest_kernel",
        {"key_ptr": "*i32", "wanted_ptr": "*i64", "take_ptr": "*i1", "num_tokens": "i32"}, {"BLOCK": 2048},
        8, 3, capability, uses_tensor_cores=False, unaligned=("num_tokens",),
    )  # fmt: skip


def compilations() -> list[Job]:
    """Every kernel of routing, on every architecture."""
    found = []
    for capability in (80, 90, 100):
        for name, experts, groups, top_k, sigmoid, biased in (
            ("qwen3", 128, 1, 8, False, False),
            ("deepseek v2 lite", 64, 1, 6, False, False),
            ("deepseek v3", 256, 8, 8, True, True),
            ("the most", 512, 1, 16, True, True),
        ):
            label = f"{name} sm{capability}"
            found.append(topk(f"top-k {label}", experts, groups, top_k, sigmoid, biased, capability))
            found.append(topk_backward(f"top-k backward {label}", experts, top_k, capability))
            found += sort(f"sort {label}", experts, top_k, capability)
        found.append(topk(f"weights of given experts sm{capability}", 128, 1, 8, False, False, capability, given=True))
        found.append(take_highest(f"take highest sm{capability}", capability))
    return found

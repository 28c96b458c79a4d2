"""The classes of `transformers` that are known here: what each key of their config.json means, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_parallel.convert.huggingface.keys import Keys, refuse
from moe_parallel.convert.huggingface.parts import (
    Experts,
    need_shared,
    read_dense_prefix,
    read_experts,
    read_grouped,
    read_latent,
    read_router,
    write_grouped,
    write_latent,
    write_qwen_experts,
    write_router,
)
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import AttentionConfig, GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.moe.adjugate import ADJUGATE_DIM, ADJUGATE_SCALE
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import GroupScore, Score, TokenChoiceConfig

_NEVER: tuple[Any, ...] = (False, None)
_GROVE_GROUP = 2
"""Experts that share an adjugate in GroveMoE's code."""


@dataclass(frozen=True)
class Family:
    """One class. Layers that are alike in all classes are read and written elsewhere.

    Args:
        read: attention, and the experts if it has any.
        write: the same, as keys. Raises ValueError for an option that it knows to be in the way.
        defaults: what the class takes for keys that a config.json may leave out.
        only: keys whose other values change the function, with those that have a counterpart here.
        window: whether a sliding window is used; None for classes that have none.
        public: it is in transformers itself. Others come with code of their own, and an export must ask for them.
    """

    class_name: str
    read: Callable[[Keys], tuple[AttentionConfig, Experts | None]]
    write: Callable[[Architecture], dict[str, Any]]
    attention: type[AttentionConfig] = GroupedQueryConfig
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    window: Callable[[Keys], bool] | None = None
    public: bool = True


def _olmoe(keys: Keys) -> tuple[AttentionConfig, Experts]:
    attention = read_grouped(keys, QKNorm.full)
    if attention.head_dim not in (None, keys.need("hidden_size") // attention.num_heads):
        refuse("head_dim", attention.head_dim, "it must be hidden_size / num_attention_heads, as in transformers")
    return attention, Experts(read_experts(keys, "intermediate_size"), read_router(keys))


def _write_olmoe(architecture: Architecture) -> dict[str, Any]:
    moe = architecture.moe
    found = write_grouped(architecture, attention_bias=False, clip_qkv=None)
    del found["head_dim"]  # the class has none
    return found | write_router(architecture, num_experts=moe.num_experts, intermediate_size=moe.expert_dim)


def _mixtral(keys: Keys) -> tuple[AttentionConfig, Experts]:
    return read_grouped(keys), Experts(read_experts(keys, "intermediate_size"), read_router(keys, normalize=True))


def _write_mixtral(architecture: Architecture) -> dict[str, Any]:
    moe = architecture.moe
    sizes = {"num_local_experts": moe.num_experts, "intermediate_size": moe.expert_dim, "sliding_window": None}
    return write_grouped(architecture) | {"num_experts_per_tok": architecture.router.top_k, **sizes}


def _qwen2_moe(keys: Keys) -> tuple[AttentionConfig, Experts]:
    width, shared = keys.need("moe_intermediate_size"), keys.need("shared_expert_intermediate_size")
    if min(shared, width) < 1 or shared % width != 0:
        refuse(
            "shared_expert_intermediate_size",
            shared,
            f"it must be a multiple of moe_intermediate_size={width}: shared experts are as wide as routed ones here",
        )
    moe = read_experts(keys, "moe_intermediate_size", num_shared_experts=shared // width, shared_expert_gate=True)
    attention = read_grouped(keys, qkv_bias=bool(keys("qkv_bias")))
    return attention, Experts(moe, read_router(keys), read_dense_prefix(keys))


def _write_qwen2_moe(architecture: Architecture) -> dict[str, Any]:
    """Shared experts always have a gate there: of a model that has none it is 0, which halves them, and their weights
    are doubled. Both are exact."""
    attention, moe = architecture.attention, architecture.moe
    assert isinstance(attention, GroupedQueryConfig)
    return (
        write_grouped(architecture, qkv_bias=attention.qkv_bias)
        | write_qwen_experts(architecture)
        | {"shared_expert_intermediate_size": need_shared(architecture) * moe.expert_dim}
    )


def _qwen3_moe(keys: Keys) -> tuple[AttentionConfig, Experts]:
    moe = read_experts(keys, "moe_intermediate_size")
    return read_grouped(keys, QKNorm.head), Experts(moe, read_router(keys), read_dense_prefix(keys))


def _grove_moe(keys: Keys) -> tuple[AttentionConfig, Experts]:
    """Qwen3-MoE with adjugates, whose sizes are in no key but in the code (github.com/inclusionAI/GroveMoE). Experts
    are chosen by the sigmoid of their logits, which is the order of the logits until it rounds to 1."""
    number = read_experts(keys, "moe_intermediate_size").num_experts
    if number % _GROVE_GROUP != 0:
        refuse("num_experts", number, f"it must be a multiple of {_GROVE_GROUP}, the experts that share an adjugate")
    moe = read_experts(
        keys,
        "moe_intermediate_size",
        adjugate_groups=number // _GROVE_GROUP,
        adjugate_dim=ADJUGATE_DIM,
        adjugate_scale=ADJUGATE_SCALE,
    )
    return read_grouped(keys, QKNorm.head), Experts(moe, read_router(keys, normalize=True), read_dense_prefix(keys))


def _write_qwen3_moe(architecture: Architecture) -> dict[str, Any]:
    return write_grouped(architecture, attention_bias=False) | write_qwen_experts(architecture)


def _deepseek_moe(keys: Keys) -> MoEConfig:
    shared = keys.need("n_shared_experts")
    if shared < 1:
        refuse("n_shared_experts", shared, "the class in transformers has at least one")
    return read_experts(keys, "moe_intermediate_size", num_shared_experts=shared)


def _deepseek_v2(keys: Keys) -> tuple[AttentionConfig, Experts]:
    """The class never divides by the sum of weights. Where groups are left out it takes their scores as 0 and we as
    minus infinity: both give an expert of theirs no weight."""
    groups: dict[str, Any] = {}
    if keys("topk_method") == "group_limited_greedy":
        groups = {"num_groups": keys.need("n_group"), "top_groups": keys.need("topk_group")}
    router = read_router(
        keys, normalize=False, route_scale=keys("routed_scaling_factor"), group_score=GroupScore.max, **groups
    )
    return read_latent(keys), Experts(_deepseek_moe(keys), router, keys("first_k_dense_replace") or 0)


def _deepseek_v3(keys: Keys) -> tuple[AttentionConfig, Experts]:
    top_k, groups, chosen = keys.need("num_experts_per_tok"), keys("n_group") or 1, keys("topk_group") or 1
    if groups > 1 and top_k != 2 * chosen:
        refuse(
            "num_experts_per_tok",
            top_k,
            f"with n_group={groups} it must be 2 * topk_group={2 * chosen}: a group is worth its two best experts "
            "there, and its num_experts_per_tok / topk_group best ones here",
        )
    router = read_router(
        keys,
        score=Score.sigmoid,
        route_scale=keys("routed_scaling_factor"),
        num_groups=groups,
        top_groups=chosen if groups > 1 else 1,
    )
    return read_latent(keys), Experts(_deepseek_moe(keys), router, keys("first_k_dense_replace") or 0, has_bias=True)


def _write_deepseek(architecture: Architecture, **more: Any) -> dict[str, Any]:
    router, moe, model = architecture.router, architecture.moe, architecture.model
    assert isinstance(router, TokenChoiceConfig)
    sizes = {"n_routed_experts": moe.num_experts, "n_shared_experts": need_shared(architecture)}
    routing = {"n_group": router.num_groups, "topk_group": router.top_groups, "moe_layer_freq": 1}
    return write_latent(architecture) | write_router(
        architecture,
        **sizes,
        **routing,
        moe_intermediate_size=moe.expert_dim,
        first_k_dense_replace=model.first_dense_layers,
        routed_scaling_factor=router.route_scale,
        **more,
    )


def _write_deepseek_v2(architecture: Architecture) -> dict[str, Any]:
    router = architecture.router
    assert isinstance(router, TokenChoiceConfig)
    if router.normalize:
        raise ValueError("router.normalize=true, where weights are not divided by their sum")
    method = "greedy" if router.num_groups == 1 else "group_limited_greedy"
    return _write_deepseek(architecture, topk_method=method, scoring_func="softmax", mlp_bias=False)


def _write_deepseek_v3(architecture: Architecture) -> dict[str, Any]:
    router = architecture.router
    assert isinstance(router, TokenChoiceConfig)
    if router.num_groups > 1 and router.group_score is GroupScore.top_sum and router.top_k != 2 * router.top_groups:
        raise ValueError(
            f"router.top_k={router.top_k} with router.top_groups={router.top_groups}, where a group is worth its two "
            "best experts, which is router.top_k = 2 * router.top_groups here"
        )
    return _write_deepseek(
        architecture,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_interleave=True,
        num_nextn_predict_layers=architecture.model.mtp_layers,
    )


def _window_given(keys: Keys) -> bool:
    return keys("sliding_window") is not None


def _window_used(keys: Keys) -> bool:
    kinds = keys.several("layer_types")
    return any(kind != "full_attention" for kind in kinds) if kinds else bool(keys.get("use_sliding_window"))


_DEEPSEEK_ONLY = {"attention_bias": _NEVER, "moe_layer_freq": (1, None)}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        lambda keys: (read_grouped(keys), None),
        lambda architecture: write_grouped(architecture, attention_bias=False, mlp_bias=False),
        only={"attention_bias": _NEVER, "mlp_bias": _NEVER},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda keys: (read_grouped(keys), None),
        lambda architecture: write_grouped(architecture, sliding_window=None),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        window=_window_given,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda keys: (read_grouped(keys, qkv_bias=True), None),
        lambda architecture: write_grouped(architecture, use_sliding_window=False, sliding_window=None),
        defaults={"num_key_value_heads": 32},
        window=_window_used,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda keys: (read_grouped(keys, QKNorm.head), None),
        lambda architecture: write_grouped(
            architecture, attention_bias=False, use_sliding_window=False, sliding_window=None
        ),
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        only={"attention_bias": _NEVER},
        window=_window_used,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        _write_mixtral,
        defaults={
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "sliding_window": None,
        },
        window=_window_given,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _olmoe,
        _write_olmoe,
        defaults={"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
        only={"attention_bias": _NEVER, "clip_qkv": (None,)},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _qwen2_moe,
        _write_qwen2_moe,
        defaults={
            "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        },
        only={"decoder_sparse_step": (1,)},
        window=_window_used,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        _write_qwen3_moe,
        defaults={
            "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
        only={"attention_bias": _NEVER, "decoder_sparse_step": (1,)},
        window=_window_used,
    ),
    "grove_moe": Family(
        "GroveMoeForCausalLM",
        _grove_moe,
        _write_qwen3_moe,
        defaults={
            "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
        only={"attention_bias": _NEVER, "decoder_sparse_step": (1,)},
        window=_window_used,
        public=False,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        _deepseek_v2,
        _write_deepseek_v2,
        LatentConfig,
        defaults={
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "first_k_dense_replace": 0, "n_shared_experts": 2, "n_routed_experts": 64,
            "routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": None, "topk_group": None,
        },
        only={
            **_DEEPSEEK_ONLY, "mlp_bias": _NEVER, "norm_topk_prob": _NEVER, "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        _deepseek_v3,
        _write_deepseek_v3,
        LatentConfig,
        defaults={
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "first_k_dense_replace": 3, "n_shared_experts": 1, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
        },
        only={
            **_DEEPSEEK_ONLY, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "rope_interleave": (True,),
        },
    ),
}  # fmt: skip
"""By model_type; an export takes the first that expresses a model."""

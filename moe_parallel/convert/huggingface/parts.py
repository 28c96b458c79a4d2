"""Parts of config.json that several classes of `transformers` have: attention and experts, read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_parallel.convert.huggingface.keys import Keys, refuse
from moe_parallel.convert.huggingface.rope import read_rope
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig

LATENT_EPSILON = 1e-6
"""What norms of latents have in the DeepSeek classes, whatever rms_norm_eps says."""


@dataclass(frozen=True)
class Experts:
    """The part of a model that a dense one does not have."""

    moe: MoEConfig
    router: TokenChoiceConfig
    first_dense_layers: int = 0
    has_bias: bool = False


# -- attention ---------------------------------------------------------------------------------------------------------


def read_grouped(keys: Keys, qk_norm: QKNorm = QKNorm.none, qkv_bias: bool = False) -> GroupedQueryConfig:
    """Grouped-query attention; what its class always has is told by the caller."""
    return GroupedQueryConfig(
        num_heads=keys.need("num_attention_heads"),
        num_kv_heads=keys.get("num_key_value_heads"),
        head_dim=keys.get("head_dim"),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        rope=read_rope(keys),
    )


def write_grouped(architecture: Architecture, **more: Any) -> dict[str, Any]:
    """The reverse, with `more` keys."""
    attention = architecture.attention
    assert isinstance(attention, GroupedQueryConfig)
    heads = {"num_key_value_heads": attention.key_heads, "head_dim": attention.head_width(architecture.model.dim)}
    return {**heads, "attention_dropout": 0.0, **more}


def read_latent(keys: Keys) -> LatentConfig:
    """Latent attention of the DeepSeek classes."""
    if keys("rms_norm_eps") != LATENT_EPSILON:
        refuse("rms_norm_eps", keys("rms_norm_eps"), f"norms of latents have {LATENT_EPSILON} there, here all the same")
    heads = keys.need("num_attention_heads")
    keys.only("num_key_value_heads", heads, None)
    return LatentConfig(
        num_heads=heads,
        q_rank=keys("q_lora_rank"),
        kv_rank=keys.need("kv_lora_rank"),
        nope_head_dim=keys.need("qk_nope_head_dim"),
        rope_head_dim=keys.need("qk_rope_head_dim"),
        value_head_dim=keys.need("v_head_dim"),
        rope=read_rope(keys),
    )


def write_latent(architecture: Architecture, **more: Any) -> dict[str, Any]:
    """The reverse, with `more` keys."""
    attention, epsilon = architecture.attention, architecture.model.norm_epsilon
    assert isinstance(attention, LatentConfig)
    if epsilon != LATENT_EPSILON:
        raise ValueError(f"model.norm_epsilon={epsilon}, where norms of latents there have {LATENT_EPSILON}")
    return {
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **more,
    }


# -- experts -----------------------------------------------------------------------------------------------------------


def _num_experts(keys: Keys) -> int:
    """By one of the names that transformers takes for the same."""
    names = "num_experts", "num_local_experts", "n_routed_experts"
    known = [name for source in (keys.config, keys.defaults) for name in names if source.get(name) is not None]
    return keys.need(known[0] if known else "num_experts")


def read_router(keys: Keys, **more: Any) -> TokenChoiceConfig:
    """Token choice; `more` options of it are set by the caller, or take the place of these."""
    return TokenChoiceConfig(
        **{"top_k": keys.need("num_experts_per_tok"), "normalize": bool(keys.get("norm_topk_prob")), **more}
    )


def read_experts(keys: Keys, width: str, **more: Any) -> MoEConfig:
    """Routed experts, of the width that a key names; `more` options are set by the caller."""
    return MoEConfig(
        **{"num_experts": _num_experts(keys), "expert_dim": keys.need(width), "num_shared_experts": 0, **more}
    )


def read_dense_prefix(keys: Keys) -> int:
    """Dense layers, if they are the first ones."""
    dense = keys.several("mlp_only_layers")
    if any(layer not in dense for layer in range(len(dense))):
        refuse("mlp_only_layers", dense, "only the first layers may be dense here")
    return len(dense)


def write_router(architecture: Architecture, **more: Any) -> dict[str, Any]:
    """The reverse of `read_router`, with `more` keys."""
    router = architecture.router
    assert isinstance(router, TokenChoiceConfig)
    return {"num_experts_per_tok": router.top_k, "norm_topk_prob": router.normalize, **more}


def write_qwen_experts(architecture: Architecture) -> dict[str, Any]:
    """Router and routed experts of the Qwen classes."""
    return write_router(
        architecture,
        num_experts=architecture.moe.num_experts,
        moe_intermediate_size=architecture.moe.expert_dim,
        decoder_sparse_step=1,
        mlp_only_layers=list(range(architecture.model.first_dense_layers)),
        use_sliding_window=False,
        sliding_window=None,
    )


def need_shared(architecture: Architecture) -> int:
    """Shared experts, which some classes always have."""
    number = architecture.moe.num_shared_experts
    if number == 0:
        raise ValueError("moe.num_shared_experts=0, where there is at least one")
    return number

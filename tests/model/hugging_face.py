"""Small random models of transformers, and the same weights in ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import AttentionConfig, GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.rope import RopeConfig, RopeScaling
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import GroupScore, Score, TokenChoiceConfig

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
LATENT: dict[str, Any] = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.5, "mscale_all_dim": 0.8,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 4, "moe_intermediate_size": 40}


@dataclass(frozen=True)
class Family:
    """One model of transformers and the options that describe it here."""

    make: Callable[[], nn.Module]
    attention: AttentionConfig
    moe: MoEConfig
    router: TokenChoiceConfig
    first_dense_layers: int = 0
    bias_rate: float = 0.0
    norm_epsilon: float = 1e-6

    def ours(self) -> Transformer:
        """Our model, without numbers."""
        model = ModelConfig(
            dim=64,
            num_layers=2,
            first_dense_layers=self.first_dense_layers,
            ffn_dim=80,
            norm_epsilon=self.norm_epsilon,
        )
        balance = BalanceConfig(bias_rate=self.bias_rate)
        return Transformer(Architecture(model, self.attention, self.moe, self.router, balance, VOCABULARY))


def _latent(q_rank: int | None, yarn: bool) -> LatentConfig:
    rope = RopeConfig()
    if yarn:
        rope = RopeConfig(
            scaling=RopeScaling.yarn, factor=8.0, original_sequence_tokens=16, mscale=0.5, mscale_all_dim=0.8
        )
    return LatentConfig(
        num_heads=4,
        q_rank=q_rank,
        kv_rank=24,
        nope_head_dim=16,
        rope_head_dim=8,
        value_head_dim=24,
        rope=rope,
    )


FAMILIES: dict[str, Family] = {
    "deepseek_v2_lite": Family(
        lambda: DeepseekV2ForCausalLM(
            DeepseekV2Config(
                **SHAPE, **LATENT, **EXPERTS, q_lora_rank=None, n_routed_experts=8, n_shared_experts=2,
                intermediate_size=80, first_k_dense_replace=1, topk_method="greedy", routed_scaling_factor=1.0,
            )
        ),
        _latent(None, yarn=False),
        MoEConfig(num_experts=8, expert_dim=40, num_shared_experts=2),
        TokenChoiceConfig(top_k=4),
        first_dense_layers=1,
    ),
    "deepseek_v2_yarn_groups": Family(
        lambda: DeepseekV2ForCausalLM(
            DeepseekV2Config(
                **SHAPE, **LATENT, **EXPERTS, q_lora_rank=32, n_routed_experts=8, n_shared_experts=1,
                intermediate_size=80, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                routed_scaling_factor=3.0, rope_parameters=YARN, max_position_embeddings=128,
            )
        ),
        _latent(32, yarn=True),
        MoEConfig(num_experts=8, expert_dim=40),
        TokenChoiceConfig(top_k=4, route_scale=3.0, num_groups=4, top_groups=2, group_score=GroupScore.max),
    ),
    "deepseek_v3_yarn": Family(
        lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **SHAPE, **LATENT, **EXPERTS, q_lora_rank=32, n_routed_experts=8, n_shared_experts=1,
                num_key_value_heads=4, intermediate_size=80, first_k_dense_replace=1, n_group=4, topk_group=2,
                routed_scaling_factor=2.5, rope_parameters=YARN, max_position_embeddings=128,
                num_nextn_predict_layers=0,
            )
        ),
        _latent(32, yarn=True),
        MoEConfig(num_experts=8, expert_dim=40),
        TokenChoiceConfig(
            top_k=4, score=Score.sigmoid, normalize=True, route_scale=2.5, num_groups=4, top_groups=2
        ),
        first_dense_layers=1,
        bias_rate=0.001,
    ),
    "qwen3_moe": Family(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SHAPE, **EXPERTS, num_key_value_heads=2, head_dim=24, num_experts=8, norm_topk_prob=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6}, sliding_window=None,
            )
        ),
        GroupedQueryConfig(
            num_heads=4, num_kv_heads=2, head_dim=24, qk_norm=QKNorm.head, rope=RopeConfig(theta=1e6)
        ),
        MoEConfig(num_experts=8, expert_dim=40, num_shared_experts=0),
        TokenChoiceConfig(top_k=4, normalize=True),
    ),
    "olmoe": Family(
        lambda: OlmoeForCausalLM(
            OlmoeConfig(
                **SHAPE, num_key_value_heads=4, num_experts=8, num_experts_per_tok=4, intermediate_size=40,
                eos_token_id=0,
            )
        ),
        GroupedQueryConfig(num_heads=4, num_kv_heads=4, qk_norm=QKNorm.full),
        MoEConfig(num_experts=8, expert_dim=40, num_shared_experts=0),
        TokenChoiceConfig(top_k=4),
        norm_epsilon=1e-5,
    ),
    "mixtral": Family(
        lambda: MixtralForCausalLM(
            MixtralConfig(
                **SHAPE, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, intermediate_size=40,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ),
        GroupedQueryConfig(num_heads=4, num_kv_heads=2, rope=RopeConfig(theta=1e6)),
        MoEConfig(num_experts=8, expert_dim=40, num_shared_experts=0),
        TokenChoiceConfig(top_k=2, normalize=True),
        norm_epsilon=1e-5,
    ),
}  # fmt: skip

_RENAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embedding."),
    (r"^lm_head\.", "head."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.q_a_proj\.", ".query_down."),
    (r"\.q_a_layernorm\.", ".query_norm."),
    (r"\.q_b_proj\.", ".query_up."),
    (r"\.kv_a_proj_with_mqa\.", ".latent_down."),
    (r"\.kv_a_layernorm\.", ".latent_norm."),
    (r"\.kv_b_proj\.", ".latent_up."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.o_proj\.", ".output."),
    (r"\.q_norm\.", ".query_norm."),
    (r"\.k_norm\.", ".key_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.shared_experts\.", ".shared."),
    (r"\.gate\.weight$", ".router.weight"),
    (r"\.gate\.e_score_correction_bias$", ".router.bias"),
    (r"\.experts\.gate_up_proj$", ".experts.gate_up"),
    (r"\.experts\.down_proj$", ".experts.down"),
    (r"\.down_proj\.", ".down."),
)


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or gradients, of a model of transformers under our names and in our layout."""
    ours = {}
    for name, tensor in theirs.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    for name in [n for n in ours if n.endswith(".gate_proj.weight")]:
        stem = name.removesuffix(".gate_proj.weight")
        gate, up = ours.pop(name), ours.pop(f"{stem}.up_proj.weight")
        if stem.endswith("shared"):
            ours[f"{stem}.gate_up.weight"] = torch.cat([gate, up])
        else:
            ours[f"{stem}.gate.weight"], ours[f"{stem}.up.weight"] = gate, up
    return ours


def same_models(family: Family) -> tuple[nn.Module, Transformer]:
    """Their model with random weights, norms and biases included, and ours with the same numbers."""
    torch.manual_seed(0)
    theirs = family.make().eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=0.15 if tensor.ndim > 1 else 0.05)
    ours = family.ours()
    ours.load_state_dict(our_names(theirs.state_dict()))
    return theirs, ours

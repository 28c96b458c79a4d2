"""Small architectures that together have every kind of parameter."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import InputNorm, Score, TokenChoiceConfig

VOCABULARY = 50

GROUPED = Architecture(
    model=ModelConfig(dim=32, num_layers=3, first_dense_layers=1, ffn_dim=48),
    attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2, qk_norm=QKNorm.head),
    moe=MoEConfig(num_experts=8, expert_dim=24, num_shared_experts=2, shared_expert_gate=True),
    router=TokenChoiceConfig(top_k=3),
    balance=BalanceConfig(global_coefficient=0.01),
    vocab_size=VOCABULARY,
)
LATENT = Architecture(
    model=ModelConfig(dim=32, num_layers=2, tie_embeddings=True),
    attention=LatentConfig(num_heads=4, q_rank=12, kv_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=12),
    moe=MoEConfig(num_experts=8, expert_dim=24, num_shared_experts=0),
    router=TokenChoiceConfig(top_k=2, score=Score.sigmoid, normalize=True),
    balance=BalanceConfig(bias_rate=0.001),
    vocab_size=VOCABULARY,
)
DENSE = Architecture(
    model=ModelConfig(dim=32, num_layers=2, first_dense_layers=2, ffn_dim=48),
    attention=GroupedQueryConfig(num_heads=4, qk_norm=QKNorm.full, qkv_bias=True),
    moe=MoEConfig(),
    router=TokenChoiceConfig(),
    balance=BalanceConfig(),
    vocab_size=VOCABULARY,
)
FURTHER = replace(
    GROUPED,
    model=replace(GROUPED.model, mtp_layers=2),
    router=TokenChoiceConfig(top_k=3, logit_residual=True, logit_offset=True, input_norm=InputNorm.standardize),
)
ARCHITECTURES = {"grouped": GROUPED, "latent": LATENT, "dense": DENSE, "further": FURTHER}


def build(architecture: Architecture, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model with random weights, through the meta device as in training. Norms and biases are random too: ones and
    zeros hide bugs."""
    with torch.device("meta"):
        model = Transformer(architecture).to(dtype)
    model.to_empty(device="cpu")
    init_weights(model, InitConfig(std=0.2), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("_bias", ".offset")):
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=dtype) - 0.5)
    return model

"""Small models in memory, as conversions see them, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Given, Lazy
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import build

VOCABULARY = 50
SEED = 5

DENSE = Architecture(
    model=ModelConfig(dim=32, num_layers=3, first_dense_layers=3, ffn_dim=48),
    attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2, qk_norm=QKNorm.head),
    moe=MoEConfig(),
    router=TokenChoiceConfig(),
    balance=BalanceConfig(),
    vocab_size=VOCABULARY,
)


def with_experts(num_experts: int, expert_dim: int, top_k: int, first_dense_layers: int = 1, **options: Any):
    """DENSE with experts: weights of a token's experts sum to 1, none shared, unless told otherwise.

    Args:
        options: of MoEConfig; those that begin with `router_` of TokenChoiceConfig.
    """
    routing = {name.removeprefix("router_"): options.pop(name) for name in list(options) if name.startswith("router_")}
    return replace(
        DENSE,
        model=replace(DENSE.model, first_dense_layers=first_dense_layers),
        moe=MoEConfig(**{"num_experts": num_experts, "expert_dim": expert_dim, "num_shared_experts": 0, **options}),
        router=TokenChoiceConfig(**{"top_k": top_k, "normalize": top_k > 1, **routing}),
    )


def pretrained(architecture: Architecture = DENSE, seed: int = 0) -> Pretrained:
    """A model with random weights, norms and biases included."""
    state = build(architecture, seed=seed).state_dict()
    if architecture.model.tie_embeddings:
        del state["head.weight"]
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if name.endswith("router.bias"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    weights: dict[str, Lazy] = {name: Given(value, name) for name, value in state.items()}
    return Pretrained(Path("memory"), architecture, weights)


def logits(architecture: Architecture, weights: Mapping[str, Lazy]) -> Tensor:
    """Of a fixed batch of two sequences with several documents, in float64: what rounds is the weights alone."""
    batch = make_batch([(13, 11), (24,)], 24, VOCABULARY)
    model = build_model(architecture, weights, torch.float64).eval()
    with torch.no_grad():
        return model(batch, ForwardContext(step=0, training=False))[0]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Euclidean norm of the difference by that of the second."""
    return float((ours - theirs).norm() / theirs.norm())

"""The names in a checkpoint are a contract: a renamed module would make every older checkpoint unreadable."""

from __future__ import annotations

import torch

from moe_parallel.checkpoint.state import model_state, optimizer_state
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig, build_optimizer

GROUPED = {
    "attention_norm.weight": (8,),
    "attention.query.weight": (8, 8),
    "attention.key.weight": (4, 8),
    "attention.value.weight": (4, 8),
    "attention.output.weight": (8, 8),
    "attention.query_norm.weight": (4,),
    "attention.key_norm.weight": (4,),
    "ffn_norm.weight": (8,),
}
LATENT = {
    "attention_norm.weight": (8,),
    "attention.query_down.weight": (6, 8),
    "attention.query_norm.weight": (6,),
    "attention.query_up.weight": (8, 6),
    "attention.latent_down.weight": (5 + 2, 8),
    "attention.latent_norm.weight": (5,),
    "attention.latent_up.weight": (2 * (2 + 3), 5),
    "attention.output.weight": (8, 6),
    "ffn_norm.weight": (8,),
}
DENSE = {"ffn.gate.weight": (10, 8), "ffn.up.weight": (10, 8), "ffn.down.weight": (8, 10)}
EXPERTS = {
    "ffn.router.weight": (4, 8),
    "ffn.router.bias": (4,),
    "ffn.experts.gate_up": (4, 2 * 3, 8),
    "ffn.experts.down": (4, 8, 3),
    "ffn.shared.gate_up.weight": (2 * 6, 8),
    "ffn.shared.down.weight": (8, 6),
    "ffn.shared_gate.weight": (1, 8),
}
ENDS = {"model.embedding.weight": (11, 8), "model.norm.weight": (8,), "model.head.weight": (11, 8)}


def build(attention, tied=False) -> Transformer:
    return Transformer(
        Architecture(
            model=ModelConfig(dim=8, num_layers=2, first_dense_layers=1, ffn_dim=10, tie_embeddings=tied),
            attention=attention,
            moe=MoEConfig(num_experts=4, expert_dim=3, num_shared_experts=2, shared_expert_gate=True),
            router=TokenChoiceConfig(top_k=2),
            balance=BalanceConfig(bias_rate=0.001),
            vocab_size=11,
        )
    )


def named(first: dict, second: dict) -> dict:
    layers = [
        (f"model.layers.{i}.{name}", shape) for i, part in enumerate((first, second)) for name, shape in part.items()
    ]
    return ENDS | dict(layers)


def shapes(state: dict) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_names_and_shapes_of_a_model() -> None:
    """Fails on any rename, transposition or changed fusion of a weight; then a conversion of old files is due."""
    grouped = build(GroupedQueryConfig(num_heads=2, num_kv_heads=1, qk_norm=QKNorm.head))
    assert shapes(model_state(grouped)) == named(GROUPED | DENSE, GROUPED | EXPERTS)
    widths = {"nope_head_dim": 2, "rope_head_dim": 2, "value_head_dim": 3}
    latent = build(LatentConfig(num_heads=2, q_rank=6, kv_rank=5, **widths))
    assert shapes(model_state(latent)) == named(LATENT | DENSE, LATENT | EXPERTS)


def test_a_tied_head_is_stored_once() -> None:
    """Two copies of one tensor could differ after a partial load."""
    tied = build(GroupedQueryConfig(num_heads=2, num_kv_heads=1, qk_norm=QKNorm.head), tied=True)
    wanted = named(GROUPED | DENSE, GROUPED | EXPERTS)
    del wanted["model.head.weight"]
    assert shapes(model_state(tied)) == wanted


def test_names_of_the_optimizer() -> None:
    """Moments are found by their parameter's name; buffers such as the router's bias have none."""
    model = build(GroupedQueryConfig(num_heads=2, num_kv_heads=1, qk_norm=QKNorm.head))
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = model_state(model)
    moments = ("step", "exp_avg", "exp_avg_sq")
    wanted = {f"optimizer.{name[6:]}.{m}" for name in state if "bias" not in name for m in moments}
    assert {name.replace("optimizer.model.", "optimizer.") for name in optimizer_state(optimizer, state)} == wanted

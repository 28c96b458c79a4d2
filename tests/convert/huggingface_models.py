"""Small random models of transformers, one or two of each class that is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moe_parallel.convert.huggingface.files import SafetensorsFolder
from moe_parallel.convert.lazy import Given, Lazy
from tests.model.hugging_face import EXPERTS, LATENT, SHAPE, VOCABULARY, YARN

__all__ = ["NAMES", "VOCABULARY", "in_memory", "make", "make_grove", "stored"]

HEADS: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 80}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PLAIN_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **SHAPE, **LATENT, **EXPERTS, "n_routed_experts": 8, "intermediate_size": 80, "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}  # fmt: skip

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: class without its ends, and what its config.json says
    "llama": ("Llama", {**SHAPE, **HEADS, "head_dim": 24, "rope_parameters": LLAMA3}),
    "llama, linear, tied": ("Llama", {**SHAPE, **HEADS, "rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SHAPE, **HEADS, "sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {**SHAPE, **HEADS, "rope_parameters": PLAIN_YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, **HEADS, "head_dim": 24}),
    "mixtral": ("Mixtral", {**SHAPE, **HEADS, "intermediate_size": 40, "num_local_experts": 8}),
    "olmoe": (
        "Olmoe",
        {**SHAPE, "num_key_value_heads": 4, "intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 4},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {**SHAPE, **HEADS, **EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 80, "mlp_only_layers": [0]},
    ),
    "qwen2_moe, weights that sum to 1": (
        "Qwen2Moe",
        {
            **SHAPE, **HEADS, **EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 40, "qkv_bias": False,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SHAPE, **HEADS, **EXPERTS, "head_dim": 24, "num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "deepseek_v2, plain queries": (
        "DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "n_shared_experts": 2, "num_key_value_heads": 4}
    ),
    "deepseek_v2, groups": (
        "DeepseekV2",
        {
            **DEEPSEEK, "q_lora_rank": 32, "n_shared_experts": 1, "topk_method": "group_limited_greedy", "n_group": 4,
            "topk_group": 2, "routed_scaling_factor": 3.0, "rope_parameters": YARN, "max_position_embeddings": 128,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **DEEPSEEK, "q_lora_rank": 32, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
            "rope_parameters": YARN, "max_position_embeddings": 128, "num_nextn_predict_layers": 0,
        },
    ),
}  # fmt: skip

NAMES = list(_MODELS)


def make(name: str) -> nn.Module:
    """A model with random weights, norms and biases included, in float32."""
    kind, options = _MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    return randomized(getattr(transformers, f"{kind}ForCausalLM")(config))


def randomized(model: nn.Module) -> nn.Module:
    """The same with random weights: ones and zeros of fresh models hide bugs."""
    model = model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(std=0.15 if tensor.ndim > 1 else 0.05)
    return model


class WithAdjugates(nn.Module):
    """A block of Qwen3-MoE with what GroveMoE adds to it, written out token by token. Names are those of its files."""

    def __init__(self, block: nn.Module, dim: int) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts
        self.block = [block]  # in a list: its weights are registered above
        groups = block.gate.weight.shape[0] // 2
        self.chunk_experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(dim, 128, bias=False),
                    "up_proj": nn.Linear(dim, 128, bias=False),
                    "down_proj": nn.Linear(128, dim, bias=False),
                }
            )
            for _ in range(groups)
        )
        self.register_buffer("expert_bias", torch.zeros(2 * groups))

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD = self.block[0](x_BSD)
        x_TD = x_BSD.flatten(0, 1)
        _, weight_TK, expert_TK = self.gate(x_TD)
        added = torch.zeros_like(x_TD)
        for token, (weights, experts) in enumerate(zip(weight_TK, expert_TK.tolist())):
            for weight, expert in zip(weights, experts):
                adjugate, x = self.chunk_experts[expert // 2], x_TD[token]
                hidden = nn.functional.silu(adjugate["gate_proj"](x)) * adjugate["up_proj"](x)
                added[token] += 0.05 * weight * adjugate["down_proj"](hidden)
        return out_BSD + added.view_as(out_BSD)


def make_grove() -> nn.Module:
    """A small GroveMoE: its class is not in transformers."""
    model = make("qwen3_moe")
    for layer in model.model.layers[1:]:
        layer.mlp = WithAdjugates(layer.mlp, model.config.hidden_size)
    return randomized(model)


def in_memory(model: nn.Module) -> dict[str, Lazy]:
    """Weights and buffers by the names that they have in transformers' modules."""
    return {name: Given(tensor, name) for name, tensor in model.state_dict().items()}


def stored(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """What transformers writes of a model: config.json, and weights by their names in the files."""
    save: Callable[[Path], None] = model.save_pretrained  # type: ignore[assignment]
    save(folder)
    return json.loads((folder / "config.json").read_text()), SafetensorsFolder(folder).weights()

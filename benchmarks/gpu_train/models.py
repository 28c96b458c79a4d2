"""The models that are trained: presets of configs/model, and the same architectures as classes of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moe_data.batch import TokenBatch
from moe_kernels.choice import ExpertKernel
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.counts import count_parameters, training_flops_per_token
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.options import architecture, composed

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Precision:
    """What is held, and computed, in which type; the same on all sides."""

    weights: torch.dtype
    """Also of gradients after their reduction, and of both moments of AdamW."""
    compute: torch.dtype
    text: str

    @property
    def mixed(self) -> bool:
        """Weights are cast for each use: FSDP2's mixed precision does it, on all sides."""
        return self.weights != self.compute


PRECISIONS = {
    "master": Precision(
        torch.float32, torch.bfloat16, "weights, gradients and moments in fp32, computed in bf16 (FSDP2 casts)"
    ),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, "weights, gradients and moments in bf16"),
    "float32": Precision(torch.float32, torch.float32, "all in fp32"),
}


@dataclass(frozen=True)
class Model:
    """A preset with the options that this benchmark changes, and the tokens of a step."""

    preset: str
    overrides: tuple[str, ...]
    """Besides those that all have, see `shape`."""
    peer: str
    """Its class in `transformers`, without `Config` or `ForCausalLM`."""
    sequence: int
    rows: int
    """Sequences of a step."""
    precision: str
    note: str
    """How it differs from what its name says."""
    init_std: float = 0.02
    """Of all weight matrices."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.rows

    def shape(self, kernel: ExpertKernel = ExpertKernel.auto) -> Architecture:
        """Without balance losses: no side computes any."""
        return _shape((f"model={self.preset}", "balance=none", f"moe.expert_kernel={kernel.value}", *self.overrides))

    def flops(self) -> float:
        """Of a step, forward and backward."""
        return training_flops_per_token(self.shape(), self.sequence) * self.tokens

    def batch(self, index: int, device: torch.device) -> TokenBatch:
        """Tokens drawn evenly, a function of `index`; each row is one document."""
        generator = torch.Generator().manual_seed(index)
        shape = (self.rows, self.sequence + 1)
        token_BS = torch.randint(self.shape().vocab_size, shape, generator=generator)
        position_BS = torch.arange(self.sequence).expand(self.rows, -1).contiguous()
        return TokenBatch(
            token_BS=token_BS[:, :-1].contiguous(),
            target_BS=token_BS[:, 1:].contiguous(),
            position_BS=position_BS,
            document_BS=torch.zeros_like(position_BS),
            sequence_B=torch.arange(self.rows),
            source_B=torch.zeros(self.rows, dtype=torch.int64),
            document_lengths=((self.sequence,),) * self.rows,
            num_targets=self.tokens,
            num_valid=self.tokens,
        ).to(device)

    def facts(self) -> str:
        """A line for the report."""
        shape = self.shape()
        counts, moe, router = count_parameters(shape), shape.moe, shape.router
        text = (
            f"{self.preset}: {shape.model.num_layers} layers of width {shape.model.dim}, {moe.num_experts} experts of "
            f"{moe.expert_dim}, top {router.top_k}; {counts.total / 1e9:.3g}B parameters, {counts.active / 1e9:.3g}B "
            f"active; {self.rows} x {self.sequence} tokens a step; {PRECISIONS[self.precision].text}; `{self.peer}`"
        )
        return f"{text}. {self.note}" if self.note else text

    def with_tokens(self, tokens: int) -> Model:
        """The same with about this many tokens a step, in whole sequences."""
        return replace(self, rows=max(1, tokens // self.sequence))


@cache
def _shape(options: tuple[str, ...]) -> Architecture:
    return architecture(composed(list(options), CONFIGS), None)


DEEPSEEK_NOTE = (
    "transformers has no DeepSeekMoE: its DeepSeek classes bring latent attention. Qwen2-MoE without biases is the "
    "same but for a sigmoid gate on the shared expert, which all sides have here (moe.shared_expert_gate=true)."
)


def models(qwen_layers: int) -> tuple[Model, ...]:
    """The shapes to measure.

    Precision is what fits in 139 GiB beside the activations of the most wasteful side: fp32 masters take 18 to 20
    bytes a weight, bf16 throughout takes 8.
    """
    return (
        Model("olmoe_1b_7b", (), "Olmoe", 4096, 2, "bfloat16", ""),
        Model("deepseekmoe_2b", ("moe.shared_expert_gate=true",), "Qwen2Moe", 2048, 4, "master", DEEPSEEK_NOTE),
        Model(
            "qwen3_30b_a3b", (f"model.num_layers={qwen_layers}",), "Qwen3Moe", 4096, 2, "master",
            f"A slice: {qwen_layers} of its 48 layers, with embedding and head whole.",
        ),
    )  # fmt: skip


_TINY = (
    "model.dim=64", "model.num_layers=2", "model.vocab_size=256", "attention.num_heads=4", "attention.num_kv_heads=2",
    "attention.head_dim=16", "moe.num_experts=8", "router.top_k=2",
)  # fmt: skip


def dry_models() -> tuple[Model, ...]:
    """The same presets, tiny, with weights so large that experts matter to the loss.

    As in the real one, DeepSeekMoE's experts have a width that the Triton kernels refuse.
    """
    return tuple(
        replace(
            model,
            overrides=(*model.overrides, *_TINY, f"moe.expert_dim={40 if model.peer == 'Qwen2Moe' else 32}"),
            sequence=32,
            rows=2,
            init_std=0.15,
        )
        for model in models(qwen_layers=2)
    )


def their_options(shape: Architecture, peer: str) -> dict[str, Any]:
    """The architecture in the words of a config class of `transformers`."""
    attention, router, moe = shape.attention, shape.router, shape.moe
    assert isinstance(attention, GroupedQueryConfig)
    assert isinstance(router, TokenChoiceConfig)
    options: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.model.dim,
        "num_hidden_layers": shape.model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.key_heads,
        "max_position_embeddings": shape.model.max_sequence_tokens,
        "rms_norm_eps": shape.model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope.theta},
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": router.normalize,
        "tie_word_embeddings": shape.model.tie_embeddings,
        "use_cache": False,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    if peer == "Olmoe":
        return options | {"intermediate_size": moe.expert_dim}
    options["moe_intermediate_size"] = moe.expert_dim
    if peer == "Qwen3Moe":
        return options | {"head_dim": attention.head_width(shape.model.dim), "sliding_window": None}
    return options | {"qkv_bias": False, "shared_expert_intermediate_size": moe.num_shared_experts * moe.expert_dim}

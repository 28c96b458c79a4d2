"""The shipped models: composed as a user would, against published sizes and against transformers' own models."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
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

from moe_parallel import options
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import count_parameters
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
BYTES = 257


@cache
def composed(*overrides: str) -> options.Config:
    """The configuration of `train.py` with these arguments."""
    options.register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return options.to_config(compose("train", list(overrides)))


def preset(name: str) -> Architecture:
    config = composed(f"model={name}")
    return options.architecture(config, None if config.model.vocab_size else BYTES)


@pytest.mark.parametrize("name", PRESETS)
def test_builds_with_the_size_that_is_counted(name: str) -> None:
    """A preset with a key that does not exist, a shape that cannot be, or another size than the plan says. Built at
    full size, without memory."""
    architecture = preset(name)
    with torch.device("meta"):
        model = Transformer(architecture)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(architecture).total


PUBLISHED = {
    # billions of parameters in total and active, each with the digits that were published
    "deepseekmoe_2b": ("2.0", "0.3"),
    "deepseekmoe_16b": ("16.4", "2.8"),
    "deepseek_v2_lite": ("15.7", "2.4"),
    "deepseek_v3": ("671", "37"),
    "olmoe_1b_7b": ("6.9", "1.3"),
    "qwen3_30b_a3b": ("30.5", "3.3"),
    "mixtral_8x7b": ("46.7", "12.9"),
}


def agrees(count: int, published: str) -> bool:
    """Equal to the published digits, rounded or cut off."""
    digits = len(published.partition(".")[2])
    scaled = count / 1e9 * 10**digits
    return round(float(published) * 10**digits) in (round(scaled), math.floor(scaled))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name: str) -> None:
    """A wrong width, layer or expert count. DeepSeek-V2-Lite's 2.4B leave out the embedding, which is a lookup: with
    it 2.66B would be active; all others count it."""
    counts = count_parameters(preset(name))
    total, active = PUBLISHED[name]
    assert agrees(counts.total, total), counts.total
    left_out = counts.embedding if name == "deepseek_v2_lite" else 0
    assert agrees(counts.active - left_out, active), counts.active


# The released config.json of each; what is not named is the default of transformers' class.
RELEASED: dict[str, tuple[type[nn.Module], object]] = {
    "deepseek_v2_lite": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
            num_attention_heads=16, q_lora_rank=None, first_k_dense_replace=1, num_experts_per_tok=6,
            n_routed_experts=64, n_shared_experts=2, vocab_size=102400,
        ),
    ),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config(num_nextn_predict_layers=0)),
    "olmoe_1b_7b": (OlmoeForCausalLM, OlmoeConfig(intermediate_size=1024, num_key_value_heads=16)),
    "qwen3_30b_a3b": (Qwen3MoeForCausalLM, Qwen3MoeConfig(num_hidden_layers=48, head_dim=128)),
    "mixtral_8x7b": (MixtralForCausalLM, MixtralConfig()),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_are_exactly_those_of_transformers(name: str) -> None:
    """Rounded published numbers cannot see a missing norm or a wrong latent width; the released model can."""
    kind, config = RELEASED[name]
    with torch.device("meta"):
        theirs = kind(config)
    assert count_parameters(preset(name)).total == sum(p.numel() for p in theirs.parameters())


def test_presets_choose_their_attention_and_command_line_wins() -> None:
    """A preset that keeps the default's attention or balance, or a choice of the user that a preset undoes."""
    assert isinstance(composed("model=deepseek_v3").attention, LatentConfig)
    balance = composed("model=deepseek_v3").balance
    assert (balance.bias_rate, balance.sequence_coefficient, balance.global_coefficient) == (1e-3, 1e-4, 0.0)
    balance = composed("model=deepseek_v3", "balance=none").balance
    assert (balance.bias_rate, balance.sequence_coefficient) == (0.0, 0.0)
    assert composed("model=mixtral_8x7b").router.normalize
    assert composed("model=mixtral_8x7b", "router=forced_balance").router.forced_balance
    assert isinstance(composed("attention=mla").attention, LatentConfig)
    assert composed("model=olmoe_1b_7b", "router.top_k=4").router.top_k == 4


def test_pretraining_positions_of_deepseek() -> None:
    """The arguments that the presets recommend for pretraining must be accepted."""
    for name in ("deepseek_v2_lite", "deepseek_v3"):
        config = composed(
            f"model={name}",
            "attention.rope.scaling=none",
            "attention.rope.factor=1",
            "model.max_sequence_tokens=4096",
        )
        assert config.model.max_sequence_tokens == 4096


def test_sizes_of_our_own_presets() -> None:
    """What the files say of themselves."""
    small = count_parameters(preset("small_cpu"))
    assert 1.3e6 < small.active < 1.5e6
    assert 3.3e6 < small.total < 3.5e6
    large = preset("h200_1b")
    counts = count_parameters(large)
    assert 0.9e9 < counts.active < 1.2e9
    assert 5e9 < counts.total < 7e9
    assert all(size % 128 == 0 for size in (large.model.dim, large.model.ffn_dim, large.moe.expert_dim))

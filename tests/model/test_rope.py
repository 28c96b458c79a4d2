"""Rotary positions against transformers' functions, and the properties that make them rotary."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from moe_parallel.model.rope import (
    RopeConfig,
    RopeScaling,
    Rotary,
    inverse_frequencies,
    latent_softmax_factor,
    rotate_halves,
    rotate_pairs,
    rotation_factor,
)

HEAD = 64
ORIGINAL = 2048


def their_frequencies(kind: str, **parameters: float) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=ORIGINAL,
        rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **parameters),
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    seq_len = 2 * ORIGINAL if kind == "dynamic" else None
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)


YARN = {"factor": 8.0, "original_max_position_embeddings": ORIGINAL}


@pytest.mark.parametrize(
    ("config", "kind", "parameters"),
    [
        (RopeConfig(), "default", {}),
        (RopeConfig(scaling=RopeScaling.linear, factor=4.0), "linear", {"factor": 4.0}),
        # Their dynamic variant derives the growth from the length: at twice the original it is factor + 1.
        (RopeConfig(scaling=RopeScaling.ntk, factor=5.0), "dynamic", {"factor": 4.0}),
        (RopeConfig(scaling=RopeScaling.yarn, factor=8.0, original_sequence_tokens=ORIGINAL), "yarn", YARN),
        (
            RopeConfig(
                scaling=RopeScaling.yarn,
                factor=8.0,
                original_sequence_tokens=ORIGINAL,
                beta_fast=16,
                beta_slow=2,
            ),
            "yarn",
            YARN | {"beta_fast": 16, "beta_slow": 2},
        ),
        (
            RopeConfig(
                scaling=RopeScaling.yarn,
                factor=8.0,
                original_sequence_tokens=ORIGINAL,
                mscale=0.7,
                mscale_all_dim=0.9,
            ),
            "yarn",
            YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        ),
        (
            RopeConfig(scaling=RopeScaling.yarn, factor=8.0, original_sequence_tokens=ORIGINAL, attention_factor=1.3),
            "yarn",
            YARN | {"attention_factor": 1.3},
        ),
        # So short an original sequence that every pair lies in one of the bands' ends.
        (
            RopeConfig(scaling=RopeScaling.yarn, factor=8.0, original_sequence_tokens=6),
            "yarn",
            {"factor": 8.0, "original_max_position_embeddings": 6},
        ),
        (
            RopeConfig(scaling=RopeScaling.llama3, factor=8.0, original_sequence_tokens=ORIGINAL),
            "llama3",
            YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
)
def test_frequencies_agree_with_transformers(config: RopeConfig, kind: str, parameters: dict[str, float]) -> None:
    """A band edge off by one pair, a wrong exponent or a forgotten factor. Theirs are float32 powers of numbers up to
    1e4, good to a few 1e-7; ours are exact to float64."""
    frequencies, factor = their_frequencies(kind, **parameters)
    torch.testing.assert_close(torch.tensor(inverse_frequencies(config, HEAD)), frequencies, rtol=2e-6, atol=0)
    assert rotation_factor(config) == pytest.approx(factor, rel=1e-12)


def test_apply_agrees_with_transformers() -> None:
    """The two layouts mixed up, or cosine and sine. DeepSeek's function reorders its output (all even places first),
    which leaves products of queries and keys alone, so products are compared for it. Angles up to 300 in float32 are
    good to 2e-5, sums of 64 products of order 1 to 1e-3."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 50, HEAD), torch.randn(2, 1, 50, HEAD)
    position_BS = torch.randint(0, 300, (2, 50))
    rotation = Rotary(RopeConfig(), HEAD)(position_BS)
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=3 * HEAD, num_attention_heads=3))
    cos, sin = embedding(q, position_BS)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for x, theirs in zip((q, k), expected):
        torch.testing.assert_close(rotate_halves(x, rotation), theirs, atol=1e-4, rtol=0)
    their_q, their_k = apply_rotary_pos_emb_interleave(q, k, cos, sin)
    ours = rotate_pairs(q, rotation) @ rotate_pairs(k, rotation).mT
    torch.testing.assert_close(ours, their_q @ their_k.mT, atol=2e-3, rtol=0)


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])
def test_products_depend_on_distance_only(rotate: object) -> None:
    """A rotation by the wrong sign or with unpaired frequencies: products of a query and a key must not change when
    both move by 1000 positions. float64 values with float32 angles below 1100, good to 1e-4, times a norm of 8."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, HEAD, dtype=torch.float64), torch.randn(1, 1, 1, HEAD, dtype=torch.float64)
    rotary = Rotary(RopeConfig(), HEAD)

    def product(query_position: int, key_position: int) -> float:
        positions = (torch.tensor([[p]]) for p in (query_position, key_position))
        rotated = [rotate(x, rotary(position)) for x, position in zip((q, k), positions)]
        return float((rotated[0] * rotated[1]).sum())

    assert product(17, 5) == pytest.approx(product(1017, 1005), abs=2e-3)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-12)
    assert abs(product(17, 5) - product(5, 17)) > 0.1


def test_latent_softmax_factor_is_deepseek_s() -> None:
    """The square forgotten, or applied without yarn. DeepSeek-V3: (0.1 ln 40 + 1)^2 = 1.8738..."""
    config = RopeConfig(scaling=RopeScaling.yarn, factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    assert latent_softmax_factor(config) == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    assert rotation_factor(config) == 1.0
    assert latent_softmax_factor(RopeConfig(scaling=RopeScaling.yarn, factor=40.0)) == 1.0
    assert latent_softmax_factor(RopeConfig()) == 1.0
    assert DeepseekV3Config().rope_interleave  # the layout that LatentAttention has built in


def test_half_precision_is_rotated_in_float32() -> None:
    """Angles or rotations in bfloat16: position 1001 would round to 1000. The result may differ from float32 by the
    one rounding at the end, 2^-8 relative."""
    x = torch.randn(1, 1, 1, HEAD).bfloat16()
    rotation = Rotary(RopeConfig(), HEAD)(torch.tensor([[1001]]))
    for rotate in (rotate_halves, rotate_pairs):
        out = rotate(x, rotation)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), rotate(x.float(), rotation), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 4.0}, "attention.rope.factor=4.0 does nothing"),
        ({"scaling": "yarn"}, "attention.rope.factor=1.0 must be above 1"),
        ({"theta": 1.0}, "attention.rope.theta=1.0"),
        ({"scaling": "yarn", "factor": 2.0, "beta_slow": 32.0}, "attention.rope.beta_slow=32.0"),
        (
            {"scaling": "llama3", "factor": 2.0, "low_frequency_factor": 4.0},
            "attention.rope.low_frequency_factor=4.0",
        ),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], message: str) -> None:
    """An option that would silently do nothing, or bands in the wrong order."""
    with pytest.raises(ValueError, match=message):
        RopeConfig(**values)

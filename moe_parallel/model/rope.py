"""Rotary position embeddings and the usual ways to stretch them to longer sequences."""

from __future__ import annotations

import math
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor


class RopeScaling(str, Enum):
    none = "none"
    """Frequencies of training."""
    linear = "linear"
    """All frequencies divided by the factor (position interpolation, arXiv 2306.15595)."""
    ntk = "ntk"
    """A larger base, such that the lowest frequency is divided by the factor."""
    yarn = "yarn"
    """Low frequencies divided, high ones kept, and a sharper softmax (arXiv 2309.00071; DeepSeek's variant)."""
    llama3 = "llama3"
    """Low frequencies divided, high ones kept, by wavelength (Llama 3.1)."""


@dataclass(kw_only=True)
class RopeConfig:
    theta: float = 10000.0
    """Base of the wavelengths: the longest is about 2 pi theta tokens."""
    scaling: RopeScaling = RopeScaling.none
    """How to reach sequences longer than those of training."""
    factor: float = 1.0
    """How many times longer; above 1 with any scaling, 1 without."""
    original_sequence_tokens: int = 4096
    """Sequence length that the factor multiplies; yarn and llama3 derive their frequency bands from it."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within the original sequence keep their frequency."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this have it divided by the factor."""
    mscale: float | None = None
    """yarn: strength of the growth of queries and keys with log(factor); null leaves it to the paper's rule."""
    mscale_all_dim: float | None = None
    """yarn: what divides that growth; latent attention also multiplies its softmax scale by the square of it."""
    attention_factor: float | None = None
    """yarn: factor on rotated queries and keys; null derives it from factor, mscale and mscale_all_dim."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_sequence_tokens / this are stretched in full."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_sequence_tokens / this are kept."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"attention.rope.theta={self.theta} must be above 1")
        if self.scaling is RopeScaling.none and self.factor != 1:
            raise ValueError(
                f"attention.rope.factor={self.factor} does nothing with attention.rope.scaling=none; "
                "set factor=1 or choose a scaling"
            )
        if self.scaling is not RopeScaling.none and self.factor <= 1:
            raise ValueError(
                f"attention.rope.factor={self.factor} must be above 1 with "
                f"attention.rope.scaling={self.scaling.value}; set scaling=none to train without stretching"
            )
        if self.original_sequence_tokens < 1:
            raise ValueError(
                f"attention.rope.original_sequence_tokens={self.original_sequence_tokens} must be at least 1"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"attention.rope.beta_slow={self.beta_slow} must lie between 0 and "
                f"attention.rope.beta_fast={self.beta_fast}"
            )
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"attention.rope.low_frequency_factor={self.low_frequency_factor} must lie between 0 and "
                f"attention.rope.high_frequency_factor={self.high_frequency_factor}"
            )


def inverse_frequencies(config: RopeConfig, rotary_dim: int) -> list[float]:
    """Radians per position of each of the rotary_dim / 2 pairs."""
    theta = config.theta
    if config.scaling is RopeScaling.ntk:
        theta *= config.factor ** (rotary_dim / (rotary_dim - 2))
    base = [theta ** (-pair / rotary_dim) for pair in range(0, rotary_dim, 2)]
    if config.scaling is RopeScaling.linear:
        return [frequency / config.factor for frequency in base]
    if config.scaling is RopeScaling.yarn:
        return _yarn(config, base, rotary_dim)
    if config.scaling is RopeScaling.llama3:
        return [_llama3(config, frequency) for frequency in base]
    return base


def _yarn(config: RopeConfig, base: list[float], rotary_dim: int) -> list[float]:
    def pair_with_turns(turns: float) -> float:
        wavelength = config.original_sequence_tokens / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(config.theta))

    # The bounds of the upper end follow the reference code, which clips to the width and not to the pairs.
    first = max(math.floor(pair_with_turns(config.beta_fast)), 0)
    last = min(math.ceil(pair_with_turns(config.beta_slow)), rotary_dim - 1)
    scaled = []
    for pair, frequency in enumerate(base):
        stretched = min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
        scaled.append(frequency * (1 - stretched) + frequency / config.factor * stretched)
    return scaled


def _llama3(config: RopeConfig, frequency: float) -> float:
    turns = config.original_sequence_tokens * frequency / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * kept + frequency / config.factor * (1 - kept)


def _yarn_growth(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def rotation_factor(config: RopeConfig) -> float:
    """What rotated queries and keys are multiplied by: 1.0 except with yarn."""
    if config.scaling is not RopeScaling.yarn:
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _yarn_growth(config.factor, config.mscale) / _yarn_growth(config.factor, config.mscale_all_dim)
    return _yarn_growth(config.factor)


def latent_softmax_factor(config: RopeConfig) -> float:
    """What latent attention multiplies its softmax scale by, because most of its width is not rotated.

    Source: DeepSeek-V2 and V3 reference code.
    """
    if config.scaling is not RopeScaling.yarn or not config.mscale_all_dim:
        return 1.0
    return _yarn_growth(config.factor, config.mscale_all_dim) ** 2


class Rotary:
    """Turns positions into rotations. No buffers: nothing to initialize, cast or save."""

    def __init__(self, config: RopeConfig, rotary_dim: int) -> None:
        self.frequencies = inverse_frequencies(config, rotary_dim)
        self.factor = rotation_factor(config)

    def __call__(self, position_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 (B, S, rotary_dim / 2)."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32)
        # A few hundred bytes: asynchronous to the host, and without a buffer that a checkpoint could miss.
        angle = position_BS.unsqueeze(-1).float() * frequencies.to(position_BS.device, non_blocking=True)
        return angle.cos() * self.factor, angle.sin() * self.factor


def _turn(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return a * cos - b * sin, b * cos + a * sin


def rotate_halves(x_BHSd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + d/2), the layout of Llama and its relatives. Computed in float32 at least."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    a, b = x_BHSd.chunk(2, dim=-1)
    return torch.cat(_turn(a, b, cos, sin), dim=-1).to(x_BHSd.dtype)


def rotate_pairs(x_BHSd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbors (2i, 2i + 1), the layout of DeepSeek-V2 and V3. Computed in float32 at least."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    a, b = x_BHSd.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_turn(a, b, cos, sin), dim=-1).flatten(-2).to(x_BHSd.dtype)

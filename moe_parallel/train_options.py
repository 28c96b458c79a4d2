"""Options of the loop: how long, on what batches, in which type, and when it is evaluated."""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass


class DType(str, Enum):
    auto = "auto"
    """bfloat16 on a GPU, float32 on a CPU."""
    float32 = "float32"
    bfloat16 = "bfloat16"


class Nonfinite(str, Enum):
    stop = "stop"
    """End the run with an error that names the first bad layer; the last checkpoint stays as it is."""
    skip = "skip"
    """Drop the step's gradients, count it, and go on; ten in a row end the run."""


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = 300
    """Optimizer steps of the whole run."""
    sequence_tokens: int = 256
    """Tokens of one packed sequence."""
    global_batch_tokens: int = 8192
    """Tokens of one optimizer step, over all ranks and micro-batches."""
    micro_batch_sequences: int | None = None
    """Sequences a rank computes at once; null takes its whole part of the global batch."""
    seed: int = 1
    """Seed of the weights and of the order of the data."""
    dtype: DType = DType.auto
    """Type of the compute; weights, router, reductions and optimizer stay in float32."""
    dry_batch: bool = True
    """Run one batch forward and backward before step 1, so that a lack of memory shows at once."""
    nonfinite: Nonfinite = Nonfinite.stop
    """What a NaN or infinite loss or gradient does."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_tokens", "global_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.global_batch_tokens % self.sequence_tokens != 0:
            raise ValueError(
                f"train.global_batch_tokens={self.global_batch_tokens} must be a multiple of "
                f"train.sequence_tokens={self.sequence_tokens}"
            )
        if self.micro_batch_sequences is not None and self.micro_batch_sequences < 1:
            raise ValueError(f"train.micro_batch_sequences={self.micro_batch_sequences} must be at least 1")

    def compute_type(self, device_type: str) -> torch.dtype:
        """What `dtype` means on a device."""
        if self.dtype is DType.auto:
            return torch.bfloat16 if device_type == "cuda" else torch.float32
        return torch.bfloat16 if self.dtype is DType.bfloat16 else torch.float32

    @property
    def global_batch_sequences(self) -> int:
        """Sequences of one optimizer step."""
        return self.global_batch_tokens // self.sequence_tokens

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """(micro-batches of a rank per step, sequences of one)."""
        if self.global_batch_sequences % ranks != 0:
            raise ValueError(
                f"train.global_batch_tokens={self.global_batch_tokens} is {self.global_batch_sequences} sequences, "
                f"which {ranks} ranks cannot share evenly; use a multiple of {ranks * self.sequence_tokens} tokens"
            )
        per_rank = self.global_batch_sequences // ranks
        size = per_rank if self.micro_batch_sequences is None else self.micro_batch_sequences
        if per_rank % size != 0:
            raise ValueError(
                f"train.micro_batch_sequences={size} does not divide the {per_rank} sequences of each rank; legal "
                f"values: {[d for d in range(1, per_rank + 1) if per_rank % d == 0]}"
            )
        return per_rank // size, size


@dataclass(kw_only=True)
class EvaluationConfig:
    every_steps: int = 100
    """Evaluate every so many steps, and always at the end; 0 evaluates at the end only."""
    at_start: bool = False
    """Evaluate before the first step as well, for a run that starts from weights; it is step 0 in the metrics."""
    sample_tokens: int = 96
    """Tokens of generated text at the end; 0 writes none."""
    sample_prompt: str = "def "
    """Text that the sample continues."""
    sample_temperature: float = 0.8
    """Temperature of the sample; 0 takes the likeliest token."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "sample_tokens", "sample_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must not be negative")

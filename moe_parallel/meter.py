"""How fast a run is and how much memory it takes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

# Dense bf16 peak of one device, FLOP/s, without sparsity; from the vendor's data sheets.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "B100": 1750e12, "L40S": 362e12}


@dataclass
class Meter:
    """Tokens and seconds of training since the last log line; evaluation and saving are not in it."""

    flops_per_token: float
    """Forward and backward, active parameters only."""
    peak_flops_per_second: float | None
    """Of all ranks' devices together; None where it is not known."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One step."""
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds

    def take(self) -> dict[str, float]:
        """Rates since the last call."""
        metrics = {
            "time/step_seconds": self.seconds / self.steps,
            "speed/tokens_per_second": self.tokens / self.seconds,
        }
        if self.peak_flops_per_second is not None:
            used = self.flops_per_token * self.tokens / self.seconds
            metrics["speed/model_flops_utilization_percent"] = 100 * used / self.peak_flops_per_second
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        return metrics


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device's data sheet promises; None where it is not known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _PEAK_BF16.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> float:
    """Most memory in use so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)

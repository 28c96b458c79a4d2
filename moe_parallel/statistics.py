"""Sums over one optimizer step: what all micro-batches and ranks counted, added up once, outside of forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel.moe.routing import LayerStats, normalized_counts


@dataclass
class StepSums:
    """Sums over tokens; float64, so that counts and losses of any batch size add without loss.

    Rows of the per-layer tensors are MoE layer passes in the order of the model.
    """

    cross_entropy: Tensor
    """Nats, summed over targets."""
    mtp_cross_entropy_M: Tensor
    """The same of each module of multi-token prediction."""
    balance: Tensor
    """Weighted balance and z losses as they enter the training loss, summed over valid tokens and layers."""
    balance_value_L: Tensor
    """Unweighted balance loss, summed over valid tokens."""
    z_square_L: Tensor
    entropy_L: Tensor
    dropped_L: Tensor
    unserved_L: Tensor
    count_LE: Tensor
    """Slots per expert before drops."""
    observed_LE: Tensor
    """Sum of what routers want averaged over the step."""
    observations_L: Tensor
    """How many of them were added."""

    @staticmethod
    def zeros(num_layers: int, num_experts: int, device: torch.device, mtp_layers: int = 0) -> StepSums:
        """Nothing counted yet."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return StepSums(
            cross_entropy=zero(),
            mtp_cross_entropy_M=zero(mtp_layers),
            balance=zero(),
            balance_value_L=zero(num_layers),
            z_square_L=zero(num_layers),
            entropy_L=zero(num_layers),
            dropped_L=zero(num_layers),
            unserved_L=zero(num_layers),
            count_LE=zero(num_layers, num_experts),
            observed_LE=zero(num_layers, num_experts),
            observations_L=zero(num_layers),
        )

    @property
    def losses(self) -> Tensor:
        """(1 + mtp_layers): losses of tokens, as `Output.loss` gives them."""
        return torch.cat([self.cross_entropy.view(1), self.mtp_cross_entropy_M])

    @property
    def no_loss(self) -> Tensor:
        """Zeros in the form of the losses that `add` takes, for a rank that has layers and no head."""
        return self.balance.new_zeros(1 + len(self.mtp_cross_entropy_M))

    def add(self, cross_entropy: Tensor, stats: list[LayerStats], rows: list[int]) -> None:
        """Add one micro-batch of this rank; `rows` are those of the passes that `stats` are of.

        Args:
            cross_entropy: as `Output.loss` gives it: of the next token, then of multi-token prediction.
        """
        losses = cross_entropy.detach().flatten()
        self.cross_entropy += losses[0]
        self.mtp_cross_entropy_M += losses[1:]
        for row, layer in zip(rows, stats, strict=True):
            self.balance += layer.balance.detach()
            self.balance_value_L[row] += layer.balance_value
            self.z_square_L[row] += layer.z_square
            self.entropy_L[row] += layer.entropy
            self.dropped_L[row] += layer.dropped
            self.unserved_L[row] += layer.unserved
            self.count_LE[row] += layer.count_E
            if layer.observed_E is not None:
                self.observed_LE[row] += layer.observed_E
                self.observations_L[row] += 1

    def summed(self, group: dist.ProcessGroup | None) -> StepSums:
        """The same sums over all ranks of `group`, with one all-reduce."""
        parts = [getattr(self, name) for name in self.__dataclass_fields__]
        packed = torch.cat([part.reshape(-1) for part in parts])
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(packed, group=group)
        pieces = packed.split([part.numel() for part in parts])
        return StepSums(*[piece.view(part.shape) for piece, part in zip(pieces, parts)])


def expert_metrics(sums: StepSums, num_valid: int, names: list[str]) -> dict[str, float]:
    """What to log about the experts of one step, from sums over all ranks.

    Args:
        names: of the passes, such as layer_3 or layer_3/iteration_1.
    Returns:
        Names of the metrics contract. `max_over_mean` is the load of the fullest expert relative to the mean, the
        worst layer in `experts/max_over_mean`; `dead` counts experts of all layers that got no token; `per_token` is
        the mean number of experts chosen for a token in a pass, `tokens_without_percent` the share that got none.
    """
    if not names:
        return {}
    count_LE = sums.count_LE.cpu()
    load_LE = normalized_counts(count_LE) * count_LE.shape[1]
    slots = float(count_LE.sum())
    metrics = {
        "loss/balance": float(sums.balance_value_L.mean()) / num_valid,
        "loss/z": float(sums.z_square_L.mean()) / num_valid,
        "experts/max_over_mean": float(load_LE.max()),
        "experts/dead": float((count_LE == 0).sum()),
        "experts/dropped_percent": 100.0 * float(sums.dropped_L.sum()) / max(slots, 1.0),
        "experts/per_token": slots / num_valid / len(names),
        "experts/tokens_without_percent": 100.0 * float(sums.unserved_L.mean()) / num_valid,
        "experts/entropy_nats": float(sums.entropy_L.mean()) / num_valid,
    }
    for name, load_E in zip(names, load_LE):
        metrics[f"experts/{name}/max_over_mean"] = float(load_E.max())
    return metrics

"""The seam of the toolkit: the record that every router returns and every dispatcher takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_data.batch import TokenBatch
from moe_kernels.permute import invert_permutation, sort_slots


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert: a list of slots, sorted by expert.

    Fixed top-k, variable k, expert choice, dropped tokens and duplicates are all this list.
    """

    token_N: Tensor
    """int64: row of x_TD that fills the slot. A token may appear k times, once, or never."""
    weight_N: Tensor
    """float32: combine weight; carries the gradient to the router."""
    count_E: Tensor
    """int64: slots per expert; sums to N."""
    payload_ND: Tensor | None = None
    """Optional rows that travel with the token."""
    slot_TK: Tensor | None = None
    """int64: places of each token's slots when every token has exactly K of them (static shapes), else None."""
    uniform_count: int | None = None
    """Slots per expert when the host knows that all are equal: no size exchange, no wait for the device."""

    @staticmethod
    def from_choice(
        expert_TK: Tensor, weight_TK: Tensor, num_experts: int, uniform_count: int | None = None
    ) -> Routing:
        """Build the list from a (T, K) table of choices; `num_experts` in the table marks an unused slot.

        `expert_TK` is a complete choice if no slot is unused; the caller says so by `uniform_count` or by
        passing a table without the mark through `from_full_choice`.
        """
        order, count_E = sort_slots(expert_TK, num_experts)
        num_slots = int(count_E.sum())  # one wait for the device: the number of rows is data here
        order_N = order[:num_slots]
        return Routing(
            token_N=order_N // expert_TK.shape[1],
            weight_N=weight_TK.reshape(-1)[order_N],
            count_E=count_E,
            uniform_count=uniform_count,
        )

    @staticmethod
    def from_full_choice(
        expert_TK: Tensor, weight_TK: Tensor, num_experts: int, uniform_count: int | None = None
    ) -> Routing:
        """Build the list from a (T, K) table in which every slot is used: shapes are static."""
        order_N, count_E = sort_slots(expert_TK, num_experts)
        return Routing(
            token_N=order_N // expert_TK.shape[1],
            weight_N=weight_TK.reshape(-1)[order_N],
            count_E=count_E,
            slot_TK=invert_permutation(order_N).view_as(expert_TK),
            uniform_count=uniform_count,
        )


class Replay:
    """What a layer decided in its forward pass, kept for the recomputation of that same pass.

    Activation recompute runs a forward function twice. Selection must not happen twice: the second run may see
    other numbers (a bias updated in between, one bit of a score) and would then compute gradients of another
    routing. One object is made per wrapped call and dies with it.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value of the first run."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class ForwardContext:
    """What one forward pass of the model may know besides its tokens. Holds no state that forward changes."""

    step: int = 0
    """Optimizer step, from 0."""
    training: bool = True
    sum_over_data: Callable[[Tensor], Tensor] = _identity
    """Sum of a tensor over all ranks that see different tokens; the identity in one process."""
    prior_count_LE: Tensor | None = None
    """float64 (decoder layers, E): slots per expert of the rest of the global batch, for the global loss.
    None when the micro-batch is the whole global batch of this rank."""
    prior_is_total: bool = False
    """The prior already holds this micro-batch (exact mode), so nothing is added to it."""
    replay: Replay | None = None
    """Set around a recomputed block."""

    def for_layer(self, layer: int, batch: TokenBatch) -> LayerContext:
        """What the router of one layer may see of this batch."""
        num_sequences, length = batch.token_BS.shape
        offset_S = torch.arange(length, device=batch.token_BS.device)
        return LayerContext(
            layer=layer,
            batch_shape=(num_sequences, length),
            valid_T=batch.document_BS.flatten() >= 0 if batch.has_padding else None,
            token_id_T=(batch.sequence_B[:, None] * length + offset_S).flatten(),
            forward=self,
        )


@dataclass(frozen=True)
class LayerContext:
    """What a router may see. Built once per layer and micro-batch."""

    layer: int
    batch_shape: tuple[int, int]
    """(B, S): sequences, tokens per sequence; T = B * S."""
    valid_T: Tensor | None = None
    """bool: False for padding; None if the batch has none."""
    token_id_T: Tensor | None = None
    """int64: index of the token in the global order; the same on every layout."""
    forward: ForwardContext = field(default_factory=ForwardContext)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Compute, or take what the first run of a recomputed pass computed."""
        replay = self.forward.replay
        return compute() if replay is None else replay.once((self.layer, key), compute)


@dataclass(frozen=True)
class LayerStats:
    """What one pass of one layer counted. Returned, never stored: the trainer adds it up after backward."""

    layer: int
    count_E: Tensor
    """int64: slots each expert was chosen for, before drops, without padding."""
    dropped: Tensor
    """int64 scalar: slots dropped by the capacity limit."""
    entropy: Tensor
    """float32 scalar: sum over valid tokens of the entropy of the normalized scores, in nats."""
    balance: Tensor
    """Scalar with gradient: the configured balance losses, coefficients included, summed over valid tokens."""
    balance_value: Tensor
    """float32 scalar without gradient: unweighted balance loss, summed over valid tokens; its mean is 1.0 when
    every expert gets an equal share."""
    z_square: Tensor
    """float32 scalar without gradient: sum over valid tokens of the squared log-sum-exp of the logits."""
    step_count_E: Tensor | None
    """float64: this micro-batch's counts summed over data-parallel ranks, if the global loss needed them."""
    used_frequency_E: Tensor | None
    """float64: the share of each expert that the global loss used, to measure the estimator's error."""


def normalized_counts(count: Tensor) -> Tensor:
    """Counts as shares that sum to 1 along the last dimension; equal shares where there is no count at all."""
    total = count.sum(-1, keepdim=True)
    return torch.where(total > 0, count / total.clamp(min=1), 1.0 / count.shape[-1])

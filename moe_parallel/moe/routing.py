"""The seam of the toolkit: the record that every router returns and every dispatcher takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_data.batch import TokenBatch
from moe_kernels.counting_sort import sort_slots
from moe_kernels.hashing import hash_key, hashed_uniform
from moe_kernels.permute import invert_permutation


@dataclass(frozen=True)
class Choice:
    """What a router chose, as integers: a table of K experts for each token, or a list of (token, expert) pairs."""

    expert: Tensor
    """int64, (T, K), or (N) where `token_N` says whose they are. The number of experts marks an unused slot."""
    token_N: Tensor | None = None
    """int64: the token of each pair of a list; None for a table."""
    is_full: bool = True
    """No slot is unused."""
    uniform_count: int | None = None
    """Slots per expert when the host knows that all are equal."""
    fused: bool = False
    """Slots are sorted by Triton kernels, where they can run."""
    tile_count: Tensor | None = None
    """What the kernel that chose has counted for them; see `sort_slots`."""

    def token_of(self, slot: Tensor) -> Tensor:
        """The token of each flat slot index."""
        return slot // self.expert.shape[1] if self.token_N is None else self.token_N[slot]

    def tokens(self) -> Tensor:
        """int64, flat: the token of each slot."""
        if self.token_N is not None:
            return self.token_N
        num_tokens, top_k = self.expert.shape
        return torch.arange(num_tokens, device=self.expert.device).repeat_interleave(top_k)

    def take(self, value_TE: Tensor) -> Tensor:
        """Each slot's value, in the shape of `expert`; some value for unused slots."""
        expert = self.expert if self.is_full else self.expert.clamp(max=value_TE.shape[1] - 1)
        return value_TE.gather(1, expert) if self.token_N is None else value_TE[self.token_N, expert]

    def only(self, keep: Tensor, num_experts: int) -> Choice:
        """The same slots without those where `keep`, in the shape of `expert`, is False."""
        return Choice(torch.where(keep, self.expert, num_experts), self.token_N, is_full=False, fused=self.fused)


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert: a list of slots, sorted by expert.

    Fixed top-k, variable k, expert choice, dropped tokens and duplicates are all this list.
    """

    token_N: Tensor
    """int64: row of x_TD that fills the slot. A token may appear k times, once, or never."""
    weight_N: Tensor | None
    """float32: combine weight; carries the gradient to the router. None for ones: rows whose weights stayed at the
    source."""
    count_E: Tensor
    """int64: slots per expert; sums to N."""
    slot_TK: Tensor | None = None
    """int64: places of each token's slots when every token has exactly K of them (static shapes), else None."""
    uniform_count: int | None = None
    """Slots per expert when the host knows that all are equal: no size exchange, no wait for the device."""
    most_of_token: int | None = None
    """Slots that a token has at most, where the host knows it; the same on all ranks."""

    @staticmethod
    def of(choice: Choice, weight: Tensor, num_experts: int) -> Routing:
        """Sort the chosen slots by expert; unused ones fall away.

        Args:
            weight: combine weights, in the shape of `choice.expert`.
        """
        order_N, count_E, place_N = sort_slots(choice.expert, num_experts, choice.fused, choice.tile_count)
        if not choice.is_full:
            order_N = order_N[: int(count_E.sum())]  # one wait for the device: the number of rows is data here
        slot_TK = None
        if choice.token_N is None and choice.is_full:  # every token has K slots: shapes are static
            slot_TK = place_N.view_as(choice.expert)
        return Routing(
            token_N=choice.token_of(order_N),
            weight_N=weight.reshape(-1)[order_N],
            count_E=count_E,
            slot_TK=slot_TK,
            uniform_count=choice.uniform_count,
            most_of_token=choice.expert.shape[1] if choice.token_N is None else None,
        )

    @staticmethod
    def of_rows(order_R: Tensor, count_L: Tensor) -> Routing:
        """One slot a row: place r of the experts' order is filled by row `order_R[r]`."""
        return Routing(order_R, None, count_L, slot_TK=invert_permutation(order_R).unsqueeze(1))

    def reordered(self, order_N: Tensor | None, inverse_N: Tensor | None) -> Routing:
        """The same slots in another order, for rows that travel in it: no longer sorted by expert. None keeps it."""
        if order_N is None or inverse_N is None:
            return self
        return replace(
            self,
            token_N=self.token_N[order_N],
            weight_N=self.weights()[order_N],
            slot_TK=None if self.slot_TK is None else inverse_N[self.slot_TK],
        )

    def weights(self) -> Tensor:
        """Combine weights, of a routing that has them."""
        assert self.weight_N is not None, "the weights of these rows stayed at their source"
        return self.weight_N


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


def _stack_one(value: Tensor) -> Tensor:
    return value.unsqueeze(0)


@dataclass(frozen=True)
class Ranks:
    """Ranks that hold parts of one thing, this one among them. By default there is no other."""

    sum: Callable[[Tensor], Tensor] = _identity
    """Sum of a tensor over them, without gradient."""
    gather: Callable[[Tensor], Tensor] = _stack_one
    """A tensor of each of them, stacked in their order."""
    place: int = 0
    """Place of this rank in that order."""
    count: int = 1


@dataclass(frozen=True)
class ForwardContext:
    """What one forward pass of the model may know besides its tokens. Holds no state that forward changes."""

    step: int = 0
    """Optimizer step, from 0."""
    training: bool = True
    data: Ranks = field(default_factory=Ranks)
    """All ranks that see different tokens of these layers, in the order (rows, parts of sequences)."""
    rows: Ranks = field(default_factory=Ranks)
    """Those that have the same part of other sequences."""
    sequence: Ranks = field(default_factory=Ranks)
    """Those that have the other parts of the same sequences."""
    no_padding: bool = False
    """No rank has padding in this step, known on all hosts: loads that are then equal need no exchange of sizes."""
    seed: int = 0
    """Seed of random routing."""
    prior_count_LIE: Tensor | None = None
    """float64 (decoder layers, iterations, E): slots per expert of the rest of the global batch, for the global loss.
    None when the micro-batch is the whole global batch of this rank."""
    prior_is_total: bool = False
    """The prior already holds this micro-batch (exact mode), so nothing is added to it."""
    replay: Replay | None = None
    """Set around a recomputed block."""
    carry: Tensor | None = None
    """Set around each block: see `LayerContext.carry`."""

    def for_layer(self, layer: int, batch: TokenBatch) -> LayerContext:
        """What the router of one layer may see of this batch."""
        num_sequences, length = batch.token_BS.shape
        offset_S = torch.arange(length, device=batch.token_BS.device) + batch.first_token
        return LayerContext(
            layer=layer,
            batch_shape=(num_sequences, length),
            num_valid=batch.num_valid,
            valid_T=batch.document_BS.flatten() >= 0 if batch.has_padding else None,
            token_id_T=(batch.sequence_B[:, None] * batch.sequence_tokens + offset_S).flatten(),
            token_T=batch.token_BS.flatten(),
            position_T=batch.position_BS.flatten(),
            document_T=batch.document_BS.flatten(),
            source_T=batch.source_B.repeat_interleave(length),
            carry=self.carry,
            forward=self,
        )


@dataclass(frozen=True)
class LayerContext:
    """What a router may see besides its input. Built once per layer and micro-batch."""

    layer: int
    batch_shape: tuple[int, int]
    """(B, S): sequences, tokens that this rank has of each; T = B * S."""
    iteration: int = 0
    """Pass over the layer's experts; 0 unless experts are chained."""
    num_valid: int | None = None
    """Tokens that are not padding, known on the host; None if all are."""
    valid_T: Tensor | None = None
    """bool: False for padding; None if the batch has none."""
    token_id_T: Tensor | None = None
    """int64: index of the token in the global order; the same on every layout."""
    token_T: Tensor | None = None
    """int64: the token itself, as an index into the vocabulary."""
    position_T: Tensor | None = None
    """int64: position that attention uses."""
    document_T: Tensor | None = None
    """int64: index of the document within its sequence, -1 for padding."""
    source_T: Tensor | None = None
    """int64: index of the source (domain)."""
    carry: Tensor | None = None
    """(T, carry width), with gradient: what the router of the pass before handed on, in this layer or the one before;
    None in the first pass of the model, and where routers hand on nothing."""
    forward: ForwardContext = field(default_factory=ForwardContext)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Compute, or take what the first run of a recomputed pass computed."""
        replay = self.forward.replay
        return compute() if replay is None else replay.once((self.layer, self.iteration, key), compute)

    def in_iteration(self, iteration: int, carry: Tensor | None = None) -> LayerContext:
        """The context of a later pass over the same experts."""
        return replace(self, iteration=iteration, carry=carry)

    def random(self, purpose: str, cells: int) -> Tensor:
        """Uniform numbers in (0, 1), float64 (T, cells): a hash of seed, step, layer, iteration and token.

        The same on every layout and when a pass is computed again.
        """
        if self.token_id_T is None:
            raise ValueError("random routing needs LayerContext.token_id_T: numbers are drawn for tokens by their id")
        key = hash_key(self.forward.seed, self.forward.step, self.layer, self.iteration, purpose)
        index_TC = self.token_id_T[:, None] * cells + torch.arange(cells, device=self.token_id_T.device)
        return hashed_uniform(index_TC, key)


@dataclass(frozen=True)
class LayerStats:
    """What one pass of one layer counted. Returned, never stored: the trainer adds it up after backward."""

    layer: int
    iteration: int
    count_E: Tensor
    """int64: slots each expert was chosen for, before drops and rounding, without padding."""
    dropped: Tensor
    """int64 scalar: slots dropped by the capacity limit or by token rounding."""
    unserved: Tensor
    """int64 scalar: valid tokens that got no expert, by choice or by drops."""
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
    observed_E: Tensor | None = None
    """float64: what the router wants averaged over the micro-batches and ranks of the step, for its `after_step`."""
    carry: Tensor | None = None
    """(T, carry width), with gradient: what the router hands on to that of the next pass."""


def normalized_counts(count: Tensor) -> Tensor:
    """Counts as shares that sum to 1 along the last dimension; equal shares where there is no count at all."""
    total = count.sum(-1, keepdim=True)
    return torch.where(total > 0, count / total.clamp(min=1), 1.0 / count.shape[-1])

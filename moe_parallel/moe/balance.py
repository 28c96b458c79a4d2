"""Balance: losses and the bias rule, as pure functions.

Every loss is a sum over tokens. The engine divides it by the number of valid tokens of the global batch, so that
no factor depends on ranks or micro-batches, and the mean is 1.0 at perfect balance whatever k and scope are.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.moe.routing import Choice, LayerContext, normalized_counts


class GlobalEstimator(str, Enum):
    look_ahead = "look_ahead"
    """Counts of the step so far, and for the micro-batches still to come the mean of the previous step."""
    exact = "exact"
    """A forward pass without gradient over all micro-batches first; costs a third more compute."""


class DeviceScope(str, Enum):
    sequence = "sequence"
    """Each packed sequence (DeepSeek-V2)."""
    micro_batch = "micro_batch"
    """The micro-batch of one rank, or of the ranks that share its sequences."""
    data_parallel = "data_parallel"
    """One micro-batch of all data-parallel ranks together."""


@dataclass(kw_only=True)
class BalanceConfig:
    sequence_coefficient: float = 0.0
    """Weight per layer of the balance loss within each packed sequence (DeepSeek-V2 and V3)."""
    micro_batch_coefficient: float = 0.0
    """Weight per layer of the loss within the micro-batch of one rank, or of the ranks that share its sequences
    (GShard, Switch; depends on the number of ranks)."""
    data_parallel_coefficient: float = 0.0
    """Weight per layer of the loss over one micro-batch of all data-parallel ranks together."""
    global_coefficient: float = 0.0
    """Weight per layer of the loss over the whole global batch (arXiv 2501.11873)."""
    global_estimator: GlobalEstimator = GlobalEstimator.look_ahead
    """How the global loss knows the load of micro-batches still to come; exact by itself with one micro-batch."""
    device_coefficient: float = 0.0
    """Weight per layer of the loss over devices: groups of neighboring experts (DeepSeekMoE, DeepSeek-V2)."""
    communication_coefficient: float = 0.0
    """Weight per layer of the loss over devices that counts a token once for each device it goes to (DeepSeek-V2)."""
    num_devices: int | None = None
    """Devices of those two losses, experts lying on them in order; stated here, so that a loss does not change with
    parallel.ep. Needed where one of them is used."""
    device_scope: DeviceScope = DeviceScope.sequence
    """Where the two losses count."""
    z_coefficient: float = 0.0
    """Weight per layer of the squared log-sum-exp of the router logits (ST-MoE), which keeps logits small."""
    bias_rate: float = 0.0
    """Step of the loss-free selection bias per optimizer step (arXiv 2408.15664); 0 has no bias."""

    def __post_init__(self) -> None:
        for name in (*self.coefficients(), "z_coefficient", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name}={getattr(self, name)} must not be negative; 0 turns it off")
        used = self.device_coefficient > 0 or self.communication_coefficient > 0
        if used != (self.num_devices is not None):
            raise ValueError(
                f"balance.num_devices={self.num_devices} belongs to balance.device_coefficient="
                f"{self.device_coefficient} and balance.communication_coefficient={self.communication_coefficient}: "
                "state it if one of them is used, and only then"
            )

    @staticmethod
    def coefficients() -> tuple[str, ...]:
        """Names of the weights of all losses that even out load."""
        return (*(f"{scope}_coefficient" for scope in _SCOPES), "device_coefficient", "communication_coefficient")

    def by_scope(self) -> dict[str, float]:
        """Weights of the losses over experts that are used, from the narrowest scope to the widest."""
        weights = (
            self.sequence_coefficient,
            self.micro_batch_coefficient,
            self.data_parallel_coefficient,
            self.global_coefficient,
        )
        return {scope: weight for scope, weight in zip(_SCOPES, weights) if weight > 0}

    def check_experts(self, num_experts: int) -> None:
        """The relation between devices and experts."""
        devices = self.num_devices
        if devices is not None and (devices < 2 or num_experts % devices != 0):
            raise ValueError(
                f"balance.num_devices={devices} must divide moe.num_experts={num_experts} into two parts or more; "
                f"legal values: {[d for d in range(2, num_experts + 1) if num_experts % d == 0]}"
            )


_SCOPES = ("sequence", "micro_batch", "data_parallel", "global")


@plain_dataclass(frozen=True)
class Level:
    """Cells that a loss loads equally: experts, or what a router of several levels chooses between."""

    share_TG: Tensor
    """Normalized scores of the cells, rows sum to 1, with gradient."""
    cell_E: Tensor | None = None
    """int64: the cell that each expert lies in; None if experts are the cells."""
    segments: int = 1
    """Cells are loaded equally within each of so many equal parts of them."""
    weight: float = 1.0
    """Factor on the coefficients of all scopes."""

    def share_of(self, count: Tensor) -> Tensor:
        """Slots per expert (..., E) to the share that each cell (..., G) has of its segment."""
        count = count.to(self.share_TG.dtype)
        if self.cell_E is not None:
            empty = count.new_zeros(*count.shape[:-1], self.share_TG.shape[1])
            count = empty.index_add(-1, self.cell_E, count)
        return normalized_counts(count.unflatten(-1, (self.segments, -1))).flatten(-2)

    def loss_sum(self, count: Tensor, score: Tensor) -> Tensor:
        """Balance loss over the tokens behind `score` (..., G), from slots per expert `count` (..., E)."""
        return balance_loss_sum(self.share_of(count), score) / self.segments


def balance_loss_sum(share: Tensor, score_sum: Tensor) -> Tensor:
    """Load-balance loss summed over the tokens behind `score_sum`: E * sum_i f_i * sum_t p_ti.

    Args:
        share: (..., E) share f_i of the slots that each expert gets in the scope of the loss; sums to 1; no gradient.
        score_sum: (..., E) sum over tokens of the normalized scores p (rows of p sum to 1).
    Returns:
        Scalar. Divided by the number of tokens it is 1.0 when every expert gets an equal share.
    Source: arXiv 2101.03961 eq. 4 (k=1), 2401.06066 eq. 12, written with f that sums to 1.
    """
    return share.shape[-1] * (share.detach().to(score_sum.dtype) * score_sum).sum()


def z_loss_sum(logit_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Squared log-sum-exp of the router logits, summed over valid tokens. Source: arXiv 2202.08906 eq. 5.

    Of logits (T, routers, E) the mean over the routers of a token.
    """
    square_T = logit_TE.logsumexp(-1).square()
    if square_T.ndim > 1:
        square_T = square_T.mean(-1)
    return (square_T if valid_T is None else square_T * valid_T).sum()


def bias_step(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """The loss-free update: raise the bias of experts below the mean load, lower it above.

    Args:
        bias_E: float32 selection bias.
        count_E: slots per expert over the whole optimizer step and all ranks, before drops.
    Returns:
        The new bias. An expert at the mean stays (sign(0) = 0).
    Source: arXiv 2408.15664 algorithm 1; DeepSeek-V3 section 2.1.2.
    """
    load_E = count_E.to(torch.float64)
    return bias_E + rate * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)


def selection_counts(choice: Choice, num_experts: int, context: LayerContext) -> Tensor:
    """Slots per expert in each sequence, without padding and unused slots: int64 count_BE."""
    num_sequences, length = context.batch_shape
    expert_N, token_N = choice.expert.reshape(-1), choice.tokens()
    cell_N = token_N // length * (num_experts + 1) + expert_N
    ones_N = torch.ones_like(expert_N) if context.valid_T is None else context.valid_T[token_N].to(expert_N.dtype)
    count = torch.zeros(num_sequences * (num_experts + 1), dtype=torch.int64, device=expert_N.device)
    return count.scatter_add_(0, cell_N, ones_N).view(num_sequences, -1)[:, :num_experts]


@plain_dataclass(frozen=True)
class BalanceTerms:
    """The balance losses of one pass, summed over valid tokens."""

    weighted: Tensor
    """All configured losses, coefficients included, with gradient."""
    value: Tensor
    """Unweighted loss of the widest configured scope, of the micro-batch if none is configured; no gradient. The mean
    over levels where a router has several, so that 1.0 a token is balance."""
    step_count_E: Tensor | None
    """float64: counts over all ranks, if a loss needed them."""
    used_share_E: Tensor | None
    """float64: the share of each expert that the global loss used."""


def balance_terms(
    config: BalanceConfig,
    levels: tuple[Level, ...],
    choice: Choice,
    num_experts: int,
    context: LayerContext,
    share_TE: Tensor | None = None,
) -> BalanceTerms:
    """All configured balance losses of one pass.

    Args:
        choice: what the losses count, before drops.
        share_TE: normalized scores of the experts, for the losses over devices; None if the first level has them.
    """
    count_BE = selection_counts(choice, num_experts, context)
    count_E = count_BE.sum(0)  # of this rank; what follows is of whole sequences
    count_BE = _of_sequences(count_BE, context, "sequence_count", _wants_sequences(config))
    counts: dict[str, Tensor] = {"micro_batch": count_BE.sum(0)}
    if config.sequence_coefficient:
        counts["sequence"] = count_BE
    step_count_E: Tensor | None = None
    if config.data_parallel_coefficient or config.global_coefficient:
        # Replayed under recompute: a second all-reduce would double the traffic and could meet other ranks' first.
        step_count_E = context.once("step_count", lambda: context.forward.data.sum(count_E.to(torch.float64)))
        counts["data_parallel"] = step_count_E
        counts["global"] = _global_counts(step_count_E, context)
    scores_BG = [_masked(level.share_TG, context).view(*context.batch_shape, -1).sum(1) for level in levels]
    value = levels[0].share_TG.new_zeros(())
    weighted = value
    for scope, coefficient in (config.by_scope() or {"micro_batch": 0.0}).items():
        values = []
        for level, score_BG in zip(levels, scores_BG):
            score = score_BG if scope == "sequence" else score_BG.sum(0)
            values.append(level.loss_sum(counts[scope], score))
            weighted = weighted + coefficient * level.weight * values[-1]
        value = torch.stack(values).mean()
    if config.num_devices is not None:
        share_TE = levels[0].share_TG if share_TE is None else share_TE
        weighted = weighted + _device_losses(config, share_TE, choice, count_BE, count_E, context)
    return BalanceTerms(
        weighted=weighted,
        value=value.detach(),
        step_count_E=step_count_E,
        used_share_E=normalized_counts(counts["global"]) if config.global_coefficient else None,
    )


def _masked(share_TG: Tensor, context: LayerContext) -> Tensor:
    return share_TG if context.valid_T is None else share_TG * context.valid_T[:, None]


def _device_losses(
    config: BalanceConfig, share_TE: Tensor, choice: Choice, count_BE: Tensor, count_E: Tensor, context: LayerContext
) -> Tensor:
    """The losses over devices and over the tokens sent to each (arXiv 2405.04434, eq. 26 to 31).

    Shares are of what is counted, so that both are 1.0 a token when all devices get the same. The paper divides the
    tokens sent by the most that may be sent, which is the same where every token uses all devices it is allowed.
    """
    assert config.num_devices is not None
    score_BD = _masked(share_TE, context).unflatten(-1, (config.num_devices, -1)).sum(-1)
    score_BD = score_BD.view(*context.batch_shape, -1).sum(1)
    loss = score_BD.new_zeros(())
    if config.device_coefficient:
        count_BD = count_BE.unflatten(-1, (config.num_devices, -1)).sum(-1)
        count_D = count_E.unflatten(-1, (config.num_devices, -1)).sum(-1)
        value = _scoped_loss(config.device_scope, count_BD, count_D, score_BD, context, "device")
        loss = loss + config.device_coefficient * value
    if config.communication_coefficient:
        sent_BD = _tokens_sent(choice, config.num_devices, count_BE.shape[1], context)
        sent_D = sent_BD.sum(0)
        sent_BD = _of_sequences(sent_BD, context, "sequence_sent", True)
        value = _scoped_loss(config.device_scope, sent_BD, sent_D, score_BD, context, "sent")
        loss = loss + config.communication_coefficient * value
    return loss


def _wants_sequences(config: BalanceConfig) -> bool:
    """Whether a loss, or the value that is logged, counts whole sequences or micro-batches."""
    scopes = list(config.by_scope())
    return config.num_devices is not None or not scopes or "sequence" in scopes or "micro_batch" in scopes


def _of_sequences(count_BC: Tensor, context: LayerContext, key: str, wanted: bool) -> Tensor:
    """Counts of this rank's parts of sequences as those of the whole sequences."""
    if not wanted or context.forward.sequence.count == 1:
        return count_BC
    return context.once(key, lambda: context.forward.sequence.sum(count_BC))


def _scoped_loss(
    scope: DeviceScope, count_BD: Tensor, count_D: Tensor, score_BD: Tensor, context: LayerContext, key: str
) -> Tensor:
    """`count_BD` of whole sequences, `count_D` of this rank's tokens."""
    if scope is DeviceScope.sequence:
        return balance_loss_sum(normalized_counts(count_BD.to(score_BD.dtype)), score_BD)
    if scope is DeviceScope.data_parallel:
        count_D = context.once(key, lambda: context.forward.data.sum(count_D.to(torch.float64)))
    else:
        count_D = count_BD.sum(0)
    return balance_loss_sum(normalized_counts(count_D.to(score_BD.dtype)), score_BD.sum(0))


def _tokens_sent(choice: Choice, num_devices: int, num_experts: int, context: LayerContext) -> Tensor:
    """Tokens of each sequence that each device gets, a token counted once a device: int64 (B, devices)."""
    num_sequences, length = context.batch_shape
    expert_N, token_N = choice.expert.reshape(-1), choice.tokens()
    used_N = expert_N < num_experts
    if context.valid_T is not None:
        used_N = used_N & context.valid_T[token_N]
    visited_TD = torch.zeros(num_sequences * length, num_devices + 1, dtype=torch.bool, device=expert_N.device)
    device_N = torch.where(used_N, expert_N // (num_experts // num_devices), num_devices)
    visited_TD[token_N, device_N] = True
    return visited_TD[:, :num_devices].view(num_sequences, length, -1).sum(1)


def _global_counts(step_count_E: Tensor, context: LayerContext) -> Tensor:
    prior_LIE = context.forward.prior_count_LIE
    if prior_LIE is None:
        return step_count_E
    prior_E = prior_LIE[context.layer, context.iteration]
    return prior_E if context.forward.prior_is_total else prior_E + step_count_E

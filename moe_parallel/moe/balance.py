"""Balance: losses and the bias rule, as pure functions.

Every loss is a sum over tokens. The engine divides it by the number of valid tokens of the global batch, so that
no factor depends on ranks or micro-batches, and the mean is 1.0 at perfect balance whatever k and scope are.
"""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_parallel.moe.routing import LayerContext, normalized_counts


class GlobalEstimator(str, Enum):
    look_ahead = "look_ahead"
    """Counts of the step so far, and for the micro-batches still to come the mean of the previous step."""
    exact = "exact"
    """A forward pass without gradient over all micro-batches first; costs a third more compute."""


@dataclass(kw_only=True)
class BalanceConfig:
    sequence_coefficient: float = 0.0
    """Weight per layer of the balance loss within each packed sequence (DeepSeek-V2 and V3)."""
    micro_batch_coefficient: float = 0.0
    """Weight per layer of the loss within one rank's micro-batch (GShard, Switch; depends on the number of ranks)."""
    data_parallel_coefficient: float = 0.0
    """Weight per layer of the loss over one micro-batch of all data-parallel ranks together."""
    global_coefficient: float = 0.0
    """Weight per layer of the loss over the whole global batch (arXiv 2501.11873)."""
    global_estimator: GlobalEstimator = GlobalEstimator.look_ahead
    """How the global loss knows the load of micro-batches still to come; exact by itself with one micro-batch."""
    z_coefficient: float = 0.0
    """Weight per layer of the squared log-sum-exp of the router logits (ST-MoE), which keeps logits small."""
    bias_rate: float = 0.0
    """Step of the loss-free selection bias per optimizer step (arXiv 2408.15664); 0 has no bias."""

    def __post_init__(self) -> None:
        for name in (*_COEFFICIENTS, "z_coefficient", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name}={getattr(self, name)} must not be negative; 0 turns it off")


_COEFFICIENTS = (
    "sequence_coefficient",
    "micro_batch_coefficient",
    "data_parallel_coefficient",
    "global_coefficient",
)


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
    """Squared log-sum-exp of the router logits, summed over valid tokens. Source: arXiv 2202.08906 eq. 5."""
    square_T = logit_TE.logsumexp(-1).square()
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


def selection_counts(expert_TK: Tensor, num_experts: int, context: LayerContext) -> tuple[Tensor, Tensor]:
    """Slots per expert, without padding, in total and per sequence.

    Args:
        expert_TK: int64 chosen experts, before drops.
    Returns:
        count_E and count_BE, int64.
    """
    num_sequences, length = context.batch_shape
    row_T = torch.arange(num_sequences, device=expert_TK.device).repeat_interleave(length)
    cell_TK = row_T[:, None] * num_experts + expert_TK
    ones_TK = torch.ones_like(expert_TK)
    if context.valid_T is not None:
        ones_TK = ones_TK * context.valid_T[:, None]
    count = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=expert_TK.device)
    count_BE = count.scatter_add_(0, cell_TK.reshape(-1), ones_TK.reshape(-1)).view(num_sequences, num_experts)
    return count_BE.sum(0), count_BE


def balance_terms(
    config: BalanceConfig, score_TE: Tensor, count_E: Tensor, count_BE: Tensor, context: LayerContext
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All configured balance losses of one layer.

    Args:
        score_TE: normalized scores, float32, rows sum to 1.
        count_E, count_BE: slots per expert of this micro-batch on this rank, and per sequence; before drops.
    Returns:
        The weighted sum with gradient; the unweighted value of the widest configured scope (of the micro-batch if
        none is configured); and for the global scope the counts summed over ranks and the share that was used.
    """
    if context.valid_T is not None:
        score_TE = score_TE * context.valid_T[:, None]
    score_BE = score_TE.view(*context.batch_shape, -1).sum(1)
    score_E = score_BE.sum(0)
    weighted = score_E.new_zeros(())
    value = balance_loss_sum(normalized_counts(count_E), score_E)
    step_count_E: Tensor | None = None
    used_share_E: Tensor | None = None
    if config.sequence_coefficient:
        value = balance_loss_sum(normalized_counts(count_BE), score_BE)
        weighted = weighted + config.sequence_coefficient * value
    if config.micro_batch_coefficient:
        value = balance_loss_sum(normalized_counts(count_E), score_E)
        weighted = weighted + config.micro_batch_coefficient * value
    if config.data_parallel_coefficient or config.global_coefficient:
        # Replayed under recompute: a second all-reduce would double the traffic and could meet other ranks' first.
        counted: Tensor = context.once("step_count", lambda: context.forward.sum_over_data(count_E.to(torch.float64)))
        step_count_E = counted
        if config.data_parallel_coefficient:
            value = balance_loss_sum(normalized_counts(counted), score_E)
            weighted = weighted + config.data_parallel_coefficient * value
        if config.global_coefficient:
            used_share_E = normalized_counts(_global_counts(counted, context))
            value = balance_loss_sum(used_share_E, score_E)
            weighted = weighted + config.global_coefficient * value
    return weighted, value.detach(), step_count_E, used_share_E


def _global_counts(step_count_E: Tensor, context: LayerContext) -> Tensor:
    prior = context.forward.prior_count_LE
    if prior is None:
        return step_count_E
    return prior[context.layer] if context.forward.prior_is_total else prior[context.layer] + step_count_E

"""The language-model loss as a sum over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_data.batch import IGNORE

_CHUNK_ELEMENTS = 1 << 24
"""Logits that are held in float32 at once."""


class _TokenLossSum(torch.autograd.Function):
    """Keeps the logits as they are and one number a token; float32 copies exist for a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, target_T: Tensor) -> Tensor:
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        log_total_T = torch.empty(target_T.shape, dtype=dtype, device=logits_TV.device)
        for logits, log_total in _chunks(logits_TV, log_total_T):
            torch.logsumexp(logits.to(dtype), dim=-1, out=log_total)
        has_target_T = target_T != IGNORE
        chosen_T = logits_TV.gather(1, target_T.clamp(min=0).unsqueeze(1)).squeeze(1).to(dtype)
        ctx.save_for_backward(logits_TV, target_T, log_total_T)
        return torch.where(has_target_T, log_total_T - chosen_T, 0.0).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits_TV, target_T, log_total_T = ctx.saved_tensors
        has_target_T = target_T != IGNORE
        scale_T = torch.where(has_target_T, grad, 0.0).to(log_total_T.dtype)
        grad_TV = torch.empty_like(logits_TV)
        for logits, target, log_total, scale, out in _chunks(
            logits_TV, target_T.clamp(min=0), log_total_T, scale_T, grad_TV
        ):
            share = (logits - log_total.unsqueeze(1)).exp_()
            share.scatter_add_(1, target.unsqueeze(1), share.new_full((1, 1), -1.0).expand(len(target), 1))
            out.copy_(share.mul_(scale.unsqueeze(1)))
        return grad_TV, None


def _chunks(first_TV: Tensor, *others: Tensor):
    """Matching slices of a number of tokens that bounds the memory of their logits."""
    size = max(1, _CHUNK_ELEMENTS // first_TV.shape[1])
    return zip(first_TV.split(size), *(other.split(size) for other in others))


def token_loss_sum(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all tokens that have a target.

    Args:
        logits_BSV: any floating type; sums run in float32, or in float64 for float64 logits.
        target_BS: int64; IGNORE where there is none.
    Returns:
        Scalar float32 (float64 for float64 logits). The gradient has the type of the logits.
    """
    return _TokenLossSum.apply(logits_BSV.flatten(0, 1), target_BS.flatten())

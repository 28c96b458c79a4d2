"""The head and the language-model loss as a sum over tokens, without ever holding the logits of a batch.

The logits of a batch, tokens times vocabulary, would be the largest tensor of a model by far. They are computed for a
slice of the vocabulary at a time: the forward pass keeps one number a token, and the backward pass computes them again.

Slices of the vocabulary and not of the tokens, because each row of the weight's gradient is then one product over all
tokens, written once: slices of tokens would need a float32 sum of the whole weight's size, which for a wide model is
more than the logits were. The price is one more product with the head (8 instead of 6 FLOPs for each weight and token),
by FLOPs 0.3 to 3 percent of a step of the published models; what fits in one slice is kept and pays nothing.
torch's own linear_cross_entropy (from 2.13 on) has that sum, and rounds a loss of bfloat16 inputs to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_data.batch import IGNORE

SLICE_LOGITS = 1 << 25
"""Logits that are computed at once."""
_ALIGNMENT = 128
"""Slices are multiples of this many words where that is possible: products of other widths are slow on accelerators."""


def slice_words(num_tokens: int, vocab_size: int) -> int:
    """Words whose logits for this many tokens are computed at once."""
    words = max(1, SLICE_LOGITS // max(1, num_tokens))
    if words >= _ALIGNMENT:
        words -= words % _ALIGNMENT
    return min(words, vocab_size)


def _slices(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    step = slice_words(num_tokens, vocab_size)
    for start in range(0, vocab_size, step):
        yield slice(start, min(start + step, vocab_size))


def _place(target_T: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Where in the slice each target is, int64 (T, 1), and whether it is there at all, bool (T, 1)."""
    place_T1 = (target_T - words.start).unsqueeze(1)
    inside_T1 = (place_T1 >= 0) & (place_T1 < words.stop - words.start)
    return torch.where(inside_T1, place_T1, 0), inside_T1


class _HeadLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        chosen_T1 = torch.zeros(len(target_T), 1, dtype=dtype, device=target_T.device)
        parts: list[Tensor] = []
        only: Tensor | None = None
        for words in _slices(len(target_T), len(weight_VD)):
            logits = hidden_TD @ weight_VD[words].T
            place_T1, inside_T1 = _place(target_T, words)
            chosen_T1 = torch.where(inside_T1, logits.gather(1, place_T1).to(dtype), chosen_T1)
            parts.append(torch.logsumexp(logits.to(dtype), dim=1))
            if logits.shape[1] == len(weight_VD):
                only = logits
        log_total_T = torch.logsumexp(torch.stack(parts), dim=0)
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, log_total_T, only)
        return torch.where(target_T != IGNORE, log_total_T - chosen_T1.squeeze(1), 0.0).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_TD, weight_VD, target_T, log_total_T, only = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        # Slices add to the same numbers, each product rounded to the compute type: the sum has float32 at least.
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=log_total_T.dtype) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        scale_T1 = torch.where(target_T != IGNORE, grad, 0.0).to(log_total_T.dtype).unsqueeze(1)
        for words in _slices(len(target_T), len(weight_VD)):
            logits = hidden_TD @ weight_VD[words].T if only is None else only
            share = (logits - log_total_T.unsqueeze(1)).exp_()
            del logits
            place_T1, inside_T1 = _place(target_T, words)
            share.scatter_add_(1, place_T1, -inside_T1.to(share.dtype))
            grad_logits = share.mul_(scale_T1).to(hidden_TD.dtype)
            del share
            if grad_weight_VD is not None:
                torch.mm(grad_logits.T, hidden_TD, out=grad_weight_VD[words])
            if grad_hidden_TD is not None:
                grad_hidden_TD += grad_logits @ weight_VD[words]
            del grad_logits
        return None if grad_hidden_TD is None else grad_hidden_TD.to(hidden_TD.dtype), grad_weight_VD, None


def head_loss_sum(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy in nats of a linear head, summed over all tokens that have a target.

    Args:
        hidden_TD, weight_VD: of one floating type, which products and logits are rounded to.
        target_T: int64; IGNORE where there is none.
    Returns:
        Scalar float32 (float64 for float64 inputs). Gradients have the types of their tensors.
    """
    return _HeadLossSum.apply(hidden_TD, weight_VD, target_T)


class Head(nn.Linear):
    """Words from the residual stream: their logits, or the loss of given ones."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def forward(self, x_BSD: Tensor, target_BS: Tensor | None = None) -> Tensor:
        """(B, S, D) -> logits (B, S, V); with targets the sum of their losses, see `head_loss_sum`."""
        if target_BS is None:
            return super().forward(x_BSD)
        return head_loss_sum(x_BSD.flatten(0, 1), self.weight, target_BS.flatten())

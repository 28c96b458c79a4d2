"""The token loss against torch's own, in value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import moe_parallel.model.loss as loss_module
from moe_data.batch import IGNORE
from moe_parallel.model.loss import token_loss_sum


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits_BSV = (torch.randn(2, 7, 33) * 4).to(dtype).requires_grad_()
    target_BS = torch.randint(0, 33, (2, 7))
    target_BS[0, 3] = target_BS[1, 0] = target_BS[1, 6] = IGNORE
    return logits_BSV, target_BS


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_equals_torch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk lost or counted twice, ignored tokens counted, a wrong sign at the target. float64: rounding only."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk)
    logits_BSV, target_BS = example(torch.float64)
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), ignore_index=IGNORE, reduction="sum")
    actual = token_loss_sum(logits_BSV, target_BS)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    for scale in (1.0, 0.25):  # the incoming gradient must be used
        ours = torch.autograd.grad(actual * scale, logits_BSV, retain_graph=True)[0]
        theirs = torch.autograd.grad(expected * scale, logits_BSV, retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """A loss summed in bfloat16 is off by percents. The reference is the same logits in float64; float32 sums of 14
    terms of order 10 are good to 1e-5, and the gradient is rounded to bfloat16 once (2^-8 relative)."""
    logits_BSV, target_BS = example(torch.bfloat16)
    actual = token_loss_sum(logits_BSV, target_BS)
    exact_BSV = logits_BSV.detach().double().requires_grad_()
    expected = token_loss_sum(exact_BSV, target_BS)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    ours, theirs = torch.autograd.grad(actual, logits_BSV)[0], torch.autograd.grad(expected, exact_BSV)[0]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_huge_logits_stay_finite() -> None:
    """An exponential without its maximum taken out overflows float32 at 89."""
    logits_BSV = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    loss = token_loss_sum(logits_BSV, torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == 1e4
    torch.testing.assert_close(logits_BSV.grad, torch.tensor([[[1.0, -1.0, 0.0]]]))


def test_nothing_but_padding_is_zero() -> None:
    """A mean over no tokens would be NaN; a sum over none is 0, and so is its gradient."""
    logits_BSV, target_BS = example(torch.float32)
    loss = token_loss_sum(logits_BSV, torch.full_like(target_BS, IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert logits_BSV.grad is not None
    assert not logits_BSV.grad.any()


def test_only_logits_are_kept_for_backward() -> None:
    """A float32 copy of the logits kept until backward: at 130 000 words that is the largest tensor of a model."""
    logits_BSV, target_BS = example(torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_loss_sum(logits_BSV, target_BS)
    large = [t for t in kept if t.numel() >= logits_BSV.numel()]
    assert [t.data_ptr() for t in large] == [logits_BSV.data_ptr()]

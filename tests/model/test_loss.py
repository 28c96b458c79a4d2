"""The head's loss against torch's own from all logits: value, gradients, and memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_parallel.model.loss as loss_module
from moe_data.batch import IGNORE
from moe_parallel.model.loss import Head, head_loss_sum, slice_words
from moe_parallel.model.transformer import Output
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import ARCHITECTURES, build

TOKENS, WIDTH, WORDS = 14, 24, 333


def example(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_TD = (torch.randn(TOKENS, WIDTH) * scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(WORDS, WIDTH).to(dtype).requires_grad_()
    target_T = torch.randint(0, WORDS, (TOKENS,))
    target_T[:3] = torch.tensor([0, WORDS - 1, 128])  # first and last word, and the first of a slice of 128
    target_T[[3, 7, 13]] = IGNORE
    return hidden_TD, weight_VD, target_T


def plain(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    return F.cross_entropy(hidden_TD @ weight_VD.T, target_T, ignore_index=IGNORE, reduction="sum")


# 1 << 25 is one slice; the others make slices of one word, of 10 (the last has 3) and of 128 (the last has 77).
@pytest.mark.parametrize("slice_logits", [1, 10 * TOKENS, 150 * TOKENS, 1 << 25])
def test_equals_torch(slice_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice lost or counted twice, a target looked for in the wrong slice, ignored tokens counted, a wrong sign at
    the target, an incoming gradient that is not used. float64: sums of hundreds of terms of order 10."""
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", slice_logits)
    hidden_TD, weight_VD, target_T = example(torch.float64)
    actual = head_loss_sum(hidden_TD, weight_VD, target_T)
    expected = plain(hidden_TD, weight_VD, target_T)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)
    for scale in (1.0, 0.25):
        for operand in (hidden_TD, weight_VD):  # one at a time: the other's gradient is not asked for
            ours = torch.autograd.grad(actual * scale, operand, retain_graph=True)[0]
            theirs = torch.autograd.grad(expected * scale, operand, retain_graph=True)[0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("slice_logits", [150 * TOKENS, 1 << 25])
def test_bfloat16_is_summed_in_float32(slice_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss summed in bfloat16 is off by percents (torch's own of 2.13 is), and slices of the gradient added in
    bfloat16 lose a bit each. The reference is float64 of the same inputs. Logits of order 5 are rounded to 2^-9
    relative: 0.01 each, at random. Gradients see rounded logits, shares and results, three roundings of 2^-9, and with
    slices one more for each partial product; their norms agree within eight."""
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", slice_logits)
    hidden_TD, weight_VD, target_T = example(torch.bfloat16)
    actual = head_loss_sum(hidden_TD, weight_VD, target_T)
    exact = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    expected = plain(*exact, target_T)
    assert actual.dtype == torch.float32
    assert abs(actual.item() - expected.item()) < 0.01 * 11**0.5 * 3
    ours, theirs = torch.autograd.grad(actual, (hidden_TD, weight_VD)), torch.autograd.grad(expected, exact)
    for mine, wanted in zip(ours, theirs):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - wanted).norm() <= 8 * 2**-9 * wanted.norm()


def test_huge_logits_stay_finite() -> None:
    """An exponential without its maximum taken out overflows float32 at 89; so does a sum over slices that does."""
    weight_VD = torch.tensor([[1e4], [0.0], [-1e4]], requires_grad=True)
    hidden_TD = torch.ones(1, 1, requires_grad=True)
    for slice_logits in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss_module, "SLICE_LOGITS", slice_logits)
            loss = head_loss_sum(hidden_TD, weight_VD, torch.tensor([1]))
            grad_VD = torch.autograd.grad(loss, weight_VD)[0]
        assert loss.item() == 1e4
        torch.testing.assert_close(grad_VD, torch.tensor([[1.0], [-1.0], [0.0]]))


def test_nothing_but_padding_is_zero() -> None:
    """A mean over no tokens would be NaN; a sum over none is 0, and so are its gradients."""
    hidden_TD, weight_VD, target_T = example(torch.float32)
    loss = head_loss_sum(hidden_TD, weight_VD, torch.full_like(target_T, IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    for operand in (hidden_TD, weight_VD):
        assert operand.grad is not None
        assert not operand.grad.any()


def test_bits_repeat() -> None:
    """Sums whose order changes from run to run break resuming to the bit."""
    results = []
    for _ in range(2):
        hidden_TD, weight_VD, target_T = example(torch.float32)
        loss = head_loss_sum(hidden_TD, weight_VD, target_T)
        results.append([loss, *torch.autograd.grad(loss, (hidden_TD, weight_VD))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_head_gives_logits_or_loss() -> None:
    """The two uses of one weight must be one function: the loss of the logits is the loss."""
    torch.manual_seed(0)
    head = Head(WIDTH, WORDS).double()
    x_BSD, target_BS = torch.randn(2, 7, WIDTH, dtype=torch.float64), torch.randint(0, WORDS, (2, 7))
    expected = F.cross_entropy(head(x_BSD).flatten(0, 1), target_BS.flatten(), reduction="sum")
    torch.testing.assert_close(head(x_BSD, target_BS), expected, rtol=1e-14, atol=0)


class Watch(TorchDispatchMode):
    """Bytes of tensors that operators made and that are alive, and the largest tensor of them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def test_logits_of_a_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits, or all their gradients, held at once: for 4096 tokens of 129,280 words they are 2 GB in float32.

    Every tensor that an operator makes is counted until it dies. Of slices, one in the compute type and float32 copies
    of it are alive at once: the slice, its shares and the temporary of one operator. The two gradients come on top."""
    tokens, width, words, chunk = 512, 16, 4096, 1 << 16
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", chunk)
    torch.manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(n, width, requires_grad=True) for n in (tokens, words))
    target_T = torch.randint(0, words, (tokens,))
    with Watch() as forward:
        loss = head_loss_sum(hidden_TD, weight_VD, target_T)
    with Watch() as backward:
        loss.backward()
    assert slice_words(tokens, words) == 128
    all_logits, gradients = 4 * tokens * words, 4 * width * (tokens + words)
    assert max(forward.largest, backward.largest) < all_logits / 8
    assert forward.peak <= 3 * 4 * chunk + 4 * tokens * 64  # numbers a token: one for each slice, targets, places
    assert backward.peak <= 3 * 4 * chunk + gradients + 4 * tokens * (64 + width)
    assert max(forward.peak, backward.peak) < all_logits / 4
    # The same measure sees them where they are: the proof that it can fail.
    with Watch() as whole:
        plain(hidden_TD, weight_VD, target_T).backward()
    assert whole.largest >= all_logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_never_holds_the_logits_of_a_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a whole step and an evaluation: a head that is called for its logits on the way to the loss. With
    3000 words and 96 tokens the largest tensor that may be made is the gradient of embedding or head."""
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", 1 << 14)
    model = build(replace(ARCHITECTURES[name], vocab_size=3000))
    batch = make_batch([[48], [20, 28]], 48, 3000)
    for context in (ForwardContext(), ForwardContext(training=False)):
        with Watch() as step:
            loss = model(batch, context, Output.loss)[0]
            if context.training:
                loss.sum().backward()
        assert step.largest <= 4 * 3000 * 32  # the gradient of a weight: a third of the logits


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 50), (4096, 129280), (16384, 50304), (1 << 26, 32000)])
def test_slices_are_bounded(num_tokens: int, vocab_size: int) -> None:
    """A slice of no words never ends; one above the limit runs out of memory; crooked widths are slow."""
    words = slice_words(num_tokens, vocab_size)
    assert 1 <= words <= vocab_size
    assert words == 1 or words * num_tokens <= loss_module.SLICE_LOGITS
    assert words in (1, vocab_size) or words % 128 == 0

"""Attention within documents: the paths against a plain formula and against each other, padding, options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_data.packing import Piece, pack
from moe_parallel.model.attention import (
    AttentionCore,
    GroupedQueryAttention,
    GroupedQueryConfig,
    attend,
)
from moe_parallel.model.latent_attention import LatentAttention, LatentConfig
from tests.batches import make_batch

ROWS = [[5, 1, 10], [16], [3, 4]]  # the last row has 9 tokens of padding
LENGTH = 16
PATHS = [AttentionCore.per_document, AttentionCore.masked]


def plain(q: Tensor, k: Tensor, v: Tensor, span_BS: Tensor, scale: float) -> Tensor:
    """Softmax attention by its formula, one pair of tokens allowed if the earlier is of the same span."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = q @ k.mT * scale
    same = span_BS[:, None, :, None] == span_BS[:, None, None, :]
    causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    return score.masked_fill(~(same & causal), float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("core", PATHS)
@pytest.mark.parametrize(("kv_heads", "value_dim"), [(4, 8), (2, 8), (1, 8), (4, 12)])
def test_paths_equal_the_formula(core: AttentionCore, kv_heads: int, value_dim: int) -> None:
    """A document that sees another, heads grouped in the wrong order, a lost scale, spans off by one; also in the
    gradients. float64: 1e-12 is rounding."""
    torch.manual_seed(0)
    batch = make_batch(ROWS, LENGTH, 50)
    shapes = [(3, 4, LENGTH, 8), (3, kv_heads, LENGTH, 8), (3, kv_heads, LENGTH, value_dim)]
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    grad = torch.randn(3, 4, LENGTH, value_dim, dtype=torch.float64)
    actual = attend(q, k, v, batch, 0.3, core)
    expected = plain(q, k, v, batch.document_BS, 0.3)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("core", PATHS)
def test_spans_and_not_documents_bound_attention(core: AttentionCore) -> None:
    """A mask built from document indices: with boundaries not kept, a span holds several documents."""
    tokens = torch.arange(12).numpy()
    begins = torch.tensor([0, 4, 9]).numpy()
    batch = pack([Piece(tokens, begins, 0, 0)], LENGTH, keep_boundaries=False, restart_positions=False)
    assert batch.document_lengths == ((12, 4),)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    span_BS = torch.tensor([[0] * 12 + [1] * 4])
    torch.testing.assert_close(attend(q, k, v, batch, 0.3, core), plain(q, k, v, span_BS, 0.3), atol=1e-12, rtol=0)


KINDS = {
    "gqa": lambda core: GroupedQueryAttention(
        32, GroupedQueryConfig(num_heads=4, num_kv_heads=2, qk_norm="head", core=core), 1e-6
    ),
    "mla": lambda core: LatentAttention(
        32,
        LatentConfig(num_heads=4, q_rank=12, kv_rank=16, rope_head_dim=4, nope_head_dim=8, core=core),
        1e-6,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", PATHS)
def test_other_documents_do_not_matter_to_the_last_bit(kind: str, core: AttentionCore) -> None:
    """Attention across documents, however small: new content in one document must not change a bit of the others,
    nor a bit of what came before it in its own."""
    torch.manual_seed(0)
    attention = KINDS[kind](core)
    batch = make_batch(ROWS, LENGTH, 50)
    x_BSD = torch.randn(3, LENGTH, 32)
    changed_BSD = x_BSD.clone()
    changed_BSD[0, 8:12] += 1.0  # within the third document of the first row, tokens 6..15
    with torch.no_grad():
        before, after = attention(x_BSD, batch), attention(changed_BSD, batch)
    same_BS = (before == after).all(-1)
    assert same_BS[0, :8].all()
    assert not same_BS[0, 8:].any()
    assert same_BS[1:].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", PATHS)
def test_padding_is_finite(kind: str, core: AttentionCore) -> None:
    """Rows that may attend to nothing give NaN, in the output or in the gradient, and poison the whole model."""
    torch.manual_seed(0)
    attention = KINDS[kind](core)
    batch = make_batch([[], [1], [7, 2]], LENGTH, 50)
    x_BSD = torch.randn(3, LENGTH, 32, requires_grad=True)
    out_BSD = attention(x_BSD, batch)
    out_BSD.square().sum().backward()
    assert out_BSD.isfinite().all()
    assert x_BSD.grad is not None
    assert x_BSD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_auto_takes_documents_one_by_one_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice reversed: the mask costs twice the time on a CPU."""
    import moe_parallel.model.attention as module

    def fail(*_args: object) -> None:
        raise AssertionError("masked path on a CPU")

    monkeypatch.setattr(module, "_attend_masked", fail)
    batch = make_batch(ROWS, LENGTH, 50)
    q = torch.randn(3, 2, LENGTH, 8)
    attend(q, q, q, batch, 1.0, AttentionCore.auto)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GroupedQueryConfig(num_heads=4, num_kv_heads=3),
            "attention.num_kv_heads=3 must be a divisor",
        ),
        (lambda: GroupedQueryConfig(head_dim=7), "attention.head_dim=7 must be even"),
        (lambda: GroupedQueryConfig(num_heads=3).head_width(64), "model.dim=64 must be a multiple of"),
        (lambda: LatentConfig(rope_head_dim=5), "attention.rope_head_dim=5 must be even"),
        (lambda: LatentConfig(q_rank=0), "attention.q_rank=0"),
    ],
)
def test_impossible_shapes_are_refused(make: object, message: str) -> None:
    """A mistake that would surface as a shape error deep in a forward pass, or as truncated heads."""
    with pytest.raises(ValueError, match=message):
        make()

"""Attention within documents: the paths against a plain formula and against each other, padding, options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import moe_parallel.model.attention as attention_module
from moe_data.batch import TokenBatch
from moe_data.packing import Piece, pack
from moe_parallel.model.attention import (
    GroupedQueryAttention,
    GroupedQueryConfig,
)
from moe_parallel.model.core import AttentionCore, attend, document_mask
from moe_parallel.model.latent_attention import LatentAttention, LatentConfig
from moe_parallel.model.transformer import Output
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import GROUPED, build

ROWS = [[5, 1, 10], [16], [3, 4]]  # the last row has 9 tokens of padding
LENGTH = 16
PATHS = [AttentionCore.per_document, AttentionCore.masked, AttentionCore.flex]


@pytest.fixture(autouse=True)
def _flex_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to differentiate flex attention on a CPU, because its kernels cannot; its plain formula, which is
    what runs uncompiled, can. That formula and our masks are what these tests see; kernels are seen on a GPU only."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_args: None)


def attend_to(batch: TokenBatch, q: Tensor, k: Tensor, v: Tensor, scale: float, core: AttentionCore) -> Tensor:
    return attend(q, k, v, batch.document_lengths, document_mask(batch, core), scale)


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
    actual = attend_to(batch, q, k, v, 0.3, core)
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
    actual = attend_to(batch, q, k, v, 0.3, core)
    torch.testing.assert_close(actual, plain(q, k, v, span_BS, 0.3), atol=1e-12, rtol=0)


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
        before, after = (attention(x, attention.plan(batch)) for x in (x_BSD, changed_BSD))
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
    out_BSD = attention(x_BSD, attention.plan(batch))
    out_BSD.square().sum().backward()
    assert out_BSD.isfinite().all()
    assert x_BSD.grad is not None
    assert x_BSD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_equals_per_document(kind: str, dtype: torch.dtype) -> None:
    """The cores must be exchangeable: the same module, weights and input, in value and all gradients. A sum of at most
    150 terms of order 1 in float32 is good to 1e-5. In bf16 queries, keys, weights and sums are rounded to 2^-9 a
    dozen times in a row, at random: norms agree within 16 of them; a wrong mask is an error of order 1.

    150 tokens: more than one block of 128, and a last one that is not whole."""
    batch = make_batch([[100, 20, 30], [140, 5], [150]], 150, 50)
    results = []
    for core in (AttentionCore.per_document, AttentionCore.flex):
        torch.manual_seed(0)
        attention = KINDS[kind](core).to(dtype)
        x_BSD = torch.randn(3, 150, 32).to(dtype).requires_grad_()
        out_BSD = attention(x_BSD, attention.plan(batch))
        grads = torch.autograd.grad(out_BSD, [x_BSD, *attention.parameters()], torch.randn_like(out_BSD))
        results.append([out_BSD, *grads])
    for ours, theirs in zip(*results):
        tolerance = 1e-5 if dtype == torch.float32 else 16 * 2**-9
        assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("length", [5, 128, 300, 512])
def test_blocks_are_those_of_torch(length: int) -> None:
    """A block that is left out loses attention, one too many costs time, one that passes for full sees other
    documents: only a GPU's kernel would show it, as the formula looks at single tokens. torch finds blocks from all
    pairs of tokens."""
    plans = [[length], [1, length - 1], [length // 2, 2], [1] * (length - 1), [length // 3, length // 3]]
    batch = make_batch(plans, length, 50)
    mask = document_mask(batch, AttentionCore.flex)
    assert isinstance(mask, BlockMask)
    wanted = create_block_mask(mask.mask_mod, len(plans), None, length, length, device="cpu")
    assert mask.shape == wanted.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        number = getattr(mask, f"{name}_num_blocks")
        assert torch.equal(number, getattr(wanted, f"{name}_num_blocks"))
        is_listed = torch.arange(-(-length // 128)) < number.unsqueeze(-1)
        places = [getattr(m, f"{name}_indices")[is_listed] for m in (mask, wanted)]
        assert torch.equal(*places)


def test_auto_takes_documents_one_by_one_on_a_cpu() -> None:
    """The choice reversed: the mask costs twice the time on a CPU."""
    batch = make_batch(ROWS, LENGTH, 50)
    assert document_mask(batch, AttentionCore.auto) is None
    mask_B1SS = document_mask(batch, AttentionCore.masked)
    assert isinstance(mask_B1SS, Tensor)
    assert mask_B1SS.shape == (3, 1, LENGTH, LENGTH)


@pytest.mark.parametrize("core", PATHS)
def test_whole_sequences_need_no_mask(core: AttentionCore) -> None:
    """A mask where every sequence is one document takes the fastest kernel away."""
    assert document_mask(make_batch([[LENGTH], [LENGTH]], LENGTH, 50), core) is None


def test_a_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and rotations of a batch made again in each layer, and again where layers are recomputed."""
    made: list[AttentionCore] = []

    def count(batch: TokenBatch, core: AttentionCore) -> Tensor | BlockMask | None:
        made.append(core)
        return document_mask(batch, core)

    monkeypatch.setattr(attention_module, "document_mask", count)
    for core in PATHS:
        made.clear()
        model = build(replace(GROUPED, attention=replace(GROUPED.attention, core=core)))
        for block in model.blocks:
            block.recompute = True
        loss, _ = model(make_batch(ROWS, LENGTH, 50), ForwardContext(), Output.loss)
        loss.backward()
        assert made == [core]


def test_flex_is_refused_where_it_cannot_train() -> None:
    """A run that builds, loads its data and dies in its first forward pass."""
    with pytest.raises(ValueError, match=r"attention\.core=flex cannot train on a CPU.*choose attention\.core=auto"):
        AttentionCore.flex.check_training("cpu")
    AttentionCore.flex.check_training("cuda")
    for core in set(AttentionCore) - {AttentionCore.flex}:
        core.check_training("cpu")


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

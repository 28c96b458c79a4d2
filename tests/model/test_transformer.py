"""The whole model: causality, documents, recompute, tied embeddings, limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import ModelConfig
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import ARCHITECTURES, DENSE, GROUPED, LATENT, VOCABULARY, build

EVALUATION = ForwardContext(training=False)


def logits_of(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch, EVALUATION)[0]


def one_document(token_S: torch.Tensor) -> TokenBatch:
    batch = make_batch([[len(token_S)]], len(token_S), VOCABULARY)
    return replace(batch, token_BS=token_S.unsqueeze(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal(name: str) -> None:
    """A path from the future in attention, routing or norms. Prefixes of a sequence are computed with other shapes, so
    float64 results may differ in rounding only; the token that changed must itself show."""
    model = build(ARCHITECTURES[name], torch.float64)
    batch = make_batch([[24], [10, 14]], 24, VOCABULARY)
    changed_BS = batch.token_BS.clone()
    changed_BS[:, 15:] = (changed_BS[:, 15:] + 1) % VOCABULARY
    before, after = logits_of(model, batch), logits_of(model, replace(batch, token_BS=changed_BS))
    torch.testing.assert_close(after[:, :15], before[:, :15], atol=1e-12, rtol=0)
    assert ((after - before).abs().amax(-1)[:, 15:] > 1e-3).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    """A leak between documents, or positions that do not restart: each document of a packed batch must give what it
    gives alone. Other shapes, so float64 rounding is all that may differ."""
    model = build(ARCHITECTURES[name], torch.float64)
    batch = make_batch([[7, 1, 12], [20], [5, 6]], 24, VOCABULARY)
    packed = logits_of(model, batch)
    for row, spans in enumerate([[7, 1, 12], [20], [5, 6]]):
        start = 0
        for length in spans:
            token_S = batch.token_BS[row, start : start + length]
            alone = logits_of(model, one_document(token_S))[0]
            torch.testing.assert_close(packed[row, start : start + length], alone, atol=1e-12, rtol=0)
            start += length


def test_positions_matter() -> None:
    """Positions that are ignored would pass the test above. One document with shifted positions is the same model
    (only distances count); positions that do not grow are not."""
    model = build(GROUPED, torch.float64)
    batch = one_document(torch.arange(20))
    logits_BSV = logits_of(model, batch)
    shifted = replace(batch, position_BS=batch.position_BS + 100)
    torch.testing.assert_close(logits_of(model, shifted), logits_BSV, atol=1e-3, rtol=0)
    still = replace(batch, position_BS=torch.zeros_like(batch.position_BS))
    assert (logits_of(model, still) - logits_BSV).abs().max() > 0.1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_changes_nothing(name: str) -> None:
    """Padding that takes part in attention, in counts or in the loss. float64 rounding only."""
    model = build(ARCHITECTURES[name], torch.float64)
    short, long = make_batch([[16]], 16, VOCABULARY), make_batch([[16]], 24, VOCABULARY)
    long = replace(long, token_BS=torch.cat([short.token_BS, long.token_BS[:, 16:]], 1))
    short_BSV, short_stats = model(short, EVALUATION)
    long_BSV, long_stats = model(long, EVALUATION)
    torch.testing.assert_close(long_BSV[:, :16], short_BSV, atol=1e-12, rtol=0)
    for ours, theirs in zip(long_stats, short_stats):
        assert ours.count_E.tolist() == theirs.count_E.tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recompute_gives_the_same_gradients(name: str) -> None:
    """A block that is computed again must give the same bits: other experts in the second run, statistics counted
    twice, or a balance loss whose gradient is lost with the first run's graph."""
    batch = make_batch([[7, 1, 12], [20]], 24, VOCABULARY)
    gradients, counts = [], []
    for recompute in (False, True):
        model = build(ARCHITECTURES[name])
        for block in model.blocks:
            block.recompute = recompute
        losses, stats = model(batch, ForwardContext(), Output.loss)
        loss = losses.sum()
        for layer in stats:
            loss = loss + layer.balance
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        counts.append([layer.count_E.tolist() for layer in stats])
    assert counts[0] == counts[1]
    for parameter, grad in gradients[0].items():
        assert grad is not None, parameter
        assert torch.equal(grad, gradients[1][parameter]), parameter


def test_recompute_does_not_choose_again() -> None:
    """The selection bias may be updated between forward and backward; the second run must still take the experts of
    the first, or gradients belong to a routing that never was."""
    batch = make_batch([[24]], 24, VOCABULARY)
    gradients = []
    for move_bias in (False, True):
        model = build(LATENT)
        for block in model.layers:
            block.recompute = True
        loss = model(batch, ForwardContext(), Output.loss)[0]
        if move_bias:
            for block in model.layers:
                block.ffn.router.bias += torch.arange(8) * 10.0
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_statistics_come_from_moe_layers_in_order() -> None:
    """A dense layer that reports, or layers numbered from the first expert layer: the bias of the wrong layer moves."""
    batch = make_batch([[24]], 24, VOCABULARY)
    assert [s.layer for s in build(GROUPED)(batch, EVALUATION)[1]] == [1, 2]
    assert [s.layer for s in build(LATENT)(batch, EVALUATION)[1]] == [0, 1]
    assert build(DENSE)(batch, EVALUATION)[1] == []


def test_tied_embeddings_stay_one_tensor() -> None:
    """The move off the meta device makes a new parameter for each name, so that a tied head silently becomes a head
    of its own; the gradient must come from both uses."""
    model = build(LATENT)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    batch = make_batch([[24]], 24, VOCABULARY)
    model(batch, ForwardContext(), Output.loss)[0].backward()
    grad_VD = model.embedding.weight.grad
    assert grad_VD is not None
    unseen = [v for v in range(VOCABULARY) if v not in batch.token_BS]
    assert (grad_VD[unseen].abs().sum(-1) > 0).all()  # only the head reaches words that no input has


def test_bfloat16_norms_are_computed_in_float32() -> None:
    """Mean squares of 32 numbers in bfloat16 are good to 1 percent only. One rounding at the end is 2^-8."""
    norm = build(DENSE).layers[0].attention_norm
    x = torch.randn(10, 32).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact = exact * norm.weight.detach().bfloat16().double()
    ours = norm.bfloat16()(x)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=0)


def test_sequence_limit() -> None:
    """A sequence beyond the positions that a model was made for would give numbers without meaning."""
    model = build(replace(DENSE, model=ModelConfig(dim=32, num_layers=1, first_dense_layers=1, max_sequence_tokens=16)))
    logits_of(model, one_document(torch.arange(16)))
    with pytest.raises(ValueError, match=r"17 tokens is longer than model\.max_sequence_tokens=16"):
        logits_of(model, one_document(torch.arange(17)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first_dense_layers": 5}, "model.first_dense_layers=5 must lie in 0..model.num_layers=4"),
        ({"dim": 0}, "model.dim=0 must be at least 1"),
        ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1, or null"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon=0.0 must be positive"),
    ],
)
def test_impossible_models_are_refused(values: dict[str, object], message: str) -> None:
    """A mistake found before any memory is used, with the option's own name."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)

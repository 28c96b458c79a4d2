"""Multi-token prediction against the same thing written out token by token, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_data.batch import IGNORE
from moe_parallel.model import transformer as transformer_module
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.counts import count_parameters
from moe_parallel.model.mtp import embed_known, following_tokens
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.routing import ForwardContext
from tests.batches import join_batches, make_batch
from tests.model.examples import ARCHITECTURES, FURTHER, GROUPED, VOCABULARY, build
from tests.model.mtp_oracle import losses_and_stats
from tests.model.test_presets import preset

DOCUMENTS = [[7, 1, 4], [12], [2, 5]]
"""The last sequence ends in padding; one document is shorter than what is predicted."""


def with_modules(name: str, mtp_layers: int) -> Architecture:
    architecture = ARCHITECTURES[name]
    return replace(architecture, model=replace(architecture.model, mtp_layers=mtp_layers))


@pytest.mark.parametrize(("name", "mtp_layers"), [("grouped", 1), ("latent", 2), ("dense", 3), ("further", 2)])
def test_losses_and_gradients(name: str, mtp_layers: int) -> None:
    """Would catch: tokens or targets that are shifted by one too many, or across documents; a projection that takes its
    halves in the other order; a norm that is left out or used twice; a module that starts from the model's and not from
    the module's before it; a loss that is a mean. Oracle: loops over positions. Float64 sums of a hundred terms."""
    model = build(with_modules(name, mtp_layers), torch.float64)
    batch = make_batch(DOCUMENTS, 12, VOCABULARY)
    weight_P = torch.tensor([1.0, 0.7, -0.3, 0.9])[: 1 + mtp_layers].double()  # another factor for each
    results = []
    for oracle in (False, True):
        found, stats = losses_and_stats(model, batch, ForwardContext()) if oracle else model(
            batch, ForwardContext(), Output.loss
        )  # fmt: skip
        losses = torch.stack(found) if oracle else found
        balance = sum((s.balance for s in stats), start=torch.zeros(()))
        model.zero_grad()
        ((losses * weight_P).sum() + balance).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses.detach(), gradients, [s.count_E.tolist() for s in stats]))
    (losses, gradients, counts), (wanted_losses, wanted, wanted_counts) = results
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-13, atol=0)
    assert counts == wanted_counts
    assert gradients.keys() == wanted.keys() == dict(model.named_parameters()).keys(), "every weight learns"
    for parameter, grad in gradients.items():
        torch.testing.assert_close(grad, wanted[parameter], rtol=0, atol=1e-11, msg=parameter)


def test_tokens_that_are_not_known_matter_to_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a target whose module has seen a stand-in for a token, or attends to one that has."""
    model, batch = build(FURTHER, torch.float64), make_batch(DOCUMENTS, 12, VOCABULARY)
    losses, _ = model(batch, ForwardContext(), Output.loss)

    def garbage(embedding: torch.nn.Module, token_BS: Tensor) -> Tensor:
        return embed_known(embedding, token_BS).masked_fill((token_BS == IGNORE).unsqueeze(-1), 7.0)

    monkeypatch.setattr(transformer_module, "embed_known", garbage)
    others, _ = model(batch, ForwardContext(), Output.loss)
    torch.testing.assert_close(others, losses, rtol=1e-13, atol=0)


def test_following_tokens() -> None:
    """Would catch: a text that ends at the sequence although its next token is known, or goes on behind a target that
    is missing. By hand: the target behind the end is that of the next sequence; boundaries are not kept, so that the
    one target that is missing is the stream's last."""
    batch = make_batch([[6], [6]], 6, 90)
    none = IGNORE
    target_BS = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, none, 24, 25, none]])
    one, two, three = following_tokens(replace(batch, target_BS=target_BS), 3)
    assert one.tolist() == target_BS.tolist()
    assert two.tolist() == [[12, 13, 14, 15, 16, none], [22, none, none, 25, none, none]]
    assert three.tolist() == [[13, 14, 15, 16, none, none], [none, none, none, none, none, none]]


@pytest.mark.parametrize("count", [2, 4, 12])
def test_parts_of_sequences_see_their_neighbors_tokens(count: int) -> None:
    """Would catch: a target that is lost at the end of each rank's part; with parts of one token all would be."""
    batch = make_batch(DOCUMENTS, 12, VOCABULARY)
    wanted = following_tokens(batch, 4)
    for ahead, table_BS in enumerate(wanted):
        parts = [following_tokens(batch.part(index, count), 4)[ahead] for index in range(count)]
        assert torch.equal(torch.cat(parts, dim=1), table_BS)
    assert all((table_BS != IGNORE).any() for table_BS in wanted)


def test_what_is_summed_does_not_depend_on_the_batch() -> None:
    """Would catch: a mean over a batch, or sequences that see each other: losses of a batch are the sums of those of
    its rows, also where one is all padding."""
    model = build(FURTHER, torch.float64)
    rows = [make_batch([lengths], 12, VOCABULARY, i) for i, lengths in enumerate([*DOCUMENTS, []])]
    single = torch.stack([model(row, ForwardContext(), Output.loss)[0] for row in rows]).sum(0)
    torch.testing.assert_close(model(join_batches(rows), ForwardContext(), Output.loss)[0], single, rtol=1e-13, atol=0)


def test_logits_do_not_know_of_it() -> None:
    """Would catch: generation that pays for the modules, or a next token that sees them. A pass that only counts must
    run them: their experts' counts are part of the global balance loss."""
    model = build(replace(FURTHER, balance=GROUPED.balance), torch.float64)
    plain = Transformer(replace(FURTHER, model=replace(FURTHER.model, mtp_layers=0))).double()
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("mtp.")})
    batch = make_batch(DOCUMENTS, 12, VOCABULARY)
    logits, stats = model(batch, ForwardContext())
    wanted, _ = plain(batch, ForwardContext())
    assert torch.equal(logits, wanted)
    assert [s.layer for s in stats] == [1, 2]
    hidden, stats = model(batch, ForwardContext(), Output.hidden)
    assert torch.equal(hidden, plain(batch, ForwardContext(), Output.hidden)[0])
    assert [s.layer for s in stats] == [1, 2, 3, 4]
    assert torch.equal(
        model(batch, ForwardContext(), Output.loss)[0][0], plain(batch, ForwardContext(), Output.loss)[0][0]
    )


def test_size_with_the_module_of_deepseek_v3() -> None:
    """Would catch: a module with an embedding or a head of its own, of which the released model has one each for all:
    by hand, one layer of experts, its attention, projection and five norms."""
    shape = preset("deepseek_v3")
    shape = replace(shape, model=replace(shape.model, mtp_layers=1))
    with torch.device("meta"):
        model = Transformer(shape)
    counts = count_parameters(shape)
    assert counts.total == sum(p.numel() for p in model.parameters())
    dim, expert = 7168, 3 * 7168 * 2048
    attention = dim * (1536 + 576) + 1536 * (128 * 192 + 1) + 512 * (128 * 256 + 1) + 128 * 128 * dim
    module = 257 * expert + 256 * dim + attention + 2 * dim * dim + 5 * dim
    assert counts.total - count_parameters(preset("deepseek_v3")).total == module


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mtp_layers": -1}, "model.mtp_layers=-1 must not be negative; 0 has none"),
        ({"mtp_coefficient": 0.0}, "model.mtp_coefficient=0.0 must be positive; .* model.mtp_layers=0"),
    ],
)
def test_bad_options(options: dict[str, float], text: str) -> None:
    """A negative number of modules builds none; a coefficient of 0 pays for modules that do not learn."""
    with pytest.raises(ValueError, match=text):
        ModelConfig(**options)  # type: ignore[arg-type]

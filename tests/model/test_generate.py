"""Sampling: against a loop written out here, reproducible, within its limits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moe_parallel.model.generate import generate, logits_of
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import GROUPED, VOCABULARY, build


def test_greedy_equals_a_plain_loop() -> None:
    """Logits of the wrong place, or a prompt that is fed wrongly. The loop reads logits from packed batches."""
    model = build(GROUPED)
    ids = [3, 1, 4]
    for _ in range(6):
        batch = make_batch([[len(ids)]], len(ids), VOCABULARY)
        batch.token_BS[0] = torch.tensor(ids)
        ids.append(int(model(batch, ForwardContext(training=False))[0][0, -1].argmax()))
    assert generate(logits_of(model), [3, 1, 4], 6, temperature=0) == ids[3:]


def test_same_seed_same_text() -> None:
    """Sampling from the global generator would depend on what ran before, and differ between ranks."""
    model = build(GROUPED)
    first = generate(logits_of(model), [1], 12, seed=5)
    torch.manual_seed(1)
    assert generate(logits_of(model), [1], 12, seed=5) == first
    assert generate(logits_of(model), [1], 12, seed=6) != first


def test_frequencies_follow_the_model() -> None:
    """A temperature that multiplies, or is ignored. 400 draws of the first token: each frequency within 4.5 standard
    errors of the model's share at temperature 0.5."""
    model = build(GROUPED)
    batch = make_batch([[1]], 1, VOCABULARY)
    batch.token_BS[0] = 7
    share_V = (model(batch, ForwardContext(training=False))[0][0, -1] / 0.5).softmax(-1).detach()
    drawn = Counter(generate(logits_of(model), [7], 1, temperature=0.5, seed=seed)[0] for seed in range(400))
    for word in range(VOCABULARY):
        share = float(share_V[word])
        assert abs(drawn[word] / 400 - share) <= 4.5 * (share * (1 - share) / 400) ** 0.5 + 1 / 400


def test_limits_on_ids() -> None:
    """`top_k=1` is greedy whatever the temperature; ids that the tokenizer lacks must never appear."""
    model = build(GROUPED)
    logits = logits_of(model)
    assert generate(logits, [1], 6, temperature=5.0, top_k=1) == generate(logits, [1], 6, temperature=0)
    assert max(generate(logits, [1], 30, temperature=5.0, allowed_ids=3)) < 3


def test_leaves_the_model_as_it_was() -> None:
    """A model left in evaluation mode, or gradients kept, after a sample in the middle of training."""
    model = build(GROUPED).train()
    seen: list[bool] = []
    model.register_forward_hook(lambda m, _a, _o: seen.append(m.training))
    generate(logits_of(model), [1], 2)
    assert seen == [False, False]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [], "num_tokens": 1}, "the prompt is empty"),
        ({"prompt": [1], "num_tokens": -1}, "num_tokens=-1"),
        ({"prompt": [1], "num_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"prompt": [1], "num_tokens": 1, "top_k": 0}, "top_k=0"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    """A mistake that would surface as an index error inside a kernel."""
    with pytest.raises(ValueError, match=message):
        generate(logits_of(build(GROUPED)), **arguments)

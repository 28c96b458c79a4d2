"""Our models against those of transformers with the same random weights.

Everything is float32, since transformers rounds its norms to float32 whatever the weights are. Values are of the
order of 1 and the largest difference found is 4e-6, some tens of roundings. The smallest wrong detail that was tried,
three times the norms' epsilon, moves the logits by 2e-4; a wrong scale or layout moves them by more than 1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_parallel.model.transformer import Output
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.hugging_face import FAMILIES, VOCABULARY, our_names, same_models

TOLERANCE = 2e-5


def watch(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each module returns, first of a tuple, once a forward pass has run."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _m, _args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_agrees(name: str) -> None:
    """A wrong rotation, softmax scale, norm or order of operations in one stage, which a look at the logits alone
    could not place: attention of each layer, each layer, and the logits, on two sequences of one document."""
    theirs, ours = same_models(FAMILIES[name])
    batch = make_batch([[40], [40]], 40, VOCABULARY)
    stages = {f"layer {i}": layer for i, layer in enumerate(theirs.model.layers)}
    stages |= {f"attention {i}": layer.self_attn for i, layer in enumerate(theirs.model.layers)}
    expected = watch(stages)
    stages = {f"layer {i}": layer for i, layer in enumerate(ours.layers)}
    stages |= {f"attention {i}": layer.attention for i, layer in enumerate(ours.layers)}
    actual = watch(stages)
    with torch.no_grad():
        expected["logits"] = theirs(batch.token_BS).logits
        actual["logits"] = ours(batch, ForwardContext(training=False))[0]
    for stage, value in expected.items():
        torch.testing.assert_close(
            actual[stage], value, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, s=stage: f"{s}: {m}"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gradient_agrees(name: str) -> None:
    """A detached path (router, shared key of latent attention, a norm's weight) leaves the loss right and one
    gradient wrong. Gradients of a sum over 78 tokens are compared relative to the largest of their tensor."""
    theirs, ours = same_models(FAMILIES[name])
    batch = make_batch([[40], [40]], 40, VOCABULARY)
    logits = theirs(batch.token_BS).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.target_BS.flatten(), reduction="sum").backward()
    ours(batch, ForwardContext(), Output.loss)[0].backward()
    expected = our_names({n: p.grad for n, p in theirs.named_parameters()})
    actual = {n: p.grad for n, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for parameter, grad in expected.items():
        scale = float(grad.abs().max())
        assert scale > 0, parameter
        torch.testing.assert_close(
            actual[parameter],
            grad,
            atol=5 * TOLERANCE * scale,
            rtol=0,
            msg=lambda m, p=parameter: f"{p}: {m}",
        )


@pytest.mark.parametrize("name", ["deepseek_v3_yarn", "qwen3_moe"])
def test_packed_documents_equal_documents_alone(name: str) -> None:
    """Attention or positions that leak from one packed document to the next: each document of our packed batch must
    give what transformers gives for that document alone."""
    theirs, ours = same_models(FAMILIES[name])
    batch = make_batch([[7, 20, 1], [28]], 32, VOCABULARY)
    with torch.no_grad():
        logits_BSV = ours(batch, ForwardContext(training=False))[0]
        for row, lengths in enumerate([[7, 20, 1], [28]]):
            start = 0
            for length in lengths:
                span = slice(start, start + length)
                alone = theirs(batch.token_BS[row : row + 1, span]).logits[0]
                torch.testing.assert_close(logits_BSV[row, span], alone, atol=TOLERANCE, rtol=TOLERANCE)
                start += length

"""What maps from dense networks are checked with: single layers, written out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Given, Lazy, whole
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Output
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.convert.models import VOCABULARY

BATCH = make_batch([(13, 11), (24,)], 24, VOCABULARY)
CONTEXT = ForwardContext(step=0, training=False)


class Trained(Given):
    """A weight with moments of an optimizer."""

    def __init__(self, value: Tensor, moments: Mapping[int, Tensor], text: str = "trained") -> None:
        super().__init__(value, text)
        self.moments = moments

    def moment(self, order: int) -> Lazy:
        return Given(self.moments[order], f"moment {order} of {self.text}")


def losses(architecture: Architecture, weights: Mapping[str, Lazy]) -> Tensor:
    """Sums of cross-entropies, of the next token and of those that multi-token prediction sees. float64."""
    model = build_model(architecture, weights, torch.float64).eval()
    with torch.no_grad():
        return model(BATCH, CONTEXT, Output.loss)[0]


def layer_pass(architecture: Architecture, weights: Mapping[str, Lazy], layer: int) -> tuple[Tensor, Tensor]:
    """What a layer's feed-forward network gets and what it adds to the stream, (T, D) each. float64."""
    model = build_model(architecture, weights, torch.float64).eval()
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module, arguments, result) -> None:
        if isinstance(result, tuple):
            seen.append((arguments[0], result[0] - arguments[3]))
        else:
            seen.append((arguments[0].flatten(0, 1), result.flatten(0, 1)))

    model.layers[layer].ffn.register_forward_hook(look)
    with torch.no_grad():
        model(BATCH, CONTEXT)
    return seen[0]


def dense(weights: Mapping[str, Lazy], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of a dense layer."""
    gate, up, down = (whole(weights[f"layers.{layer}.ffn.{what}.weight"]) for what in ("gate", "up", "down"))
    return gate, up, down


def experts(plan: Mapping[str, Lazy], layer: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down of each routed expert."""
    gate_up, down = (whole(plan[f"layers.{layer}.ffn.experts.{what}"]) for what in ("gate_up", "down"))
    return [(*pair.chunk(2), last) for pair, last in zip(gate_up, down)]


def swiglu(x_TD: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(T, D) -> (T, D) in float64."""
    hidden_TF = F.silu(x_TD @ gate.double().T) * (x_TD @ up.double().T)
    return hidden_TF @ down.double().T

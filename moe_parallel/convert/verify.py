"""A converted model beside those that it was made of, on text: how far its function moved, and what its experts are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_data.batch import IGNORE, TokenBatch
from moe_data.packing import Piece, pack
from moe_data.tokenizers import Tokenizer
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.lazy import Lazy
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle.map import Preserves
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.counts import count_parameters
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.experts import local_tensor
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routing import ForwardContext

EXACT = 1e-4
"""Relative difference of logits up to which functions are equal in float32: 1e-7 to 1e-5 is rounding, grown through
some dozen layers; a weight in the wrong place shows at 1e-2 and above."""


@dataclass(frozen=True)
class Against:
    """The new model and one that it was made of, on the same tokens."""

    source: str
    logits_relative_difference: float
    """Euclidean norm of the difference of all logits, by that of the source's."""
    source_nats: float
    new_nats: float
    """Mean cross-entropy of the next token."""


@dataclass(frozen=True)
class Size:
    """Parameters of a model, and those that a token uses."""

    total: int
    active: int


@dataclass(frozen=True)
class Verification:
    """What a report shows."""

    promise: Preserves
    tokens: int
    against: list[Against]
    expert_cosine: dict[str, float]
    """By layer: mean cosine of the weights of all pairs of experts; 1 for copies, about 0 for strangers."""
    router_entropy_nats: dict[str, float]
    """By pass: mean over tokens of the entropy of the normalized scores; ln(experts) where a router does not prefer."""
    experts: int
    sizes: dict[str, Size]
    """Of the new model and of its sources."""

    @property
    def is_kept(self) -> bool:
        """What the map promises holds on this text."""
        return self.promise is not Preserves.exact or self.against[0].logits_relative_difference <= EXACT

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "promise": self.promise.value, "is_kept": self.is_kept}

    def markdown(self) -> str:
        """Tables of what was found."""
        verdict = "" if self.promise is not Preserves.exact else ", kept" if self.is_kept else ", **broken**"
        lines = [
            f"The map's promise: {self.promise.value}{verdict}. Measured on {self.tokens:,} tokens in float32.",
            "",
        ]
        lines += ["| model | parameters | active for a token |", "|---|---|---|"]
        lines += [f"| {name} | {size.total:,} | {size.active:,} |" for name, size in self.sizes.items()]
        lines += ["", "| against | logits, relative difference | its nats | new nats |", "|---|---|---|---|"]
        lines += [
            f"| {a.source} | {a.logits_relative_difference:.3g} | {a.source_nats:.4f} | {a.new_nats:.4f} |"
            for a in self.against
        ]
        if self.expert_cosine:
            lines += ["", "| layer | mean cosine of two experts |", "|---|---|"]
            lines += [f"| {name} | {cosine:.4f} |" for name, cosine in self.expert_cosine.items()]
            even = f"ln {self.experts} = {math.log(self.experts):.3f}"
            lines += ["", f"| pass | entropy of the router in nats, at most {even} |", "|---|---|"]
            lines += [f"| {name} | {entropy:.4f} |" for name, entropy in self.router_entropy_nats.items()]
        return "\n".join(lines) + "\n"


def verify(
    target: Architecture,
    weights: Mapping[str, Lazy],
    sources: Sequence[Pretrained],
    promise: Preserves,
    batches: Sequence[TokenBatch],
    device: torch.device | str = "cpu",
) -> Verification:
    """Compute what the report shows. The new model and one source at a time are in memory.

    Raises ValueError if the text has no token to predict.
    """
    if not sum(batch.num_targets for batch in batches):
        raise ValueError("the text has no token to predict; give more of it")
    new = build_model(target, weights, device=device).eval()
    against: list[Against] = []
    entropy: dict[str, float] = {}
    for source in sources:
        old = build_model(source.architecture, source.weights, device=device).eval()
        found, entropy = _compare(str(source.path), old, new, batches)
        against.append(found)
        del old
    layers = {f"layer_{m.layer}": m for m in new.modules() if isinstance(m, MoELayer)}
    models = {"new": target} | {str(source.path): source.architecture for source in sources}
    counts = {name: count_parameters(architecture) for name, architecture in models.items()}
    return Verification(
        promise=promise,
        tokens=sum(batch.num_valid for batch in batches),
        against=against,
        expert_cosine={name: expert_cosine(layer) for name, layer in layers.items()},
        router_entropy_nats=entropy,
        experts=target.moe.num_experts,
        sizes={name: Size(count.total, count.active) for name, count in counts.items()},
    )


@torch.no_grad()
def _compare(
    name: str, old: Transformer, new: Transformer, batches: Sequence[TokenBatch]
) -> tuple[Against, dict[str, float]]:
    """Against one source; entropies of the new model's routers."""
    difference = size = old_nats = new_nats = 0.0
    entropy: dict[str, float] = {}
    device, context = new.embedding.weight.device, ForwardContext(training=False)
    for batch in (batch.to(device) for batch in batches):
        wanted = old(batch, context)[0]
        got, stats = new(batch, context)
        valid = batch.document_BS >= 0
        difference += float((got - wanted)[valid].double().square().sum())
        size += float(wanted[valid].double().square().sum())
        old_nats += _loss_sum(wanted, batch)
        new_nats += _loss_sum(got, batch)
        for s in stats:
            place = f"layer_{s.layer}" + (
                f"/iteration_{s.iteration}" if new.architecture.moe.chain.iterations > 1 else ""
            )
            entropy[place] = entropy.get(place, 0.0) + float(s.entropy)
    targets, tokens = sum(batch.num_targets for batch in batches), sum(batch.num_valid for batch in batches)
    found = Against(name, math.sqrt(difference / size), old_nats / targets, new_nats / targets)
    return found, {place: total / tokens for place, total in entropy.items()}


def _loss_sum(logits_BSV: Tensor, batch: TokenBatch) -> float:
    target_T = batch.target_BS.flatten()
    return float(F.cross_entropy(logits_BSV.flatten(0, 1).float(), target_T, ignore_index=IGNORE, reduction="sum"))


@torch.no_grad()
def expert_cosine(layer: MoELayer) -> float:
    """Mean cosine of all pairs of a layer's experts: of gate, up and down together, as they are computed with."""
    experts = layer.experts
    stored = {name: local_tensor(getattr(experts, name)) for name in experts.names}
    base = None
    if layer.base is not None:
        base = local_tensor(layer.base.gate_up.weight), local_tensor(layer.base.down.weight)
    matrices = [experts.form.gate_up(stored, base).flatten(1), experts.form.down(stored, base).flatten(1)]
    number = len(matrices[0])
    if number < 2:
        return 1.0
    length_E1 = torch.stack([m.double().square().sum(1) for m in matrices]).sum(0).sqrt().unsqueeze(1)
    # The sum of all products of two unit vectors is the square of the length of their sum.
    square = sum(float((m.double() / length_E1).sum(0).square().sum()) for m in matrices)
    return (square - number) / (number * (number - 1))


def batches_of_text(
    texts: Iterable[str], tokenizer: Tokenizer, sequence_tokens: int, most_tokens: int, rows: int
) -> list[TokenBatch]:
    """The beginning of some texts as batches; each text is a document.

    Args:
        most_tokens: of all texts together; each gives equally many, as far as it has them.
        rows: sequences of a batch.
    """
    texts = list(texts)
    pieces: list[Piece] = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)[: max(2, most_tokens // len(texts))].astype(np.int64)
        for start in range(0, len(ids) - 1, sequence_tokens):
            window = ids[start : start + sequence_tokens + 1]
            pieces.append(Piece(tokens=window, begins=np.empty(0, np.int64), sequence=len(pieces), source=number))
    return [
        pack(pieces[start : start + rows], sequence_tokens, keep_boundaries=True, restart_positions=True)
        for start in range(0, len(pieces), rows)
    ]

"""Which other tokens a token's output depends on: measured by changing them, and compared with what is declared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_data.batch import TokenBatch
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routers.router import BatchShape, LooksAt
from moe_parallel.moe.routing import ForwardContext, LayerContext

DIM, LENGTH, VOCABULARY = 16, 16, 64
DRAWS = 6
"""Weights and rows are drawn so many times: a choice may be the same by chance although it depends on other tokens."""
ROUNDING = 1e-9
"""Outputs are about 1 in float64; a token that goes elsewhere moves by 1e-2 and more."""


@dataclass(frozen=True)
class Finding:
    """One policy of one layer or model."""

    what: str
    declared: LooksAt
    measured: LooksAt
    allowed: LooksAt
    """What it may look at whatever it declares."""

    @property
    def is_fine(self) -> bool:
        """Nothing was seen that is not declared, or not allowed."""
        return self.measured & ~(self.declared & self.allowed) == LooksAt.itself


ANYTHING = LooksAt.past | LooksAt.future | LooksAt.others


def probe(architecture: Architecture) -> list[Finding]:
    """Measure a layer of these options in training and in evaluation, and a whole model in evaluation.

    Raises:
        ValueError: no number of sequences up to 512 suits the router's pools.
    """
    sequences = _sequences_for(architecture)
    seen = dict.fromkeys((True, False), LooksAt.itself)
    leak = LooksAt.itself
    for draw in range(DRAWS):
        layer = _make_layer(architecture, draw)
        _settle(layer, sequences, draw)
        for training in seen:
            seen[training] |= _measure_layer(layer, sequences, training, draw)
        leak |= _measure_model(architecture, draw)
    findings = [
        Finding(
            f"layer, {'training' if training else 'evaluation'}",
            layer.looks_at(training),
            measured,
            ANYTHING if training else ~LooksAt.future,
        )
        for training, measured in seen.items()
    ]
    past = LooksAt.past  # through attention
    return [*findings, Finding("model, evaluation", past | layer.looks_at(False), past | leak, ~LooksAt.future)]


def _sequences_for(architecture: Architecture) -> int:
    problem: ValueError | None = None
    for sequences in range(4, 513):
        try:
            shape = BatchShape(1, 1, sequences, LENGTH)
            architecture.router.check_batch(shape, architecture.moe.num_experts)
        except ValueError as error:
            problem = error
        else:
            return sequences
    raise ValueError(f"no batch of up to 512 sequences of {LENGTH} tokens suits this router: {problem}")


def _draw(tensor: Tensor, generator: torch.Generator, scale: float) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)


@torch.no_grad()
def _make_layer(architecture: Architecture, draw: int) -> MoELayer:
    """A layer of small width, with weights at which routing is lively."""
    moe = replace(architecture.moe, expert_dim=8)
    layer = MoELayer(DIM, moe, architecture.router, architecture.balance, 0).double()
    generator = torch.Generator().manual_seed(draw)
    for parameter in layer.parameters():
        _draw(parameter, generator, 0.5)
    for router in layer.routers:
        if router.bias is not None:
            _draw(router.bias, generator, 0.05)
    return layer


@dataclass(frozen=True)
class _Rows:
    """What a layer is given: rows, and what a router may know of their tokens."""

    x_TD: Tensor
    token_T: Tensor
    source_T: Tensor

    @staticmethod
    def drawn(num_tokens: int, seed: int) -> _Rows:
        generator = torch.Generator().manual_seed(seed)
        return _Rows(
            torch.randn(num_tokens, DIM, generator=generator, dtype=torch.float64),
            torch.randint(0, VOCABULARY, (num_tokens,), generator=generator),
            torch.randint(0, 3, (num_tokens,), generator=generator),
        )

    def changed(self, where_T: Tensor, seed: int) -> _Rows:
        """Other rows, tokens and sources at the marked places."""
        other = _Rows.drawn(where_T.numel(), seed)
        return _Rows(
            torch.where(where_T[:, None], other.x_TD, self.x_TD),
            torch.where(where_T, other.token_T, self.token_T),
            torch.where(where_T, other.source_T, self.source_T),
        )

    def context(self, training: bool) -> LayerContext:
        num_tokens = self.token_T.numel()
        position_T = torch.arange(num_tokens) % LENGTH
        return LayerContext(
            layer=0,
            batch_shape=(num_tokens // LENGTH, LENGTH),
            token_id_T=torch.arange(num_tokens),
            token_T=self.token_T,
            position_T=position_T,
            document_T=torch.zeros_like(position_T),
            source_T=self.source_T,
            forward=ForwardContext(step=1, training=training),
        )


@torch.no_grad()
def _settle(layer: MoELayer, sequences: int, draw: int) -> None:
    """Give what routers keep between steps the values of a step, so that evaluation has cutoffs to go by."""
    rows = _Rows.drawn(sequences * LENGTH, 1000 + draw)
    for router, stats in zip(layer.routers, layer(rows.x_TD, rows.context(training=True))[1]):
        count_E = stats.count_E.double()
        router.after_step(count_E, count_E * 0 if stats.observed_E is None else stats.observed_E, layer.balance)


@torch.no_grad()
def _measure_layer(layer: MoELayer, sequences: int, training: bool, draw: int) -> LooksAt:
    rows = _Rows.drawn(sequences * LENGTH, draw)
    before_TD = layer(rows.x_TD, rows.context(training))[0]
    place_T = torch.arange(sequences * LENGTH)
    sequence, middle = draw % sequences, LENGTH // 2
    mine_T, early_T = place_T // LENGTH == sequence, place_T % LENGTH < middle
    seen = LooksAt.itself
    for what, changed_T, watched_T in (
        (LooksAt.future, mine_T & ~early_T, mine_T & early_T),
        (LooksAt.past, mine_T & early_T, mine_T & ~early_T),
        (LooksAt.others, ~mine_T, mine_T),
    ):
        other = rows.changed(changed_T, 500 + draw)
        after_TD = layer(other.x_TD, other.context(training))[0]
        if float((after_TD - before_TD)[watched_T].abs().max()) > ROUNDING:
            seen |= what
    return seen


@torch.no_grad()
def _measure_model(architecture: Architecture, draw: int) -> LooksAt:
    """Whether logits of a text in evaluation depend on what follows."""
    small = Architecture(
        model=replace(
            architecture.model, dim=DIM * architecture.attention.num_heads, num_layers=2, first_dense_layers=0
        ),
        attention=architecture.attention,
        moe=replace(architecture.moe, expert_dim=8),
        router=architecture.router,
        balance=architecture.balance,
        vocab_size=VOCABULARY,
    )
    model = Transformer(small).double().eval()
    generator = torch.Generator().manual_seed(draw)
    for parameter in model.parameters():
        _draw(parameter, generator, 0.3)
    text, middle = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator), LENGTH // 2
    text[1, :middle] = text[0, :middle]
    logits = [model(_one_text(text_S), ForwardContext(training=False))[0][0, :middle] for text_S in text]
    return LooksAt.future if float((logits[0] - logits[1]).abs().max()) > ROUNDING else LooksAt.itself


def _one_text(text_S: Tensor) -> TokenBatch:
    token_BS, zero_B = text_S[None], torch.zeros(1, dtype=torch.int64)
    return TokenBatch(
        token_BS=token_BS,
        target_BS=token_BS,
        position_BS=torch.arange(LENGTH)[None],
        document_BS=torch.zeros_like(token_BS),
        sequence_B=zero_B,
        source_B=zero_B,
        document_lengths=((LENGTH,),),
        num_targets=LENGTH,
        num_valid=LENGTH,
    )

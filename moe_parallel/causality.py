"""Which other tokens a token's experts and output depend on: measured by changing them, compared with what is declared.

Three changes, each to one sequence of a batch or to all others: what follows a place, what precedes it, all other
sequences. Tokens that were not changed are watched: their experts, weights and output must not move, but for what is
declared. In evaluation a text is also cut off and taken out of its batch, as in generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_data.batch import IGNORE, TokenBatch
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.dispatch.local import LocalDispatcher
from moe_parallel.moe.experts import Ticket
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routers.router import BatchShape, LooksAt
from moe_parallel.moe.routing import ForwardContext, LayerContext, Routing

DIM, EXPERT_DIM, VOCABULARY = 16, 4, 13
LENGTHS, MOST_SEQUENCES = (12, 24, 48, 96), 1024
DRAWS = 12
"""Times that texts are drawn and the router's state moves on: what is looked at may be so by chance or seldom."""
ROUNDING = 1e-10
"""Relative to the largest value. In float64 other sums are rounded to 1e-15; another expert or weight moves by 1e-2."""

Run = Callable[["Texts", ForwardContext], Tensor]
"""Texts -> (B, S, X): all that is watched of each token."""


@dataclass(frozen=True)
class Finding:
    """One policy of one layer or model."""

    what: str
    declared: LooksAt
    measured: LooksAt
    allowed: LooksAt
    """What it may look at whatever it declares."""
    trouble: str = ""
    """Why nothing could be measured."""

    @property
    def is_fine(self) -> bool:
        """Nothing was seen that is not declared, or not allowed."""
        return not self.trouble and self.measured & ~(self.declared & self.allowed) == LooksAt.itself

    @property
    def verdict(self) -> str:
        """In words."""
        if self.trouble:
            return self.trouble
        if self.measured & ~self.allowed:
            return "LOOKS AT THE FUTURE IN EVALUATION"
        return "fine" if self.is_fine else "LOOKS AT MORE THAN IT DECLARES"


class CannotMeasureError(Exception):
    """A token's output is not a function of what it is given."""


def probe(architecture: Architecture, draws: int = DRAWS) -> list[Finding]:
    """Measure a layer and a model of these options, with their numbers of experts but of small width.

    Raises:
        ValueError: the model has no experts, or no batch suits the router.
    """
    if architecture.num_moe_layers == 0:
        raise ValueError("the model has no mixture-of-experts layer; lower model.first_dense_layers")
    sequences, length = _batch_for(architecture)
    small = _small(architecture)
    layer = MoELayer(DIM, small.moe, small.router, small.balance, 0)
    model = Transformer(small)
    findings = []
    for what, module, run, layers, visible in (
        ("layer", layer, _run_layer(layer), [layer], LooksAt.itself),
        ("model", model, _run_model(model), [block.ffn for block in model.blocks], LooksAt.past),  # by attention
    ):
        module.double()
        _draw_weights(module, torch.Generator().manual_seed(0))
        seen = _measure(run, [part for part in layers if isinstance(part, MoELayer)], sequences, length, draws)
        for training, (measured, trouble) in seen.items():
            policy = "training" if training else "evaluation"
            allowed = LooksAt.past | LooksAt.others | (LooksAt.future if training else LooksAt.itself)
            declared = layer.looks_at(training) | visible
            findings.append(Finding(f"{what}, {policy}", declared, measured, allowed, trouble))
    return findings


def _batch_for(architecture: Architecture) -> tuple[int, int]:
    """The smallest batch that suits the router: sequences, tokens of one."""
    problem: ValueError | None = None
    for length in LENGTHS:
        for sequences in range(3, MOST_SEQUENCES + 1):
            try:
                architecture.router.check_batch(BatchShape(1, 1, sequences, length), architecture.moe.num_experts)
            except ValueError as error:
                problem = error
            else:
                return sequences, length
    raise ValueError(f"no batch of 3 to {MOST_SEQUENCES} sequences suits this router: {problem}")


def _small(architecture: Architecture) -> Architecture:
    return Architecture(
        model=ModelConfig(dim=DIM, num_layers=2),
        attention=GroupedQueryConfig(num_heads=2),
        moe=replace(architecture.moe, expert_dim=EXPERT_DIM),
        router=architecture.router,
        balance=architecture.balance,
        vocab_size=VOCABULARY,
    )


@torch.no_grad()
def _draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Numbers at which rows have a size of about 1, and routing is lively."""
    for name, part in module.named_modules():
        if isinstance(part, nn.RMSNorm):
            continue
        of_router = any(piece in ("router", "later_routers") for piece in name.split("."))
        for parameter in part.parameters(recurse=False):
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else 0.5
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * (2 * scale if of_router else scale))
        for buffer in part.buffers(recurse=False):
            buffer.zero_()


# -- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """A batch, and a row of numbers for each token for layers that are probed alone."""

    batch: TokenBatch
    row_BSD: Tensor

    @staticmethod
    def of(token_BS: Tensor, document_BS: Tensor, source_B: Tensor, sequence_B: Tensor, row_BSD: Tensor) -> Texts:
        """Positions, lengths and counts follow from the documents."""
        spans = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_BS]
        position_BS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in spans])
        valid_BS = document_BS >= 0
        batch = TokenBatch(
            token_BS=torch.where(valid_BS, token_BS, 0),
            target_BS=torch.full_like(token_BS, IGNORE),
            position_BS=position_BS,
            document_BS=document_BS,
            sequence_B=sequence_B,
            source_B=source_B,
            document_lengths=tuple(tuple(row) for row in spans),
            num_targets=0,
            num_valid=int(valid_BS.sum()),
        )
        return Texts(batch, row_BSD)

    @staticmethod
    def drawn(sequences: int, length: int, generator: torch.Generator) -> Texts:
        """Random tokens in documents of random lengths; some sequences end in padding."""
        document_BS = (torch.rand(sequences, length, generator=generator) < 0.15).cumsum(1)
        padding_B = torch.randint(0, length // 3, (sequences,), generator=generator)
        padding_B *= torch.rand(sequences, generator=generator) < 0.4
        padded_BS = torch.arange(length) >= length - padding_B[:, None]
        first = int(torch.randint(0, 1000, (), generator=generator))
        return Texts.of(
            torch.randint(0, VOCABULARY, (sequences, length), generator=generator),
            document_BS.masked_fill(padded_BS, -1),
            torch.randint(0, 3, (sequences,), generator=generator),
            first + torch.randperm(sequences, generator=generator),
            torch.randn(sequences, length, DIM, generator=generator, dtype=torch.float64),
        )

    def replaced(self, other: Texts, where_BS: Tensor) -> Texts:
        """Other tokens and rows at the marked places, and what belongs to them."""
        mine, theirs = self.batch, other.batch
        whole_B = where_BS.all(1)
        document_BS = torch.where(whole_B[:, None], theirs.document_BS, mine.document_BS)
        for b in torch.nonzero(where_BS[:, -1] & ~whole_B).flatten().tolist():  # an ending: other documents follow
            start = int(where_BS[b].to(torch.int64).argmax())
            before = int(mine.document_BS[b, start - 1])
            ending_S = theirs.document_BS[b, start:]
            moved_S = ending_S - theirs.document_BS[b, start - 1] + before
            padded_S = (ending_S < 0) | (before < 0)
            document_BS[b, start:] = torch.where(padded_S, -1, moved_S)
        return Texts.of(
            torch.where(where_BS, theirs.token_BS, mine.token_BS),
            document_BS,
            torch.where(whole_B, theirs.source_B, mine.source_B),
            torch.where(whole_B, theirs.sequence_B + 1000, mine.sequence_B),
            torch.where(where_BS[..., None], other.row_BSD, self.row_BSD),
        )

    def alone(self, sequence: int, length: int) -> Texts:
        """The beginning of one sequence without the others."""
        batch, cut = self.batch, (slice(sequence, sequence + 1), slice(length))
        number = torch.zeros(1, dtype=torch.int64)  # numbers of tokens follow from it, and do not see the length
        source_B = batch.source_B[sequence : sequence + 1]
        return Texts.of(batch.token_BS[cut], batch.document_BS[cut], source_B, number, self.row_BSD[cut])


# -- what is watched -----------------------------------------------------------------------------------------------


class _Watched(LocalDispatcher):
    """Keeps which experts each token was sent to, and with what weights."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], Ticket]:
        num_experts = routing.count_E.numel()
        expert_N = torch.arange(num_experts).repeat_interleave(routing.count_E)
        zero_TE = torch.zeros(x_TD.shape[0], num_experts, dtype=torch.float64)
        weight_N = routing.weights().double()
        for value_N in (weight_N, torch.ones_like(weight_N)):
            self.seen.append(zero_TE.index_put((routing.token_N, expert_N), value_N, accumulate=True))
        return super().dispatch(x_TD, routing, context)


def _run_layer(layer: MoELayer) -> Run:
    watched = _Watched()
    layer.dispatcher = watched
    width = layer.router.config.carry_width(layer.config.num_experts)
    handed_on = torch.randn(DIM, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(texts: Texts, forward: ForwardContext) -> Tensor:
        watched.seen.clear()
        row_TD = texts.row_BSD.flatten(0, 1)
        context = replace(forward, carry=row_TD @ handed_on if width else None)
        out_TD, all_stats = layer(row_TD, context.for_layer(0, texts.batch))
        hands_on = [stats.carry for stats in all_stats if stats.carry is not None]
        return torch.cat([out_TD, *hands_on, *watched.seen], dim=1).unflatten(0, texts.batch.token_BS.shape)

    return run


def _run_model(model: Transformer) -> Run:
    def run(texts: Texts, forward: ForwardContext) -> Tensor:
        logits_BSV: Tensor = model(texts.batch, forward)[0]
        return logits_BSV

    return run


# -- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(
    run: Run, layers: list[MoELayer], sequences: int, length: int, draws: int
) -> dict[bool, tuple[LooksAt, str]]:
    """What was seen in training (True) and in evaluation, and what kept from measuring.

    What routers keep from step to step starts as in a new model and moves on after each draw; the number of the step
    grows faster, so that rules that change with it are met.
    """
    generator = torch.Generator().manual_seed(1)
    found = dict.fromkeys((True, False), (LooksAt.itself, ""))
    for draw in range(draws):
        texts, other = (Texts.drawn(sequences, length, generator) for _ in range(2))
        for training, (seen, trouble) in found.items():
            no_padding = not texts.batch.has_padding
            forward = ForwardContext(step=2**draw - 1, training=training, seed=draw, no_padding=no_padding)
            if not trouble:
                try:
                    found[training] = (seen | _looks_at(run, texts, other, forward, layers, generator), "")
                except CannotMeasureError as error:
                    found[training] = (seen, str(error))
        _settle(layers, texts, draw, generator)
    return found


def _looks_at(
    run: Run, texts: Texts, other: Texts, forward: ForwardContext, layers: list[MoELayer], generator: torch.Generator
) -> LooksAt:
    shape = texts.batch.token_BS.shape
    valid_B = (texts.batch.document_BS >= 0).sum(1)
    sequence = int(torch.randint(0, shape[0], (), generator=generator))
    place = int(torch.randint(1, int(valid_B[sequence]), (), generator=generator))
    before = run(texts, forward)
    if not before.isfinite().all():
        raise CannotMeasureError("weights or outputs are not finite")
    if not torch.equal(before, run(texts, forward)):
        raise CannotMeasureError("A SECOND PASS DIFFERS: draw by context.random, write nothing in forward")
    mine_BS = (torch.arange(shape[0]) == sequence)[:, None].expand(shape)
    late_BS = (torch.arange(shape[1]) >= place).expand(shape)
    seen = LooksAt.itself
    for flag, changed_BS, watched_BS in (
        (LooksAt.future, mine_BS & late_BS, mine_BS & ~late_BS),
        (LooksAt.past, mine_BS & ~late_BS, mine_BS & late_BS),
        (LooksAt.others, ~mine_BS, mine_BS),
    ):
        changed = texts.replaced(other, changed_BS)
        watched_BS = watched_BS & (texts.batch.document_BS >= 0)
        context = replace(forward, no_padding=not changed.batch.has_padding)
        if _differ(before[watched_BS], run(changed, context)[watched_BS]):
            seen |= flag
    # Experts that are dealt out in turn, for benchmarks, suit no single text.
    if not forward.training and not any(layer.router.config.forced_balance for layer in layers):
        whole, part = (run(texts.alone(sequence, end), forward)[0] for end in (shape[1], place))
        if _differ(whole[:place], part):
            seen |= LooksAt.future
    return seen


def _differ(a: Tensor, b: Tensor) -> bool:
    return not bool(((a - b).abs() <= ROUNDING * (1 + a.abs().max())).all())  # also where b is not a number


def _settle(layers: list[MoELayer], texts: Texts, draw: int, generator: torch.Generator) -> None:
    """One step of what routers keep, and lively biases: an expert's is near the differences between scores."""
    forward = ForwardContext(step=2**draw - 1, seed=draw)
    for layer in layers:
        _, all_stats = layer(texts.row_BSD.flatten(0, 1), forward.for_layer(layer.layer, texts.batch))
        for router, stats in zip(layer.routers, all_stats):
            count_E = stats.count_E.double()
            observed_E = torch.zeros_like(count_E) if stats.observed_E is None else stats.observed_E
            router.after_step(count_E, observed_E, layer.balance)
            if router.bias is not None:
                router.bias.copy_(torch.randn(router.bias.shape, generator=generator) * 0.2)

"""The table of topologies, and the two sides that are compared: an engine on many ranks, one plain process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_data.batch import TokenBatch
from moe_kernels.hashing import hash_key
from moe_parallel.engines.engine import Engine
from moe_parallel.engines.native import NativeEngine, moe_layers
from moe_parallel.mesh import Compile, ParallelConfig, ParallelMesh, PipelineSchedule, Recompute, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.initialize import InitConfig, fill_normal, init_weights
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig, GlobalEstimator
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routing import ForwardContext, LayerStats
from moe_parallel.optim import OptimConfig
from moe_parallel.options import ROUTERS
from tests.batches import join_batches, make_batch, plain_loss_sum
from tests.model.mtp_oracle import losses_and_stats

SEQUENCE_TOKENS, VOCABULARY, SEED = 12, 37, 5
STEPS = 2  # the second step uses what the first one left: bias, look-ahead counts, optimizer state
OPTIM = OptimConfig(learning_rate=1e-2, epsilon=1e-4, warmup_steps=0, max_gradient_norm=0.5)
"""A large epsilon, so that rounding of gradients that are really zero is not blown up into updates."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    world: int
    ep: int = 1
    shard: int | None = None
    tp: int = 1
    cp: int = 1
    pp: int = 1
    schedule: str = "one_f_one_b"
    """Of the pipeline, as the two after it."""
    stages_per_rank: int | None = None
    stage_layers: list[int] | None = None
    reshard_after_forward: bool = True
    recompute: str = "none"
    micro_batches: int = 1
    rows: int = 1
    """Sequences of one micro-batch of one rank."""
    num_experts: int = 4
    kind: str = "token_choice"
    """Of the router."""
    router: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    dispatch: DispatchConfig = field(default_factory=AllToAllConfig)
    latent_attention: bool = False
    attention: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 3
    """The first of them is dense."""
    tied: bool = False
    mtp_layers: int = 0
    whole_rows: bool = False
    """No padding at all."""
    idle_rank: bool = False
    """The last rank gets only padding."""
    starved_rank: bool = False
    """Routing sends every token to the experts of the first rank."""
    dtype: str = "float64"
    compile: str = "none"
    frozen: list[str] = field(default_factory=list)
    """Patterns of names, as in `optim`."""
    router_only_steps: int = 0

    @property
    def optim(self) -> OptimConfig:
        """What all cases share, but for what learns."""
        return replace(OPTIM, frozen=self.frozen, router_only_steps=self.router_only_steps)

    @property
    def batch_ranks(self) -> int:
        """Groups of ranks that have rows of their own."""
        return self.world // (self.pp * self.tp * self.cp)

    @property
    def per_rank_pool(self) -> bool:
        """Whether results depend on how the batch is cut into micro-batches of single ranks."""
        return "capacity_factor" in self.moe or "micro_batch_coefficient" in self.balance

    def architecture(self) -> Architecture:
        """A small model with everything switched on that the case asks for."""
        attention: Any = GroupedQueryConfig(**{"num_heads": 4, "num_kv_heads": 2, **self.attention})
        if self.latent_attention:
            sizes = {"num_heads": 2, "q_rank": 8, "kv_rank": 8, "nope_head_dim": 4, "rope_head_dim": 4}
            attention = LatentConfig(**{**sizes, "value_head_dim": 4, **self.attention})
        return Architecture(
            model=ModelConfig(
                dim=16,
                num_layers=self.num_layers,
                first_dense_layers=1,
                ffn_dim=24,
                tie_embeddings=self.tied,
                mtp_layers=self.mtp_layers,
            ),
            attention=attention,
            moe=MoEConfig(num_experts=self.num_experts, expert_dim=8, **self.moe),
            router=ROUTERS[self.kind](**{"top_k": 2, **self.router}),
            balance=BalanceConfig(**self.balance),
            vocab_size=VOCABULARY,
        )

    def batch(self, step: int, micro_batch: int, rank: int) -> TokenBatch:
        """Documents of uneven lengths; the same rows whoever computes them."""
        first = ((step * self.micro_batches + micro_batch) * self.batch_ranks + rank) * self.rows
        if self.idle_rank and rank == self.batch_ranks - 1:
            return make_batch([[] for _ in range(self.rows)], SEQUENCE_TOKENS, VOCABULARY, first)
        plans = ([5, 7], [12], [6, 6]) if self.whole_rows else ([5, 7], [12], [3, 4, 2], [9], [6, 6])
        return make_batch(
            [plans[(first + row) % len(plans)] for row in range(self.rows)], SEQUENCE_TOKENS, VOCABULARY, first
        )


@dataclass
class Outcome:
    """What one step gave, as plain tensors."""

    loss: float
    balance: float
    norm: float
    gradients: dict[str, Tensor]
    counts: Tensor
    dropped: float
    buffers: list[Tensor]
    """What routers keep from step to step."""
    further: list[float] = field(default_factory=list)
    """Losses of multi-token prediction, as sums."""


def router_factor(name: str) -> float:
    """What a weight of a router is multiplied with to make routing lively."""
    # Residual logits would grow from layer to layer; rows of domains are products of two weights.
    return {"residual": 1.0, "gate_up": 7.0, "project": 7.0}.get(name.rpartition(".")[2], 20.0)


def _prepare(model: torch.nn.Module, case: Case) -> None:
    """Weights of a size at which routing is lively; a starved rank gets no token by construction."""
    for layer in moe_layers(model):
        for router in layer.routers:
            for name, weight in router.named_parameters():
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.data.mul_(router_factor(name))
        if layer.later_scale is not None:  # it starts at 0, which would hide what it scales
            scale = layer.later_scale
            (scale.to_local() if isinstance(scale, DTensor) else scale).data.fill_(0.5)
        if layer.experts.adjugates is not None:  # likewise
            with torch.no_grad():
                fill_normal(layer.experts.adjugates.down, 0.3, hash_key(SEED, layer.layer))
        for number, name in enumerate(("gate_up_out", "down_out")):  # likewise
            if name in layer.experts.names:
                with torch.no_grad():
                    fill_normal(getattr(layer.experts, name), 0.3, hash_key(SEED, layer.layer, number))
        if case.starved_rank:
            assert layer.router.bias is not None
            half = case.num_experts // case.ep
            layer.router.bias[:half] += 100.0


def run_engine(case: Case, as_one: bool = False) -> list[Outcome]:
    """The engine on this rank, gradients gathered to full tensors.

    Args:
        as_one: one rank computes the rows of all ranks, micro-batch by micro-batch.
    """
    world = dist.get_world_size()
    parallel = ParallelConfig(recompute=Recompute(case.recompute), compile=Compile(case.compile))
    if not as_one:
        for name in ("ep", "shard", "tp", "cp", "pp", "stages_per_rank", "stage_layers", "reshard_after_forward"):
            setattr(parallel, name, getattr(case, name))
        parallel.schedule = PipelineSchedule(case.schedule)
    layout = make_layout(parallel, world, case.num_experts)
    mesh = ParallelMesh(layout, "cpu")
    compute = getattr(torch, case.dtype)
    master = torch.float64 if compute is torch.float64 else torch.float32
    dispatch = AllToAllConfig() if as_one else case.dispatch
    engine = NativeEngine(
        case.architecture(), mesh, parallel, case.optim, torch.device("cpu"), compute, master, dispatch=dispatch
    )
    engine.init_weights(InitConfig(std=0.1), SEED)
    _prepare(engine.model, case)
    outcomes = run_steps(
        engine,
        case,
        lambda: {n: _full(p.grad) for n, p in engine.model.named_parameters() if p.grad is not None},
        as_one,
    )
    return outcomes if layout.pp == 1 else _of_all_stages(outcomes, [layer.layer for layer in engine.layers])


def _of_all_stages(mine: list[Outcome], layers: list[int]) -> list[Outcome]:
    """Gradients and buffers of all layers; a weight that two stages have must have the same gradient on both."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (layers, mine))
    for step, outcome in enumerate(mine):
        gradients: dict[str, Tensor] = {}
        buffers: dict[int, list[Tensor]] = {}
        for their_layers, outcomes in everyone:
            theirs = outcomes[step]
            assert (theirs.loss, theirs.balance, theirs.norm) == (outcome.loss, outcome.balance, outcome.norm)
            for name, gradient in theirs.gradients.items():
                assert torch.equal(gradients.setdefault(name, gradient), gradient), f"ranks differ in {name}"
            each = len(theirs.buffers) // max(1, len(their_layers))
            buffers |= {n: theirs.buffers[i * each : (i + 1) * each] for i, n in enumerate(their_layers)}
        outcome.gradients = gradients
        outcome.buffers = [buffer for layer in sorted(buffers) for buffer in buffers[layer]]
    return mine


def run_steps(
    engine: Engine, case: Case, gradients_of: Callable[[], dict[str, Tensor]], as_one: bool = False
) -> list[Outcome]:
    """Train an engine that has its weights for two steps; `gradients_of` gathers those of whole parameters."""
    layout, outcomes = engine.layout, []
    for step in range(STEPS):
        mine = range(case.batch_ranks) if as_one else [layout.batch_rank(dist.get_rank())]
        batches = [join_batches([case.batch(step, m, r) for r in mine]) for m in range(case.micro_batches)]
        sizes = torch.tensor([sum(b.num_targets for b in batches), sum(b.num_valid for b in batches)])
        dist.all_reduce(sizes)
        sizes //= layout.ranks // layout.batch_ranks
        sums, _ = engine.forward_backward(batches, step, int(sizes[0]), int(sizes[1]))
        totals = sums.summed(engine.group)
        norm = engine.gradient_norm()
        gradients = gradients_of()
        engine.step(OPTIM.learning_rate, norm)
        engine.update_routers(totals)
        outcomes.append(
            Outcome(
                loss=float(totals.cross_entropy) / int(sizes[0]),
                balance=float(totals.balance) / int(sizes[1]),
                norm=float(norm),
                gradients=gradients,
                counts=totals.count_LE,
                dropped=float(totals.dropped_L.sum()),
                buffers=_buffers(engine.layers),
                further=totals.mtp_cross_entropy_M.tolist(),
            )
        )
    return outcomes


def _buffers(layers: list[MoELayer]) -> list[Tensor]:
    return [value.clone() for layer in layers for router in layer.routers for value in router.buffers()]


def _full(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def run_reference(case: Case) -> list[Outcome]:
    """One process, no engine, no sharding: forward, a loss written out, backward, AdamW."""
    compute = getattr(torch, case.dtype)
    model = Transformer(case.architecture()).to(torch.float64 if compute is torch.float64 else torch.float32)
    init_weights(model, InitConfig(std=0.1), SEED)
    _prepare(model, case)
    layers = moe_layers(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(fnmatch(name, pattern) for pattern in case.frozen)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIM.learning_rate, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.epsilon,
    )  # fmt: skip
    iterations = case.architecture().moe.chain.iterations
    num_layers = case.architecture().model.num_layers + case.mtp_layers
    previous_LIE = torch.zeros(num_layers, iterations, case.num_experts, dtype=torch.float64)
    outcomes = []
    for step in range(STEPS):
        outcome, previous_LIE, observed_LE = _reference_step(case, model, step, previous_LIE)
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        rows = [(layer, router) for layer in layers for router in layer.routers]
        for layer, router in dict.fromkeys(rows):
            mine = [row for row, pair in enumerate(rows) if pair == (layer, router)]
            router.after_step(outcome.counts[mine].sum(0), observed_LE[mine].mean(0), layer.balance)
        outcome.buffers = _buffers(layers)
        outcomes.append(outcome)
    return outcomes


def _reference_step(case: Case, model: Transformer, step: int, previous_LIE: Tensor) -> tuple[Outcome, Tensor, Tensor]:
    grid = [[case.batch(step, m, r) for r in range(case.batch_ranks)] for m in range(case.micro_batches)]
    groups = [[b] for row in grid for b in row] if case.per_rank_pool else grid
    batches = [join_batches(group) for group in groups]
    num_targets, num_valid = sum(b.num_targets for b in batches), sum(b.num_valid for b in batches)
    exact = case.balance.get("global_estimator") is GlobalEstimator.exact
    total_LIE = torch.zeros_like(previous_LIE)
    if exact:
        with torch.no_grad():
            for batch in batches:
                for s in _reference_losses(model, batch, ForwardContext(step=step))[1]:
                    total_LIE[s.layer, s.iteration] += s.step_count_E
    seen_LIE = torch.zeros_like(previous_LIE)
    loss = balance = dropped = torch.zeros((), dtype=torch.float64)
    passes = len(moe_layers(model)) * previous_LIE.shape[1]
    counts = torch.zeros(passes, case.num_experts, dtype=torch.float64)
    further = torch.zeros(case.mtp_layers, dtype=torch.float64)
    observed_LE = torch.zeros_like(counts)
    for index, batch in enumerate(batches):
        left = (len(batches) - index - 1) / len(batches)
        prior_LIE = total_LIE if exact else seen_LIE + left * previous_LIE
        context = ForwardContext(step=step, prior_count_LIE=prior_LIE, prior_is_total=exact)
        (cross_entropy, *more), stats = _reference_losses(model, batch, context)
        extra = sum((s.balance for s in stats), torch.zeros(()))
        weighted = sum(more) * 0.3 / max(1, len(more))
        ((cross_entropy + weighted) / num_targets + extra / num_valid).backward()
        further += torch.tensor([value.item() for value in more], dtype=torch.float64)
        loss, balance = loss + cross_entropy.detach(), balance + extra.detach()
        dropped = dropped + sum(s.dropped for s in stats)
        counts += torch.stack([s.count_E for s in stats]) if stats else 0
        seen_LIE = seen_LIE.clone()
        for row, s in enumerate(stats):
            if s.step_count_E is not None:
                seen_LIE[s.layer, s.iteration] += s.step_count_E
            if s.observed_E is not None:
                observed_LE[row] += s.observed_E / len(batches)
    for name, parameter in model.named_parameters():
        if step < case.router_only_steps and "router" not in name:
            parameter.grad = None
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    outcome = Outcome(
        float(loss) / num_targets, float(balance) / num_valid, float(norm), gradients, counts, float(dropped), []
    )
    outcome.further = further.tolist()
    return outcome, seen_LIE, observed_LE


def _reference_losses(
    model: Transformer, batch: TokenBatch, context: ForwardContext
) -> tuple[list[Tensor], list[LayerStats]]:
    """Of the next token, then of multi-token prediction, written out where there is any."""
    if model.mtp:
        return losses_and_stats(model, batch, context)
    logits, stats = model(batch, context)
    return [plain_loss_sum(logits, batch)], stats

"""The table of topologies, and the two sides that are compared: an engine on many ranks, one plain process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_data.batch import TokenBatch
from moe_parallel.engines.native import NativeEngine, moe_layers
from moe_parallel.mesh import ParallelConfig, ParallelMesh, Recompute, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.loss import token_loss_sum
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.balance import BalanceConfig, GlobalEstimator, bias_step
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import RouterConfig
from moe_parallel.moe.routing import ForwardContext
from moe_parallel.optim import OptimConfig
from tests.batches import join_batches, make_batch

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
    recompute: str = "none"
    micro_batches: int = 1
    rows: int = 1
    """Sequences of one micro-batch of one rank."""
    num_experts: int = 4
    router: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    latent_attention: bool = False
    tied: bool = False
    idle_rank: bool = False
    """The last rank gets only padding."""
    starved_rank: bool = False
    """Routing sends every token to the experts of the first rank."""
    dtype: str = "float64"

    @property
    def per_rank_pool(self) -> bool:
        """Whether results depend on how the batch is cut into micro-batches of single ranks."""
        return "capacity_factor" in self.moe or "micro_batch_coefficient" in self.balance

    def architecture(self) -> Architecture:
        """A small model with everything switched on that the case asks for."""
        attention: Any = GroupedQueryConfig(num_heads=4, num_kv_heads=2)
        if self.latent_attention:
            attention = LatentConfig(
                num_heads=2, q_rank=8, kv_rank=8, nope_head_dim=4, rope_head_dim=4, value_head_dim=4
            )
        return Architecture(
            model=ModelConfig(dim=16, num_layers=3, first_dense_layers=1, ffn_dim=24, tie_embeddings=self.tied),
            attention=attention,
            moe=MoEConfig(num_experts=self.num_experts, expert_dim=8, **self.moe),
            router=RouterConfig(**{"top_k": 2, **self.router}),
            balance=BalanceConfig(**self.balance),
            vocab_size=VOCABULARY,
        )

    def batch(self, step: int, micro_batch: int, rank: int) -> TokenBatch:
        """Documents of uneven lengths; the same rows whoever computes them."""
        first = ((step * self.micro_batches + micro_batch) * self.world + rank) * self.rows
        if self.idle_rank and rank == self.world - 1:
            return make_batch([[] for _ in range(self.rows)], SEQUENCE_TOKENS, VOCABULARY, first)
        plans = ([5, 7], [12], [3, 4, 2], [9], [6, 6])
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
    biases: list[Tensor]


def _prepare(model: torch.nn.Module, case: Case) -> None:
    """Weights of a size at which routing is lively; a starved rank gets no token by construction."""
    for layer in moe_layers(model):
        weight = layer.router.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        local.data.mul_(20.0)
        if case.starved_rank:
            assert layer.router.bias is not None
            half = case.num_experts // case.ep
            layer.router.bias[:half] += 100.0


def run_engine(case: Case, as_one: bool = False) -> list[Outcome]:
    """The engine on this rank, gradients gathered to full tensors.

    Args:
        as_one: one rank computes the rows of all ranks, micro-batch by micro-batch.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    ep, shard = (1, None) if as_one else (case.ep, case.shard)
    parallel = ParallelConfig(ep=ep, shard=shard, recompute=Recompute(case.recompute))
    layout = make_layout(parallel, world, case.num_experts)
    mesh = ParallelMesh(layout, "cpu")
    compute = getattr(torch, case.dtype)
    master = torch.float64 if compute is torch.float64 else torch.float32
    engine = NativeEngine(case.architecture(), mesh, parallel, OPTIM, torch.device("cpu"), compute, master)
    engine.init_weights(InitConfig(std=0.1), SEED)
    _prepare(engine.model, case)
    outcomes = []
    for step in range(STEPS):
        mine = range(case.world) if as_one else [rank]
        batches = [join_batches([case.batch(step, m, r) for r in mine]) for m in range(case.micro_batches)]
        sizes = torch.tensor([sum(b.num_targets for b in batches), sum(b.num_valid for b in batches)])
        dist.all_reduce(sizes)
        sums, _ = engine.forward_backward(batches, step, int(sizes[0]), int(sizes[1]))
        totals = sums.summed(engine.group)
        norm = engine.gradient_norm()
        gradients = {n: _full(p.grad) for n, p in engine.model.named_parameters() if p.grad is not None}
        engine.step(OPTIM.learning_rate, norm)
        engine.update_router_bias(totals.count_LE)
        outcomes.append(
            Outcome(
                loss=float(totals.cross_entropy) / int(sizes[0]),
                balance=float(totals.balance) / int(sizes[1]),
                norm=float(norm),
                gradients=gradients,
                counts=totals.count_LE,
                dropped=float(totals.dropped_L.sum()),
                biases=[layer.router.bias.clone() for layer in engine.layers if layer.router.bias is not None],
            )
        )
    return outcomes


def _full(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def run_reference(case: Case) -> list[Outcome]:
    """One process, no engine, no sharding: forward, a loss written out, backward, AdamW."""
    compute = getattr(torch, case.dtype)
    model = Transformer(case.architecture()).to(torch.float64 if compute is torch.float64 else torch.float32)
    init_weights(model, InitConfig(std=0.1), SEED)
    _prepare(model, case)
    layers = moe_layers(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIM.learning_rate, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.epsilon,
    )  # fmt: skip
    previous_LE = torch.zeros(3, case.num_experts, dtype=torch.float64)
    outcomes = []
    for step in range(STEPS):
        outcome, previous_LE = _reference_step(case, model, step, previous_LE)
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        for layer, count_E in zip(layers, outcome.counts):
            if layer.router.bias is not None:
                layer.router.bias.copy_(bias_step(layer.router.bias, count_E, case.balance["bias_rate"]))
        outcome.biases = [layer.router.bias.clone() for layer in layers if layer.router.bias is not None]
        outcomes.append(outcome)
    return outcomes


def _reference_step(case: Case, model: Transformer, step: int, previous_LE: Tensor) -> tuple[Outcome, Tensor]:
    grid = [[case.batch(step, m, r) for r in range(case.world)] for m in range(case.micro_batches)]
    groups = [[b] for row in grid for b in row] if case.per_rank_pool else grid
    batches = [join_batches(group) for group in groups]
    num_targets, num_valid = sum(b.num_targets for b in batches), sum(b.num_valid for b in batches)
    exact = case.balance.get("global_estimator") is GlobalEstimator.exact
    total_LE = torch.zeros_like(previous_LE)
    if exact:
        with torch.no_grad():
            for batch in batches:
                for s in model(batch, ForwardContext(step=step))[1]:
                    total_LE[s.layer] += s.step_count_E
    seen_LE = torch.zeros_like(previous_LE)
    loss = balance = dropped = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, case.num_experts, dtype=torch.float64)
    for index, batch in enumerate(batches):
        left = (len(batches) - index - 1) / len(batches)
        prior_LE = total_LE if exact else seen_LE + left * previous_LE
        context = ForwardContext(step=step, prior_count_LE=prior_LE, prior_is_total=exact)
        logits, stats = model(batch, context)
        cross_entropy, extra = token_loss_sum(logits, batch.target_BS), sum(s.balance for s in stats)
        (cross_entropy / num_targets + extra / num_valid).backward()
        loss, balance = loss + cross_entropy.detach(), balance + extra.detach()
        dropped = dropped + sum(s.dropped for s in stats)
        counts += torch.stack([s.count_E for s in stats])
        seen_LE = seen_LE.clone()
        for s in stats:
            if s.step_count_E is not None:
                seen_LE[s.layer] += s.step_count_E
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    outcome = Outcome(
        float(loss) / num_targets, float(balance) / num_valid, float(norm), gradients, counts, float(dropped), []
    )
    return outcome, seen_LE

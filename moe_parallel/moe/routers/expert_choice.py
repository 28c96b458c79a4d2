"""Expert choice: each expert takes the tokens it scores highest (arXiv 2202.09368), and its causal repair by cutoffs.

A choice among the tokens of a pool looks at later tokens and cannot generate text. So cutoffs are kept: for every
expert the running mean of the lowest score that it took. With them a token's experts depend on that token alone:
always in evaluation and generation, and in training with `training=threshold` (arXiv 2603.11535).
"""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.balance import BalanceConfig, Level
from moe_parallel.moe.pool import best_at_most, best_in_pools, best_over_ranks
from moe_parallel.moe.routers.router import BatchShape, LooksAt, Routed, Router, RouterConfig, linear_logits
from moe_parallel.moe.routers.token_choice import Score
from moe_parallel.moe.routing import Choice, LayerContext


class Policy(str, Enum):
    pool = "pool"
    """Experts choose among the tokens of a pool: perfect balance, but the choice looks at other tokens."""
    threshold = "threshold"
    """A token takes every expert whose cutoff it reaches; cutoffs come from earlier steps. Causal."""


class Pool(str, Enum):
    micro_batch = "micro_batch"
    """`pool_sequences` neighboring sequences of one rank's micro-batch. Loads are equal on every rank."""
    data_parallel = "data_parallel"
    """One micro-batch of all ranks, `pool_sequences` in all."""
    global_batch = "global_batch"
    """The whole global batch; needs one micro-batch a step."""
    position = "position"
    """Tokens at the same place of all sequences of a micro-batch of all ranks: not a token's own future."""


@dataclass(kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    score: Score = Score.softmax
    """How logits become scores: over experts, not over tokens."""
    training: Policy = Policy.pool
    """How experts are chosen in training. Evaluation and generation always use the cutoffs."""
    pool: Pool = Pool.position
    """Which tokens an expert compares; also those that cutoffs are taken from (for position all of a micro-batch)."""
    pool_sequences: int | None = None
    """Sequences of a pool, stated so that results do not change with the number of ranks. null is the whole global
    batch, in one micro-batch; pools of a micro-batch need a number."""
    allow_leak: bool = False
    """Train with pools that hold a token's own future. Its loss is not that of a language model."""
    max_experts_per_token: int | None = None
    """Limit on the experts of a token, by an entropy-regularized assignment; needs pool=micro_batch. null has none."""
    warmup_steps: int = 0
    """Steps that training=threshold chooses from pools before its cutoffs are good."""
    cutoff_decay: float = 0.99
    """How much of the running cutoffs a step keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cutoff_decay < 1:
            raise ValueError(f"router.cutoff_decay={self.cutoff_decay} must lie in 0..1, 1 excluded")
        if self.pool_sequences is not None and self.pool_sequences < 1:
            raise ValueError(f"router.pool_sequences={self.pool_sequences} must be at least 1, or null")
        if self.warmup_steps < 0:
            raise ValueError(f"router.warmup_steps={self.warmup_steps} must not be negative")
        if self.warmup_steps and self.training is Policy.pool:
            raise ValueError(f"router.warmup_steps={self.warmup_steps} belongs to router.training=threshold; set 0")
        pools = self.training is Policy.pool or self.warmup_steps > 0
        self._check_leak(pools)
        if self.max_experts_per_token is not None:
            self._check_cap(self.max_experts_per_token, pools)

    def _check_leak(self, pools: bool) -> None:
        if pools and self.pool is not Pool.position and not self.allow_leak:
            raise ValueError(
                f"router.pool={self.pool.value} lets a token's experts depend on its own future, which a language "
                "model must not see; set router.training=threshold (without router.warmup_steps), "
                "router.pool=position, or router.allow_leak=true to train with the leak all the same"
            )

    def _check_cap(self, most: int, pools: bool) -> None:
        if most < self.top_k:
            raise ValueError(
                f"router.max_experts_per_token={most} is below router.top_k={self.top_k}: the "
                "experts could not fill their places"
            )
        if self.pool is not Pool.micro_batch or not pools:
            raise ValueError(
                f"router.max_experts_per_token={most} needs router.training=pool and router.pool=micro_batch, not "
                f"{self.training.value} and {self.pool.value}: the assignment is solved on one rank"
            )

    def build(self, dim: int, num_experts: int, with_bias: bool) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(dim, num_experts, self)

    def check_balance(self, balance: BalanceConfig) -> None:
        super().check_balance(balance)
        self.check_no_losses(balance, "with expert choice every expert takes equally many tokens")

    def check_capacity(self, factor: float) -> None:
        raise ValueError(
            f"moe.capacity_factor={factor} does not apply to expert choice, which has room for "
            f"router.top_k={self.top_k} by itself; set moe.capacity_factor=null"
        )

    def check_batch(self, shape: BatchShape, num_experts: int) -> None:
        super().check_batch(shape, num_experts)
        if shape.parts > 1 and self.max_experts_per_token is not None:
            raise ValueError(
                f"router.max_experts_per_token={self.max_experts_per_token} is solved on one rank, but parallel.cp * "
                f"parallel.tp={shape.parts} ranks share each sequence; set parallel.cp=1 parallel.tp=1"
            )
        rows, together = shape.micro_batch_sequences, shape.ranks * shape.micro_batch_sequences
        pool, stated = f"router.pool={self.pool.value}", self.pool_sequences
        if self.pool is Pool.micro_batch:
            if stated is None or rows % stated != 0:
                raise ValueError(
                    f"{pool} with router.pool_sequences={'null' if stated is None else stated} does not divide the "
                    f"{rows} sequences of a rank's micro-batch; legal values: "
                    f"{[d for d in range(1, rows + 1) if rows % d == 0]}"
                )
        elif stated is None or self.pool is Pool.global_batch:
            if shape.micro_batches > 1 or stated not in (None, together):
                raise ValueError(
                    f"{pool} takes the whole global batch in one micro-batch, but a step has {shape.micro_batches} of "
                    f"{together} sequences; set train.micro_batch_sequences=null, or "
                    f"router.pool=data_parallel router.pool_sequences={together}"
                )
        elif stated != together:
            raise ValueError(
                f"{pool} with router.pool_sequences={stated}: a micro-batch of all {shape.ranks} ranks has {together} "
                f"sequences; set train.micro_batch_sequences={max(1, stated // shape.ranks)}, or state {together}"
            )
        tokens = together if self.pool is Pool.position else (stated or together) * shape.sequence_tokens
        if tokens * self.top_k < num_experts:
            raise ValueError(
                f"{pool} has {tokens} tokens, of which each of moe.num_experts={num_experts} experts would take "
                f"{tokens * self.top_k / num_experts:.2g}; make pools larger or router.top_k higher"
            )


class ExpertChoiceRouter(Router):
    """Scores in float32, chosen by experts from a pool or by cutoffs from the tokens."""

    config: ExpertChoiceConfig
    cutoff: Tensor
    """float32 (E): running mean of the lowest scores taken, weights not yet summing to 1."""
    cutoff_weight: Tensor
    """float32 (1): sum of those weights, 1 - decay^steps; 0 before the first step."""

    def __init__(self, dim: int, num_experts: int, config: ExpertChoiceConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=torch.float32))
        self.register_buffer("cutoff", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("cutoff_weight", torch.zeros(1, dtype=torch.float32))

    def looks_at(self, training: bool) -> LooksAt:
        config = self.config
        if not training or (config.training is Policy.threshold and config.warmup_steps == 0):
            return LooksAt.itself
        if config.pool is Pool.position:
            return LooksAt.others
        own = LooksAt.past | LooksAt.future
        return own if config.pool is Pool.micro_batch and config.pool_sequences == 1 else own | LooksAt.others

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        return linear_logits(x_TD, self.weight)

    def scores(self, logit_TE: Tensor) -> Tensor:
        return logit_TE.softmax(-1) if self.config.score is Score.softmax else logit_TE.sigmoid()

    def route(self, logit_TE: Tensor, context: LayerContext) -> Routed:
        score_TE = self.scores(logit_TE)
        observed_E: Tensor | None = None
        if self.config.forced_balance or not context.forward.training:
            choice = self.decide(score_TE, context)
        else:
            choice, observed_E = context.once("pool", lambda: self._train(score_TE.detach(), context))
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routed(
            choice=choice,
            weight=choice.take(score_TE) * self.config.route_scale,
            share_TE=share_TE,
            logits=(logit_TE,),
            levels=(Level(share_TE),),
            observed_E=observed_E,
        )

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        """By the cutoffs. Before the first step, when there are none, a token takes its best experts."""
        cutoff_E = self.cutoff / self.cutoff_weight.clamp(min=1e-30)
        best_TE = torch.zeros_like(score_TE, dtype=torch.bool)
        best_TE.scatter_(1, score_TE.topk(self.config.top_k, dim=-1).indices, True)
        return _listed(torch.where(self.cutoff_weight > 0, score_TE >= cutoff_E, best_TE))

    def _train(self, score_TE: Tensor, context: LayerContext) -> tuple[Choice, Tensor]:
        config, forward, (num_sequences, length) = self.config, context.forward, context.batch_shape
        parts = forward.sequence.count
        local = config.pool is Pool.micro_batch and parts == 1
        if config.pool is Pool.position:
            order_PQ = torch.arange(num_sequences * length, device=score_TE.device).view(num_sequences, length).T
        else:
            size = (config.pool_sequences or num_sequences) if config.pool is Pool.micro_batch else num_sequences
            order_PQ = torch.arange(num_sequences * length, device=score_TE.device).view(-1, size * length)
        score_PQE = score_TE[order_PQ]
        valid_PQ = None if context.valid_T is None else context.valid_T[order_PQ]
        if config.max_experts_per_token is not None:
            chosen_PQE, cutoff_PE = best_at_most(score_PQE, valid_PQ, config.top_k, config.max_experts_per_token)
        elif local:
            chosen_PQE, cutoff_PE = best_in_pools(score_PQE, valid_PQ, config.top_k)
        else:
            # A pool holds the same positions of all sequences, all tokens of some sequences, or all tokens.
            ranks, rows, near = forward.rows, num_sequences, 1
            if config.pool is not Pool.position:
                ranks = forward.sequence if config.pool is Pool.micro_batch else forward.data
                rows, near = size, parts
            chosen_PQE, cutoff_PE = best_over_ranks(score_PQE, valid_PQ, config.top_k, ranks, rows=rows, parts=near)
        if config.pool is Pool.position:
            # The lowest scores of many small pools lie above that of them all: by their mean, evaluation would give
            # tokens fewer experts than training.
            whole_T = None if context.valid_T is None else context.valid_T[None]
            _, cutoff_PE = best_over_ranks(score_TE[None], whole_T, config.top_k, forward.data)
        cutoff_E = self._mean_cutoff(cutoff_PE, context)
        if config.training is Policy.threshold and forward.step >= config.warmup_steps:
            return self.select(score_TE, context), cutoff_E
        chosen_TE = torch.empty_like(score_TE, dtype=torch.bool)
        chosen_TE[order_PQ.reshape(-1)] = chosen_PQE.flatten(0, 1)
        if local and forward.no_padding and config.max_experts_per_token is None:
            pools, size = order_PQ.shape
            return _listed(chosen_TE, pools * (size * config.top_k // self.num_experts)), cutoff_E
        return _listed(chosen_TE), cutoff_E

    def _mean_cutoff(self, cutoff_PE: Tensor, context: LayerContext) -> Tensor:
        """Over the pools of which something was taken: padding alone has no lowest score, and a 0 would lower the mean.

        Pools of one rank each have their own number of those, so the mean is taken over all ranks.
        """
        sum_2E = torch.stack([cutoff_PE, cutoff_PE > 0]).double().sum(1)
        if self.config.pool is Pool.micro_batch and not context.forward.no_padding:
            sum_2E = context.forward.data.sum(sum_2E)
        return sum_2E[0] / sum_2E[1].clamp(min=1)

    @torch.no_grad()
    def after_step(self, count_E: Tensor, observed_E: Tensor, balance: BalanceConfig) -> None:
        """Move the running cutoffs by those of this step."""
        decay = self.config.cutoff_decay
        self.cutoff.mul_(decay).add_((1 - decay) * observed_E.to(self.cutoff.dtype))
        self.cutoff_weight.mul_(decay).add_(1 - decay)


def _listed(chosen_TE: Tensor, uniform_count: int | None = None) -> Choice:
    """A mask as a list of pairs, sorted by expert."""
    chosen_ET = chosen_TE.T.contiguous()
    if uniform_count is None:
        expert_N, token_N = chosen_ET.nonzero(as_tuple=True)
    else:  # the size is known: no wait for the device
        pair_N2 = torch.nonzero_static(chosen_ET, size=uniform_count * chosen_ET.shape[0])
        expert_N, token_N = pair_N2[:, 0], pair_N2[:, 1]
    return Choice(expert_N, token_N, uniform_count=uniform_count)

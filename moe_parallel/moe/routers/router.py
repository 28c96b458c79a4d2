"""What every router is: options that build it, logits, and a choice from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from enum import Flag
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.balance import BalanceConfig, Level, bias_step
from moe_parallel.moe.routing import Choice, ForwardContext, LayerContext


class LooksAt(Flag):
    """Which other tokens may change a token's experts or weights. A language model must not look at the future."""

    itself = 0
    past = 1
    """Earlier tokens of its sequence."""
    future = 2
    """Later tokens of its sequence."""
    others = 4
    """Tokens of other sequences."""

    def __str__(self) -> str:
        return " and ".join(["itself", *(str(flag.name) for flag in self)])


@plain_dataclass(frozen=True)
class BatchShape:
    """What the relations between a router and the run depend on."""

    ranks: int
    """Ranks, or groups of them, that have sequences of their own."""
    micro_batches: int
    """Micro-batches of a step."""
    micro_batch_sequences: int
    """Sequences of one on each rank."""
    sequence_tokens: int
    parts: int = 1
    """Ranks that share each sequence."""


@dataclass(kw_only=True)
class RouterConfig:
    """Options of all routers. A router's own options are a subclass that builds it."""

    top_k: int = 4
    """Experts per token, on average where a router gives tokens different numbers. Compute grows linearly with it."""
    route_scale: float = 1.0
    """Factor on the weights of the routed experts, after normalization (2.5 in DeepSeek-V3)."""
    forced_balance: bool = False
    """Benchmark and planning mode: experts are dealt out in turn, whatever the scores say; no size exchange."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.route_scale <= 0:
            raise ValueError(f"router.route_scale={self.route_scale} must be positive")

    def build(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        """The router of one layer; `with_bias` asks for a selection bias that evens out the load."""
        raise NotImplementedError

    def build_first(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        """The same for the one router of a model that nothing is handed to; see `carry_width`."""
        return self.build(dim, num_experts, with_bias)

    def num_weights(self, dim: int, num_experts: int) -> int:
        """Parameters of one router."""
        return num_experts * dim

    def num_products(self, dim: int, num_experts: int) -> int:
        """Numbers that one router multiplies every token with: its weights, or what is made of them once for all."""
        return self.num_weights(dim, num_experts)

    def carry_width(self, num_experts: int) -> int:
        """Numbers for each token that a router hands on to the next one, with gradient; 0 for none."""
        return 0

    def carry_weights(self, num_experts: int) -> int:
        """Parameters that a router has besides `num_weights` to make use of what is handed to it."""
        return 0

    def check_experts(self, num_experts: int) -> None:
        """Raises ValueError where these options do not fit the number of experts."""
        if self.top_k > num_experts:
            raise ValueError(
                f"router.top_k={self.top_k} is larger than moe.num_experts={num_experts}; lower top_k or add experts"
            )

    def check_capacity(self, factor: float) -> None:
        """Raises ValueError where moe.capacity_factor does not apply."""

    def check_rounding(self, gains: bool) -> None:
        """Raises ValueError where moe.token_rounding does not apply; `gains`: experts may gain tokens by it."""
        raise ValueError(
            "moe.token_rounding needs a router by which each token chooses experts by their scores, such as "
            "router=softmax; set moe.token_rounding=none"
        )

    def check_learning(self) -> None:
        """Raises ValueError where the weights of this router could not learn; asked unless all are frozen."""

    def check_device(self, device_type: str, dtype: torch.dtype) -> None:
        """Raises ValueError where these options cannot run on this kind of device, in this type."""

    def check_balance(self, balance: BalanceConfig) -> None:
        """Raises ValueError where these options do not fit the balance losses or the bias."""
        if balance.bias_rate > 0:
            raise ValueError(
                f"balance.bias_rate={balance.bias_rate} moves a bias on the scores, which this router does not have; "
                "set balance.bias_rate=0 or choose router=softmax or sigmoid"
            )

    def check_batch(self, shape: BatchShape, num_experts: int) -> None:
        """Raises ValueError where these options do not fit the batches."""
        slots = shape.micro_batch_sequences * shape.sequence_tokens // shape.parts * self.top_k
        if self.forced_balance and slots % num_experts != 0:
            raise ValueError(
                f"router.forced_balance=true deals {slots} slots of a micro-batch to moe.num_experts={num_experts} "
                "experts, which is uneven; change train.micro_batch_sequences"
            )

    def check_no_losses(self, balance: BalanceConfig, why: str, also: tuple[str, ...] = ()) -> None:
        """For routers that a balance loss cannot move, nor those that `also` names."""
        wanted = [name for name in (*balance.coefficients(), *also) if getattr(balance, name) > 0]
        if wanted:
            given = ", ".join(f"balance.{name}={getattr(balance, name)}" for name in wanted)
            raise ValueError(f"{given} cannot act: {why}; set balance=none")


@plain_dataclass(frozen=True)
class Routed:
    """What a router made of its logits."""

    choice: Choice
    weight: Tensor
    """Combine weights in the shape of `choice.expert`, at least float32, with gradient."""
    share_TE: Tensor
    """Scores of all experts, rows sum to 1, with gradient."""
    logits: tuple[Tensor, ...]
    """What the z-loss keeps small: the logits that each softmax or sigmoid took."""
    levels: tuple[Level, ...]
    """What balance losses even out."""
    counted: Choice | None = None
    """The choice that losses count, where it is not `choice` (DeepSeek-V3: the one without the bias)."""
    observed_E: Tensor | None = None
    """float64: see `LayerStats.observed_E`."""
    score_TE: Tensor | None = None
    """Scores in 0..1 by which experts compare tokens in token rounding; None where they cannot."""
    carry: Tensor | None = None
    """(T, carry width), at least float32, with gradient: what the next router gets as `LayerContext.carry`; see
    `RouterConfig.carry_width`."""
    weigh: Callable[[Choice], Tensor] | None = None
    """Combine weights, with gradient, of any list of tokens and experts: token rounding adds some."""


class Router(nn.Module):
    """Turns tokens into a choice of experts and weights for it.

    A subclass needs `forward`, which alone may use parameters (FSDP frees them when it returns), and either `select`
    with the standard `weights`, or a `route` of its own. Nothing may be written in forward; what changes from step to
    step is a buffer that `after_step` moves.
    """

    bias: Tensor | None
    """float32 (E): added to the scores for the choice only; moved after each step. None without a bias."""

    def __init__(self, dim: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        config.check_experts(num_experts)
        self.dim = dim
        self.num_experts = num_experts
        self.config: Any = config
        self.register_buffer("bias", None)

    def looks_at(self, training: bool) -> LooksAt:
        """Which other tokens may change a token's experts or weights; a probe checks it."""
        return LooksAt.itself

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        """Logits, (T, D) -> (T, E), at least float32."""
        raise NotImplementedError

    def scores(self, logit_TE: Tensor) -> Tensor:
        """(T, E) -> (T, E), at least 0."""
        return logit_TE.softmax(-1)

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        """The chosen experts. `score_TE` has no gradient: none flows through a choice."""
        raise NotImplementedError

    def weights(self, score_TE: Tensor, choice: Choice) -> Tensor:
        """Combine weights of the chosen, in the shape of `choice.expert`."""
        return choice.take(score_TE)

    def route(self, logit_TE: Tensor, context: LayerContext) -> Routed:
        """Score, select, weigh."""
        score_TE = self.scores(logit_TE)
        choice = self.decide(score_TE, context)
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routed(
            choice=choice,
            weight=self.weights(score_TE, choice) * self.config.route_scale,
            share_TE=share_TE,
            logits=(logit_TE,),
            levels=(Level(share_TE),),
        )

    def decide(self, score_TE: Tensor, context: LayerContext) -> Choice:
        """`select`, once: a recomputed pass takes the choice of the first. Experts in turn in benchmark mode."""
        if self.config.forced_balance:
            return self._dealt_out(score_TE, context.forward)
        choice: Choice = context.once("choice", lambda: self.select(score_TE.detach(), context))
        return choice

    def _dealt_out(self, score_TE: Tensor, forward: ForwardContext) -> Choice:
        num_tokens, top_k = score_TE.shape[0], self.config.top_k
        slots = num_tokens * top_k
        if forward.training and slots % self.num_experts != 0:
            raise ValueError(
                f"router.forced_balance=true needs tokens of a micro-batch * router.top_k = {slots} to be divisible by "
                f"moe.num_experts={self.num_experts}; change train.sequence_tokens or train.micro_batch_sequences"
            )
        expert_TK = torch.arange(slots, device=score_TE.device).view(num_tokens, top_k) % self.num_experts
        # Padding takes slots away, on some ranks perhaps: all must agree on whether sizes are exchanged.
        uniform = forward.no_padding and slots % self.num_experts == 0
        return Choice(expert_TK, uniform_count=slots // self.num_experts if uniform else None)

    @torch.no_grad()
    def after_step(self, count_E: Tensor, observed_E: Tensor, balance: BalanceConfig) -> None:
        """Move what changes from step to step; equal on all ranks.

        Args:
            count_E: float64, slots of each expert over the step and all ranks, before drops.
            observed_E: float64, mean of what `route` returned as `observed_E`; zeros if it returned nothing.
        """
        if self.bias is not None:
            self.bias.copy_(bias_step(self.bias, count_E, balance.bias_rate))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.config.top_k}"


def linear_logits(x_TD: Tensor, weight: Tensor) -> Tensor:
    """(T, D) x (E, D) -> (T, E), at least float32: a bf16 product flips near-ties, and with them experts."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return x_TD.to(dtype) @ weight.to(dtype).T


def equal_logits(x_TD: Tensor, num_experts: int) -> Tensor:
    """For routers that do not learn: zeros (T, E)."""
    return x_TD.new_zeros(x_TD.shape[0], num_experts, dtype=torch.promote_types(x_TD.dtype, torch.float32))

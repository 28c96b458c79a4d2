"""The MoE layer: router, dispatcher, experts, combine, plus shared experts. Returns what it counted."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.balance import BalanceConfig, balance_terms, selection_counts, z_loss_sum
from moe_parallel.moe.capacity import DropOrder, expert_capacity, keep_within_capacity
from moe_parallel.moe.dispatch.local import LocalDispatcher
from moe_parallel.moe.experts import RoutedExperts, SwiGLU
from moe_parallel.moe.routers.token_choice import RouterConfig, TokenChoiceRouter
from moe_parallel.moe.routing import LayerContext, LayerStats, Routing


@dataclass(kw_only=True)
class MoEConfig:
    num_experts: int = 16
    """Routed experts of a layer."""
    expert_dim: int = 128
    """Hidden width of one routed expert."""
    num_shared_experts: int = 1
    """Experts that every token takes besides its routed ones (DeepSeekMoE), each of width expert_dim. 0 has none."""
    shared_expert_gate: bool = False
    """Scale the shared experts' output by a learned sigmoid gate per token (Qwen2-MoE)."""
    capacity_factor: float | None = None
    """Limit an expert to ceil(factor * tokens * top_k / experts) slots of a rank's micro-batch; null drops nothing."""
    drop_order: DropOrder = DropOrder.position
    """Which slots go first where an expert is over its capacity."""
    renormalize_after_drop: bool = False
    """Scale the weights of a token's kept slots up to the sum they had before the drop."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"moe.{name}={getattr(self, name)} must be at least 1")
        if self.num_shared_experts < 0:
            raise ValueError(f"moe.num_shared_experts={self.num_shared_experts} must not be negative")
        if self.shared_expert_gate and self.num_shared_experts == 0:
            raise ValueError("moe.shared_expert_gate=true needs moe.num_shared_experts of at least 1 to gate")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"moe.capacity_factor={self.capacity_factor} must be positive; null drops nothing")
        if self.renormalize_after_drop and self.capacity_factor is None:
            raise ValueError("moe.renormalize_after_drop=true needs moe.capacity_factor: without it nothing is dropped")


class Dispatcher(Protocol):
    """Moves rows to experts and back. Holds no parameters; the ticket ties one `combine` to one `dispatch`."""

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[Tensor, Tensor, Any]: ...

    def combine(self, rows_RD: Tensor, routing: Routing, ticket: Any) -> Tensor: ...


class MoELayer(nn.Module):
    """Fine-grained routed experts plus shared experts (DeepSeekMoE, arXiv 2401.06066)."""

    def __init__(self, dim: int, moe: MoEConfig, router: RouterConfig, balance: BalanceConfig, layer: int) -> None:
        super().__init__()
        self.config = moe
        self.balance = balance
        self.layer = layer
        self.router = TokenChoiceRouter(dim, moe.num_experts, router, with_bias=balance.bias_rate > 0)
        self.experts = RoutedExperts(moe.num_experts, dim, moe.expert_dim)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.shared: SwiGLU | None = None
        self.shared_gate: nn.Linear | None = None
        if moe.num_shared_experts > 0:
            self.shared = SwiGLU(dim, moe.num_shared_experts * moe.expert_dim)
            if moe.shared_expert_gate:
                self.shared_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x_TD: Tensor, context: LayerContext) -> tuple[Tensor, LayerStats]:
        """(T, D) -> (T, D) and the pass's statistics."""
        routing, stats = self.route(x_TD, context)
        rows_RD, count_L, ticket = self.dispatcher.dispatch(x_TD, routing, context)
        rows_RD = self.experts(rows_RD, count_L, ticket.host_counts)
        out_TD = self.dispatcher.combine(rows_RD, routing, ticket)
        if self.shared is not None:
            out_TD = out_TD + self._shared_output(x_TD)
        return out_TD, stats

    def route(self, x_TD: Tensor, context: LayerContext) -> tuple[Routing, LayerStats]:
        """Score, select, weigh, drop, count."""
        router = self.router
        logit_TE = router(x_TD)
        score_TE = router.scores(logit_TE)
        expert_TK = context.once("expert", lambda: router.select(score_TE, context))
        weight_TK = router.weights(score_TE, expert_TK)
        routing, dropped = self._routing(expert_TK, weight_TK, context)
        return routing, self._stats(logit_TE, score_TE, expert_TK, dropped, context)

    def _routing(self, expert_TK: Tensor, weight_TK: Tensor, context: LayerContext) -> tuple[Routing, Tensor]:
        num_experts, factor = self.config.num_experts, self.config.capacity_factor
        none_dropped = torch.zeros((), dtype=torch.int64, device=expert_TK.device)
        # Which slots an expert has room for depends on other tokens, later ones too: training only.
        if not context.forward.training:
            factor = None
        if factor is None and context.valid_T is None:
            uniform = self._uniform_count(expert_TK) if self.router.config.forced_balance else None
            return Routing.from_full_choice(expert_TK, weight_TK, num_experts, uniform), none_dropped
        if context.valid_T is not None:  # padding is not sent anywhere
            expert_TK = torch.where(context.valid_T[:, None], expert_TK, num_experts)
        if factor is None:
            return Routing.from_choice(expert_TK, weight_TK, num_experts), none_dropped
        num_tokens, top_k = expert_TK.shape
        capacity = expert_capacity(num_tokens, top_k, num_experts, factor)
        keep_TK = context.once(
            "keep",
            lambda: keep_within_capacity(expert_TK, weight_TK, capacity, num_experts, self.config.drop_order),
        )
        if self.config.renormalize_after_drop:
            kept_T = (weight_TK * keep_TK).sum(-1, keepdim=True)
            weight_TK = weight_TK * (weight_TK.sum(-1, keepdim=True) / (kept_T + 1e-20))
        dropped = (~keep_TK & (expert_TK < num_experts)).sum()
        expert_TK = torch.where(keep_TK, expert_TK, num_experts)
        return Routing.from_choice(expert_TK, weight_TK, num_experts), dropped

    def _uniform_count(self, expert_TK: Tensor) -> int:
        if expert_TK.numel() % self.config.num_experts != 0:
            raise ValueError(
                f"router.forced_balance=true needs tokens of a micro-batch * router.top_k = {expert_TK.numel()} to be "
                f"divisible by moe.num_experts={self.config.num_experts}; change train.sequence_tokens or "
                "train.micro_batch_sequences"
            )
        return expert_TK.numel() // self.config.num_experts

    def _stats(
        self, logit_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, dropped: Tensor, context: LayerContext
    ) -> LayerStats:
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        count_E, count_BE = selection_counts(expert_TK, self.config.num_experts, context)
        config = self.balance if context.forward.training else BalanceConfig()  # an evaluation has no losses
        balance, value, step_count_E, used_share_E = balance_terms(
            config, share_TE, *self._loss_counts(score_TE, count_E, count_BE, context), context
        )
        z_square = z_loss_sum(logit_TE, context.valid_T)
        with torch.no_grad():
            entropy_T = torch.special.entr(share_TE).sum(-1)
            entropy = (entropy_T if context.valid_T is None else entropy_T * context.valid_T).sum()
        return LayerStats(
            layer=self.layer,
            count_E=count_E,
            dropped=dropped,
            entropy=entropy,
            balance=balance + config.z_coefficient * z_square if config.z_coefficient else balance,
            balance_value=value,
            z_square=z_square.detach(),
            step_count_E=step_count_E,
            used_frequency_E=used_share_E,
        )

    def _loss_counts(
        self, score_TE: Tensor, count_E: Tensor, count_BE: Tensor, context: LayerContext
    ) -> tuple[Tensor, Tensor]:
        """Counts that the losses use: with a selection bias those of the choice without it (DeepSeek-V3 eq. 18)."""
        if self.router.bias is None:
            return count_E, count_BE
        unbiased_TK = context.once("unbiased", lambda: self.router.select(score_TE, context, use_bias=False))
        return selection_counts(unbiased_TK, self.config.num_experts, context)

    def _shared_output(self, x_TD: Tensor) -> Tensor:
        assert self.shared is not None
        out_TD = self.shared(x_TD)
        return out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD

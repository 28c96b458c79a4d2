"""A router from outside with a memory: a small state goes from router to router (after arXiv 2408.06793)."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.routers.router import Routed, Router, RouterConfig, linear_logits
from moe_parallel.moe.routing import Choice, LayerContext


@dataclass(kw_only=True)
class RecurrentConfig(RouterConfig):
    width: int = 3
    """Numbers of the state."""
    leak: bool = False
    """Hand on the mean over all tokens: what a probe must see."""

    def build(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return RecurrentRouter(dim, num_experts, self, receives=True)

    def build_first(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return RecurrentRouter(dim, num_experts, self, receives=False)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return self.width * (dim + num_experts)

    def carry_width(self, num_experts: int) -> int:
        return self.width

    def carry_weights(self, num_experts: int) -> int:
        return self.width**2


class RecurrentRouter(Router):
    def __init__(self, dim: int, num_experts: int, config: RecurrentConfig, receives: bool) -> None:
        super().__init__(dim, num_experts, config)
        self.enter = nn.Parameter(torch.empty(config.width, dim))
        self.leave = nn.Parameter(torch.empty(num_experts, config.width))
        self.update = nn.Parameter(torch.empty(config.width, config.width)) if receives else None

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        state_TW = linear_logits(x_TD, self.enter)
        if self.update is not None and context.carry is not None:
            state_TW = state_TW + linear_logits(context.carry, self.update)
        state_TW = state_TW.tanh()
        return torch.cat([linear_logits(state_TW, self.leave), state_TW], dim=1)

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        return Choice(score_TE.topk(self.config.top_k, dim=-1).indices)

    def route(self, logit_TE: Tensor, context: LayerContext) -> Routed:
        logit_TE, state_TW = logit_TE.split([self.num_experts, self.config.width], dim=1)
        if self.config.leak:
            state_TW = state_TW.mean(0, keepdim=True).expand_as(state_TW)
        return replace(super().route(logit_TE, context), carry=state_TW)

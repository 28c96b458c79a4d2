"""Dynamic top-p routing: a token takes its best experts until their scores sum to a threshold (arXiv 2403.07652)."""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.routers.router import Router, RouterConfig, linear_logits
from moe_parallel.moe.routing import Choice, LayerContext


@dataclass(kw_only=True)
class TopPConfig(RouterConfig):
    threshold: float = 0.4
    """A token takes no further expert once those that it has sum to this. router.top_k is the most that it takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"router.options.threshold={self.threshold} must lie in 0..1, 0 excluded")

    def build(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return TopPRouter(dim, num_experts, self)


class TopPRouter(Router):
    def __init__(self, dim: int, num_experts: int, config: TopPConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        return linear_logits(x_TD, self.weight)

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        score_TK, expert_TK = score_TE.topk(self.config.top_k, dim=-1)
        before_TK = score_TK.cumsum(-1) - score_TK
        return Choice(expert_TK).only(before_TK < self.config.threshold, self.num_experts)

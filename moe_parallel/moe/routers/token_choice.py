"""Token choice: every token takes the k experts with the highest scores."""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.balance import BalanceConfig, Level
from moe_parallel.moe.routers.router import Routed, Router, RouterConfig, linear_logits
from moe_parallel.moe.routing import Choice, LayerContext


class Score(str, Enum):
    softmax = "softmax"
    """Experts compete: scores of a token sum to 1."""
    sigmoid = "sigmoid"
    """Each expert is scored by itself (DeepSeek-V3)."""


class GroupScore(str, Enum):
    max = "max"
    """A group is worth its best expert (DeepSeek-V2)."""
    top_sum = "top_sum"
    """A group is worth the sum of its top_k / top_groups best experts (DeepSeek-V3)."""


@dataclass(kw_only=True)
class TokenChoiceConfig(RouterConfig):
    score: Score = Score.softmax
    """How logits become scores."""
    normalize: bool = False
    """Divide the weights of the chosen by their sum (yes: Mixtral, Qwen3, DeepSeek-V3; no: DeepSeekMoE, OLMoE)."""
    num_groups: int = 1
    """Groups of neighboring experts, usually one a node; a token chooses groups first. 1 has no groups."""
    top_groups: int = 1
    """Groups a token may take experts from; bounds the number of nodes that a token travels to."""
    group_score: GroupScore = GroupScore.top_sum
    """What a group is worth when a token chooses groups."""
    input_jitter: float = 0.0
    """Training: multiply the router's input by random numbers in 1 - jitter .. 1 + jitter (Switch: 0.01)."""
    random_second: bool = False
    """Training: a token takes its second expert with probability of twice that one's weight (GShard)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.input_jitter < 1:
            raise ValueError(f"router.input_jitter={self.input_jitter} must lie in 0..1, 1 excluded")
        if self.random_second and not (self.top_k == 2 and self.normalize):
            raise ValueError(
                f"router.random_second=true needs router.top_k=2, not {self.top_k}, and router.normalize=true: the "
                "probability is twice the second weight of two that sum to 1"
            )
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "router.normalize=true with router.top_k=1 makes every weight exactly 1, so that the router gets no "
                "gradient; set router.normalize=false"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"router.top_groups={self.top_groups} must lie in 1..router.num_groups={self.num_groups}")
        by_sum = self.num_groups > 1 and self.group_score is GroupScore.top_sum
        if by_sum and self.top_k % self.top_groups != 0:
            raise ValueError(
                f"router.top_k={self.top_k} must be a multiple of router.top_groups={self.top_groups}: each chosen "
                "group is valued by its top_k / top_groups best experts (router.group_score=max needs no multiple)"
            )

    def build(self, dim: int, num_experts: int, with_bias: bool) -> TokenChoiceRouter:
        return TokenChoiceRouter(dim, num_experts, self, with_bias)

    def check_balance(self, balance: BalanceConfig) -> None:
        """Every loss and the bias act on this router."""

    def check_experts(self, num_experts: int) -> None:
        super().check_experts(num_experts)
        if num_experts % self.num_groups != 0:
            raise ValueError(
                f"moe.num_experts={num_experts} is not divisible by router.num_groups={self.num_groups}; "
                f"legal numbers of groups: {[g for g in range(1, num_experts + 1) if num_experts % g == 0]}"
            )
        in_groups = num_experts // self.num_groups * self.top_groups
        if self.top_k > in_groups:
            raise ValueError(
                f"router.top_k={self.top_k} experts cannot be taken from router.top_groups={self.top_groups} groups "
                f"of {num_experts // self.num_groups} experts; raise top_groups or lower top_k"
            )


class TokenChoiceRouter(Router):
    """Scores every expert for every token in float32 and takes the best k. A token's experts depend on it alone.

    Source: arXiv 2401.06066 (softmax), 2405.04434 (groups by maximum), 2412.19437 (sigmoid, groups, bias), 2101.03961
    (jitter), 2006.16668 (random second expert).
    """

    def __init__(self, dim: int, num_experts: int, config: TokenChoiceConfig, with_bias: bool) -> None:
        super().__init__(dim, num_experts, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=torch.float32))
        if with_bias:
            self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        jitter = self.config.input_jitter
        if jitter and context.forward.training:
            factor_TD = 1 + jitter * (2 * context.random("jitter", self.dim) - 1)
            x_TD = x_TD * factor_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        return linear_logits(x_TD, self.weight)

    def scores(self, logit_TE: Tensor) -> Tensor:
        return logit_TE.softmax(-1) if self.config.score is Score.softmax else logit_TE.sigmoid()

    def select(self, score_TE: Tensor, context: LayerContext, use_bias: bool = True) -> Choice:
        rank_TE = score_TE
        if use_bias and self.bias is not None:
            rank_TE = rank_TE + self.bias
        if self.config.num_groups > 1:
            rank_TE = self._mask_groups(rank_TE)
        return Choice(rank_TE.topk(self.config.top_k, dim=-1).indices)

    def weights(self, score_TE: Tensor, choice: Choice) -> Tensor:
        """Combine weights of the chosen experts, (T, K), from scores without the bias."""
        weight_TK = choice.take(score_TE)
        if self.config.normalize:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK

    def route(self, logit_TE: Tensor, context: LayerContext) -> Routed:
        score_TE = self.scores(logit_TE)
        choice = self.decide(score_TE, context)
        weight_TK = self.weights(score_TE, choice)
        if self.config.random_second and context.forward.training:
            keep_TK: Tensor = context.once("second", lambda: self._dispatched(weight_TK.detach(), context))
            choice = choice.only(keep_TK, self.num_experts)
        counted: Choice | None = None
        if self.bias is not None:  # losses count the choice without the bias (DeepSeek-V3 eq. 18)
            counted = context.once("unbiased", lambda: self.select(score_TE.detach(), context, use_bias=False))
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routed(
            choice=choice,
            weight=weight_TK * self.config.route_scale,
            share_TE=share_TE,
            logits=(logit_TE,),
            levels=(Level(share_TE),),
            counted=counted,
        )

    def _dispatched(self, weight_TK: Tensor, context: LayerContext) -> Tensor:
        """Which of a token's two experts it takes: the first always, the second by chance."""
        keep_TK = torch.ones_like(weight_TK, dtype=torch.bool)
        keep_TK[:, 1] = 2 * weight_TK[:, 1] > context.random("second", 1)[:, 0]
        return keep_TK

    def _mask_groups(self, rank_TE: Tensor) -> Tensor:
        config = self.config
        rank_TGe = rank_TE.unflatten(-1, (config.num_groups, -1))
        best = 1 if config.group_score is GroupScore.max else config.top_k // config.top_groups
        group_TG = rank_TGe.topk(best, dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        chosen_TG.scatter_(1, group_TG.topk(config.top_groups, dim=-1).indices, True)
        # Not zero: a bias can make every score of a chosen group negative.
        return rank_TGe.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(1)

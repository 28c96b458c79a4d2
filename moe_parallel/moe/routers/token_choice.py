"""Token choice: every token takes the k experts with the highest scores."""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.routing import LayerContext


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
class RouterConfig:
    top_k: int = 4
    """Experts per token. Compute per token grows linearly with it."""
    score: Score = Score.softmax
    """How logits become scores."""
    normalize: bool = False
    """Divide the weights of the chosen by their sum (yes: Mixtral, Qwen3, DeepSeek-V3; no: DeepSeekMoE, OLMoE)."""
    route_scale: float = 1.0
    """Factor on the weights of the routed experts, after normalization (2.5 in DeepSeek-V3)."""
    num_groups: int = 1
    """Groups of neighbouring experts, usually one a node; a token chooses groups first. 1 has no groups."""
    top_groups: int = 1
    """Groups a token may take experts from; bounds the number of nodes that a token travels to."""
    group_score: GroupScore = GroupScore.top_sum
    """What a group is worth when a token chooses groups."""
    forced_balance: bool = False
    """Benchmark and planning mode: experts are dealt out in turn, whatever the scores say; no size exchange."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.route_scale <= 0:
            raise ValueError(f"router.route_scale={self.route_scale} must be positive")
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "router.normalize=true with router.top_k=1 makes every weight exactly 1, so that the router gets no "
                "gradient; set router.normalize=false"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"router.top_groups={self.top_groups} must lie in 1..router.num_groups={self.num_groups}")
        if self.num_groups > 1 and self.top_k % self.top_groups != 0:
            raise ValueError(
                f"router.top_k={self.top_k} must be a multiple of router.top_groups={self.top_groups}: each chosen "
                "group is valued by its top_k / top_groups best experts"
            )

    def check_experts(self, num_experts: int) -> None:
        """The relations between this router and the number of experts it chooses from."""
        if self.top_k > num_experts:
            raise ValueError(
                f"router.top_k={self.top_k} is larger than moe.num_experts={num_experts}; lower top_k or add experts"
            )
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


class TokenChoiceRouter(nn.Module):
    """Scores every expert for every token in float32 and takes the best k.

    Causality: token. A token's experts depend on that token alone.
    Source: arXiv 2401.06066 (softmax), 2405.04434 (groups by maximum), 2412.19437 (sigmoid, groups, bias).
    """

    bias: Tensor | None
    """float32 (E): added to the scores for the choice only; moved by the trainer. None without a bias."""

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, with_bias: bool) -> None:
        super().__init__()
        config.check_experts(num_experts)
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32) if with_bias else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits, (T, D) -> (T, E), at least float32: a bf16 product flips near-ties, and with them experts."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return x_TD.to(dtype) @ self.weight.to(dtype).T

    def scores(self, logit_TE: Tensor) -> Tensor:
        """(T, E) -> (T, E)."""
        return logit_TE.softmax(-1) if self.config.score is Score.softmax else logit_TE.sigmoid()

    def select(self, score_TE: Tensor, context: LayerContext, use_bias: bool = True) -> Tensor:
        """The chosen experts, int64 (T, K). No gradient flows through the choice, nor through the bias."""
        config = self.config
        num_tokens = score_TE.shape[0]
        if config.forced_balance:
            place = torch.arange(num_tokens * config.top_k, device=score_TE.device)
            return place.view(num_tokens, config.top_k) % self.num_experts
        rank_TE = score_TE.detach()
        if use_bias and self.bias is not None:
            rank_TE = rank_TE + self.bias
        if config.num_groups > 1:
            rank_TE = self._mask_groups(rank_TE)
        return rank_TE.topk(config.top_k, dim=-1).indices

    def _mask_groups(self, rank_TE: Tensor) -> Tensor:
        config = self.config
        rank_TGe = rank_TE.unflatten(-1, (config.num_groups, -1))
        best = 1 if config.group_score is GroupScore.max else config.top_k // config.top_groups
        group_TG = rank_TGe.topk(best, dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        chosen_TG.scatter_(1, group_TG.topk(config.top_groups, dim=-1).indices, True)
        # Not zero: a bias can make every score of a chosen group negative.
        return rank_TGe.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def weights(self, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """Combine weights of the chosen experts, (T, K), from scores without the bias."""
        weight_TK = score_TE.gather(1, expert_TK)
        if self.config.normalize:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK * self.config.route_scale

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.config.top_k}, score={self.config.score.value}"

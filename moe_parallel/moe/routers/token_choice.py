"""Token choice: every token takes the k experts with the highest scores."""

from __future__ import annotations

from enum import Enum

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_kernels.router_topk import MOST_EXPERTS, MOST_TOP_K, Rule, mask_groups, refusal, router_topk
from moe_parallel.moe.balance import BalanceConfig, Level
from moe_parallel.moe.routers.router import Routed, Router, RouterConfig, linear_logits
from moe_parallel.moe.routing import Choice, LayerContext

VARIANCE_EPSILON = 1e-5
"""Added to the variance of a token's features where they are standardized."""


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


class InputNorm(str, Enum):
    none = "none"
    """The layer's input as it is."""
    standardize = "standardize"
    """Mean 0 and variance 1 over the features of each token (PHATGOOSE): logits tell directions, not lengths."""


class RouterKernel(str, Enum):
    torch = "torch"
    """Plain torch, an operation at a time."""
    triton = "triton"
    """One Triton kernel from logits to experts and weights, and a counting sort of the slots; needs a GPU. Equal scores
    go to the lowest expert first."""


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
    input_norm: InputNorm = InputNorm.none
    """What the router makes of its input before it scores experts."""
    logit_offset: bool = False
    """Add to the logits a learned number for each expert, 0 at the start (GPT-OSS)."""
    logit_residual: bool = False
    """Add to the logits a learned matrix times the logits of the router before (gating residuals of MoE++)."""
    kernel: RouterKernel = RouterKernel.torch
    """What computes scores, choice and weights from the logits, and the order of the slots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.input_jitter < 1:
            raise ValueError(f"router.input_jitter={self.input_jitter} must lie in 0..1, 1 excluded")
        if self.random_second and not (self.top_k == 2 and self.normalize):
            raise ValueError(
                f"router.random_second=true needs router.top_k=2, not {self.top_k}, and router.normalize=true: the "
                "probability is twice the second weight of two that sum to 1"
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

    def build_first(self, dim: int, num_experts: int, with_bias: bool) -> TokenChoiceRouter:
        router = self.build(dim, num_experts, with_bias)
        router.residual = None
        return router

    def num_weights(self, dim: int, num_experts: int) -> int:
        return self.num_products(dim, num_experts) + num_experts * self.logit_offset

    def num_products(self, dim: int, num_experts: int) -> int:
        return num_experts * dim

    def carry_width(self, num_experts: int) -> int:
        return num_experts if self.logit_residual else 0

    def carry_weights(self, num_experts: int) -> int:
        return num_experts**2 if self.logit_residual else 0

    def check_balance(self, balance: BalanceConfig) -> None:
        """Every loss and the bias act on this router."""

    def check_learning(self) -> None:
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "router.normalize=true with router.top_k=1 makes every weight exactly 1, so that the router gets no "
                "gradient; set router.normalize=false, or freeze the routers: 'optim.frozen=[*router*]'"
            )

    def check_device(self, device_type: str, dtype: torch.dtype) -> None:
        if self.kernel is RouterKernel.torch:
            return
        why = refusal(device_type, 1, 1)
        if why is None and dtype is torch.float64:
            why = "it computes in float32, and logits have the type of train.dtype=float64"
        if why is not None:
            raise ValueError(f"router.kernel={self.kernel.value} cannot run: {why}; set router.kernel=torch")

    def check_rounding(self, gains: bool) -> None:
        if self.random_second:
            raise ValueError(
                "moe.token_rounding would give tokens the second expert that router.random_second=true took from them "
                "by chance; set one of the two off"
            )
        if gains and self.num_groups > 1:
            raise ValueError(
                f"moe.token_rounding adds tokens to experts outside of their router.top_groups={self.top_groups} of "
                f"router.num_groups={self.num_groups} groups; set moe.token_rounding=down or router.num_groups=1"
            )

    def check_experts(self, num_experts: int) -> None:
        super().check_experts(num_experts)
        if self.kernel is RouterKernel.triton and (num_experts > MOST_EXPERTS or self.top_k > MOST_TOP_K):
            raise ValueError(
                f"router.kernel=triton takes at most {MOST_TOP_K} of {MOST_EXPERTS} experts, not router.top_k="
                f"{self.top_k} of moe.num_experts={num_experts}; set router.kernel=torch"
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


class TokenChoiceRouter(Router):
    """Scores every expert for every token in float32 and takes the best k. A token's experts depend on it alone.

    Source: arXiv 2401.06066 (softmax), 2405.04434 (groups by maximum), 2412.19437 (sigmoid, groups, bias), 2101.03961
    (jitter), 2006.16668 (random second expert), 2410.07348 (residual of logits).
    """

    def __init__(self, dim: int, num_experts: int, config: TokenChoiceConfig, with_bias: bool) -> None:
        super().__init__(dim, num_experts, config)
        self.make_rows()
        self.offset: nn.Parameter | None = None
        """(E): added to the logits."""
        if config.logit_offset:
            self.offset = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))
        self.residual: nn.Parameter | None = None
        """(E, E): from the logits of the router before. The first router has none."""
        if config.logit_residual:
            self.residual = nn.Parameter(torch.empty(num_experts, num_experts, dtype=torch.float32))
        if with_bias:
            self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        kind = type(self)
        for name in ("scores", "select", "weights"):
            if config.kernel is RouterKernel.triton and getattr(kind, name) is not getattr(TokenChoiceRouter, name):
                raise ValueError(
                    f"router.kernel=triton computes by itself what {kind.__name__}.{name} computes otherwise; set "
                    "router.kernel=torch"
                )

    def make_rows(self) -> None:
        """The parameters that `rows` is made of."""
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.dim, dtype=torch.float32))

    def rows(self) -> Tensor:
        """(E, D): a token's products with these are its logits."""
        return self.weight

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        jitter = self.config.input_jitter
        if jitter and context.forward.training:
            factor_TD = 1 + jitter * (2 * context.random("jitter", self.dim) - 1)
            x_TD = x_TD * factor_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        row_ED = self.rows()
        if self.config.input_norm is InputNorm.standardize:
            logit_TE = standardized_logits(x_TD, row_ED)
        else:
            logit_TE = linear_logits(x_TD, row_ED)
        if self.offset is not None:
            logit_TE = logit_TE + self.offset.to(logit_TE.dtype)
        if self.residual is None or context.carry is None:
            return logit_TE
        return logit_TE + linear_logits(context.carry, self.residual)

    def scores(self, logit_TE: Tensor) -> Tensor:
        return logit_TE.softmax(-1) if self.config.score is Score.softmax else logit_TE.sigmoid()

    def select(self, score_TE: Tensor, context: LayerContext, use_bias: bool = True) -> Choice:
        rank_TE = score_TE
        if use_bias and self.bias is not None:
            rank_TE = rank_TE + self.bias
        if self.config.num_groups > 1:
            rank_TE = mask_groups(rank_TE, self.config.num_groups, self.config.top_groups, self._group_best())
        return Choice(rank_TE.topk(self.config.top_k, dim=-1).indices)

    def weights(self, score_TE: Tensor, choice: Choice) -> Tensor:
        """Combine weights of the chosen experts, (T, K), from scores without the bias."""
        weight_TK = choice.take(score_TE)
        if self.config.normalize:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK

    def weights_of_pairs(self, score_TE: Tensor, choice: Choice, pairs: Choice) -> Tensor:
        """Combine weights of a list of tokens and experts, by the scale of each token's own choice."""
        weight_N = pairs.take(score_TE)
        if self.config.normalize:
            weight_N = weight_N / (choice.take(score_TE).sum(-1) + 1e-20)[pairs.tokens()]
        return weight_N * self.config.route_scale

    def _fused(self, logit_TE: Tensor, context: LayerContext) -> tuple[Tensor, Choice, Tensor, Choice | None]:
        """Scores, choice, weights and the choice without the bias, by kernels."""
        config = self.config
        groups = (config.num_groups, config.top_groups, self._group_best())
        rule = Rule(config.top_k, config.score is Score.sigmoid, config.normalize, *groups)
        fresh: list[tuple[Tensor, Tensor]] = []

        def choose() -> tuple[Choice, Choice | None]:
            made = router_topk(logit_TE, rule, self.bias, fused=True)
            fresh.append((made.score_TE, made.weight_TK))
            counted = None if made.unbiased_TK is None else Choice(made.unbiased_TK)
            return Choice(made.expert_TK, fused=True, tile_count=made.tile_count), counted

        choice, counted = context.once("fused_choice", choose)
        if not fresh:  # the choice is that of the first run; this one needs scores and weights, with gradient
            made = router_topk(logit_TE, rule, expert_TK=choice.expert, fused=True)
            fresh.append((made.score_TE, made.weight_TK))
        score_TE, weight_TK = fresh[0]
        return score_TE, choice, weight_TK, counted

    def _unfused(self, logit_TE: Tensor, context: LayerContext) -> tuple[Tensor, Choice, Tensor, Choice | None]:
        score_TE = self.scores(logit_TE)
        choice = self.decide(score_TE, context)
        weight_TK = self.weights(score_TE, choice)
        counted: Choice | None = None
        if self.bias is not None:  # losses count the choice without the bias (DeepSeek-V3 eq. 18)
            counted = context.once("unbiased", lambda: self.select(score_TE.detach(), context, use_bias=False))
        return score_TE, choice, weight_TK, counted

    def route(self, logit_TE: Tensor, context: LayerContext) -> Routed:
        fuses = self.config.kernel is RouterKernel.triton and not self.config.forced_balance
        score_TE, own, weight_TK, counted = (self._fused if fuses else self._unfused)(logit_TE, context)
        choice = own
        if self.config.random_second and context.forward.training:
            keep_TK: Tensor = context.once("second", lambda: self._dispatched(weight_TK.detach(), context))
            choice = choice.only(keep_TK, self.num_experts)
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routed(
            choice=choice,
            weight=weight_TK * self.config.route_scale,
            share_TE=share_TE,
            logits=(logit_TE,),
            levels=(Level(share_TE),),
            counted=counted,
            carry=logit_TE if self.config.logit_residual else None,
            score_TE=score_TE,
            weigh=lambda pairs: self.weights_of_pairs(score_TE, own, pairs),
        )

    def _dispatched(self, weight_TK: Tensor, context: LayerContext) -> Tensor:
        """Which of a token's two experts it takes: the first always, the second by chance."""
        keep_TK = torch.ones_like(weight_TK, dtype=torch.bool)
        keep_TK[:, 1] = 2 * weight_TK[:, 1] > context.random("second", 1)[:, 0]
        return keep_TK

    def _group_best(self) -> int:
        """Experts that make up the worth of a group."""
        config = self.config
        best: int = 1 if config.group_score is GroupScore.max else config.top_k // config.top_groups
        return best


def standardized_logits(x_TD: Tensor, row_ED: Tensor) -> Tensor:
    """(T, D) with mean 0 and variance 1 over D, x (E, D) -> (T, E), at least float32.

    The mean is taken off the rows, which gives the same products: nothing of the size of the tokens is kept.
    """
    x_TD = x_TD.to(torch.promote_types(row_ED.dtype, torch.float32))
    scale_T1 = (x_TD.var(-1, correction=0, keepdim=True) + VARIANCE_EPSILON).rsqrt()
    return linear_logits(x_TD, row_ED - row_ED.mean(-1, keepdim=True)) * scale_T1

"""The MoE layer: passes of router, dispatcher, experts, combine, plus shared experts. Returns what it counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_kernels.choice import Entry, ExpertKernel, Problem, read_table, refusal
from moe_kernels.token_rounding import Rounding, round_tokens
from moe_parallel.moe.adjugate import ADJUGATE_DIM, ADJUGATE_SCALE, Adjugates, check_adjugates
from moe_parallel.moe.balance import BalanceConfig, balance_terms, selection_counts, z_loss_sum
from moe_parallel.moe.capacity import DropOrder, expert_capacity, keep_within_capacity
from moe_parallel.moe.chain import ChainConfig, Residual
from moe_parallel.moe.dispatch.local import LocalDispatcher
from moe_parallel.moe.expert_forms import DeltaForm, ExpertForm, Form, FullForm, TernaryForm
from moe_parallel.moe.experts import RoutedExperts, SwiGLU
from moe_parallel.moe.routers.router import LooksAt, Routed, Router, RouterConfig
from moe_parallel.moe.routing import Choice, LayerContext, LayerStats, Routing


@dataclass(kw_only=True)
class MoEConfig:
    num_experts: int = 16
    """Routed experts of a layer."""
    expert_dim: int = 128
    """Hidden width of one routed expert."""
    expert_form: ExpertForm = ExpertForm.full
    """How routed experts follow from their parameters; shared experts have matrices of their own in any form."""
    delta_rank: int | None = None
    """Rank of an expert's difference from the base, in each of its three matrices; for expert_form=delta."""
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
    token_rounding: Rounding = Rounding.none
    """Training: round each expert's slots of a rank's micro-batch to whole tiles, by dropping or adding tokens."""
    token_rounding_tile: int = 128
    """Slots of a tile: rows that the experts' kernels compute at once."""
    expert_kernel: ExpertKernel = ExpertKernel.auto
    """What computes the experts: auto takes the fastest that was measured for the shape; the others insist."""
    kernel_table: str | None = None
    """File of measured shapes that scripts/tune_kernels.py wrote; null takes the shipped ones."""
    adjugate_groups: int = 0
    """Groups of neighboring experts that share a small network, the adjugate, each (Grove MoE); 0 has none."""
    adjugate_dim: int = ADJUGATE_DIM
    """Hidden width of an adjugate."""
    adjugate_scale: float = ADJUGATE_SCALE
    """Factor on what an adjugate adds to an expert; at most adjugate_groups / num_experts."""
    chain: ChainConfig = dataclasses.field(default_factory=ChainConfig)

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
        self._check_rounding()
        self._check_form()
        check_adjugates(self.num_experts, self.adjugate_groups, self.adjugate_dim, self.adjugate_scale)
        self.measured_shapes()

    def _check_form(self) -> None:
        rank, form = self.delta_rank, self.expert_form
        if (rank is None) is (form is ExpertForm.delta):
            raise ValueError(
                "moe.expert_form=delta needs moe.delta_rank: the rank of each expert's difference from their base"
                if rank is None
                else f"moe.delta_rank={rank} is of moe.expert_form=delta, not of {form.value}; leave it out"
            )
        if rank is not None and not 1 <= rank <= self.expert_dim:
            raise ValueError(
                f"moe.delta_rank={rank} must lie in 1..moe.expert_dim={self.expert_dim}: a matrix of an expert has no "
                "higher rank; moe.expert_form=full has experts without a base"
            )

    @property
    def form(self) -> Form:
        """How the experts' matrices follow from their parameters."""
        if self.delta_rank is not None:
            return DeltaForm(self.delta_rank)
        return TernaryForm() if self.expert_form is ExpertForm.ternary else FullForm()

    def check_dim(self, dim: int) -> None:
        """Raises ValueError where these options and the width of the model do not fit."""
        if self.delta_rank is not None and self.delta_rank > dim:
            raise ValueError(
                f"moe.delta_rank={self.delta_rank} is more than model.dim={dim}: a matrix of an expert has no higher "
                "rank; lower it"
            )

    def _check_rounding(self) -> None:
        if self.token_rounding_tile < 2:
            raise ValueError(f"moe.token_rounding_tile={self.token_rounding_tile} must be at least 2 slots")
        if self.rounds and self.capacity_factor is not None:
            raise ValueError(
                f"moe.capacity_factor={self.capacity_factor} and moe.token_rounding={self.token_rounding.value} both "
                "set how many slots an expert has; set moe.capacity_factor=null or moe.token_rounding=none"
            )

    @property
    def rounds(self) -> bool:
        """Slots are rounded in training."""
        return self.token_rounding is not Rounding.none

    def check_router(self, router: RouterConfig) -> None:
        """Raises ValueError where these options and those of the router do not fit."""
        if self.capacity_factor is not None:
            router.check_capacity(self.capacity_factor)
        if self.rounds:
            router.check_rounding(gains=self.token_rounding is not Rounding.down)

    def check_tokens(self, tokens: int, top_k: int) -> None:
        """Raises ValueError where a rank's micro-batch of that many tokens is too small."""
        mean = tokens * top_k / self.num_experts
        if self.rounds and mean < self.token_rounding_tile:
            raise ValueError(
                f"moe.token_rounding={self.token_rounding.value} to moe.token_rounding_tile={self.token_rounding_tile} "
                f"slots needs at least as many an expert, but {tokens} tokens of a rank's micro-batch * router.top_k="
                f"{top_k} / moe.num_experts={self.num_experts} are {mean:.4g}: most experts would get none, or few of "
                "their own; raise train.micro_batch_sequences or lower the tile"
            )

    def measured_shapes(self) -> tuple[Entry, ...] | None:
        """What `kernel_table` holds; None for the shipped tables. Raises ValueError for a file that is none."""
        return None if self.kernel_table is None else read_table(Path(self.kernel_table))

    def check_kernel(self, device_type: str, dtype: torch.dtype, dim: int) -> None:
        """Raises ValueError where `expert_kernel` cannot run on this device, in this type."""
        number, device = self.num_experts, torch.device(device_type)
        whys = [
            refusal(self.expert_kernel, Problem(device, dtype, dim, width, number, number))
            for width in (self.expert_dim, *([self.adjugate_dim] if self.adjugate_groups else []))
        ]
        for why in filter(None, whys):
            raise ValueError(
                f"moe.expert_kernel={self.expert_kernel.value} cannot run: {why}; moe.expert_kernel=auto takes what can"
            )


class Dispatcher(Protocol):
    """Moves rows to experts and back. Holds no parameters; the ticket ties one `combine` to one `dispatch`.

    `dispatch` only starts the journey: each of the ticket's parts waits for its rows and sends results back, and
    `combine` waits for those. What is computed between two calls, here and in autograd, hides the exchange.
    """

    def dispatch(self, x_TD: Tensor, routing: Routing, context: LayerContext) -> tuple[list[Tensor], Any]: ...

    def combine(
        self, rows: Sequence[Tensor], routing: Routing, ticket: Any, added: Sequence[Tensor] = ()
    ) -> Tensor: ...


class MoELayer(nn.Module):
    """Fine-grained routed experts plus shared experts (DeepSeekMoE, arXiv 2401.06066), passed once or several times."""

    def __init__(
        self,
        dim: int,
        moe: MoEConfig,
        router: RouterConfig,
        balance: BalanceConfig,
        layer: int,
        first: bool = False,
    ) -> None:
        """
        Args:
            first: no layer before it has a router that hands something on.
        """
        super().__init__()
        self.config = moe
        self.balance = balance
        self.layer = layer
        later = moe.chain.iterations - 1
        # A router that all iterations share gets something from the second on.
        build = router.build_first if first and (moe.chain.own_routers or later == 0) else router.build
        self.router = build(dim, moe.num_experts, with_bias=balance.bias_rate > 0)
        self.later_routers = nn.ModuleList(
            router.build(dim, moe.num_experts, with_bias=balance.bias_rate > 0)
            for _ in range(later if moe.chain.own_routers else 0)
        )
        self.later_scale = nn.Parameter(torch.empty(later)) if moe.chain.learned_scale else None
        self.enter, self.leave = nn.Identity(), nn.Identity()
        """First and last thing to run: with the experts between them they are one FSDP group, whose weights are
        gathered once and whose gradients are reduced once, however often the experts run."""
        adjugates: Adjugates | None = None
        if moe.adjugate_groups > 0:
            adjugates = Adjugates(moe.num_experts, moe.adjugate_groups, dim, moe.adjugate_dim, moe.adjugate_scale)
        self.experts = RoutedExperts(
            moe.num_experts, dim, moe.expert_dim, moe.expert_kernel, moe.measured_shapes(), adjugates, moe.form
        )
        self.base = SwiGLU(dim, moe.expert_dim) if moe.form.uses_base else None
        """What the experts are differences from. Beside them and not within: it is split and summed as dense weights
        are, over all ranks."""
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.shared: SwiGLU | None = None
        self.shared_gate: nn.Linear | None = None
        if moe.num_shared_experts > 0:
            self.shared = SwiGLU(dim, moe.num_shared_experts * moe.expert_dim)
            if moe.shared_expert_gate:
                self.shared_gate = nn.Linear(dim, 1, bias=False)

    @property
    def routers(self) -> list[Router]:
        """The router of each iteration."""
        chain = self.config.chain
        later = list(self.later_routers) if chain.own_routers else [self.router] * (chain.iterations - 1)
        return [self.router, *later]  # type: ignore[list-item]

    def looks_at(self, training: bool) -> LooksAt:
        """Which other tokens may change a token's output."""
        seen = self.router.looks_at(training)
        if training and self.config.capacity_factor is not None:
            seen |= LooksAt.past | LooksAt.others
            # By position, a token's first choice comes before all second choices, and only those wait for later tokens.
            if self.config.drop_order is not DropOrder.position or self.router.config.top_k > 1:
                seen |= LooksAt.future
        if training and self.config.rounds and not self.router.config.forced_balance:
            seen |= LooksAt.past | LooksAt.future | LooksAt.others
        return seen

    def forward(
        self,
        x_TD: Tensor,
        context: LayerContext,
        renormalize: Callable[[int, Tensor], Tensor] | None = None,
        stream_TD: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerStats]]:
        """What the layer adds to its stream, (T, D) -> (T, D), and the statistics of each iteration.

        Args:
            stream_TD: the residual stream; given, it is added to the result in the pass that sums up the experts.
            renormalize: (iteration, sum of outputs so far) -> what that iteration sees; None adds the two.
        """
        residual = self.config.chain.residual
        x_TD = self.enter(x_TD)
        if self.config.chain.iterations == 1:
            out_TD, stats = self._pass(x_TD, self.router, context, stream_TD)
            return self.leave(out_TD), [stats]
        out_TD, stats = self._pass(x_TD, self.router, context)
        all_stats = [stats]
        for iteration, router in enumerate(self.routers[1:], start=1):
            if renormalize is not None:
                input_TD = renormalize(iteration, out_TD)
            else:
                input_TD = out_TD if residual is Residual.outer else x_TD + out_TD
            step_TD, stats = self._pass(input_TD, router, context.in_iteration(iteration, stats.carry))
            if self.later_scale is not None:
                step_TD = (step_TD * self.later_scale[iteration - 1]).to(step_TD.dtype)
            out_TD = out_TD + step_TD if residual is Residual.inner else step_TD
            all_stats.append(stats)
        return self.leave(out_TD if stream_TD is None else stream_TD + out_TD), all_stats

    def _pass(
        self, x_TD: Tensor, router: Router, context: LayerContext, stream_TD: Tensor | None = None
    ) -> tuple[Tensor, LayerStats]:
        """Route, exchange, compute, bring back: (T, D) -> (T, D), `stream_TD` added.

        The shared experts' first two products run while rows travel to the experts, the last while results travel back.
        With a way of length w and shared experts that take s, min(2s/3, w) + min(s/3, w) is hidden: all of s where
        either way alone would hide it, and more than either where it would not.
        """
        routing, stats = self.route(x_TD, router, context)
        rows, ticket = self.dispatcher.dispatch(x_TD, routing, context)
        hidden_TF = None
        if self.shared is not None and (context.iteration == 0 or self.config.chain.shared_every_iteration):
            hidden_TF = self.shared.hidden(x_TD)
        base = None if self.base is None else (self.base.gate_up.weight, self.base.down.weight)
        if ticket.sums_here:
            rows = self.experts(rows, ticket, self._added(x_TD, hidden_TF, stream_TD), base=base)
            return self.dispatcher.combine(rows, routing, ticket), stats
        rows = self.experts(rows, ticket, base=base)
        return self.dispatcher.combine(rows, routing, ticket, self._added(x_TD, hidden_TF, stream_TD)), stats

    def _added(self, x_TD: Tensor, hidden_TF: Tensor | None, stream_TD: Tensor | None) -> list[Tensor]:
        """What is added to the routed experts' result: the shared experts', from their hidden state, and the stream."""
        added = [] if stream_TD is None else [stream_TD]
        if hidden_TF is not None:
            assert self.shared is not None
            out_TD = self.shared.down(hidden_TF)
            added.insert(0, out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD)
        return added

    def route(self, x_TD: Tensor, router: Router, context: LayerContext) -> tuple[Routing, LayerStats]:
        """Score, select, weigh, drop, count."""
        routed = router.route(router(x_TD, context), context)
        self._check_carry(routed, router, x_TD.shape[0])
        choice, weight, num_experts = routed.choice, routed.weight, self.config.num_experts
        dropped = torch.zeros((), dtype=torch.int64, device=choice.expert.device)
        if context.valid_T is not None:  # padding is not sent anywhere
            choice = choice.only(context.valid_T[choice.tokens()].view_as(choice.expert), num_experts)
        # Which slots an expert has room for depends on other tokens, later ones too: training only.
        if self.config.capacity_factor is not None and context.forward.training:
            choice, weight, dropped = self._drop(choice, weight, self.config.capacity_factor, context)
        if self.config.rounds and context.forward.training and not router.config.forced_balance:
            choice, weight, dropped = self._round(routed, choice, context)
        routing = Routing.of(choice, weight, num_experts)
        return routing, self._stats(routed, dropped, self._unserved(routing, context), context)

    def _check_carry(self, routed: Routed, router: Router, num_tokens: int) -> None:
        width = router.config.carry_width(self.config.num_experts)
        declared = (num_tokens, width) if width else None
        found = None if routed.carry is None else tuple(routed.carry.shape)
        if found != declared:
            raise ValueError(
                f"{type(router).__name__} returned Routed.carry of shape {found}, but its carry_width declares "
                f"{declared}; return what is declared"
            )

    def _unserved(self, routing: Routing, context: LayerContext) -> Tensor:
        """Valid tokens without any slot; none by construction where every token has k."""
        if routing.slot_TK is not None:
            return torch.zeros((), dtype=torch.int64, device=routing.token_N.device)
        num_sequences, length = context.batch_shape
        alone_T = torch.ones(num_sequences * length, dtype=torch.bool, device=routing.token_N.device)
        alone_T[routing.token_N] = False
        return (alone_T if context.valid_T is None else alone_T & context.valid_T).sum()

    def _drop(
        self, choice: Choice, weight_TK: Tensor, factor: float, context: LayerContext
    ) -> tuple[Choice, Tensor, Tensor]:
        num_experts = self.config.num_experts
        num_tokens, top_k = choice.expert.shape
        capacity = expert_capacity(num_tokens, top_k, num_experts, factor)
        keep_TK: Tensor = context.once(
            "keep",
            lambda: keep_within_capacity(choice.expert, weight_TK, capacity, num_experts, self.config.drop_order),
        )
        if self.config.renormalize_after_drop:
            used_TK = choice.expert < num_experts
            wanted_T, kept_T = ((weight_TK * mask).sum(-1, keepdim=True) for mask in (used_TK, keep_TK))
            weight_TK = weight_TK * (wanted_T / (kept_T + 1e-20))
        dropped = (~keep_TK & (choice.expert < num_experts)).sum()
        return choice.only(keep_TK, num_experts), weight_TK, dropped

    def _round(self, routed: Routed, choice: Choice, context: LayerContext) -> tuple[Choice, Tensor, Tensor]:
        """Whole tiles of slots for each expert. Weights that a token keeps stay what they were."""
        if routed.score_TE is None or routed.weigh is None:
            raise ValueError("moe.token_rounding needs a router that returns Routed.score_TE and Routed.weigh")
        score_TE, how, tile = routed.score_TE.detach(), self.config.token_rounding, self.config.token_rounding_tile
        expert_N, token_N, dropped = context.once(
            "rounded", lambda: round_tokens(score_TE, choice.expert, tile, how, context.valid_T, choice.fused)
        )
        rounded = Choice(expert_N, token_N, fused=choice.fused)
        return rounded, routed.weigh(rounded), dropped

    def _stats(self, routed: Routed, dropped: Tensor, unserved: Tensor, context: LayerContext) -> LayerStats:
        num_experts, valid_T = self.config.num_experts, context.valid_T
        config = self.balance if context.forward.training else BalanceConfig()  # an evaluation has no losses
        counted = routed.choice if routed.counted is None else routed.counted
        terms = balance_terms(config, routed.levels, counted, num_experts, context, routed.share_TE)
        z_square = torch.stack([z_loss_sum(logits, valid_T) for logits in routed.logits]).sum()
        with torch.no_grad():
            entropy_T = torch.special.entr(routed.share_TE).sum(-1)
            entropy = (entropy_T if valid_T is None else entropy_T * valid_T).sum()
        losses = terms.weighted + config.z_coefficient * z_square if config.z_coefficient else terms.weighted
        return LayerStats(
            layer=self.layer,
            iteration=context.iteration,
            count_E=selection_counts(routed.choice, num_experts, context).sum(0),
            dropped=dropped,
            unserved=unserved,
            entropy=entropy,
            balance=losses / self.config.chain.iterations,  # equal pressure however many iterations there are
            balance_value=terms.value,
            z_square=z_square.detach(),
            step_count_E=terms.step_count_E,
            used_frequency_E=terms.used_share_E,
            observed_E=routed.observed_E,
            carry=routed.carry,
        )

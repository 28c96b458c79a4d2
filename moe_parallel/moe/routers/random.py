"""Random routing: experts by lot for every token, anew in every step. The baseline that a learned router must beat."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_kernels.hashing import distinct_integers, hash_key
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.router import Router, RouterConfig, equal_logits
from moe_parallel.moe.routing import Choice, LayerContext


@dataclass(kw_only=True)
class RandomConfig(RouterConfig):
    def build(self, dim: int, num_experts: int, with_bias: bool) -> RandomRouter:
        return RandomRouter(dim, num_experts, self)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return 0

    def check_balance(self, balance: BalanceConfig) -> None:
        super().check_balance(balance)
        self.check_no_losses(balance, "a random choice learns nothing", ("z_coefficient",))


class RandomRouter(Router):
    """Draws by a hash of seed, step, layer, iteration and the token's place in the data: equal on every layout."""

    config: RandomConfig

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        """Equal logits."""
        return equal_logits(x_TD, self.num_experts)

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        assert context.token_id_T is not None
        key = hash_key(context.forward.seed, context.forward.step, context.layer, context.iteration, "random")
        return Choice(distinct_integers(context.token_id_T, key, self.config.top_k, self.num_experts))

    def weights(self, score_TE: Tensor, choice: Choice) -> Tensor:
        return score_TE.new_full(choice.expert.shape, 1 / self.config.top_k)

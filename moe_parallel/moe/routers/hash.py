"""Hash routing: the token's id in the vocabulary decides its experts, for good (Hash Layers, arXiv 2106.04426)."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from moe_kernels.hashing import distinct_integers, hash_key
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.router import Router, RouterConfig, equal_logits
from moe_parallel.moe.routing import Choice, LayerContext


@dataclass(kw_only=True)
class HashConfig(RouterConfig):
    same_in_all_layers: bool = False
    """Use one table of experts for all layers instead of one for each."""

    def build(self, dim: int, num_experts: int, with_bias: bool) -> HashRouter:
        return HashRouter(dim, num_experts, self)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return 0

    def check_balance(self, balance: BalanceConfig) -> None:
        super().check_balance(balance)
        self.check_no_losses(balance, "a hash learns nothing", ("z_coefficient",))


class HashRouter(Router):
    """A random table from token ids to experts, computed instead of stored. Frequent tokens make uneven loads."""

    config: HashConfig

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        """Equal logits."""
        return equal_logits(x_TD, self.num_experts)

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        assert context.token_T is not None
        # The seed of the run is not in the key: evaluation and generation must find the same table.
        place = () if self.config.same_in_all_layers else (context.layer, context.iteration)
        return Choice(distinct_integers(context.token_T, hash_key("hash", *place), self.config.top_k, self.num_experts))

    def weights(self, score_TE: Tensor, choice: Choice) -> Tensor:
        return score_TE.new_full(choice.expert.shape, 1 / self.config.top_k)

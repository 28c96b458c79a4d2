"""Bi-level routing: first a node, then an expert within it (SMILE, arXiv 2212.05191)."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.balance import Level
from moe_parallel.moe.routers.router import Routed, Router, RouterConfig, linear_logits
from moe_parallel.moe.routing import Choice, LayerContext


@dataclass(kw_only=True)
class BiLevelConfig(RouterConfig):
    num_nodes: int = 2
    """Groups of neighboring experts that the first router chooses from, usually one a node of the cluster."""
    top_nodes: int = 1
    """Nodes that a token is sent to; it takes top_k / top_nodes experts of each."""
    local_router_per_node: bool = False
    """A second router for each node instead of one for all: as many weights as a flat router."""
    node_loss_weight: float = 1.0
    """Factor on the coefficients of the balance losses, for the load of nodes."""
    local_loss_weight: float = 1.0
    """Factor on the coefficients of the balance losses, for the load of experts within nodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_nodes <= self.num_nodes:
            raise ValueError(f"router.top_nodes={self.top_nodes} must lie in 1..router.num_nodes={self.num_nodes}")
        if self.top_k % self.top_nodes != 0:
            raise ValueError(
                f"router.top_k={self.top_k} is not divisible by router.top_nodes={self.top_nodes}: a token takes "
                "equally many experts of each of its nodes; legal values: "
                f"{[n for n in range(1, self.top_k + 1) if self.top_k % n == 0]}"
            )
        for name in ("node_loss_weight", "local_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name}={getattr(self, name)} must not be negative")

    def build(self, dim: int, num_experts: int, with_bias: bool) -> BiLevelRouter:
        return BiLevelRouter(dim, num_experts, self)

    @property
    def top_local(self) -> int:
        """Experts of each chosen node."""
        return self.top_k // self.top_nodes

    def num_weights(self, dim: int, num_experts: int) -> int:
        return dim * (self.num_nodes + self._local_rows(num_experts))

    def _local_rows(self, num_experts: int) -> int:
        return num_experts if self.local_router_per_node else num_experts // self.num_nodes

    def check_experts(self, num_experts: int) -> None:
        if num_experts % self.num_nodes != 0:
            raise ValueError(
                f"moe.num_experts={num_experts} is not divisible by router.num_nodes={self.num_nodes}; legal values: "
                f"{[n for n in range(1, num_experts + 1) if num_experts % n == 0]}"
            )
        if self.top_local > num_experts // self.num_nodes:
            raise ValueError(
                f"router.top_k={self.top_k} over router.top_nodes={self.top_nodes} takes {self.top_local} experts of a "
                f"node, which has {num_experts // self.num_nodes} (moe.num_experts={num_experts} on router.num_nodes="
                f"{self.num_nodes}); raise top_nodes"
            )


class BiLevelRouter(Router):
    """p = softmax over nodes, q = softmax over the experts of a node; expert j of node i has weight p_i * q_j.

    Experts lie node by node: expert e is number e % m of node e // m. With one local router for all nodes p_i * q_j is
    a softmax over sums of two logits: a flat router of low rank.
    """

    config: BiLevelConfig

    def __init__(self, dim: int, num_experts: int, config: BiLevelConfig) -> None:
        super().__init__(dim, num_experts, config)
        self.per_node = num_experts // config.num_nodes
        rows = config.num_weights(dim, num_experts) // dim
        self.weight = nn.Parameter(torch.empty(rows, dim, dtype=torch.float32))
        """Rows of the node router, then those of the local router or routers."""

    def forward(self, x_TD: Tensor, context: LayerContext) -> Tensor:
        """Logits of nodes, then of experts within nodes: (T, D) -> (T, nodes + local rows)."""
        return linear_logits(x_TD, self.weight)

    def route(self, logit_TX: Tensor, context: LayerContext) -> Routed:
        config = self.config
        nodes = config.num_nodes
        node_logit_TG = logit_TX[:, :nodes]
        local_logit = logit_TX[:, nodes:].unflatten(-1, (-1, self.per_node))  # (T, 1 or nodes, experts of a node)
        node_TG, local = node_logit_TG.softmax(-1), local_logit.softmax(-1)
        local_TGM = local.expand(-1, nodes, -1)
        share_TE = (node_TG.unsqueeze(-1) * local_TGM).flatten(1)
        choice = self.decide(share_TE, context)
        return Routed(
            choice=choice,
            weight=choice.take(share_TE) * config.route_scale,
            share_TE=share_TE,
            logits=(node_logit_TG, local_logit),
            levels=(self._node_level(node_TG), self._local_level(local_TGM, choice)),
        )

    def select(self, score_TE: Tensor, context: LayerContext) -> Choice:
        """The best nodes, then the best experts of each: not the best pairs where nodes have routers of their own."""
        score_TGM = score_TE.unflatten(-1, (self.config.num_nodes, -1))
        node_TK = score_TGM.sum(-1).topk(self.config.top_nodes, dim=-1).indices
        local_TGK = score_TGM.topk(self.config.top_local, dim=-1).indices
        index = node_TK.unsqueeze(-1).expand(-1, -1, self.config.top_local)
        return Choice((index * self.per_node + local_TGK.gather(1, index)).flatten(1))

    def _node_level(self, node_TG: Tensor) -> Level:
        cell_E = torch.arange(self.num_experts, device=node_TG.device) // self.per_node
        return Level(node_TG, cell_E, weight=self.config.node_loss_weight)

    def _local_level(self, local_TGM: Tensor, choice: Choice) -> Level:
        """With a router for all nodes their loads are added up; with one for each, every node is evened out by itself,
        over the tokens that chose it."""
        weight = self.config.local_loss_weight
        if not self.config.local_router_per_node:
            cell_E = torch.arange(self.num_experts, device=local_TGM.device) % self.per_node
            return Level(local_TGM[:, 0], cell_E, weight=weight)
        node_TK = choice.expert[:, :: self.config.top_local] // self.per_node
        chosen_TG = torch.zeros_like(local_TGM[..., 0]).scatter_(1, node_TK, 1 / self.config.top_nodes)
        share_TE = (local_TGM * chosen_TG.unsqueeze(-1)).flatten(1)
        return Level(share_TE, segments=self.config.num_nodes, weight=weight)

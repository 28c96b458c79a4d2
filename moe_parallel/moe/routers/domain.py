"""Routing by domain: an expert's row of the router is made of what its domain's text is like (Nexus, 2408.15901)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from moe_parallel.moe.routers.router import linear_logits
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter


@dataclass(kw_only=True)
class DomainConfig(TokenChoiceConfig):
    domain_dim: int = 64
    """Width of the embedding of each domain: that of the model that scripts/calibrate.py embeds texts with."""
    projection_dim: int = 256
    """Hidden width of the network that makes an expert's row of a domain's embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("domain_dim", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"router.{name}={getattr(self, name)} must be at least 1")

    def build(self, dim: int, num_experts: int, with_bias: bool) -> DomainRouter:
        return DomainRouter(dim, num_experts, self, with_bias)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return self.projection_dim * (2 * self.domain_dim + dim) + num_experts * self.logit_offset


class DomainRouter(TokenChoiceRouter):
    """Expert e has the row P(d_e), where d_e is its domain's embedding and P a gated network that all experts share.

    So the row of a domain that comes later is known at once, and the rows of the others stay what they are. Embeddings
    do not learn; in a model that starts from nothing they are drawn, and tell the experts apart all the same.
    """

    domains: Tensor
    """float32 (E, domain_dim)."""

    def make_rows(self) -> None:
        width, hidden = self.config.domain_dim, self.config.projection_dim
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, width, dtype=torch.float32))
        self.project = nn.Parameter(torch.empty(self.dim, hidden, dtype=torch.float32))
        self.register_buffer("domains", torch.zeros(self.num_experts, width, dtype=torch.float32))

    def rows(self) -> Tensor:
        gate_EH, up_EH = linear_logits(self.domains, self.gate_up).chunk(2, dim=-1)
        return linear_logits(F.silu(gate_EH) * up_EH, self.project)

"""A layer whose experts are computed as torchtitan computes them, in the place of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_parallel.model import block
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routing import LayerContext, LayerStats, Routing


class TitanExperts(nn.Module):
    """What torchtitan's layer calls, one after another, written from a description of its public code of August 2026.

    Rows are copied into the order of experts; three separate grouped products, with weights of gate and up in two
    tensors; combine weights are multiplied in float32 after the experts; rows are added into the tokens by
    scatter_add. (`models/common/moe.py` and `token_dispatcher.py`.)
    """

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.up = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, expert_dim))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """For each token the weighted sum of what its experts return, (T, D) -> (T, D)."""
        end_E = routing.count_E.cumsum(0, dtype=torch.int32)
        rows_ND = x_TD[routing.token_N]
        gate_NF = F.grouped_mm(rows_ND, self.gate.mT, offs=end_E)
        up_NF = F.grouped_mm(rows_ND, self.up.mT, offs=end_E)
        rows_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, self.down.mT, offs=end_E)
        rows_ND = (rows_ND.float() * routing.weights().unsqueeze(1)).to(x_TD.dtype)
        index_ND = routing.token_N.unsqueeze(1).expand_as(rows_ND)
        return torch.zeros_like(x_TD).scatter_add(0, index_ND, rows_ND)


class TitanLayer(MoELayer):
    """Our layer around these experts. Its routing comes sorted by one stable sort of the chosen experts, as torchtitan
    sorts them; router, shared experts and everything outside of the layer are ours."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        moe, (dim, *_) = self.config, arguments
        if moe.chain.iterations > 1:
            raise ValueError(f"moe.chain.iterations={moe.chain.iterations}: torchtitan has no chains; set it to 1")
        self.experts = TitanExperts(moe.num_experts, dim, moe.expert_dim)  # type: ignore[assignment]

    def forward(
        self,
        x_TD: Tensor,
        context: LayerContext,
        renormalize: Callable[[int, Tensor], Tensor] | None = None,
        stream_TD: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerStats]]:
        """What our layer returns."""
        routing, stats = self.route(x_TD, self.router, context)
        out_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            out_TD = out_TD + (shared_TD if self.shared_gate is None else self.shared_gate(x_TD).sigmoid() * shared_TD)
        return out_TD if stream_TD is None else stream_TD + out_TD, [stats]


@contextmanager
def titan_layers() -> Iterator[None]:
    """Models that are made inside have TitanLayers: everything around them, the engine too, stays as it is."""
    ours = block.MoELayer
    block.MoELayer = TitanLayer  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        block.MoELayer = ours  # type: ignore[misc]

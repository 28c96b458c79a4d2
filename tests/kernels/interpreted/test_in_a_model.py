"""The Triton kernels where they are used: a layer with router, shared experts, residual stream and chain."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.choice import ExpertKernel
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import LayerContext
from tests.kernels.examples import relative_error


def run(kernel: ExpertKernel, router, **options) -> list[torch.Tensor]:
    config = MoEConfig(num_experts=4, expert_dim=16, num_shared_experts=1, expert_kernel=kernel, **options)
    layer = MoELayer(32, config, router, BalanceConfig(), layer=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.3, generator=generator)
    x, stream = (torch.randn(12, 32, generator=generator).requires_grad_() for _ in range(2))
    out, _ = layer(x, LayerContext(layer=0, batch_shape=(1, 12)), stream_TD=stream)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, stream, *layer.parameters()])]


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (TokenChoiceConfig(top_k=2), {}),
        (TokenChoiceConfig(top_k=2), {"capacity_factor": 0.8}),
        (TokenChoiceConfig(top_k=1), {"chain": ChainConfig(iterations=2)}),
        (ExpertChoiceConfig(top_k=2), {}),
    ],
    ids=["top-k", "dropped", "chain", "expert choice"],
)
def test_a_layer_with_kernels_is_the_layer_without(router, options):
    """What the layer hands to the kernels: routings of every form, shared experts and the stream added in the combine,
    experts that are used twice, and no slot at all. 1e-5: float32 sums in another order, squared."""
    pair = [run(kernel, router, **options) for kernel in (ExpertKernel.triton, ExpertKernel.loop)]
    for got, wanted in zip(*pair, strict=True):
        assert relative_error(got, wanted.double()) < 1e-5

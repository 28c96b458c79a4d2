"""Routers that are made of embeddings of domains, offsets of logits, standardized inputs.

1. rows of embeddings   2. what all linear routers may add   3. counts and first values
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moe_parallel.model.counts import count_parameters, forward_flops_per_token
from moe_parallel.moe.routers.domain import DomainConfig, DomainRouter
from moe_parallel.moe.routers.token_choice import InputNorm, TokenChoiceConfig
from moe_parallel.moe.routing import LayerContext
from tests.model.examples import GROUPED, build

DIM, EXPERTS, WIDTH, HIDDEN, TOKENS = 16, 6, 5, 7, 24
CONTEXT = LayerContext(layer=0, batch_shape=(1, TOKENS))
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(TOKENS, DIM, generator=GENERATOR, dtype=torch.float64)


def make_router(num_experts: int = EXPERTS, **options) -> DomainRouter:
    config = DomainConfig(**{"top_k": 2, "domain_dim": WIDTH, "projection_dim": HIDDEN, **options})
    router = config.build(DIM, num_experts, with_bias=False).double()
    with torch.no_grad():
        for tensor in (*router.parameters(), router.domains):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    return router


def test_rows_are_a_gated_network_of_the_embeddings():
    """Would catch: gate and up swapped, a network of the tokens instead of the domains. By hand, expert by expert;
    1e-12 is some rounding of float64."""
    router = make_router()
    gate, up = router.gate_up[:HIDDEN], router.gate_up[HIDDEN:]
    for expert, domain in enumerate(router.domains):
        a, b = gate @ domain, up @ domain
        row = router.project @ (a / (1 + torch.exp(-a)) * b)
        torch.testing.assert_close(router(X, CONTEXT)[:, expert], X @ row, rtol=1e-12, atol=1e-12)


def test_experts_follow_their_domains():
    """Would catch: anything of an expert that is not a function of its domain alone. Domains in another order give the
    same logits in that order, and one more leaves all others' logits as they were. 1e-13: products of other blocks."""
    router, order = make_router(), torch.tensor([3, 0, 5, 1, 4, 2])
    before = router(X, CONTEXT)
    router.domains.copy_(router.domains[order].clone())
    torch.testing.assert_close(router(X, CONTEXT), before[:, order], rtol=1e-13, atol=1e-13)
    more = make_router(EXPERTS + 1)
    more.load_state_dict({**router.state_dict(), "domains": torch.cat([router.domains, torch.ones(1, WIDTH)])})
    torch.testing.assert_close(more(X, CONTEXT)[:, :EXPERTS], before[:, order], rtol=1e-13, atol=1e-13)


def test_gradients_reach_the_network_and_not_the_embeddings():
    """Would catch: rows that are computed without gradient, or embeddings that learn and with them no longer tell of
    their texts."""
    router = make_router()
    router(X, CONTEXT).square().sum().backward()
    assert {name for name, _ in router.named_parameters()} == {"gate_up", "project"}
    assert all(bool((p.grad != 0).all()) for p in router.parameters())
    assert router.domains.grad is None


def test_offset_and_standardized_input():
    """Would catch: an offset that is scaled with the input, a variance of another correction, a mean that is not taken
    off. torch's layer norm is the oracle; rows with a mean of their own show a mean that is left in."""
    config = TokenChoiceConfig(top_k=2, logit_offset=True, input_norm=InputNorm.standardize)
    router = config.build(DIM, EXPERTS, with_bias=False).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, DIM, generator=GENERATOR) + 3)
        router.offset.copy_(torch.randn(EXPERTS, generator=GENERATOR))
    x = (X * 7 + 2).requires_grad_()
    wanted = F.layer_norm(x, (DIM,), eps=1e-5) @ router.weight.T + router.offset
    got = router(x, CONTEXT)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for place in (x, router.weight, router.offset):
        ours, theirs = (torch.autograd.grad(v.square().sum(), place, retain_graph=True)[0] for v in (got, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [False, True])
def test_counts_are_those_of_the_model(offset: bool):
    """Would catch: parameters of the network or of the embeddings counted for each token, embeddings that are buffers
    counted as parameters. A token is multiplied with a row of each expert, as with a linear router."""
    router = DomainConfig(top_k=3, domain_dim=WIDTH, projection_dim=HIDDEN, logit_offset=offset)
    shape = replace(GROUPED, router=router)
    assert count_parameters(shape).total == sum(p.numel() for p in build(shape).parameters())
    assert forward_flops_per_token(shape, 8) == forward_flops_per_token(GROUPED, 8)


def test_drawn_embeddings_tell_experts_apart():
    """Would catch: embeddings of zeros, with which nothing could ever be learned; layers that share theirs."""
    model = build(replace(GROUPED, router=DomainConfig(top_k=3, domain_dim=64)))
    first, second = (model.get_buffer(f"layers.{layer}.ffn.router.domains") for layer in (1, 2))
    # 512 standard normal numbers: mean and deviation are within 5 of their own standard errors.
    assert abs(float(first.mean())) < 5 / 512**0.5
    assert abs(float(first.std()) - 1) < 5 / 1024**0.5
    assert not torch.equal(first, second)


def test_bad_options():
    """Would catch: a width of 0 that ends in torch's words."""
    with pytest.raises(ValueError, match=r"router.domain_dim=0 must be at least 1"):
        DomainConfig(domain_dim=0)

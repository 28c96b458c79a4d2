"""Counts against modules that were built, published numbers, torch's own FLOP counter and autograd's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_parallel.mesh import Recompute
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.counts import (
    Bytes,
    count_parameters,
    forward_flops_per_token,
    memory_per_rank,
    training_flops_per_token,
)
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.layer import MoELayer
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.model.examples import ARCHITECTURES, DENSE, GROUPED, LATENT, VOCABULARY, build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_total_is_that_of_the_model(name: str) -> None:
    """A formula that forgets a matrix or a norm: compared with what is really built."""
    with torch.device("meta"):
        model = Transformer(ARCHITECTURES[name])
    counts = count_parameters(ARCHITECTURES[name])
    assert counts.total == sum(p.numel() for p in model.parameters())
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    assert counts.routed == sum(p.numel() for p in experts)


def test_active_counts_what_one_token_uses() -> None:
    """All experts counted, or none. By hand: 5 of 8 experts of 3 * 32 * 24 weights are left out in 2 layers."""
    counts = count_parameters(GROUPED)
    assert counts.total - counts.active == 2 * (8 - 3) * 3 * 32 * 24
    assert count_parameters(DENSE).active == count_parameters(DENSE).total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_are_those_of_torch(name: str) -> None:
    """A product that is forgotten or counted twice. torch counts what really runs; its plain attention computes all S
    tokens instead of the (S + 1) / 2 that are needed on average. Counts are exact."""
    architecture = ARCHITECTURES[name]
    length = 24
    model, batch = build(architecture), make_batch([[length]], length, VOCABULARY)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch, ForwardContext(training=False), Output.loss)
    by_operation = counter.get_flop_counts()["Global"]
    attention = by_operation[torch.ops.aten.bmm]
    counted = (sum(by_operation.values()) - attention + attention * (length + 1) / (2 * length)) / length
    assert forward_flops_per_token(architecture, length) == pytest.approx(counted, rel=1e-9)
    assert training_flops_per_token(architecture, length) == 3 * forward_flops_per_token(architecture, length)


def saved_bytes(model: Transformer, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps, each storage once, without those of parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[object] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive.append(run())  # storages must live, or their addresses are used again
    return sum(kept.values())


def wide(name: str) -> Architecture:
    """An example whose large tensors dwarf the small ones."""
    architecture = ARCHITECTURES[name]
    attention = architecture.attention
    if isinstance(attention, LatentConfig):
        # Values as wide as queries: a CPU pads others and keeps the padded ones.
        attention = replace(attention, nope_head_dim=32, rope_head_dim=16, value_head_dim=48, kv_rank=48)
    return replace(
        architecture,
        model=replace(architecture.model, dim=128, ffn_dim=256),
        attention=attention,
        moe=replace(architecture.moe, expert_dim=96),
        vocab_size=512,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recompute", list(Recompute))
def test_activations_are_near_what_autograd_keeps(name: str, recompute: Recompute) -> None:
    """A forgotten tensor of the size of the experts' rows, or of the logits, makes plans run out of memory.

    The estimate leaves out what is small in a real model (indices, statistics of norms): 2 percent. It is for
    accelerators: norms on a CPU keep one tensor more, and results of some attention kernels must be copied there; both
    are measured and taken off. So is the one recomputed block, which exists only after the forward pass."""
    architecture, tokens = wide(name), 256
    model, batch = build(architecture), make_batch([[64]] * 4, 64, 512)
    for block in model.blocks:
        block.recompute = recompute is Recompute.full
        if isinstance(block.ffn, MoELayer):
            block.ffn.experts.recompute = recompute is Recompute.selective

    def run() -> object:
        return model(batch, ForwardContext(), Output.loss)

    def estimate(some: Architecture, how: Recompute) -> int:
        return memory_per_rank(some, tokens, recompute=how, size=Bytes(compute=4)).activations

    expected = estimate(architecture, recompute)
    if recompute is Recompute.full:
        dense = int(name == "dense")
        shape = replace(architecture.model, num_layers=1, first_dense_layers=dense, mtp_layers=0)
        one = replace(architecture, model=shape)
        expected -= estimate(one, Recompute.none) - (512 + 2 * 128) * 4 * tokens
    extra: list[int] = []
    for norm in (m for m in model.modules() if isinstance(m, nn.RMSNorm)):
        if recompute is not Recompute.full or norm is model.norm:
            norm.register_forward_hook(lambda _m, _args, out: extra.append(out.nbytes))
    for block in model.blocks if recompute is not Recompute.full else []:
        block.attention.output.register_forward_pre_hook(
            lambda _m, args: extra.append(args[0].nbytes if args[0]._base is None else 0)
        )
    actual = saved_bytes(model, run) - sum(extra)
    assert actual == pytest.approx(expected, rel=0.02)


def test_memory_of_a_rank_divides_by_its_degrees() -> None:
    """Experts divided by the dense degree, or dense weights by ep. Powers of two divide these shapes evenly."""
    counts = count_parameters(LATENT)
    whole = memory_per_rank(LATENT, 0)
    assert whole.weights == 4 * counts.total
    assert whole.optimizer == 8 * counts.total
    split = memory_per_rank(LATENT, 0, shard=4, ep=2, expert_shard=2)
    dense = counts.total - counts.routed
    assert split.weights == 4 * (dense // 4 + counts.routed // 4)
    assert memory_per_rank(LATENT, 0, ep=8).gradients == 4 * (dense + counts.routed // 8)
    assert whole.total == sum(vars(whole).values())


def test_longer_sequences_cost_more_attention_only() -> None:
    """A quadratic term on the wrong length: 1024 more tokens of sequence add 512 more of context on average, times
    heads times both widths, times layers, times 2."""
    extra = forward_flops_per_token(LATENT, 2048) - forward_flops_per_token(LATENT, 1024)
    assert extra == 2 * 2 * 4 * (12 + 12) * 512


def test_all_dense_ignores_expert_options() -> None:
    """A dense model must not be refused, or counted, by expert options that it does not use."""
    dense = replace(DENSE, router=replace(DENSE.router, top_k=99))
    assert count_parameters(dense).total == count_parameters(DENSE).total
    with pytest.raises(ValueError, match=r"router\.top_k=99"):
        replace(dense, model=ModelConfig(dim=32))

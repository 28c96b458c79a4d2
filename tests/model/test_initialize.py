"""Initial weights: their statistics, that nothing is forgotten, and that sharding does not change a bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import moe_parallel.model.initialize as module
from moe_kernels.hashing import hash_key
from moe_parallel.engines.native import parallelize
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.initialize import (
    InitConfig,
    fill_normal,
    hashed_normal,
    init_weights,
)
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from tests.model.examples import ARCHITECTURES, GROUPED, LATENT
from tests.ranks import run_threads

COUNT = 1 << 20


def test_numbers_are_standard_normal() -> None:
    """A wrong constant in the hash or in the transform. Over 2^20 numbers each statistic has a known standard error;
    4.5 of them leave one false alarm in 100 000."""
    z = hashed_normal(torch.arange(COUNT), hash_key(1, "a"))
    error = 1 / math.sqrt(COUNT)
    assert abs(float(z.mean())) < 4.5 * error
    assert abs(float(z.square().mean()) - 1) < 4.5 * error * math.sqrt(2)
    assert abs(float(z.pow(3).mean())) < 4.5 * error * math.sqrt(15)
    assert abs(float(z.pow(4).mean()) - 3) < 4.5 * error * math.sqrt(96)
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        seen = float((z.abs() > bound).double().mean())
        assert abs(seen - share) < 4.5 * error * math.sqrt(share * (1 - share)), bound
    assert z.unique().numel() == COUNT


@pytest.mark.parametrize("lag", [1, 2, 63, 64, 1024])
def test_neighbors_are_independent(lag: int) -> None:
    """A weak hash correlates the places of a regular grid: columns or rows of a matrix would repeat. Also of squares,
    which sees shared magnitudes. Standard errors as above (of products of unit variance; of squares variance 4)."""
    z = hashed_normal(torch.arange(COUNT), hash_key(1, "a"))
    error = 1 / math.sqrt(COUNT - lag)
    a, b = z[lag:], z[:-lag]
    assert abs(float((a * b).mean())) < 4.5 * error
    assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) < 4.5 * error * 2


def test_parameters_and_seeds_are_independent() -> None:
    """One stream for all layers: every layer would start as a copy of the first."""
    index = torch.arange(COUNT)
    streams = [
        (1, "layers.0.x"),
        (1, "layers.1.x"),
        (2, "layers.0.x"),
        (12, "layers.0.x"),
        (1, "2layers.0.x"),
    ]
    numbers = [hashed_normal(index, hash_key(seed, name)) for seed, name in streams]
    for i, a in enumerate(numbers):
        for b in numbers[:i]:
            assert abs(float((a * b).mean())) < 4.5 / math.sqrt(COUNT)


def test_value_of_a_place_is_fixed() -> None:
    """A change of the numbers, by any edit of this file, would silently change every run and its resumption. Known
    values of splitmix64 (start 0: outputs of its reference code) guard the hash; the transform is monotonic."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    z = hashed_normal(torch.arange(1, 4), 0)
    for value, output in zip(z.tolist(), outputs):
        uniform = ((output >> 11) + 0.5) / 2**53
        assert 0.5 * math.erfc(-value / math.sqrt(2)) == pytest.approx(uniform, rel=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_left_as_it_was(name: str) -> None:
    """Memory without numbers behaves like some model and trains badly. Everything is poisoned first."""
    model = Transformer(ARCHITECTURES[name])
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    init_weights(model, InitConfig(), 3)
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), key
    assert {key for key, tensor in model.state_dict().items() if (tensor == 1).all()} == {
        key for key in model.state_dict() if key.endswith("norm.weight")
    }
    assert {key for key, tensor in model.state_dict().items() if (tensor == 0).all()} == {
        key for key in model.state_dict() if key.endswith(("router.bias", "router.offset", "_bias"))
    }


def test_standard_deviations() -> None:
    """The wrong matrices scaled by depth. Exactly those that write to the residual stream are; a sample of n has a
    standard deviation good to 1 / sqrt(2 n), five of which are allowed."""
    model = Transformer(GROUPED)
    init_weights(model, InitConfig(std=0.1, scale_output_by_depth=True), 3)
    outputs = ("attention.output.weight", "ffn.down.weight", "ffn.shared.down.weight", "ffn.experts.down")
    scaled = 0
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        expected = 0.1
        if name.endswith(outputs):
            expected, scaled = 0.1 / math.sqrt(2 * 3), scaled + 1
        error = 1 / math.sqrt(2 * parameter.numel())
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(expected, rel=5 * error), name
    assert scaled == 3 + 1 + 2 + 2


def test_unknown_parameters_are_refused() -> None:
    """A new kind of parameter must get a rule, not whatever memory held."""
    model = Transformer(GROUPED)
    model.layers[0].gain = nn.Parameter(torch.empty(3))
    with pytest.raises(ValueError, match=r"no rule says how to initialize layers.0.gain of shape \(3,\)"):
        init_weights(model, InitConfig(), 0)
    model = Transformer(GROUPED)
    model.register_buffer("table", torch.empty(3))
    with pytest.raises(ValueError, match="buffer table"):
        init_weights(model, InitConfig(), 0)
    with torch.device("meta"):
        model = Transformer(GROUPED)
    with pytest.raises(ValueError, match=r"embedding\.weight has no memory yet"):
        init_weights(model, InitConfig(), 0)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that starts at the wrong place, on tensors of one to three dimensions."""
    for shape in [(300, 7), (4, 30, 9), (5, 1, 3)]:
        whole, chunked = torch.empty(shape), torch.empty(shape)
        fill_normal(whole, 1.0, 5)
        monkeypatch.setattr(module, "_CPU_CHUNK", 16)
        fill_normal(chunked, 1.0, 5)
        monkeypatch.undo()
        assert torch.equal(whole, chunked)
        flat = hashed_normal(torch.arange(whole.numel()), 5).float()
        assert torch.equal(whole.flatten(), flat)


PLACEMENTS: list[tuple[Placement, Placement]] = [
    (Shard(0), Replicate()),
    (Replicate(), Shard(1)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(2), Shard(0)),
]


def check_shards() -> int:
    """On one of 4 ranks: every shard of tensors that divide unevenly is a piece of the whole one, bit by bit."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    checked = 0
    for shape in [(8, 6, 4), (5, 3, 7), (1, 9, 2)]:
        whole = torch.empty(shape)
        fill_normal(whole, 1.0, 7)
        for placements in PLACEMENTS:
            part = distribute_tensor(torch.zeros(shape), mesh, placements)
            fill_normal(part, 1.0, 7)
            expected = distribute_tensor(whole, mesh, placements)
            assert torch.equal(part.to_local(), expected.to_local()), (shape, placements)
            checked += 1
    return checked


def check_parallel_models() -> int:
    """On one of 4 ranks: models split by the engine, in several layouts, start as the whole model does."""
    checked = 0
    for ep, shard in [(1, 4), (4, 4), (2, 4), (2, 2), (4, 1)]:
        for architecture in (replace(GROUPED, vocab_size=51), LATENT):
            whole = Transformer(architecture)
            init_weights(whole, InitConfig(), 11)
            expected = whole.state_dict()
            config = ParallelConfig(ep=ep, shard=shard)
            mesh = ParallelMesh(make_layout(config, 4, architecture.moe.num_experts), "cpu")
            with torch.device("meta"):
                model = Transformer(architecture)
            model = parallelize(model, mesh, config, AllToAllConfig(), torch.float32).to_empty(device="cpu")
            init_weights(model, InitConfig(), 11)
            for name, tensor in model.state_dict().items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(full, expected[name]), (ep, shard, name)
                checked += 1
    return checked


def check_ranks() -> tuple[int, int]:
    """All checks of one rank, for one start of the threads."""
    return check_shards(), check_parallel_models()


def test_sharding_does_not_change_a_bit() -> None:
    """A shard that draws the numbers of another place, or every rank the same ones: the model would depend on the
    number of ranks, and a comparison of layouts would compare models."""
    assert len(set(run_threads(check_ranks, 4, timeout=60))) == 1

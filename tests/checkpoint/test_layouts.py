"""Checkpoints of a real model: what any layout has written, any other reads, bit for bit, and one process too.

A row is a number of ranks and degrees of parallelism. The writer gathers its tensors whole by torch, without
the code under test; the readers start from other weights and gather theirs the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.initialize import InitConfig
from tests.parity.cases import OPTIM, Case
from tests.ranks import run_ranks

Degrees = dict[str, int | None]
CASE = Case("checkpoint", world=4, tied=True, balance={"bias_rate": 0.1})
WRITTEN: dict[str, Degrees] = {
    "sharded": {"ep": 2, "shard": 4},
    "replicated": {"ep": 4, "shard": 1},
    "mixed": {"ep": 1, "shard": 2, "tp": 2},
}
"""On four ranks."""
READ: dict[int, list[Degrees]] = {
    4: [{"ep": 4, "shard": 4}, {"ep": 1, "shard": 2}, {"ep": 2, "shard": 2, "tp": 2}],
    2: [{"ep": 2, "shard": 1}, {"ep": 1, "shard": 2}],
    1: [{}],
}


def engine_of(degrees: Degrees, seed: int) -> NativeEngine:
    parallel = ParallelConfig(**degrees)  # type: ignore[arg-type]
    mesh = ParallelMesh(make_layout(parallel, dist.get_world_size(), CASE.num_experts), "cpu")
    engine = NativeEngine(CASE.architecture(), mesh, parallel, OPTIM, torch.device("cpu"), torch.float32)
    engine.init_weights(InitConfig(std=0.1), seed)
    return engine


def train(engine: NativeEngine) -> None:
    """One step, so that moments and the routers' bias are what no initialization gives."""
    batch = CASE.batch(0, 0, engine.layout.batch_rank(dist.get_rank()))
    sums, _ = engine.forward_backward([batch], 0, 100, 100)
    totals = sums.summed(engine.group)
    engine.step(OPTIM.learning_rate, engine.gradient_norm())
    engine.update_routers(totals)


def gathered(engine: NativeEngine) -> dict[str, Tensor]:
    """All of model and optimizer by torch's names, whole, on every rank."""
    found = dict(engine.model.state_dict())
    for name, parameter in engine.model.named_parameters():
        found |= {f"{name}/{moment}": value for moment, value in engine.optimizer.state.get(parameter, {}).items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in found.items()}


def checkpointer(folder: Path) -> Checkpointer:
    config = CheckpointConfig(every_steps=0, asynchronous=False)
    return Checkpointer(folder, config, dist.group.WORLD if dist.get_world_size() > 1 else None)


def write(folder: Path) -> None:
    for name, degrees in WRITTEN.items():
        engine = engine_of(degrees, seed=1)
        train(engine)
        saver = checkpointer(folder / name)
        saver.save(1, engine.checkpoint_state(), {}, {})
        saver.close()
        whole = gathered(engine)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{name}.pt")
        dist.barrier()


def read(folder: Path) -> list[str]:
    """What differs after loading, over all layouts of so many ranks."""
    wrong = []
    for degrees in READ[dist.get_world_size()]:
        engine = engine_of(degrees, seed=2)
        for name in WRITTEN:
            expected = torch.load(folder / f"{name}.pt", weights_only=True)
            loader = checkpointer(folder / name)
            loader.load(folder / name / "step_00000001", engine.checkpoint_state(), {})
            loader.close()
            found = gathered(engine)
            names = found.keys() | expected.keys()
            equal = {n for n in found.keys() & expected.keys() if torch.equal(found[n], expected[n])}
            wrong += [f"{name} as {degrees}: {n}" for n in sorted(names - equal)]
    return wrong


def write_and_read(folder: Path) -> list[str]:
    write(folder)
    return read(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder, run_ranks(write_and_read, 4, folder)


def test_any_layout_reads_any_other(written: tuple[Path, list[Any]]) -> None:
    """Would catch: experts of another ep at the wrong place, a shard of a shard put back in the wrong order, moments
    that stay those of the reader, a bias that is not saved."""
    folder, on_four = written
    assert on_four == [[]] * 4
    assert run_ranks(read, 2, folder) == [[]] * 2
    assert run_ranks(read, 1, folder) == [[]]


def test_the_reference_is_of_a_trained_model(written: tuple[Path, list[Any]]) -> None:
    """Would catch: a comparison of what is zero or equal anyway."""
    reference = {name: torch.load(written[0] / f"{name}.pt", weights_only=True) for name in WRITTEN}
    for tensors in reference.values():
        moments = [name for name in tensors if name.endswith("/exp_avg")]
        assert len(moments) > 20
        assert all(tensors[name].abs().sum() > 0 for name in moments)
        assert any(tensors[name].abs().sum() > 0 for name in tensors if name.endswith("router.bias"))

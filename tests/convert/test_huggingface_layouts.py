"""Models of transformers on several ranks: every layout computes their logits and their gradients.

In float32 and relative to the largest of each tensor, as gradients of one process are compared in
tests/model/test_hugging_face.py: what is found is some tens of roundings (3e-6), and weights of a wrong expert, or a
rank's part read from a wrong place, are off by more than 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_data.batch import TokenBatch
from moe_parallel.convert.fill import load
from moe_parallel.convert.huggingface.families import architecture_of_config
from moe_parallel.convert.huggingface.folder import open_model
from moe_parallel.convert.huggingface.weights import import_weights
from moe_parallel.convert.lazy import Given, whole
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.architecture import Architecture
from moe_parallel.optim import OptimConfig
from tests.batches import make_batch
from tests.convert.huggingface_models import NAMES, VOCABULARY, in_memory, make, stored
from tests.ranks import run_threads

LAYOUTS = [{"ep": 1}, {"ep": 2}, {"ep": 4}, {"ep": 2, "tp": 2}]
DENSE_LAYOUTS = [{"ep": 1}, {"tp": 2}]
WORLD, LENGTH = 4, 24
TOLERANCE = 1e-4

Found = tuple[Tensor, dict[str, Tensor]]
"""Logits of this rank's row, and gradients."""


def row(number: int) -> TokenBatch:
    """One sequence of one document, as transformers sees it without a mask of its own."""
    return make_batch([[LENGTH]], LENGTH, VOCABULARY, number)


def on_ranks(folders: dict[str, Path]) -> dict[tuple[str, str], Found]:
    """All models in all layouts on this rank; weights are read by `load`, each rank its own."""
    found = {}
    for name, folder in folders.items():
        source = open_model(folder)
        for degrees in layouts_of(source.architecture):
            parallel = ParallelConfig(**degrees)
            layout = make_layout(parallel, WORLD, source.architecture.moe.num_experts)
            engine = NativeEngine(
                source.architecture, ParallelMesh(layout, "cpu"), parallel, OptimConfig(), torch.device("cpu"),
                torch.float32, torch.float32,
            )  # fmt: skip
            load(engine.checkpoint_state(), source.weights)
            batch = row(layout.batch_rank(dist.get_rank()))
            targets = batch.num_targets * layout.batch_ranks
            engine.forward_backward([batch], 0, targets, batch.num_valid * layout.batch_ranks)
            gradients = {key: full(p.grad) for key, p in engine.model.named_parameters() if p.grad is not None}
            found[name, str(degrees)] = (engine.logits(batch), gradients)
    return found


def layouts_of(architecture: Architecture) -> list[dict[str, int]]:
    return LAYOUTS if architecture.num_moe_layers else DENSE_LAYOUTS


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def of_transformers(model: nn.Module, config: dict, rows: int) -> Found:
    """Logits of all rows and gradients of the mean loss, under our names."""
    tokens = torch.cat([row(number).token_BS for number in range(rows)])
    targets = torch.cat([row(number).target_BS for number in range(rows)])
    logits = model(tokens).logits
    model.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=int(targets.min())).backward()
    theirs = in_memory(model)
    theirs |= {key: Given(p.grad, key) for key, p in model.named_parameters()}
    ours = import_weights(config, theirs)
    return logits.detach(), {key: whole(lazy) for key, lazy in ours.items() if not key.endswith("router.bias")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    models = {name: make(name) for name in NAMES}
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    configs = {name: stored(model, folders[name])[0] for name, model in models.items()}
    return models, configs, run_threads(on_ranks, WORLD, folders)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_transformers(compared, name: str) -> None:
    """Experts on the wrong rank, a part of a stack that is read from another place, a bias whose other half has no
    gradient."""
    models, configs, ranks = compared
    for degrees in layouts_of(architecture_of_config(configs[name])):
        rows = WORLD // degrees.get("tp", 1)
        logits, gradients = of_transformers(models[name], configs[name], rows)
        for rank, found in enumerate(ranks):
            mine, my_gradients = found[name, str(degrees)]
            where = f"{degrees}, rank {rank}"
            expected = logits[rank * rows // WORLD][None]
            assert float((mine - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()), where
            assert my_gradients.keys() == gradients.keys(), where
            for key, gradient in gradients.items():
                scale = float(gradient.abs().max())
                assert scale > 0, key
                assert float((my_gradients[key] - gradient).abs().max()) <= TOLERANCE * scale, f"{where}: {key}"

"""What a pipeline does besides gradients, which `tests/parity/test_pipelines.py` compares: passes without gradient,
collectives of FSDP, checkpoints, the name of a bad module. One launch of four ranks, another of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, PipelineSchedule, make_layout
from moe_parallel.model.initialize import InitConfig
from tests.batches import make_batch
from tests.parity.cases import OPTIM, SEED, SEQUENCE_TOKENS, VOCABULARY, Case, run_steps
from tests.ranks import run_ranks

PLAIN = Case("", 1, num_layers=5, micro_batches=4, balance={"global_coefficient": 0.3, "bias_rate": 0.05})
CARRY = Case("", 1, num_layers=5, router={"logit_residual": True})
FURTHER = Case("", 1, num_layers=5, mtp_layers=1, tied=True, router={"logit_residual": True})
V = {"schedule": PipelineSchedule.dual_pipe_v}
PIPELINES: list[tuple[Case, dict[str, Any]]] = [
    (FURTHER, {"pp": 2, "shard": 2}),
    (FURTHER, {"pp": 2, "tp": 2, "schedule": PipelineSchedule.interleaved}),
    (CARRY, {"pp": 2, "ep": 2, **V}),
    (CARRY, {"pp": 4}),
]
NO_CHECKPOINTS = CheckpointConfig(every_steps=0, keep_last=9, asynchronous=False)


def build(case: Case, **degrees: Any) -> NativeEngine:
    """An engine with its first weights."""
    parallel = ParallelConfig(**degrees)
    mesh = ParallelMesh(make_layout(parallel, dist.get_world_size(), case.num_experts), "cpu")
    cpu, double = torch.device("cpu"), torch.float64
    engine = NativeEngine(case.architecture(), mesh, parallel, OPTIM, cpu, double, double)
    engine.init_weights(InitConfig(std=0.1), SEED)
    return engine


def passes(case: Case, **degrees: Any) -> dict[str, Any]:
    """An evaluation, logits, and the name of the first module that a bad weight spoils."""
    engine = build(case, **degrees)
    batch = make_batch([[5, 7], [3, 4, 2]], SEQUENCE_TOKENS, VOCABULARY)
    totals = engine.evaluate(batch).summed(engine.group)
    seen = {
        # Of a batch that all ranks have, each place within a stage adds its own, or its part of the sequences.
        "losses": totals.losses / engine.layout.batch_ranks,
        "counts": totals.count_LE / engine.layout.batch_ranks,
        "logits": engine.logits(make_batch([[7]], 7, VOCABULARY)),
    }
    for name, parameter in engine.model.named_parameters():
        if name == "layers.2.attention.output.weight":
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).data.fill_(float("nan"))
    return seen | {"bad": engine.first_nonfinite_module(batch)}


class Calls(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with Calls() as calls:
        yield calls.count


def traffic(micro_batches: int, **degrees: Any) -> tuple[int, int, int]:
    """(reductions, gathers, FSDP groups of this rank) in one step."""
    engine = build(PLAIN, **degrees)
    rank = engine.layout.batch_rank(dist.get_rank())
    batches = [PLAIN.batch(0, m, rank) for m in range(micro_batches)]
    with counted() as count:
        engine.forward_backward(batches, 0, 40, 40)
    assert engine.pipeline is not None
    groups = {
        id(module._get_fsdp_state()._fsdp_param_group)
        for stage in engine.pipeline.stages.values()
        for module in stage.modules()
        if hasattr(module, "_get_fsdp_state") and module._get_fsdp_state()._fsdp_param_group is not None
    }
    return count["_reduce_scatter_base_"], count["_allgather_base_"], len(groups)


def state(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Weights and moments of this rank, whole."""
    tensors = engine.checkpoint_state().tensors()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}  # type: ignore[union-attr]


def save(folder: Path, name: str, case: Case, **degrees: Any) -> dict[str, torch.Tensor]:
    """Two steps, then a checkpoint."""
    engine = build(case, **degrees)
    run_steps(engine, case, dict)
    saver = Checkpointer(folder / name, NO_CHECKPOINTS, dist.group.WORLD)
    saver.save(2, engine.checkpoint_state(), {}, {})
    saver.close()
    return state(engine)


def load(folder: Path, name: str, case: Case, **degrees: Any) -> dict[str, torch.Tensor]:
    """Into other first weights."""
    engine = build(case, **degrees)
    engine.init_weights(InitConfig(std=0.1), SEED + 1)
    loader = Checkpointer(folder / name, NO_CHECKPOINTS, dist.group.WORLD)
    loader.load(folder / name / "step_00000002", engine.checkpoint_state(), {})
    loader.close()
    return state(engine)


TIED = Case("", 4, pp=2, num_layers=5, tied=True, micro_batches=2, balance={"bias_rate": 0.05})
WHOLE = Case("", 1, num_layers=5, tied=True, micro_batches=2, balance={"bias_rate": 0.05})


def on_four(folder: Path) -> dict[str, Any]:
    """All that needs a pipeline."""
    interleaved = PipelineSchedule.interleaved_zero_bubble
    engine = build(PLAIN, pp=2, ep=2)
    case = Case("", 4, pp=2, num_layers=5, micro_batches=4, balance=PLAIN.balance)
    batches = [case.batch(0, m, engine.layout.batch_rank(dist.get_rank())) for m in range(4)]
    error = engine.forward_backward(batches, 0, 70, 80)[1]
    return {
        "passes": [passes(case, **degrees) for case, degrees in PIPELINES],
        "traffic": {m: traffic(m, pp=2) for m in (2, 4)},
        "kept": {m: traffic(m, pp=2, reshard_after_forward=False) for m in (2, 4)},
        "scheduled": {m: traffic(m, pp=2, schedule=interleaved) for m in (2, 4)},
        "estimate": (error, engine.previous_count_LIE),
        "saved": save(folder, "stages", TIED, pp=2),
        "loaded": load(folder, "one", TIED, pp=2, schedule=interleaved),
    }


def on_one(folder: Path) -> dict[str, Any]:
    """The same without one; after the four it reads theirs, before them it writes."""
    case = Case("", 1, num_layers=5, micro_batches=4, rows=2, balance=PLAIN.balance)
    engine = build(case)
    error = engine.forward_backward([case.batch(0, m, 0) for m in range(4)], 0, 70, 80)[1]
    return {
        "passes": [passes(case) for case in (FURTHER, CARRY)],
        "estimate": (error, engine.previous_count_LIE),
        "saved": save(folder, "one", WHOLE),
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    """What the stages saved, in one process."""
    return load(folder, "stages", WHOLE)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank and what four ranks found."""
    folder = tmp_path_factory.mktemp("pipeline")
    (one,) = run_ranks(on_one, 1, folder)
    four = run_ranks(on_four, 4, folder)
    (again,) = run_ranks(read, 1, folder)
    return {"one": one, "four": four, "read": again}


def test_passes_without_gradient(seen):
    """Would catch: a stage that is left out or run twice, a carry that is lost between stages, logits that only the
    last stage has, a loss that is counted on every stage."""
    whole = dict(zip((id(FURTHER), id(CARRY)), seen["one"]["passes"]))
    for rank in seen["four"]:
        for (case, degrees), got in zip(PIPELINES, rank["passes"], strict=True):
            wanted = whole[id(case)]
            for name in ("losses", "counts", "logits"):
                # As in the parity suite: sums of some hundred terms in another order.
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=1e-12, msg=f"{degrees}: {name}")


def test_first_nonfinite_module(seen):
    """Would catch: in a V the last stage's module, which rank 0 has, named before the one that spoiled it."""
    for place in (*seen["one"]["passes"], *(p for rank in seen["four"] for p in rank["passes"])):
        assert place["bad"] == "layers.2.attention.output"


def test_gradients_are_reduced_once(seen):
    """Would catch: a reduction or, where weights are kept, a gather for every micro-batch."""
    for rank in seen["four"]:
        for name in ("traffic", "kept", "scheduled"):
            for micro_batches, (reductions, gathers, groups) in rank[name].items():
                assert reductions == groups > 2, (name, micro_batches)
                if name != "traffic":
                    assert gathers == groups, (name, micro_batches)


def test_counts_of_all_stages(seen):
    """Would catch: a look-ahead that knows only its own stage's layers after a resume, an error of one stage."""
    error, counts = seen["one"]["estimate"]
    for rank in seen["four"]:
        assert torch.equal(rank["estimate"][1], counts)
        torch.testing.assert_close(rank["estimate"][0], error, rtol=1e-12, atol=0)


def test_checkpoints(seen):
    """Would catch: layers of other stages lost or foreign, a shared weight saved twice or only from one stage. To the
    last bit: nothing is computed."""
    together: dict[str, torch.Tensor] = {}
    for rank in seen["four"]:
        for name, tensor in rank["saved"].items():
            assert torch.equal(together.setdefault(name, tensor), tensor), name
    assert together.keys() == seen["read"].keys() == seen["one"]["saved"].keys()
    for name, tensor in together.items():
        assert torch.equal(tensor, seen["read"][name]), name
    for rank in seen["four"]:
        assert "model.embedding.weight" in rank["loaded"]
        assert "model.head.weight" not in rank["loaded"]
        for name, tensor in rank["loaded"].items():
            assert torch.equal(tensor, seen["one"]["saved"][name]), name

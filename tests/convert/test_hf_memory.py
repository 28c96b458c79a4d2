"""Models larger than the memory that a process may have: read, stored and exported part by part.

Each case runs in a process of its own whose memory (RLIMIT_DATA: what it allocates or maps for itself) is limited to
what it has after importing torch and a share of the model. A twin does the same with the whole model, and must fail:
otherwise the limit would limit nothing.
"""

from __future__ import annotations

import filecmp
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.fill import build_model, load
from moe_parallel.convert.huggingface.files import SINGLE
from moe_parallel.convert.huggingface.folder import contents, open_model
from moe_parallel.convert.huggingface.write_files import write_folder
from moe_parallel.convert.lazy import Constant, Lazy
from moe_parallel.convert.lazy_state import LazyState
from moe_parallel.convert.pretrained import shapes_of
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig
from tests.ranks import forked

SHAPE = Architecture(
    model=ModelConfig(dim=1024, num_layers=9),
    attention=GroupedQueryConfig(num_heads=8, num_kv_heads=4),
    moe=MoEConfig(num_experts=16, expert_dim=512, num_shared_experts=0),
    router=TokenChoiceConfig(top_k=2, normalize=True),
    balance=BalanceConfig(),
    vocab_size=512,
)
MIB = 2**20
MODEL_MIB = 4 * sum(torch.Size(shape).numel() for shape in shapes_of(SHAPE).values()) // MIB
"""975, in float32."""


def numbers() -> dict[str, Lazy]:
    """Another one for each weight, which bfloat16 holds."""
    return {name: Constant(shape, float(n + 1)) for n, (name, shape) in enumerate(shapes_of(SHAPE).items())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In the memory file system where there is one with room: a disk would take most of the time."""
    shared = Path("/dev/shm")
    fast = shared.is_dir() and shutil.disk_usage(shared).free > 6 * MODEL_MIB * MIB
    path = (
        tmp_path_factory.mktemp("large") if not fast else shared / f"moe_parallel_{tmp_path_factory.getbasetemp().name}"
    )
    path.mkdir(exist_ok=True)
    config, weights = contents(SHAPE, numbers(), torch.bfloat16)
    write_folder(path / "model", config, weights, lambda folder: None)
    yield path
    shutil.rmtree(path)


def _limited(action: Callable[[Path], None], path: Path, limit_mib: int, answer: Path) -> None:
    torch.set_num_threads(1)
    used_mib = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) // 1024
    resource.setrlimit(resource.RLIMIT_DATA, ((used_mib + limit_mib) * MIB,) * 2)
    try:
        action(path)
        answer.write_text("done")
    except BaseException:
        answer.write_text(traceback.format_exc())


def run(action: Callable[[Path], None], path: Path, limit_mib: int) -> str:
    """`done`, or what went wrong, in a process that may allocate so much."""
    context = forked()
    answer = path / "answer"
    answer.unlink(missing_ok=True)
    process = context.Process(target=_limited, args=(action, path, limit_mib, answer))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return answer.read_text() if answer.exists() else f"ended with {process.exitcode}"


# -- what is run ---------------------------------------------------------------------------------------------------


def start_on_two_ranks(path: Path) -> None:
    """What rank 0 of two does when a training starts: build the engine, read its half. No rank waits for another."""
    _start(path, 2)


def start_alone(path: Path) -> None:
    _start(path, 1)


def _start(path: Path, ranks: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    parallel = ParallelConfig(shard=ranks)
    mesh = ParallelMesh(make_layout(parallel, ranks, SHAPE.moe.num_experts), "cpu")
    engine = NativeEngine(SHAPE, mesh, parallel, OptimConfig(), torch.device("cpu"), torch.float32)
    load(engine.checkpoint_state(), open_model(path / "model").weights)
    wanted = numbers()
    for name, tensor in engine.checkpoint_state().tensors().items():
        lazy = wanted.get(name.removeprefix("model."))
        if isinstance(lazy, Constant) and name.startswith("model."):
            held = tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor
            assert isinstance(held, torch.Tensor)
            assert held.flatten()[0] == held.flatten()[-1] == lazy.value, name


def store(path: Path) -> None:
    """As scripts/import_hf.py --run does."""
    saver = Checkpointer(path / "checkpoints", CheckpointConfig(asynchronous=False))
    saver.save(0, LazyState(open_model(path / "model").weights), {}, {})


def export(path: Path) -> None:
    """As scripts/export_hf.py does."""
    weights = weights_of_checkpoint(path / "checkpoints" / "step_00000000")
    config, theirs = contents(SHAPE, weights, torch.bfloat16)
    write_folder(path / "exported", config, theirs, lambda folder: None, jobs=2)


def whole_model(path: Path) -> None:
    build_model(SHAPE, open_model(path / "model").weights)


# -- the tests -----------------------------------------------------------------------------------------------------


def test_a_start_reads_what_its_rank_holds(folder: Path) -> None:
    """Would catch: a rank that reads the whole model, a map of whole files, a layer that lies in memory twice."""
    limit = MODEL_MIB // 2 + 150
    assert run(start_on_two_ranks, folder, limit) == "done"
    assert "allocate memory" in run(start_alone, folder, limit)


def test_storing_and_exporting_hold_parts(folder: Path) -> None:
    """Would catch: tensors that pile up until a file is closed, in our code or torch's; files that are read whole."""
    limit = 300
    assert limit < MODEL_MIB / 3
    assert run(store, folder, limit) == "done"
    assert run(export, folder, limit) == "done"
    assert "allocate memory" in run(whole_model, folder, limit)
    assert filecmp.cmp(folder / "model" / SINGLE, folder / "exported" / SINGLE, shallow=False)

"""Import and export of Hugging Face folders against safetensors copying the same bytes.

A random model of 256 million parameters, 16 experts a layer with three tensors each, bfloat16, in shards of 100 MB. In
turn, several times in one run, all in one process:

- copy: the library's load_file and save_file, shard by shard, each synced to the disk as ours are.
- load: the library's load_file and a cast to float32, all shards, kept in memory.
- start: what one rank does at the start of a training, which fills a whole float32 model in memory.
- import: the folder to a checkpoint of a run, float32, so twice the bytes are written (scripts/import_hf.py --run).
- export: that checkpoint to a folder in bfloat16, so twice the bytes are read (scripts/export_hf.py): by one thread,
  by two, and after comparing the checkpoint's checksums, which reads it once more.

Rates count the bytes of the folder. Before each the system is asked to forget the files (posix_fadvise). Memory is what
the process holds at most beyond what it held before (resident, so files that are mapped count).

    python benchmarks/convert.py             prints a table
    python benchmarks/convert.py --write     puts it into docs/benchmarks.md too
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from report import processor, write_between
from safetensors.torch import load_file, save_file

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.huggingface.folder import contents, open_model
from moe_parallel.convert.huggingface.write_files import write_folder
from moe_parallel.convert.lazy import Given
from moe_parallel.convert.lazy_state import LazyState
from moe_parallel.convert.pretrained import shapes_of
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- convert -->", "<!-- /convert -->"
SHARD_BYTES = 10**8
SHAPE = Architecture(
    model=ModelConfig(dim=1024, num_layers=9),
    attention=GroupedQueryConfig(num_heads=8, num_kv_heads=4, qk_norm=QKNorm.head),
    moe=MoEConfig(num_experts=16, expert_dim=512, num_shared_experts=0),
    router=TokenChoiceConfig(top_k=2, normalize=True),
    balance=BalanceConfig(),
    vocab_size=512,
)


def make(folder: Path) -> int:
    """The model's folder, of numbers that no file system can make smaller; its bytes."""
    weights = {
        name: Given(torch.randn(shape, generator=torch.Generator().manual_seed(number)), name)
        for number, (name, shape) in enumerate(shapes_of(SHAPE).items())
    }
    config, theirs = contents(SHAPE, weights, torch.bfloat16)
    write_folder(folder, config, theirs, lambda partial: None, SHARD_BYTES)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def copy(source: Path, target: Path) -> None:
    """The library's own way, a shard in memory at a time."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), target / file.name, metadata={"format": "pt"})
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_by_library(source: Path) -> list[dict[str, torch.Tensor]]:
    return [{n: t.float() for n, t in load_file(file).items()} for file in sorted(source.glob("*.safetensors"))]


def take_in(source: Path, target: Path) -> None:
    saver = Checkpointer(target, CheckpointConfig(asynchronous=False))
    saver.save(0, LazyState(open_model(source).weights), {}, {})


def export(source: Path, target: Path, jobs: int, verify: bool) -> None:
    checkpoint = source / "step_00000000"
    if verify:
        Checkpointer(source, CheckpointConfig()).verify(checkpoint)
    config, theirs = contents(SHAPE, weights_of_checkpoint(checkpoint), torch.bfloat16)
    write_folder(target, config, theirs, lambda partial: None, SHARD_BYTES, jobs)


def memory(field: str) -> float:
    """A line of the process's status, in MB."""
    return float(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def measure(action: Callable[[], Any], reads: Path) -> tuple[float, float]:
    """Seconds, and the most memory in MB beyond what there was."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for file in (f for f in reads.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    Path("/proc/self/clear_refs").write_text("5")  # the most that was ever held begins anew
    before, started = memory("VmRSS"), time.perf_counter()
    kept = action()
    took = time.perf_counter() - started
    del kept
    return took, memory("VmHWM") - before


def rounds(place: Path, number: int) -> tuple[int, list[dict[str, tuple[float, float]]]]:
    """Bytes of the folder; seconds and memory of each action in each round."""
    source, stored, out = place / "model", place / "checkpoints", place / "out"
    size = make(source)
    actions: dict[str, tuple[Callable[[], Any], Path]] = {
        "copy": (lambda: copy(source, out), source),
        "load": (lambda: read_by_library(source), source),
        "start": (lambda: build_model(SHAPE, open_model(source).weights), source),
        "import": (lambda: take_in(source, stored), source),
        "export": (lambda: export(stored, out, 1, False), stored),
        "export, two threads": (lambda: export(stored, out, 2, False), stored),
        "export, checksums first": (lambda: export(stored, out, 1, True), stored),
    }
    found = []
    for index in range(number + 1):
        row = {}
        for name, (action, reads) in actions.items():
            row[name] = measure(action, reads)
            shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(stored)
        if index:  # the first round loads code
            found.append(row)
    return size, found


def table(size: int, found: list[dict[str, tuple[float, float]]]) -> str:
    """A line for each action. Ratios are taken within a round and then their median."""

    def spread(values: list[float], digits: int = 2) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    lines = ["| what | MB/s of the folder | **of copying** | of loading | peak memory, MB |", "|---|---|---|---|---|"]
    for name in found[0]:
        lines.append(
            f"| {name} | {spread([size / 1e6 / row[name][0] for row in found], 0)} "
            f"| {spread([row['copy'][0] / row[name][0] for row in found])} "
            f"| {spread([row['load'][0] / row[name][0] for row in found])} "
            f"| {max(row[name][1] for row in found):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache", help="on the disk to measure")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    place = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        size, found = rounds(place, arguments.rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    facts = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, folder of {size / 1e6:,.0f} MB, load of "
        f"the machine {load:.0f} before and {os.getloadavg()[0]:.0f} after; `make bench-convert`"
    )
    notes = f"Median of {arguments.rounds} rounds (smallest-largest); memory is the largest. A ratio above 1 is faster."
    text = f"{facts}\n\n{table(size, found)}\n\n{notes}"
    print(text)
    if arguments.write:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

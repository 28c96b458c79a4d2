"""Checkpoints against the disk that they go to, and how long a killed run takes to train again.

Saving and loading: the native engine's state of a small mixture-of-experts model (weights and both moments, float32) on
1, 2 and 4 ranks, sharded over all of them. In turn, several times in one run:

- raw write: each rank writes its share of the same bytes from memory into a file of its own, in blocks of 16 MiB, and
  syncs it; the slowest rank.
- save: `checkpoint.asynchronous=false`, until the checkpoint is durable and has its name.
- save in the background: how long training stands still, and how long until the checkpoint is durable. Nothing else
  runs meanwhile.
- raw read: each rank reads its share of the checkpoint's own files into one buffer.
- load, with and without `checkpoint.verify`.

Before each read the system is asked to forget the files (posix_fadvise), so they come from the disk, or from what lies
behind it: a virtual disk may have a cache of its own.

Kill: `torchrun --max-restarts` runs train.py on two ranks; one of them gets SIGKILL. Until "resuming from" is printed,
and until the first step after that is in metrics.jsonl.

    python benchmarks/checkpoint.py             prints a table
    python benchmarks/checkpoint.py --write     puts it into docs/benchmarks.md too
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from report import processor, write_between

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.initialize import InitConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- checkpoint -->", "<!-- /checkpoint -->"
BLOCK = 2**24
RANKS = (1, 2, 4)
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def engine(layers: int) -> NativeEngine:
    """A model of 4 million parameters a layer, with moments of numbers that no file system can make smaller."""
    parallel = ParallelConfig(ep=1)
    shape = Architecture(
        model=ModelConfig(dim=256, num_layers=layers, first_dense_layers=0),
        attention=GroupedQueryConfig(num_heads=4, num_kv_heads=4),
        moe=MoEConfig(num_experts=16, expert_dim=320),
        router=TokenChoiceConfig(top_k=2),
        balance=BalanceConfig(),
        vocab_size=1024,
    )
    mesh = ParallelMesh(make_layout(parallel, dist.get_world_size(), shape.moe.num_experts), "cpu")
    made = NativeEngine(shape, mesh, parallel, OptimConfig(), torch.device("cpu"), torch.float32)
    made.init_weights(InitConfig(), 1)
    for parameter in made.model.parameters():
        parameter.grad = parameter.detach().clone()
    made.step(1e-4, torch.tensor(1.0))
    return made


def seconds(action: Callable[[], Any]) -> float:
    """Of the slowest rank, from a common start."""
    dist.barrier()
    started = time.perf_counter()
    action()
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def forget(files: list[Path]) -> None:
    """Ask the system to drop what it keeps of these files in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def raw_write(file: Path, block: memoryview, size: int) -> None:
    """`size` bytes from memory, until they are on the disk."""
    with file.open("wb", buffering=0) as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: min(len(block), size - start)])
        os.fsync(stream.fileno())


def raw_read(files: list[Path]) -> None:
    """All of these files through one buffer."""
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def worker(folder: Path, layers: int, rounds: int) -> None:
    """One rank: all rounds; rank 0 prints the numbers."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made = engine(layers)
    state = made.checkpoint_state()
    block = memoryview(bytearray(os.urandom(BLOCK)))
    options = {"every_steps": 0, "keep_last": 1}
    now = Checkpointer(folder, CheckpointConfig(**options, asynchronous=False), dist.group.WORLD)
    later = Checkpointer(folder, CheckpointConfig(**options), dist.group.WORLD)
    trusting = Checkpointer(folder, CheckpointConfig(**options, verify=False), dist.group.WORLD)
    now.save(0, state, {}, {})  # not counted: the first save loads code
    path = now.latest()
    assert path is not None
    size = sum(file.stat().st_size for file in path.iterdir())
    found: list[dict[str, float]] = []
    for index in range(1, rounds + 1):
        row = {"raw write": seconds(lambda: raw_write(folder / f"raw_{rank}", block, size // ranks))}
        (folder / f"raw_{rank}").unlink()
        row["save"] = seconds(lambda: now.save(2 * index, state, {}, {}))  # noqa: B023
        started = time.perf_counter()
        row["blocked"] = seconds(lambda: later.save(2 * index + 1, state, {}, {}))  # noqa: B023
        later.wait()
        row["durable"] = time.perf_counter() - started
        path = later.latest()
        assert path is not None
        files = sorted(path.iterdir(), key=lambda file: (-file.stat().st_size, file.name))
        for name, action in {
            "raw read": lambda: raw_read(files[rank::ranks]),  # noqa: B023
            "load": lambda: now.load(path, state, {}),  # noqa: B023
            "load unverified": lambda: trusting.load(path, state, {}),  # noqa: B023
        }.items():
            dist.barrier()
            forget(files)
            row[name] = seconds(action)
        found.append(row)
    for one in (now, later, trusting):
        one.close()
    if rank == 0:
        print("RESULT " + json.dumps({"ranks": ranks, "bytes": size, "rounds": found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Start the ranks and take what they print."""
    options = ["--worker", str(folder), "--layers", str(layers), "--rounds", str(rounds)]
    command = [sys.executable, *LAUNCHER, str(ranks), __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"the ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0][len("RESULT ") :])


# -- killed and training again -------------------------------------------------------------------------------------


def process_of(rank: int, launcher: int) -> int:
    """The process of a rank, found among the launcher's children by its environment."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    name = f"LOCAL_RANK={rank}".encode()
    return next(int(c) for c in children if name in Path(f"/proc/{c}/environ").read_bytes().split(b"\0"))


def lines_of(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_and_wait(folder: Path) -> dict[str, float]:
    """Seconds from the SIGKILL of one of two ranks to "resuming from" and to the first step after it."""
    corpus = folder / "texts"
    corpus.mkdir(parents=True)
    for index in range(64):
        (corpus / f"{index}.txt").write_text(" ".join(str(n * n) for n in range(index, index + 400)))
    options = [
        *("model=tiny", "tracking=none", "data=text", "train.dtype=float32", f"run.dir={folder}", "run.name=run"),
        *(f"data.sources.0.paths=[{corpus}]", f"data.cache_dir={folder / 'cache'}", "data.validation_sequences=0"),
        *("train.steps=100000", "train.sequence_tokens=64", "train.global_batch_tokens=512", "resume=auto"),
        *("tracking.log_every_steps=1", "checkpoint.every_steps=10", "evaluation.every_steps=0", "parallel.ep=2"),
    ]
    command = [sys.executable, *LAUNCHER, "2", "--max-restarts", "1", str(ROOT / "train.py"), *options]
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | QUIET
    )
    heard: list[tuple[float, str]] = []
    assert run.stderr is not None
    errors = run.stderr
    threading.Thread(target=lambda: heard.extend((time.perf_counter(), line) for line in errors), daemon=True).start()
    metrics = folder / "run" / "metrics.jsonl"

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.perf_counter() + 180
        while not condition():
            if run.poll() is not None or time.perf_counter() > end:
                raise SystemExit("the run did not go on:\n" + "".join(line for _, line in heard)[-4000:])
            time.sleep(0.005)

    try:
        wait_for(lambda: lines_of(metrics) >= 25)
        killed = time.perf_counter()
        os.kill(process_of(1, run.pid), signal.SIGKILL)
        wait_for(lambda: any("resuming from" in line for _, line in heard))
        resumed, line = next((at, line) for at, line in heard if "resuming from" in line)
        step = int(line.rsplit("step ", 1)[1])
        wait_for(lambda: last_step(metrics) == step)  # the file is cut back to the checkpoint's step first
        wait_for(lambda: last_step(metrics) > step)
        again = time.perf_counter()
    finally:
        run.terminate()
        run.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
    return {"resuming": resumed - killed, "training": again - killed}


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # a line that is being written
        return -1


# -- the table -----------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    """Median with the smallest and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(results: list[dict[str, Any]]) -> str:
    """A line for each number of ranks. Ratios are taken within a round and then their median."""
    head = [
        *("ranks", "MiB", "raw write, MiB/s", "**save, of raw**", "background save, of raw"),
        *("training stands still, s", "**of the time until durable**", "raw read, MiB/s", "**load, of raw**"),
        "load unverified, of raw",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        rounds, mib = result["rounds"], result["bytes"] / 2**20

        def over(above: str, below: str, rounds: list[dict[str, float]] = rounds) -> str:
            return spread([row[above] / row[below] for row in rounds])

        cells = [
            *(str(result["ranks"]), f"{mib:.0f}", spread([mib / row["raw write"] for row in rounds], 0)),
            *(over("raw write", "save"), over("raw write", "durable"), spread([row["blocked"] for row in rounds])),
            *(over("blocked", "durable"), spread([mib / row["raw read"] for row in rounds], 0)),
            *(over("raw read", "load"), over("raw read", "load unverified")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=11, help="of the model; 49 MiB each with moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache", help="on the disk to measure")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        return worker(arguments.worker, arguments.layers, arguments.rounds)
    load = os.getloadavg()[0]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        results = [measure(ranks, place / "checkpoints", arguments.layers, arguments.rounds) for ranks in RANKS]
        kills = [kill_and_wait(place / "run") for _ in range(arguments.kills)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    facts = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, gloo, one thread a rank, load of the machine {load:.0f} before and "
        f"{os.getloadavg()[0]:.0f} after; "
        "`make bench-checkpoint`"
    )
    again = (
        f"Killed and training again, {arguments.kills} times: {spread([k['training'] for k in kills], 1)} s from "
        f"SIGKILL to the end of the next step, of which {spread([k['resuming'] for k in kills], 1)} s until the ranks "
        "have started anew and read the checkpoint."
    )
    notes = f"Median of {arguments.rounds} rounds (smallest-largest). `of raw`: the rate against the raw rate."
    text = f"{facts}\n\n{table(results)}\n\n{notes}\n\n{again}"
    print(text)
    if arguments.write:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

"""Run `train.py` as users do: as processes with a command line, an environment, signals and an exit code.

Importing torch takes seconds, so most processes here are forked from one that has imported it already; from there
on they run train.py like any other process. `command` starts a real one, with or without torchrun.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.ranks import forked

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@dataclass
class Running:
    """The processes of one run, one for each rank."""

    folder: Path
    """Of the run, where its name is known."""
    logs: Path
    processes: list[BaseProcess]
    store: Any = field(repr=False, default=None)

    @property
    def out(self) -> str:
        """Standard output of all ranks, rank by rank."""
        return "".join((self.logs / f"out_{rank}").read_text() for rank in range(len(self.processes)))

    @property
    def err(self) -> str:
        """Standard error of all ranks, rank by rank."""
        return "".join((self.logs / f"err_{rank}").read_text() for rank in range(len(self.processes)))

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Until some rank has printed it."""
        end = time.monotonic() + timeout
        while text not in self.out + self.err:
            assert time.monotonic() < end, f"no {text!r} in\n{self.out}\n{self.err}"
            assert any(p.is_alive() for p in self.processes), f"ended without {text!r}:\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send it to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def finish(self, timeout: float = 90.0) -> list[int | None]:
        """Exit codes by rank; minus the signal where one ended it. Kills what hangs."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"hangs:\n{self.out}\n{self.err}"
        return [process.exitcode for process in self.processes]


class Runner:
    """Starts runs of a tiny model on a small corpus, in folders of one test."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.runs = folder / "runs"
        self.corpus = corpus
        self._folder = folder
        self._count = 0

    def arguments(self, *overrides: str) -> list[str]:
        """A run of 12 steps that takes a second."""
        return [
            *("model=tiny", "tracking=none", "data=text", f"run.dir={self.runs}"),
            *(f"data.sources.0.paths=[{self.corpus / 'texts'}]", "data.sources.0.validation_fraction=0.1"),
            *(f"data.cache_dir={self.corpus / 'cache'}", "data.validation_sequences=8"),
            *("train.sequence_tokens=32", "train.global_batch_tokens=256", "train.steps=12"),
            *("train.dtype=float32", "tracking.log_every_steps=1", "evaluation.sample_tokens=0"),
            *overrides,
        ]

    def start(
        self,
        name: str,
        *overrides: str,
        ranks: int = 1,
        patch: str = "",
        env: dict[str, str] | None = None,
        store: dist.TCPStore | None = None,
    ) -> Running:
        """Start a run called `name`.

        Args:
            patch: Python that each rank executes before train.py; it may use RANK.
            env: put into the environment.
            store: where ranks meet, of an earlier start; by default a new one.
        """
        self._count += 1
        logs = self._folder / f"logs_{self._count}"
        logs.mkdir()
        for rank in range(ranks):
            (logs / f"out_{rank}").touch()
            (logs / f"err_{rank}").touch()
        arguments = self.arguments(f"run.name={name}", *overrides)
        environments = [{**os.environ, **(env or {})} for _ in range(ranks)]
        if ranks > 1:
            store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for rank, environment in enumerate(environments):
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
                environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # as under torchrun: no rank owns the store
        context = forked()
        processes = [
            context.Process(target=_become_train, args=(rank, arguments, environment, logs, patch), daemon=True)
            for rank, environment in enumerate(environments)
        ]
        for process in processes:
            process.start()
        return Running(self.runs / name, logs, list(processes), store)

    def run(self, name: str, *overrides: str, codes: int | None = 0, **arguments: Any) -> Running:
        """Start a run and wait for its end; all ranks must end with the given code."""
        running = self.start(name, *overrides, **arguments)
        found = running.finish()
        assert codes is None or set(found) == {codes}, f"exit codes {found}:\n{running.out}\n{running.err}"
        return running

    def command(
        self, *before: str, name: str, overrides: list[str], env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A real command: python [before] train.py ..."""
        return subprocess.Popen(
            [sys.executable, *before, str(TRAIN), *self.arguments(f"run.name={name}", *overrides)],
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )


def _become_train(rank: int, arguments: list[str], env: dict[str, str], logs: Path, patch: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(logs / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.clear()  # a fork has that of the time when the first one was made
    os.environ.update(env | {"CUDA_VISIBLE_DEVICES": ""})  # several ranks cannot share one GPU
    sys.argv = [str(TRAIN), *arguments]
    if patch:
        exec(patch, {"RANK": rank})
    runpy.run_path(str(TRAIN), run_name="__main__")


def at_step(step: int, action: str) -> str:
    """A patch that runs a statement before the training step after `step`; os, signal and RANK are at hand."""
    return f"""
import os, signal
from moe_parallel.trainer import Trainer
train_step = Trainer.train_step
def patched(self, *arguments):
    if self.state.step == {step}:
        {action}
    return train_step(self, *arguments)
Trainer.train_step = patched
"""


TERM = "os.kill(os.getpid(), signal.SIGTERM)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def write_corpus(folder: Path) -> Path:
    """Forty short documents of made-up words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 8))) for _ in range(200)]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(40):
        text = " ".join(generator.choices(words, k=generator.randint(50, 400)))
        (texts / f"{number:02}.txt").write_text(text + ".\n")
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> dict[int, dict[str, Any]]:
    """What training computed, by step: metrics without the clock's and the memory's."""
    return {
        row["step"]: {key: value for key, value in row.items() if key.split("/")[0] not in ("time", "speed", "memory")}
        for row in rows(folder)
    }


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's complete checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))

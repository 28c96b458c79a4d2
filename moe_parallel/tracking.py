"""What a run reports, and where to: metrics.jsonl, Weights & Biases, the console, pictures and samples.

Rank 0 has a Tracker, other ranks a NullTracker. metrics.jsonl is the record; W&B shows the same values.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from pydantic.dataclasses import dataclass

from moe_parallel.console import Console, ConsoleMode
from moe_parallel.heatmap import write_heatmap
from moe_parallel.metrics_file import MetricsFile
from moe_parallel.run_folder import RunFolder
from moe_parallel.wandb_run import WandbRun


class WandbMode(str, Enum):
    none = "none"
    """Do not import wandb."""
    offline = "offline"
    """Write a run that `wandb sync` can upload and `wandb leet` can show; needs no account."""
    online = "online"
    """Send to the server; offline if it cannot be reached."""


@dataclass(kw_only=True)
class TrackingConfig:
    wandb: WandbMode = WandbMode.none
    """Where Weights & Biases sends the run."""
    project: str = "moe-parallel"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; None = the account's default."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    log_every_steps: int = 10
    """Optimizer steps between lines in metrics.jsonl, W&B and the console; the first and last always log."""
    heatmap_every_steps: int = 100
    """Optimizer steps between pictures of the load of every expert in every layer; 0 = none."""
    init_timeout_seconds: float = 20.0
    """How long the start waits for the W&B server before the run goes offline."""
    finish_timeout_seconds: float = 60.0
    """How long the end waits for uploads to W&B; what is left can be uploaded with `wandb sync`."""
    console: ConsoleMode = ConsoleMode.auto
    """What rank 0 shows: a live panel, lines, or warnings only."""

    def __post_init__(self) -> None:
        if self.log_every_steps < 1:
            raise ValueError(f"tracking.log_every_steps={self.log_every_steps} must be at least 1")
        if self.heatmap_every_steps < 0:
            raise ValueError(f"tracking.heatmap_every_steps={self.heatmap_every_steps} must be 0 (none) or more")
        for name in ("init_timeout_seconds", "finish_timeout_seconds"):
            # W&B takes 0 for "without limit", which is what these options are there to prevent.
            if getattr(self, name) <= 0:
                raise ValueError(f"tracking.{name}={getattr(self, name)} must be more than 0")

    def log_due(self, step: int, total_steps: int) -> bool:
        """Whether metrics are wanted after this step. All ranks ask: it decides who joins reductions."""
        return step % self.log_every_steps == 0 or step in (1, total_steps)

    def heatmap_due(self, step: int) -> bool:
        """Whether a picture of expert load is wanted after this step."""
        return self.heatmap_every_steps > 0 and step % self.heatmap_every_steps == 0


class Tracker:
    """Everything that rank 0 reports.

    Args:
        run_dir: folder of the run.
        config: what to report where.
        resume_state: what `state` returned at the checkpoint that the run resumes from; None = a new run.
        name: of the run.
        total_steps: the step at which the run ends.
        run_config: the resolved configuration, for W&B.
        label: put into every console line of a run whose numbers are not training (forced balance).
        stream: of the console; None = standard output.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        resume_state: dict[str, Any] | None = None,
        *,
        name: str,
        total_steps: int,
        run_config: dict[str, Any] | None = None,
        label: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        resumed = resume_state or {}
        self._folder = RunFolder(run_dir)
        self._metrics = MetricsFile(self._folder.metrics, resumed.get("step"))
        self._console = Console(config.console, total_steps, label, stream)
        self._run_id = resumed.get("wandb_run_id") or secrets.token_hex(4)
        self._wandb: WandbRun | None = None
        if config.wandb is not WandbMode.none:
            self._wandb = WandbRun(
                online=config.wandb is WandbMode.online,
                folder=run_dir,
                project=config.project,
                entity=config.entity,
                name=name,
                tags=config.tags,
                run_id=self._run_id,
                run_config=run_config or {},
                init_timeout_seconds=config.init_timeout_seconds,
                finish_timeout_seconds=config.finish_timeout_seconds,
                warn=self._console.warning,
            )

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """All metrics of one step, by their names in metrics.jsonl; once per step, steps rising."""
        self._metrics.write(step, tokens, metrics)
        self._console.update(step, tokens, metrics)
        if self._wandb is not None:
            self._wandb.log(step, {"tokens": tokens, **metrics})

    def image(
        self,
        step: int,
        name: str,
        matrix: Sequence[Sequence[float]],
        row_label: str = "layer",
        column_label: str = "expert",
    ) -> Path:
        """A heat map, such as tokens by layer and expert, as images/<name>_<step>.png and in W&B."""
        path = self._folder.images / f"{name.replace('/', '_')}_{step:08d}.png"
        title = f"{name}, step {step}"
        write_heatmap(path, matrix, title=title, row_label=row_label, column_label=column_label)
        if self._wandb is not None:
            self._wandb.image(step, name, path)
        return path

    def text(self, step: int, samples: list[str]) -> None:
        """Generated text: appended to samples.txt, and a table in W&B."""
        with self._folder.samples.open("a", encoding="utf-8") as file:
            for number, sample in enumerate(samples):
                file.write(f"=== step {step}, sample {number}\n{sample}\n")
        if self._wandb is not None:
            self._wandb.table(step, "samples", "text", samples)

    def info(self, text: str) -> None:
        """A line for the person who watches."""
        self._console.info(text)

    def warning(self, text: str) -> None:
        """A line that is shown even when the console is quiet."""
        self._console.warning(text)

    def state(self, step: int) -> dict[str, Any]:
        """For the checkpoint of this step: where the record ends, and the id that W&B knows the run by."""
        return {"step": step, "wandb_run_id": self._run_id}

    def finish(self, exit_code: int) -> None:
        """Close everything; waits for uploads at most finish_timeout_seconds."""
        self._console.close()
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code)


class NullTracker:
    """The Tracker of every rank but 0: takes everything, reports nothing."""

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None: ...

    def image(
        self,
        step: int,
        name: str,
        matrix: Sequence[Sequence[float]],
        row_label: str = "layer",
        column_label: str = "expert",
    ) -> None: ...

    def text(self, step: int, samples: list[str]) -> None: ...

    def info(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def state(self, step: int) -> dict[str, Any]:
        return {}

    def finish(self, exit_code: int) -> None: ...

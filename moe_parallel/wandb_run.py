"""One Weights & Biases run that can neither stop nor stall the training.

Online mode needs a server when the run starts. If none answers within init_timeout_seconds, or no API key is
configured, the run goes on offline with one warning, and `wandb sync` uploads it later. Of later errors only
the first is reported. wandb is imported here only, when a run is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal


class WandbRun:
    """A run in `folder`/wandb.

    Args:
        online: try the server first.
        folder: of the run; wandb makes its own folder in it.
        run_id: the same id continues a run (offline: `wandb sync` joins the parts).
        run_config: the resolved configuration, shown beside the curves.
        init_timeout_seconds: how long to wait for the server before going offline.
        finish_timeout_seconds: how long `finish` may upload; the data stays on disk in any case.
        warn: called with one line of text.
    """

    def __init__(
        self,
        *,
        online: bool,
        folder: Path,
        project: str,
        entity: str | None,
        name: str,
        tags: list[str],
        run_id: str,
        run_config: dict[str, Any],
        init_timeout_seconds: float,
        finish_timeout_seconds: float,
        warn: Callable[[str], None],
    ) -> None:
        self._warn, self._warned, self._run = warn, False, None
        arguments = {
            "dir": str(folder),
            "project": project,
            "entity": entity,
            "name": name,
            "tags": tags,
            "id": run_id,
            "resume": "allow",
            "config": run_config,
        }
        # The console stays ours: its panel must not be captured or written into.
        options = {
            "init_timeout": init_timeout_seconds,
            "finish_timeout": finish_timeout_seconds,
            "console": "off",
            "silent": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if online:
            try:
                self._run = _start("online", arguments, options)
            except Exception as error:
                warn(f"W&B is offline for this run, upload it later with `wandb sync`: {_brief(error)}")
                _forget()
        if self._run is None:
            try:
                self._run = _start("offline", arguments, options)
            except Exception as error:
                warn(f"W&B is off for this run, metrics.jsonl has everything: {_brief(error)}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values by name. The step is a value like others: the server drops rows whose own step goes back."""
        self._try(lambda run: run.log({"step": step, **values}))

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture from a PNG."""

        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, name: wandb.Image(str(path))})

        self._try(send)

    def table(self, step: int, name: str, column: str, rows: list[str]) -> None:
        """Texts as a table of one column."""

        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, name: wandb.Table(columns=[column], data=[[row] for row in rows])})

        self._try(send)

    def finish(self, exit_code: int) -> None:
        """Upload what is left, for finish_timeout_seconds at most. Nothing can be logged afterwards."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            if not self._warned:
                self._warn(f"W&B failed, training goes on and metrics.jsonl has everything: {_brief(error)}")
            self._warned = True


def _start(mode: Literal["online", "offline"], arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(**options)
    if mode == "online":
        wandb.setup(settings=settings)
        # Otherwise a missing key opens a dialogue on a terminal, which waits for an answer without limit.
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; set WANDB_API_KEY or run `wandb login` on this machine")
    run = wandb.init(mode=mode, settings=settings, **arguments)
    run.define_metric("*", step_metric="step")
    return run


def _forget() -> None:
    """End wandb's service process: it would refuse the id of the run that could not start to the next one."""
    import wandb

    wandb.teardown()


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

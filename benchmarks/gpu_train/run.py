"""Trains whole models on this GPU: ours, torchtitan's expert layer in ours, and transformers; a table and JSON.

    python -m benchmarks.gpu_train.run                              all models, nine minutes
    python -m benchmarks.gpu_train.run --models olmoe_1b_7b --tokens 16384 --write
    python -m benchmarks.gpu_train.run --dry-run                    on a CPU, tiny, and once in fp32: are sides equal?

Models: OLMoE-1B-7B whole; DeepSeekMoE 2B whole; Qwen3-30B-A3B with as many of its layers as fit. All sides start from
the same weights and read the same batches, so their first losses must agree; the table says how far they do. What a
side cannot do stands in the table with its reason. transformers runs with the fastest of its expert implementations.
Needs this toolkit and `transformers` importable; no network.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_train.compare import Effort, Row, compare, exact_losses
from benchmarks.gpu_train.models import PRECISIONS, Model, dry_models, models
from benchmarks.gpu_train.report import BEGIN, END, EXACT_TOLERANCE, LOSS_TOLERANCE, disagreement, report
from benchmarks.gpu_train.worker import OutOfTime, Worker
from benchmarks.report import write_between

ROOT = Path(__file__).parents[2]
LAST_SECONDS = 20.0
"""Kept back of the time for what is running when it is nearly up, and for the report."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; every one of them changes the run."""
    names = [model.preset for model in models(1)]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side, where memory does not hold all")
    parser.add_argument("--apart", action="store_true", help="turns even where memory would hold all sides")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all, split among the models")
    parser.add_argument("--tokens", type=int, help="tokens of a step, in whole sequences; default 8192")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="default: each model's own, see models.py")
    parser.add_argument("--qwen-layers", type=int, default=6, help="layers of the Qwen3 slice, of 48")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_gpu_train", help="folder of the results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny models; runs on a CPU")
    chosen = parser.parse_args(arguments)
    for name in ("steps", "rounds", "qwen_layers"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(chosen, name)} must be at least 1")
    if chosen.dry_run and chosen.write:
        parser.error("--write with --dry-run: times of a dry run say nothing; write those of a GPU")
    if not chosen.dry_run and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here; --dry-run tries everything on a CPU")
    return chosen


def chosen_models(arguments: argparse.Namespace) -> list[Model]:
    """What the options ask for."""
    known = dry_models() if arguments.dry_run else models(arguments.qwen_layers)
    chosen = [model for model in known if model.preset in arguments.models]
    if arguments.tokens:
        chosen = [model.with_tokens(arguments.tokens) for model in chosen]
    if arguments.precision:
        chosen = [replace(model, precision=arguments.precision) for model in chosen]
    return chosen


def measure(arguments: argparse.Namespace, began: float) -> dict[str, Any]:
    """All models, each with an equal part of the time that is left. Raises OutOfTime if none could begin."""
    end = began + arguments.seconds - LAST_SECONDS
    worker = Worker(deadline=end)
    found: dict[str, Any] = {"rows": [], "exact": {}}
    effort = Effort(arguments.steps, arguments.rounds, arguments.apart)
    todo = chosen_models(arguments)
    try:
        found["machine"] = worker.ask("machine", dry=arguments.dry_run)
        memory = found["machine"]["memory_bytes"]
        for position, model in enumerate(todo):
            if time.time() > end:
                break
            share = (end - time.time()) / (len(todo) - position)
            found["rows"] += compare(worker, model, effort, memory, time.time() + share)
            if arguments.dry_run and memory is None:
                found["exact"][model.preset] = exact_losses(worker, model)
            print(f"{model.preset}: until {time.time() - began:.0f} s", flush=True)
    except OutOfTime:
        if "machine" not in found:
            raise
    finally:
        worker.close()
    return found


def complaints(rows: list[Row], exact: dict[str, list[Row]]) -> list[str]:
    """What sides should have agreed on and did not."""
    found = []
    for preset in dict.fromkeys(row.model for row in rows):
        worst = disagreement([row for row in rows if row.model == preset])
        if worst > LOSS_TOLERANCE:
            found.append(f"{preset}: losses of the first steps differ by {100 * worst:.2g} %")
    for preset, mine in exact.items():
        found += [f"{preset} in fp32: {row.side}: {row.refused}" for row in mine if row.refused]
        if disagreement(mine) > EXACT_TOLERANCE:
            found.append(f"{preset} in fp32: losses of the first steps differ by {disagreement(mine):.1e} of them")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write. 1 if the sides do not train the same model."""
    chosen, began = parse(arguments), time.time()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        found = measure(chosen, began)
    except OutOfTime:
        raise SystemExit(f"--seconds={chosen.seconds:g} is too short to begin; give more") from None
    rows, machine, wanted = found["rows"], found["machine"], chosen_models(chosen)
    reached = {row.model for row in rows if row.turns}
    not_reached = [model.preset for model in wanted if model.preset not in reached]
    text = report(wanted, rows, machine, not_reached)
    results = {
        "machine": machine,
        "rows": [row.values() for row in rows],
        "exact": {preset: [row.values() for row in mine] for preset, mine in found["exact"].items()},
        "not_reached": not_reached,
        "arguments": {key: str(value) for key, value in vars(chosen).items()},
        "took_s": time.time() - began,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (chosen.out / "table.md").write_text(text + "\n")
    print(f"{text}\n\nWritten to {chosen.out}")
    wrong = complaints(rows, found["exact"])
    for line in wrong:
        print(f"error: {line}: the sides do not train the same model")
    if chosen.write and not wrong:
        write_between(BEGIN, END, text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

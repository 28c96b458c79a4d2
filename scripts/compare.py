"""Run a comparison: all its arms with several seeds on the same tokens, and what came of it.

python scripts/compare.py granularity
python scripts/compare.py granularity --seeds 1,2,3 --jobs 2 --write
python scripts/compare.py loss_free --size one_gpu data=parquet 'data.sources.0.paths=[/corpus/web]'

Comparisons are the folders of configs/experiment that have a _comparison.yaml. Runs go to RUNS/NAME/ARM/seed_N; those
that are finished are not repeated, and those that were stopped go on. --write puts the table and a picture into docs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_parallel import options, relations
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.comparison import (
    Comparison,
    Flat,
    Results,
    add_relations,
    check_alike,
    differences,
    flatten,
    is_finished,
    markdown,
    read_comparison,
    read_outcome,
    write_between_marks,
)
from moe_parallel.measured import measure_runs
from moe_parallel.run_folder import write_text_atomic

ROOT = Path(__file__).parents[1]
CONFIGS, DOCS = ROOT / "configs", ROOT / "docs"
OURS = ("train.seed", "run.name", "run.dir", "resume", "dry_run", "experiment")
"""Options that this command sets itself."""
FIRST_SEED = 1000
"""Added to the seed of the run that arms start from: they are to see tokens that it has not seen."""
RunKey = tuple[str, int]


class RunFailed(Exception):
    """A run ended with an error."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the comparison")
    parser.add_argument("overrides", nargs="*", help="options for all arms, such as train.steps=20")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with one thread (default: 1)")
    parser.add_argument("--size", help="a file of configs/experiment/_size, such as one_gpu (default: the arms' own)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/experiments.md")
    return parser.parse_intermixed_args(arguments)


def seeds_of(text: str) -> list[int]:
    """Raises ValueError where they are not different whole numbers."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds {text} must be whole numbers with commas between them, such as 1,2,3") from error
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text} has a seed twice; a run is counted once")
    return seeds


# -- the runs ------------------------------------------------------------------------------------------------------


def composed(overrides: list[str]) -> Flat:
    """Options of a run as train.py composes and checks them."""
    config = options.composed(overrides, CONFIGS)
    relations.check(config, 1)
    return flatten(options.config_yaml(config))


def train_all(todo: dict[RunKey, list[str]], folders: dict[RunKey, Path], jobs: int) -> None:
    """Run train.py for each key. Raises RunFailed with the first that fails, once those that run have ended."""
    failed = Event()

    def one(key: RunKey) -> None:
        if failed.is_set():
            return
        folder = folders[key]
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *todo[key], "resume=auto"]
        environment = {"OMP_WAIT_POLICY": "passive"} | dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        print(f"run {folder}", flush=True)
        with (folder / "train.log").open("a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if code != 0:
            failed.set()
            said = [line for line in (folder / "train.log").read_text().splitlines() if line.strip()]
            raise RunFailed(f"{folder} ended with code {code}: {said[-1] if said else 'it said nothing'}", code)

    with ThreadPoolExecutor(jobs) as pool:
        for ended in [pool.submit(one, key) for key in todo]:
            ended.result()


def prepare(made: Path, text: str, base: Path) -> None:
    """Run a command of `prepared` unless it has ended before. Raises RunFailed if it fails, ValueError if what is there
    was made by another one."""
    words = [word.format(runs=base, run=made.name) for word in shlex.split(text)]
    done = made.with_name(f"{made.name}.done")
    if done.is_file():
        if done.read_text() != shlex.join(words):
            raise ValueError(f"{done} is of another command: {done.read_text()}; delete it, or choose another --runs")
        return
    print(f"make {made}", flush=True)
    made.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_WAIT_POLICY": "passive"} | dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        last = [line for line in ended.stderr.splitlines() if line.strip()][-1:]
        raise RunFailed(f"{shlex.join(words)} ended with code {ended.returncode}: {''.join(last)}", ended.returncode)
    write_text_atomic(done, shlex.join(words))


def compare(arguments: argparse.Namespace) -> Results:
    """Check, run what is missing, measure, collect."""
    seeds = seeds_of(arguments.seeds)
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
    if taken := [text for text in arguments.overrides if text.lstrip("+~").split("=")[0] in OURS]:
        raise ValueError(f"{taken[0]}: this command sets it by itself; --seeds, --runs and the name are its options")
    comparison = read_comparison(CONFIGS / "experiment" / arguments.name)
    extra = list(arguments.overrides)
    if arguments.size:
        extra.insert(0, f"+experiment/_size={arguments.size}")
        comparison = replace(comparison, name=f"{comparison.name}_{arguments.size}")
    base = arguments.runs / comparison.name
    first = comparison.first
    keys = [(arm, seed) for seed in seeds for arm in [*first, *comparison.arms]]
    folders = {(arm, seed): base / arm / f"seed_{seed}" for arm, seed in keys}
    commands = {
        (arm, seed): [
            *(f"experiment={arguments.name}/{arm}", *extra),
            f"train.seed={seed + FIRST_SEED if arm in first else seed}",
            *(f"run.dir={base / arm}", f"run.name=seed_{seed}"),
        ]
        for arm, seed in keys
    }
    options.register()
    flats = {key: composed(command) for key, command in commands.items()}
    alike = {arm: flats[arm, seeds[0]] for arm in comparison.arms}
    print(comparison.question)
    for name, values in differences(alike).items():
        print(f"  {name}: {', '.join(f'{arm} {value}' for arm, value in values.items())}")
    check_alike(comparison, alike)
    todo = {key: commands[key] for key in keys if not is_finished(folders[key], flats[key])}
    for name in first:
        train_all({key: todo[key] for key in todo if key[0] == name}, folders, arguments.jobs)
    for name, text in comparison.prepared.items():
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for ended in [pool.submit(prepare, base / name / f"seed_{seed}", text, base) for seed in seeds]:
                ended.result()
    train_all({key: todo[key] for key in todo if key[0] in comparison.arms}, folders, arguments.jobs)
    measured = measure_runs([folders[key] for key in keys if key[0] not in first])
    outcomes = {
        arm: [read_outcome(folders[arm, seed], measured[folders[arm, seed]]) for seed in seeds]
        for arm in comparison.arms
    }
    add_relations(comparison, outcomes)
    return Results(comparison, seeds, differences(alike), outcomes)


# -- the picture ---------------------------------------------------------------------------------------------------


def colors(results: Results) -> list[Any]:
    """One for each arm."""
    number = len(results.comparison.arms)
    return [colormaps["tab10" if number <= 10 else "tab20"](place) for place in range(number)]


def draw_curves(axes: Axes, results: Results) -> None:
    """Mean validation loss of the seeds over tokens, and a band from the lowest to the highest."""
    for color, arm in zip(colors(results), results.comparison.arms):
        runs = [outcome.curve for outcome in results.outcomes[arm]]
        tokens = [tokens / 1e6 for tokens, _ in runs[0]]
        losses = [[loss for _, loss in points] for points in zip(*runs)]
        means = [sum(values) / len(values) for values in losses]
        axes.plot(tokens, means, color=color, linewidth=1.2, label=arm)
        axes.fill_between(tokens, [min(v) for v in losses], [max(v) for v in losses], color=color, alpha=0.2)
    curves = [outcome.curve for runs in results.outcomes.values() for outcome in runs]
    ends = [loss for curve in curves for _, loss in curve[len(curve) // 2 :]]
    if ends:  # the first points are far above all others and would flatten them
        room = 0.05 * (max(ends) - min(ends)) or 0.01
        axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.set(xlabel="million tokens", ylabel="validation loss in nats", title="seeds: mean, lowest to highest")
    axes.legend(fontsize=7)


def draw_ends(axes: Axes, results: Results) -> None:
    """Final validation loss of every run; seeds joined by a line, for they share data and differ together."""
    arms = results.comparison.arms
    for index, seed in enumerate(results.seeds):
        losses = [results.loss(arm).values[index] for arm in arms]
        axes.plot(range(len(arms)), losses, color="0.75", linewidth=0.8, zorder=1)
        axes.scatter(range(len(arms)), losses, s=16, color=colors(results), zorder=2)
        axes.annotate(
            f"seed {seed}", (len(arms) - 1, losses[-1]), fontsize=6, xytext=(4, 0), textcoords="offset points"
        )
    for number, (color, arm) in enumerate(zip(colors(results), arms)):
        axes.hlines(results.loss(arm).mean, number - 0.2, number + 0.2, color=color)
    axes.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=7)
    axes.set(ylabel="validation loss in nats", title="at the end: every run, and the mean")
    axes.margins(x=0.15)


def draw(results: Results, output: Path) -> None:
    figure = Figure(figsize=(10.0, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw_curves(figure.add_subplot(1, 2, 1), results)
    draw_ends(figure.add_subplot(1, 2, 2), results)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


# -- what is written -----------------------------------------------------------------------------------------------


def report(results: Results, arguments: argparse.Namespace) -> None:
    """Tables to the screen and beside the runs; with --write into docs as well."""
    comparison: Comparison = results.comparison
    table, base = markdown(results), arguments.runs / comparison.name
    print(f"\n{table}")
    if len(results.revisions) > 1:
        print(f"warning: runs are of different revisions: {', '.join(results.revisions)}", file=sys.stderr)
    write_text_atomic(base / "comparison.json", json.dumps(results.as_json(), indent=1) + "\n")
    write_text_atomic(base / "comparison.md", table)
    draw(results, base / "comparison.png")
    print(f"written to {base}/comparison.json, .md, .png")
    if not arguments.write:
        return
    image = DOCS / "images" / f"compare_{comparison.name}.png"
    size = f" --size {arguments.size}" if arguments.size else ""
    told = " ".join(
        [f"python scripts/compare.py {arguments.name}{size} --seeds {arguments.seeds}", *arguments.overrides]
    )
    caption = f"`{told}`, revision {', '.join(results.revisions)}; mean ± standard deviation over the seeds.\n"
    picture = f"![losses of {comparison.name}](images/{image.name})\n"
    write_between_marks(DOCS / "experiments.md", comparison.name, f"\n{caption}\n{table}\n{picture}\n")
    draw(results, image)
    print(f"written to {DOCS / 'experiments.md'} and {image}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in what was given, else that of the run that failed."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        report(compare(given), given)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw a run: losses, balance of the experts, and its newest picture of expert load.

python scripts/plot_run.py runs/small_cpu
python scripts/plot_run.py runs/small_cpu --output small_cpu.png
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from moe_parallel.metrics_file import read_metrics
from moe_parallel.run_folder import RunFolder

TOTAL = "validation/cross_entropy_nats"
DOMAIN = re.compile(r"validation/(.+)/cross_entropy_nats")
LAYER = re.compile(r"experts/layer_(\d+)/max_over_mean")
WIDTH_INCHES, PANEL_INCHES, DPI = 10.0, 3.6, 110
Rows = list[dict[str, float]]


def points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Millions of tokens, and the values of one metric there."""
    found = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in found], [value for _, value in found]


def matching(rows: Rows, pattern: re.Pattern[str]) -> dict[str, str]:
    """Metrics whose whole name matches, by the part in the pattern's parentheses."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {match[1]: name for name in names if (match := pattern.fullmatch(name))}


def draw_losses(axes: Axes, rows: Rows) -> None:
    """Training loss as a line, validation as points, one color for each domain."""
    axes.plot(*points(rows, "loss/cross_entropy_nats"), color="0.6", linewidth=1, label="training")
    for domain, name in matching(rows, DOMAIN).items():
        axes.plot(*points(rows, name), marker="o", markersize=3, linewidth=0.8, label=domain)
    if any(TOTAL in row for row in rows):
        axes.plot(*points(rows, TOTAL), color="black", marker="o", markersize=4, label="validation, all")
    axes.set(xlabel="million tokens", ylabel="cross-entropy in nats", title="loss")
    axes.legend(fontsize=7)


def draw_balance(axes: Axes, rows: Rows) -> None:
    """Load of the fullest expert of each layer; 1 is perfect balance."""
    for layer, name in matching(rows, LAYER).items():
        axes.plot(*points(rows, name), linewidth=1, label=f"layer {layer}")
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="million tokens", ylabel="load, times the mean", ylim=(0, None), title="fullest expert of a layer")
    if len(axes.lines) <= 12:
        axes.legend(fontsize=7)


def draw_run(run: Path, output: Path) -> None:
    """Write the picture. Raises ValueError where there is nothing to draw."""
    folder = RunFolder(run)
    if not folder.metrics.is_file():
        raise ValueError(f"{run} has no {folder.metrics.name}; give a run folder such as runs/small_cpu")
    rows = read_metrics(folder.metrics)
    if not rows:
        raise ValueError(f"{folder.metrics} has no complete line yet")
    maps = sorted(folder.images.glob("experts_load_*.png"))
    load = imread(maps[-1]) if maps else None
    strip = 0.0 if load is None else min(load.shape[0] / DPI, WIDTH_INCHES * load.shape[0] / load.shape[1])
    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES + strip), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if strip else 1, 2, height_ratios=[PANEL_INCHES, strip] if strip else [1])
    draw_losses(figure.add_subplot(grid[0, 0]), rows)
    draw_balance(figure.add_subplot(grid[0, 1]), rows)
    if load is not None:
        axes = figure.add_subplot(grid[1, :])
        axes.imshow(load)
        axes.set_axis_off()
    figure.savefig(output)


def main() -> None:
    """Read the run folder of the command line, write the picture, say where."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, such as runs/small_cpu; it may still be running")
    parser.add_argument("--output", type=Path, help="the PNG to write; default: images/run.png in the run folder")
    arguments = parser.parse_args()
    output = arguments.output or RunFolder(arguments.run).images / "run.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw_run(arguments.run, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(output)


if __name__ == "__main__":
    main()

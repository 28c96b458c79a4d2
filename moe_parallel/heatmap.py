"""A matrix as a picture: expert load by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CELL_PIXELS = 16
"""Width and height of one cell at most; wide matrices get narrower ones."""
MARGINS_PIXELS = {"left": 70, "right": 90, "top": 40, "bottom": 50}
MAX_PIXELS = 2000
"""Cells never take more than this in either direction."""


def cell_pixels(num_cells: int) -> int:
    """Pixels along one side of a cell, of `num_cells` in that direction."""
    return max(2, min(CELL_PIXELS, MAX_PIXELS // max(num_cells, 1)))


def write_heatmap(
    path: Path,
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Write a PNG in which a brighter cell is a larger number; the scale starts at 0: an idle expert is dark.

    Args:
        path: of the PNG; its folder is created.
        matrix: rows (layers) of columns (experts), all rows of one length, finite and at least 0.
        title: one line above.
        row_label, column_label: what rows and columns are.
    """
    # Not pyplot: it keeps every figure in a global list and may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns = len(matrix), len(matrix[0])
    width, height = columns * cell_pixels(columns), rows * cell_pixels(rows)
    margins = MARGINS_PIXELS
    full = (margins["left"] + width + margins["right"], margins["bottom"] + height + margins["top"])
    figure = Figure(figsize=(full[0] / 100, full[1] / 100), dpi=100)
    FigureCanvasAgg(figure)
    box = (margins["left"] / full[0], margins["bottom"] / full[1], width / full[0], height / full[1])
    axes = figure.add_axes(box)
    largest = max(max(row) for row in matrix)
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=largest or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(1, width // 40), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=max(1, height // 20), integer=True))
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    figure.suptitle(title, fontsize=9)
    bar = figure.add_axes((box[0] + box[2] + 12 / full[0], box[1], 12 / full[0], box[3]))
    figure.colorbar(image, cax=bar)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

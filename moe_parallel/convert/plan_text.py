"""A plan in words: what goes where, layers with the same recipe in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_parallel.convert.lazy import Lazy, size_bytes
from moe_parallel.convert.upcycle.map import Drawn

_LAYER = re.compile(r"\b(layers|mtp)\.(\d+)\.")
_MOST_LETTERS = 150
"""Of a recipe; experts that are all different would fill pages."""


@dataclass
class _Line:
    name: str
    recipe: str
    lazy: Lazy
    layers: list[int] = field(default_factory=list)

    @property
    def num_tensors(self) -> int:
        return max(1, len(self.layers))


def plan_text(plan: Mapping[str, Lazy]) -> str:
    """One line for each kind of weight: name, layers, shape, size, and where it comes from. Reads nothing."""
    lines = _lines(plan)
    rows = [("weight", "shape", "bytes", "from")]
    for line in lines:
        name = line.name.replace("*", ranges(line.layers), 1) if line.layers else line.name
        each = size_bytes(line.lazy)
        size = f"{line.num_tensors} x {_bytes(each)}" if line.num_tensors > 1 else _bytes(each)
        rows.append((name, " x ".join(map(str, line.lazy.shape)) or "1", size, shortened(line.recipe)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows]
    new = sum(math.prod(lazy.shape) for lazy in plan.values() if isinstance(lazy, Drawn))
    total = sum(math.prod(lazy.shape) for lazy in plan.values())
    told = f"{total:,} numbers, {_bytes(sum(map(size_bytes, plan.values())))}; {new:,} of them are drawn anew"
    return "\n".join([*table, told])


def _lines(plan: Mapping[str, Lazy]) -> list[_Line]:
    """In the order of the plan. A recipe may name the weight's own layer: that is the same in all layers."""
    found: dict[tuple[str, str, tuple[int, ...], str], _Line] = {}
    for full, lazy in plan.items():
        name, recipe, layer = full, str(lazy), None
        if match := _LAYER.match(full):
            layer = int(match[2])
            name = f"{match[1]}.*.{full[match.end() :]}"
            recipe = recipe.replace(match[0], f"{match[1]}.*.")
        line = found.setdefault((name, recipe, lazy.shape, str(lazy.dtype)), _Line(name, recipe, lazy))
        if layer is not None:
            line.layers.append(layer)
    return list(found.values())


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with neighbors as a range: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def shortened(recipe: str) -> str:
    """Its beginning and its end."""
    if len(recipe) <= _MOST_LETTERS:
        return recipe
    half = _MOST_LETTERS // 2
    return f"{recipe[:half]} ... {recipe[-half:]}"


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"

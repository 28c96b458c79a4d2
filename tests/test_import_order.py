"""The floors of the building: who may import whom, and how large a file and a function may get.

A module imports from floors below its own, or from its own floor as long as no cycle arises. A new module needs a
floor here; a floor says what a module is about.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"moe_kernels": ROOT / "kernels/moe_kernels", "moe_data": ROOT / "data/moe_data"}
SOURCES |= {"moe_parallel": ROOT / "moe_parallel", "train": ROOT / "train.py", "scripts": ROOT / "scripts"}

FLOORS: dict[str, int] = {
    # Functions on tensors; documents to batches.
    "moe_kernels": 0,
    "moe_data": 0,
    # Ranks: their axes, what they exchange, how they meet and leave.
    "moe_parallel.mesh": 1,
    "moe_parallel.collectives": 1,
    "moe_parallel.sequence_exchange": 1,
    "moe_parallel.row_exchange": 1,
    "moe_parallel.stop": 1,
    "moe_parallel.launch": 1,
    # What is chosen for a token, and the experts themselves.
    "moe_parallel.moe.routing": 2,
    "moe_parallel.moe.routers": 2,
    "moe_parallel.moe.balance": 2,
    "moe_parallel.moe.capacity": 2,
    "moe_parallel.moe.chain": 2,
    "moe_parallel.moe.pool": 2,
    "moe_parallel.moe.experts": 2,
    "moe_parallel.moe.expert_forms": 2,
    "moe_parallel.moe.adjugate": 2,
    # To the experts and back.
    "moe_parallel.moe.dispatch": 3,
    "moe_parallel.moe.layer": 4,
    "moe_parallel.model": 5,
    # State in and out; what is counted, and where to it is written.
    "moe_parallel.checkpoint": 6,
    "moe_parallel.convert": 6,
    "moe_parallel.optim": 6,
    "moe_parallel.learning": 6,
    "moe_parallel.statistics": 6,
    "moe_parallel.meter": 6,
    "moe_parallel.run_folder": 6,
    "moe_parallel.metrics_file": 6,
    "moe_parallel.heatmap": 6,
    "moe_parallel.console": 6,
    "moe_parallel.wandb_run": 6,
    "moe_parallel.engines": 7,
    "moe_parallel.causality": 7,
    # The loop, what it reports, and all options in one place.
    "moe_parallel.tracking": 8,
    "moe_parallel.trainer": 8,
    "moe_parallel.start": 8,
    "moe_parallel.remote_code": 8,
    "moe_parallel.causal_lm": 8,
    "moe_parallel.option_texts": 8,
    "moe_parallel.train_options": 8,
    "moe_parallel.options": 8,
    "moe_parallel.relations": 8,
    # A whole run, and what it would be.
    "moe_parallel.plan": 9,
    "moe_parallel.planner": 9,
    "moe_parallel.measured": 9,
    "moe_parallel.comparison": 9,
    "moe_parallel.run": 9,
    # The roof: commands.
    "train": 10,
    "scripts": 10,
}
FILE_LINES, FUNCTION_LINES = 400, 60


@cache
def modules() -> dict[str, Path]:
    """Files by module name; scripts and train.py are modules by their own names."""
    found = {}
    for package, place in SOURCES.items():
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            parts = path.relative_to(place).with_suffix("").parts if place.is_dir() else ()
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def floor_of(module: str) -> int | None:
    """Of the module or of the package that it is in; packages that only hold others have none."""
    while module:
        if module in FLOORS:
            return FLOORS[module]
        module = module.rpartition(".")[0]
    return None


def imports_of(module: str) -> set[str]:
    """Our modules that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written out in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in modules()} or {str(node.module)}
    return {name for name in found if name in modules() and name != module}


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    """Would catch: a kernel that knows the model, a model that knows the trainer, a module without a place."""
    mine = floor_of(module)
    if mine is None:
        assert not imports_of(module), "a package that only holds others imports nothing"
        assert any(name.startswith(f"{module}.") for name in FLOORS), "give it a floor"
        return
    for other in imports_of(module):
        floor = floor_of(other)
        assert floor is not None, f"import from a module of {other}, not from the package"
        assert floor <= mine, f"{other} is on floor {floor}, above {mine}"


def test_floor_zero_is_independent() -> None:
    """Would catch: data that need the kernels, or kernels that need the data; both are usable alone."""
    for module in modules():
        if module.startswith(("moe_kernels", "moe_data")):
            assert all(other.split(".")[0] == module.split(".")[0] for other in imports_of(module)), module


def test_no_cycles() -> None:
    """Would catch: two modules of one floor that need each other, hidden by an import inside of a function."""
    try:
        TopologicalSorter({module: imports_of(module) for module in modules()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_floor_has_its_module() -> None:
    """Would catch: an entry in the table for a module that is gone."""
    assert [name for name in FLOORS if not any(m == name or m.startswith(f"{name}.") for m in modules())] == []


def test_only_options_and_train_know_hydra() -> None:
    """Would catch: a DictConfig that travels, or a second way to read options."""
    users = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            users |= {name for found in names if found.split(".")[0] in ("hydra", "omegaconf")}
    assert {name for name in users if not name.startswith("scripts.")} == {"moe_parallel.options", "train"}


@pytest.mark.parametrize("module", modules())
def test_size(module: str) -> None:
    """Would catch: a file or a function that does too much to be read at once."""
    text = modules()[module].read_text()
    assert len(text.splitlines()) <= FILE_LINES
    long = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long

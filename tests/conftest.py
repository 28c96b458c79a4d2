"""What all tests share: the tables that are printed at the end, and a count of GPU tests that did not run."""

from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere: ranks share the cores of the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_PARITY_HEAD = (
    "parity with one process", "tier", "ranks", "pp", "tp", "cp", "ep", "shard", "recompute", "micro",
    "worst gradient", "allowed",
)  # fmt: skip
_PLAN_HEAD = (
    "built, sharded and run on fake ranks", "ranks", "rank", "ep", "shard", "recompute", "micro-batch", "M weights",
    "of this rank", "estimated GiB", "peak GiB", "seconds",
)  # fmt: skip
_TABLES: dict[tuple[str, ...], list[tuple[str, ...]]] = {_PARITY_HEAD: [], _PLAN_HEAD: []}


@pytest.fixture(scope="session")
def parity_table():
    """Call with (case, tier, worst error, tolerance) to add a row."""

    def record(case, tier, worst, tolerance) -> None:
        row = (
            case.name, tier, *(str(number) for number in (case.world, case.pp, case.tp, case.cp, case.ep)),
            str(case.shard or case.world // (case.pp * case.tp)), case.recompute,
            str(case.micro_batches), f"{worst:.1e}", f"{tolerance:.0e}",
        )  # fmt: skip
        if row not in _TABLES[_PARITY_HEAD]:
            _TABLES[_PARITY_HEAD].append(row)

    return record


@pytest.fixture(scope="session")
def plan_table():
    """Call with a row of the table of planned configs."""
    return _TABLES[_PLAN_HEAD].append


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """A few documents, tokenized once for all runs."""
    from tests.runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def runner(tmp_path, small_corpus):
    """Starts train.py in folders of this test."""
    from tests.runs import Runner

    return Runner(tmp_path, small_corpus)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_sessionfinish(session):
    """A worker of several hands its rows over to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = list(_TABLES.values())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for rows, found in zip(_TABLES.values(), getattr(node, "workeroutput", {}).get("tables", [])):
        rows += [tuple(row) for row in found]


def pytest_terminal_summary(terminalreporter):
    for head, rows in _TABLES.items():
        if rows:
            terminalreporter.section(head[0])
            widths = [max(len(cell) for cell in column) for column in zip(head, *rows)]
            for row in (head, *rows):
                terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

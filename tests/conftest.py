"""What all tests share: the parity table that is printed at the end, and a count of GPU tests that did not run."""

from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere: ranks share the cores of the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_ROWS: list[tuple[str, ...]] = []


@pytest.fixture(scope="session")
def parity_table():
    """Call with (case, tier, worst error, tolerance) to add a row."""

    def record(case, tier, worst, tolerance) -> None:
        row = (
            case.name, tier, str(case.world), str(case.ep), str(case.shard or case.world), case.recompute,
            str(case.micro_batches), f"{worst:.1e}", f"{tolerance:.0e}",
        )  # fmt: skip
        if row not in _ROWS:
            _ROWS.append(row)

    return record


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    head = (
        "parity with one process",
        "tier",
        "ranks",
        "ep",
        "shard",
        "recompute",
        "micro",
        "worst gradient",
        "allowed",
    )
    widths = [max(len(row[i]) for row in [head, *_ROWS]) for i in range(len(head))]
    terminalreporter.section("parity")
    for row in [head, *_ROWS]:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

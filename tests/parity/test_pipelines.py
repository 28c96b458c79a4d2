"""Every pipeline computes what one process computes, as `test_parity` says; between processes only, for stages send.

Rows of 8 processes are slow on few cores: `make parity-slow` runs them.
"""

from __future__ import annotations

import pytest
import torch

from tests.parity import table
from tests.parity.cases import run_reference
from tests.parity.test_parity import check, run_cases
from tests.ranks import run_ranks, run_threads


def compare(cases, parity_table, timeout: float = 300.0) -> None:
    """Every rank against one plain process."""
    torch.set_num_threads(1)
    everyone = run_ranks(run_cases, cases[0].world, cases, timeout=timeout)
    for index, case in enumerate(cases):
        reference = run_reference(case)
        for got in everyone:
            check(case, got[index], reference, "processes", parity_table)


@pytest.mark.parametrize("rows", ["PIPELINE_TWO", "PIPELINE_FOUR", "FROZEN_PIPELINE_TWO"])
def test_processes(rows, parity_table):
    """A gradient that is sent to the wrong stage, a stage that forgets its balance losses or the counts of earlier
    micro-batches, a shared weight that only one stage trains, a reduction for every micro-batch."""
    compare(getattr(table, rows), parity_table)


@pytest.mark.slow
def test_eight_processes(parity_table):
    """Degrees that are right two by two and wrong together."""
    compare(table.PIPELINE_EIGHT, parity_table, timeout=900.0)


def test_bfloat16(parity_table):
    """What is handed between stages in another type than FSDP would give it: the same sums within roundings."""
    one = run_threads(run_cases, 1, table.PIPELINE_BFLOAT16, True)[0]
    two = run_ranks(run_cases, 2, table.PIPELINE_BFLOAT16)[0]
    for case, got, wanted in zip(table.PIPELINE_BFLOAT16, two, one, strict=True):
        check(case, got[:1], wanted[:1], "processes", parity_table)

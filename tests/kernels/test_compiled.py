"""Every kernel with every shipped configuration is compiled for GPUs that are not here, and its machine code is read.

What no test of results can show: registers that spill to memory, shared memory that no GPU has (the compiler does not
complain), products that miss the tensor cores, roles of warps that were silently left out.
"""

from __future__ import annotations

import pytest

from moe_kernels.triton_support import HAS_TRITON
from tests.kernels.compiled.build import Resources, compile_all, faults

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def test_every_kernel_and_configuration():
    """Without spills, within the shared memory, on the tensor cores, warps with the roles that were asked for."""
    from tests.kernels.compiled.jobs import all_jobs

    jobs = all_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    made = compile_all(jobs)
    found = {job.name: faults(job, made[job.name]) for job in jobs}
    assert not {name: list_ for name, list_ in found.items() if list_}


def test_faults_are_found():
    """The check itself: a tile that needs more registers than there are, and one that needs more shared memory than
    there is, must be reported."""
    from moe_kernels.choice import Tile
    from tests.kernels.compiled.jobs import QWEN3, hidden, up

    spills = hidden("spills", Tile(128, 128, 64, 8, 4, parts=1), QWEN3, gather=True, weighted=True)
    large = up("large", Tile(128, 128, 64, 8, 6), QWEN3, gather=False)
    made = compile_all([spills, large])
    assert isinstance(made["spills"], Resources)
    assert any("spilled" in fault for fault in faults(spills, made["spills"]))
    assert any("shared memory" in fault or "does not compile" in fault for fault in faults(large, made["large"]))

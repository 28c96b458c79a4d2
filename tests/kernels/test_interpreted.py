"""Runs the tests of the Triton kernels in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_kernels.triton_support import HAS_TRITON

HERE = Path(__file__).parent


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_kernels_in_the_interpreter(request):
    """What they catch stands with each of them. A folder in which nothing is collected passes nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 25
    print("\n" + done.stdout.strip().splitlines()[-1])

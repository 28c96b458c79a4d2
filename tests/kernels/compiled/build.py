"""Compile kernels for GPUs that are not here, and read from the machine code what they take.

python -m tests.kernels.compiled.build        every kernel and configuration, as a table
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may have: 163 KB on Ampere, 227 KB on Hopper and Blackwell."""


@dataclass(frozen=True)
class Job:
    """One kernel with one configuration for one architecture."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    """Triton's name of the type of each argument that is no constant."""
    constants: dict[str, Any]
    warps: int
    stages: int
    capability: int = 90
    uses_tensor_cores: bool = True
    specialized: bool = False
    unaligned: tuple[str, ...] = field(default=())
    """Integers that need not be multiples of 16."""


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a job."""

    registers: int
    stack_bytes: int
    spills: int
    """Instructions that load from or store to local memory."""
    shared_bytes: int
    matrix_instructions: int
    """Of the tensor cores: HGMMA on Hopper."""
    bulk_copies: int
    """By the copy engine: UTMALDG."""
    async_copies: int
    """Of a thread, past its registers: LDGSTS."""
    specialized: bool
    """Warps have roles: some give their registers to others."""


def compile_job(job: Job) -> Resources:
    """Compile and disassemble; nothing is run."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    names = kernel.arg_names
    given = {*job.types, *job.constants}
    assert given == set(names), f"{job.name}: {sorted(given ^ set(names))}"
    pointers = [n for n, t in job.types.items() if t.startswith("*")]
    integers = [n for n, t in job.types.items() if t.startswith("i") and n not in job.unaligned]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in job.constants else job.types[n] for n in names},
        constexprs={(names.index(n),): v for n, v in job.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, *integers)},
    )
    options = {"num_warps": job.warps, "num_stages": job.stages}
    built = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    usage, code = _disassemble(built.asm["cubin"])
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        stack_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=built.metadata.shared,
        matrix_instructions=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code)),
        bulk_copies=len(re.findall(r"\bUTMALDG\b", code)),
        async_copies=len(re.findall(r"\bLDGSTS\b", code)),
        specialized="setmaxnreg" in built.asm["ptx"],
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    assert code.returncode == 0, code.stderr
    return usage.stdout, code.stdout


def compile_all(jobs: list[Job]) -> dict[str, Resources | str]:
    """By name; the end of the error message for what does not compile."""
    names = [job.name for job in jobs]
    try:
        with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
            return dict(zip(names, pool.map(_try, jobs)))
    except BrokenProcessPool:  # a compiler that crashed: who was it?
        return {job.name: _try_apart(job) for job in jobs}


def _try(job: Job) -> Resources | str:
    try:
        return compile_job(job)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[-500:]}"


def _try_apart(job: Job) -> Resources | str:
    """In a process of its own, so that a compiler that crashes takes nothing else with it."""
    code = f"from tests.kernels.compiled.build import *\nprint(repr(compile_job({job!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return eval(done.stdout) if done.returncode == 0 else done.stderr.strip()[-500:]


def faults(job: Job, made: Resources | str) -> list[str]:
    """What keeps the kernel from being as fast as it should, or from running at all."""
    if isinstance(made, str):
        return [f"does not compile: {made}"]
    found = []
    if made.stack_bytes or made.spills:
        found.append(f"{made.spills} accesses of spilled registers, a stack of {made.stack_bytes} bytes")
    if made.shared_bytes > SHARED_LIMIT[job.capability]:
        found.append(f"{made.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[job.capability]}")
    if job.uses_tensor_cores and made.matrix_instructions == 0:
        found.append("no instructions of the tensor cores")
    if job.specialized and not made.specialized:
        found.append("warps without roles")
    return found


if __name__ == "__main__":
    from tests.kernels.compiled.jobs import all_jobs

    for job in all_jobs():
        if all(word in job.name for word in sys.argv[1:]):
            made = _try_apart(job)
            print(f"{job.name:60}", made if isinstance(made, Resources) else "", *faults(job, made), flush=True)

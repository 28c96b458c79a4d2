"""What all benchmarks share: the machine's name, and the place of their tables in docs/benchmarks.md."""

from __future__ import annotations

import platform
from pathlib import Path

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def write_between(begin: str, end: str, text: str) -> None:
    """Replace what stands between the two marks."""
    report = REPORT.read_text()
    if begin not in report or end not in report:
        raise SystemExit(f"{REPORT} has no {begin} ... {end} to write between")
    before, after = report.split(begin)[0], report.split(end)[1]
    REPORT.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def processor() -> str:
    """Name of the processor, as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

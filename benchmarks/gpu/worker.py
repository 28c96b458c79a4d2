"""The process that measures. It writes a line of JSON for everything that it begins and everything that it knows.

If the device is lost (an illegal access of a peer) or a peer never returns, this process ends or is ended, and
`run.py` starts another one without that peer. All sides of a case share one process: the layer of DeepSeek-V3 has
22.5 GB of weights, too many for one copy a side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import Case, Inputs, Weights
from benchmarks.gpu.measure import CaseRun, DeviceLost
from benchmarks.gpu.peers import use_bundle
from benchmarks.gpu.shapes import DRY_SHAPES, SHAPES

LOST = 3
"""Exit code after the device was lost."""
_SHAPES = {shape.name: shape for shape in (*SHAPES, *DRY_SHAPES)}


@dataclass(frozen=True)
class Plan:
    """What is left to do, as `run.py` passes it on."""

    cases: list[list[Any]]
    """Type, shape, tokens, routing."""
    accumulate: list[list[Any]]
    """Cases that also time gradient accumulation."""
    peers: list[str]
    tune: list[str]
    excluded: dict[str, str]
    """"shape/peer": why it is not tried again."""
    deadline: float
    dry: bool
    ceilings: bool


class Lines:
    """The results, one JSON object a line, complete at any moment."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def write(self, kind: str, **content: Any) -> None:
        """Flushed at once: the next step may end this process."""
        self.file.write(json.dumps({"kind": kind, "time": time.time(), **content}) + "\n")
        self.file.flush()


def versions(names: list[str]) -> dict[str, str]:
    """Of what is installed and compared."""
    from importlib import metadata

    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def prepare_environment(plan: Plan) -> None:
    """Variables that peers read while they are imported."""
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "1" if "liger" in plan.tune else "0"
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count() or 8))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def measure_case(plan: Plan, case: list[Any], weights: Weights, device: Device, lines: Lines, seconds: float) -> bool:
    """All sides of one case.

    Returns:
        Whether the device still works.
    """
    dtype, shape, tokens, routing = case
    run = CaseRun(
        inputs=Inputs(Case(_SHAPES[shape], tokens, routing), weights, getattr(torch, dtype), device.device),
        device=device,
        deadline=plan.deadline,
        progress=lambda peer, stage: lines.write("progress", case=case, peer=peer, stage=stage),
        tune=tuple(plan.tune),
        accumulate=case in plan.accumulate,
    )
    excluded = {peer: why for peer in plan.peers if (why := plan.excluded.get(f"{shape}/{peer}")) is not None}
    try:
        for row in run.rows([peer for peer in plan.peers if peer not in excluded], seconds):
            lines.write("row", **asdict(row))
    except DeviceLost as lost:
        lines.write("lost", case=case, reason=str(lost))
        return False
    for peer, why in excluded.items():
        row = run.row(peer)
        row.refused = why
        lines.write("row", **asdict(row))
    lines.write("case", case=case, state=device.state())
    return True


def main(plan_path: str, out_path: str) -> int:
    """Work through the plan until its end or its deadline."""
    plan = Plan(**json.loads(Path(plan_path).read_text()))
    lines = Lines(Path(out_path))
    prepare_environment(plan)
    use_bundle()
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # On a CPU, new tensors are filled with NaN where the check asks for deterministic algorithms.
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if plan.ceilings:
        names = ["triton", "transformers", "sonic-moe", "quack-kernels", "liger-kernel", "scattermoe", "deepspeed"]
        lines.write("machine", device=device.name(), versions=versions(names), state=device.state())
        lines.write("progress", peer="device", stage="ceilings")
        lines.write("ceilings", **ceilings(device, plan.dry), state=device.state())
    weights: Weights | None = None
    made_for = None
    for index, case in enumerate(plan.cases):
        left = plan.deadline - time.time()
        if left <= 0:
            break
        lines.write("progress", case=case, peer="inputs", stage="inputs")
        if made_for != case[:2]:
            weights = None  # freed before the next ones are made
            device.release()
            weights, made_for = Weights.random(_SHAPES[case[1]], device.device, getattr(torch, case[0])), case[:2]
        assert weights is not None
        # Half of a case's share of the time for timing: the other half goes into first calls and checks.
        if not measure_case(plan, case, weights, device, lines, left / (len(plan.cases) - index) / 2):
            return LOST
    lines.write("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Which implementation computes the experts: looked up by device and shape, never tried out during training.

A table holds what was measured (`scripts/tune_kernels.py` measures a shape and writes it). What is in no table is
computed by torch: `grouped_mm` where it is one kernel (bf16 on Hopper and Blackwell), else a loop over the experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels.triton_support import HAS_TRITON, INTERPRETED, SPECIALIZES


class ExpertKernel(str, Enum):
    """How the products of the experts are computed."""

    auto = "auto"
    """What a table says was fastest; else grouped_mm in bf16 on Hopper and Blackwell, and the loop elsewhere."""
    triton = "triton"
    """Kernels of this project: gather, products, activation and combine fused; bf16 or fp16 on a GPU."""
    grouped_mm = "grouped_mm"
    """`torch.nn.functional.grouped_mm`; rows of 16 bytes. In bf16 on Hopper and Blackwell one kernel a product, whose
    counts stay on the device."""
    loop = "loop"
    """One matmul an expert. Any type and size; needs the counts on the host."""


@dataclass(frozen=True)
class Tile:
    """What one program of a product computes at a time, and with what."""

    rows: int
    columns: int
    depth: int
    """Extent of the sum that one step takes."""
    warps: int
    stages: int
    """Steps whose operands are on their way at once."""
    specialize: bool = False
    """Some warps only load (Hopper); needs 4 warps, operands in the order of experts, and an end in one part."""
    parts: int = 1
    """Pieces of columns in which the end of a tile is computed: more need fewer registers."""
    per_processor: int = 1
    """Programs that are started for each multiprocessor; they share the steps."""

    def numbers(self) -> list[int]:
        """As custom operators of torch take it."""
        return [int(value) for value in astuple(self)]

    @staticmethod
    def of(numbers: Sequence[int]) -> Tile:
        """What `numbers` made."""
        rows, columns, depth, warps, stages, specialize, parts, per_processor = numbers
        return Tile(rows, columns, depth, warps, stages, bool(specialize), parts, per_processor)


@dataclass(frozen=True)
class KernelConfig:
    """Tiles of the Triton kernels for one shape; None leaves a product to plain torch."""

    up: Tile | None
    """Up-projection; its columns count twice, for gate and up."""
    down: Tile | None
    """Down-projection."""
    grad_hidden: Tile | None
    """Gradient of the pre-activation."""
    grad_rows: Tile | None
    """Gradient of the input rows."""
    grad_weight: Tile | None
    """Gradients of both weights; its rows and columns are those of the weight, its depth counts rows of an expert."""
    add_weight: Tile | None
    """The same where they are added to a float32 buffer, which needs registers of its own."""
    combine: bool = True
    """The sum of a token's slots by a kernel, in one order."""
    copy_rows: bool = False
    """Copy gathered rows into the order of experts before the products, instead of gathering them within."""

    @property
    def specialized(self) -> bool:
        """Some product gives its warps roles."""
        return any(isinstance(tile, Tile) and tile.specialize for tile in vars(self).values())

    @property
    def gathers(self) -> bool:
        """The products gather their rows themselves."""
        return self.up is not None and not self.copy_rows

    @staticmethod
    def from_json(values: dict[str, Any]) -> KernelConfig:
        """What `asdict` made."""
        parts: dict[str, Any] = {k: Tile(**v) if isinstance(v, dict) else v for k, v in values.items()}
        return KernelConfig(**parts)


PLAIN = KernelConfig(
    up=None, down=None, grad_hidden=None, grad_rows=None, grad_weight=None, add_weight=None, combine=False
)
"""Plain torch throughout."""

GATHERED = KernelConfig(
    up=Tile(128, 64, 64, warps=8, stages=4),
    down=Tile(128, 256, 64, warps=8, stages=3),
    grad_hidden=Tile(128, 128, 64, warps=8, stages=4, parts=2),
    grad_rows=Tile(128, 256, 64, warps=8, stages=3),
    grad_weight=Tile(128, 256, 64, warps=8, stages=4, parts=4),
    add_weight=Tile(128, 256, 64, warps=8, stages=4, parts=4),
)
"""Rows are gathered by the products; for Hopper and what came after."""

AMPERE = KernelConfig(
    up=Tile(128, 64, 32, warps=8, stages=3),
    down=Tile(128, 128, 32, warps=8, stages=3),
    grad_hidden=Tile(128, 128, 32, warps=8, stages=3, parts=4),
    grad_rows=Tile(128, 128, 32, warps=8, stages=3),
    grad_weight=Tile(128, 128, 32, warps=8, stages=3, parts=4),
    add_weight=Tile(128, 128, 32, warps=8, stages=3, parts=4),
)

SPECIALIZED = KernelConfig(
    up=Tile(128, 128, 64, warps=4, stages=4, specialize=True),
    down=Tile(128, 256, 64, warps=4, stages=3, specialize=True),
    grad_hidden=Tile(128, 128, 64, warps=8, stages=4, parts=2),
    grad_rows=Tile(128, 256, 64, warps=4, stages=3, specialize=True),
    grad_weight=Tile(128, 256, 64, warps=4, stages=3, specialize=True),
    add_weight=Tile(128, 256, 64, warps=8, stages=3, parts=4),
    copy_rows=True,
)
"""Rows are copied into order first; then everything is loaded by the copy engine, by warps of their own."""

INTERPRETER = KernelConfig(
    up=Tile(16, 32, 16, warps=1, stages=1),
    down=Tile(16, 32, 16, warps=1, stages=1),
    grad_hidden=Tile(16, 32, 16, warps=1, stages=1, parts=2),
    grad_rows=Tile(16, 32, 16, warps=1, stages=1),
    grad_weight=Tile(32, 32, 16, warps=1, stages=1, parts=4),
    add_weight=Tile(32, 32, 16, warps=1, stages=1, parts=2),
)
"""Small enough for tests."""


@dataclass(frozen=True)
class Entry:
    """The fastest implementation that was measured for a shape."""

    device: str
    """As its maker names it, such as "NVIDIA H200"; "cpu" for all of those."""
    dtype: str
    dim: int
    expert_dim: int
    num_experts: int
    """On one rank."""
    rows_per_expert: int
    """The mean of the measurement."""
    how: ExpertKernel
    config: KernelConfig = PLAIN


@dataclass(frozen=True)
class Choice:
    """An implementation, and why."""

    how: ExpertKernel
    config: KernelConfig
    why: str


def read_table(path: Path) -> tuple[Entry, ...]:
    """Entries that `write_table` wrote. Raises ValueError, with the file's name, for anything else."""
    try:
        known = {field.name for field in fields(Entry)}
        entries = []
        for row in json.loads(path.read_text())["entries"]:
            values = {name: value for name, value in row.items() if name in known}
            how, config = ExpertKernel(values.pop("how")), KernelConfig.from_json(values.pop("config"))
            entries.append(Entry(**values, how=how, config=config))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of kernels as scripts/tune_kernels.py writes it: {error!r}") from error
    return tuple(entries)


def write_table(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write beside and rename: a reader sees the old table or the new one."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({"entries": entries}, indent=1) + "\n")
    beside.replace(path)


def entry_values(entry: Entry, **measured: Any) -> dict[str, Any]:
    """A line of a table, with what was measured beside what is read back."""
    return {**asdict(entry), "how": entry.how.value, **measured}


SHIPPED = tuple(e for path in sorted((Path(__file__).parent / "tuned").glob("*.json")) for e in read_table(path))
"""What was measured on machines of this project: files of the folder `tuned` beside this one. None yet."""


def device_name(device: torch.device) -> str:
    """As tables name it."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else device.type


@dataclass(frozen=True)
class Problem:
    """What a choice depends on."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    expert_dim: int
    num_experts: int
    """On this rank."""
    num_rows: int
    """Slots of all experts."""

    @staticmethod
    def of(x_TD: Tensor, gate_up: Tensor, num_rows: int) -> Problem:
        """`gate_up` is (E, 2F, D)."""
        num_experts, double, dim = gate_up.shape
        return Problem(x_TD.device, x_TD.dtype, dim, double // 2, num_experts, num_rows)


def choose(how: ExpertKernel, problem: Problem, table: tuple[Entry, ...] | None = None) -> Choice:
    """The implementation for a problem.

    Args:
        table: None takes the shipped one.
    Raises:
        ValueError: an explicit choice cannot run here.
    """
    near = None
    if how in (ExpertKernel.auto, ExpertKernel.triton):
        near = _nearest(SHIPPED if table is None else table, problem)
    if how is ExpertKernel.auto:
        if near is not None and refusal(near.how, problem) is None:
            return Choice(near.how, near.config, f"measured with {near.rows_per_expert} rows an expert")
        return _unmeasured(problem)
    why = refusal(how, problem)
    if why is not None:
        raise ValueError(f"moe.expert_kernel={how.value} cannot compute these experts: {why}")
    if how is not ExpertKernel.triton:
        return Choice(how, PLAIN, "as asked")
    if near is not None and near.how is ExpertKernel.triton:
        return Choice(how, near.config, f"as asked; tiles measured with {near.rows_per_expert} rows an expert")
    return Choice(how, _untuned(problem.device), "as asked; tiles not tuned for this shape")


def _nearest(table: tuple[Entry, ...], problem: Problem) -> Entry | None:
    """The entry of these widths whose number of experts, then of rows, is nearest, as a ratio.

    Chunks of an exchange and borrowed experts make the number of experts vary; the tiles do not depend on it.
    """
    if not table:
        return None
    kind = str(problem.dtype).removeprefix("torch.")
    shape = (device_name(problem.device), kind, problem.dim, problem.expert_dim)
    same = [e for e in table if (e.device, e.dtype, e.dim, e.expert_dim) == shape]
    if not SPECIALIZES:  # measured with another Triton; this one cannot compile them
        same = [e for e in same if not e.config.specialized]
    rows, experts = max(problem.num_rows / problem.num_experts, 1), problem.num_experts

    def distance(entry: Entry) -> tuple[float, float]:
        by_experts = max(entry.num_experts / experts, experts / entry.num_experts)
        return by_experts, max(entry.rows_per_expert / rows, rows / entry.rows_per_expert)

    return min(same, key=distance, default=None)


def _unmeasured(problem: Problem) -> Choice:
    # On a CPU both take the same time, and the loop takes every type; on a GPU it would wait for the counts.
    if problem.device.type != "cuda":
        return Choice(ExpertKernel.loop, PLAIN, "no measurement of this shape, so the loop")
    why = refusal(ExpertKernel.grouped_mm, problem)
    # Elsewhere torch copies the counts to the host for every product and loops: the loop does that once.
    fast = problem.dtype is torch.bfloat16 and torch.cuda.get_device_capability(problem.device) in ((9, 0), (10, 0))
    if why is not None or not fast:
        why = why or "torch has no grouped kernel for this type and device"
        return Choice(ExpertKernel.loop, PLAIN, f"no measurement of this shape, and {why}, so the loop")
    return Choice(ExpertKernel.grouped_mm, PLAIN, "no measurement of this shape, so torch's own kernel")


def _untuned(device: torch.device) -> KernelConfig:
    if INTERPRETED:
        return INTERPRETER
    return GATHERED if torch.cuda.get_device_capability(device) >= (9, 0) else AMPERE


def refusal(how: ExpertKernel, problem: Problem) -> str | None:
    """Why an implementation cannot run; None if it can."""
    dim, expert_dim, dtype, on_gpu = problem.dim, problem.expert_dim, problem.dtype, problem.device.type == "cuda"
    if how is ExpertKernel.grouped_mm:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"torch has no grouped_mm for {dtype}"
        if any(size * dtype.itemsize % 16 for size in (dim, expert_dim)):
            return f"model.dim={dim} and moe.expert_dim={expert_dim} must fill rows of 16 bytes"
    if how is ExpertKernel.triton:
        if not HAS_TRITON:
            return "triton is not installed"
        if not (on_gpu or INTERPRETED):
            return f"Triton kernels run on a GPU, and the rows are on the {problem.device.type}"
        if on_gpu and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "the kernels need compute capability 8.0 (Ampere) or later"
        if dtype not in (torch.bfloat16, torch.float16) and not INTERPRETED:
            return f"its products are of bf16 or fp16, not {dtype}"
        step = 16 if INTERPRETED else 64
        if dim % step or expert_dim % 8:
            return f"model.dim={dim} must be a multiple of {step} and moe.expert_dim={expert_dim} of 8"
    return None

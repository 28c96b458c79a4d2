"""Least-loaded dispatch against plain expert parallelism, under skewed loads, on 4 processes of this CPU.

One MoE layer without its router (the choice is given, so that the skew is exact): dispatch, experts, combine, and their
backward pass. Both dispatchers take turns within one run. Measured for each:

- rows: of the busiest rank, from the tickets.
- CPU seconds of a rank: `time.thread_time` over the step, which is planning, sorting, copies and products, without
  waiting and without gloo's own threads. The slowest rank's is the makespan of a MODEL: a core for each rank and a
  network that costs nothing. A machine with fewer cores than ranks cannot show this as time of a step.
- step: wall time, slowest rank, with all ranks on the cores that there are.
- peak memory: most bytes of tensors alive at once, beyond the weights that lie there before the step, on the busiest
  rank. Counted by a dispatch mode, storage by storage, in a step of its own; gloo's buffers are not in it.
- bytes between ranks: rows (there and back, forward and backward), and weights with their gradients, from the plan.
- equality: largest relative difference, in float64, of output and all gradients.

    python benchmarks/skewed_load.py             prints a table and writes JSON
    python benchmarks/skewed_load.py --write     puts the table into docs/benchmarks.md too
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from report import processor, write_between
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_kernels.counting_sort import sort_slots
from moe_parallel import launch
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig, LeastLoadedDispatcher
from moe_parallel.moe.dispatch.spill_plan import SpillPlan, plain_plan
from moe_parallel.moe.experts import RoutedExperts
from moe_parallel.moe.routing import LayerContext, Routing

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- skewed_load -->", "<!-- /skewed_load -->"
SIDES = ("all_to_all", "least_loaded")


@dataclass(frozen=True)
class Shape:
    """A layer and the tokens of one rank; each token takes one expert, so that a share can reach 95 %."""

    name: str
    dim: int
    expert_dim: int
    experts: int
    tokens: int
    min_chunk_rows: int


@dataclass(frozen=True)
class Skew:
    """`share` of all slots go to the last expert, or evenly to the last rank's; the rest evenly to all others."""

    name: str
    share: float = 0.0
    to_rank: bool = False


MANY = Shape("many rows", dim=256, expert_dim=512, experts=16, tokens=4096, min_chunk_rows=1024)
FEW = Shape("few rows", dim=512, expert_dim=1024, experts=16, tokens=16, min_chunk_rows=1)
SKEWS = (
    Skew("balanced"),
    Skew("30 % to a rank", 0.30, to_rank=True),
    Skew("60 % to a rank", 0.60, to_rank=True),
    Skew("95 % to a rank", 0.95, to_rank=True),
    Skew("30 % to an expert", 0.30),
    Skew("60 % to an expert", 0.60),
    Skew("95 % to an expert", 0.95),
)
CASES = [(MANY, skew) for skew in SKEWS] + [(FEW, SKEWS[-1])]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in self._tensors((args, kwargs)):  # those that were there before do not count
            self._add(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in self._tensors(out):
            self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return out

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = weakref.finalize(storage, self._remove, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


class Layer:
    """One rank's experts, tokens and choice, and a step with either dispatcher."""

    def __init__(self, shape: Shape, skew: Skew, dtype: torch.dtype) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(rank)
        self.shape, self.world = shape, world
        self.experts = RoutedExperts(shape.experts // world, shape.dim, shape.expert_dim).to(dtype)
        for parameter in self.experts.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.x_TD, self.grad_TD = (
            torch.randn(shape.tokens, shape.dim, generator=generator).to(dtype) for _ in range(2)
        )
        self.weight_TK = torch.rand(shape.tokens, 1, generator=generator).to(torch.promote_types(dtype, torch.float32))
        self.expert_TK = choose(shape, skew, world, generator)
        config = LeastLoadedConfig(min_chunk_rows=shape.min_chunk_rows)
        self.least_loaded = LeastLoadedDispatcher(dist.group.WORLD, config)
        self.dispatchers = {"all_to_all": AllToAllDispatcher(dist.group.WORLD), "least_loaded": self.least_loaded}

    def step(self, side: str) -> tuple[list[Tensor], int]:
        """Forward and backward. Returns output and gradients, and the rows that this rank computed."""
        x_TD, weight_TK = (tensor.detach().requires_grad_() for tensor in (self.x_TD, self.weight_TK))
        self.experts.zero_grad()
        order_N, count_E, place_N = sort_slots(self.expert_TK, self.shape.experts)
        slot_TK = place_N.view_as(self.expert_TK)
        routing = Routing(token_N=order_N, weight_N=weight_TK.view(-1)[order_N], count_E=count_E, slot_TK=slot_TK)
        context = LayerContext(layer=0, batch_shape=(1, self.shape.tokens))
        dispatcher: Any = self.dispatchers[side]
        rows, ticket = dispatcher.dispatch(x_TD, routing, context)
        num_rows = sum(ticket.parts[0].host_counts)
        out_TD = dispatcher.combine(self.experts(rows, ticket), routing, ticket)
        out_TD.backward(self.grad_TD)
        made = [out_TD.detach(), x_TD.grad, weight_TK.grad, self.experts.gate_up.grad, self.experts.down.grad]
        return made, num_rows  # type: ignore[return-value]


def choose(shape: Shape, skew: Skew, world: int, generator: torch.Generator) -> Tensor:
    """int64 (T, 1): exact shares on every rank, in random order."""
    hot = shape.experts // world if skew.to_rank else 1
    cold = shape.experts if skew.share == 0 else shape.experts - hot
    num_hot = round(skew.share * shape.tokens)
    expert_T = torch.arange(shape.tokens) % cold
    expert_T[:num_hot] = shape.experts - hot + torch.arange(num_hot) % hot
    return expert_T[torch.randperm(shape.tokens, generator=generator)].unsqueeze(1)


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def measure(shape: Shape, skew: Skew, steps: int) -> dict[str, Any]:
    """One row of the table; the same on all ranks."""
    layer = Layer(shape, skew, torch.float32)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    busy: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    result: dict[str, Any] = {"shape": shape.name, "skew": skew.name}
    for index in range(steps + 1):
        for side in SIDES if index % 2 else SIDES[::-1]:
            dist.barrier()
            began, began_busy = time.perf_counter(), time.thread_time()
            _, rows = layer.step(side)
            spent = gathered((time.perf_counter() - began, time.thread_time() - began_busy))
            if index > 0:  # the first warms caches
                seconds[side].append(max(wall for wall, _ in spent))
                busy[side].append([cpu for _, cpu in spent])
            result[f"{side} rows"] = gathered(rows)
    for side in SIDES:
        with PeakBytes() as memory:
            made, _ = layer.step(side)
        del made
        result[f"{side} peak bytes"] = gathered(memory.peak)
        result[f"{side} step seconds"] = seconds[side]
        result[f"{side} CPU seconds"] = busy[side]
    exact = Layer(shape, skew, torch.float64)
    sides = [exact.step(side)[0] for side in SIDES]
    result["largest relative difference"] = max(
        gathered(max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in zip(*sides)))
    )
    counts = np.array(gathered(np.bincount(layer.expert_TK.view(-1).numpy(), minlength=shape.experts)))
    return result | planned(layer, counts)


def planned(layer: Layer, count_PE: np.ndarray) -> dict[str, Any]:
    """What the plan moves between ranks, and what it costs to make."""
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        plan = layer.least_loaded.plan(count_PE)
        plan.rows_of(count_PE)
        seconds.append(time.perf_counter() - began)
    plain = plain_plan(count_PE.sum(0), layer.world)
    expert_bytes = sum(p[0].numel() * p.element_size() for p in layer.experts.parameters())
    return {
        "planning seconds": statistics.median(seconds),
        "experts moved": int(plan.foreign_C.sum()),
        "weight bytes": 2 * int(plan.foreign_C.sum()) * expert_bytes,  # weights there, gradients back
        "all_to_all row bytes": row_bytes(plain, count_PE, layer.shape.dim * 4),
        "least_loaded row bytes": row_bytes(plan, count_PE, layer.shape.dim * 4),
    }


def row_bytes(plan: SpillPlan, count_PE: np.ndarray, size: int) -> int:
    """Bytes of rows that leave their rank: dispatch and combine, forward and backward."""
    rows_PC = plan.rows_of(count_PE)
    leaves_PC = plan.rank_C[None, :] != np.arange(len(count_PE))[:, None]
    return 4 * int((rows_PC * leaves_PC).sum()) * size


def worker(steps: int, quick: bool) -> None:
    """All cases on this rank; rank 0 prints them as JSON."""
    torch.set_num_threads(1)
    here = launch.start(timeout_seconds=600)
    for shape, skew in CASES[-2:] if quick else CASES:
        result = measure(shape, skew, steps)
        if here.is_first:
            print("RESULT " + json.dumps(result), flush=True)
    launch.finish()


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of one row of the table."""
    facts = {}
    for side in SIDES:
        slowest = [max(ranks) for ranks in result[f"{side} CPU seconds"]]
        facts[f"{side} makespan"] = statistics.median(slowest)
        facts[f"{side} step"] = statistics.median(result[f"{side} step seconds"])
        facts[f"{side} peak"] = max(result[f"{side} peak bytes"])
    for name in ("makespan", "step", "peak"):
        facts[f"{name} ratio"] = facts[f"all_to_all {name}"] / facts[f"least_loaded {name}"]
    pairs = zip(result["all_to_all step seconds"], result["least_loaded step seconds"])
    ratios = [plain / spilled for plain, spilled in pairs]
    return facts | {"lowest": min(ratios), "highest": max(ratios)}


def verdict(facts: dict[str, float], result: dict[str, Any]) -> str:
    """In words, so that a loss is not overlooked."""
    if result["experts moved"] == 0:
        return "no transfer"
    names = {"makespan": "model", "step": "step", "peak": "memory"}
    lost = [text for name, text in names.items() if facts[f"{name} ratio"] < 0.98]
    return f"**loses: {', '.join(lost)}**" if lost else "wins"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: all_to_all -> least_loaded, and ratios above 1 where least_loaded is better."""
    lines = [
        "| load | busiest rank's rows | experts moved | model: slowest rank's CPU ms | "
        "step ms on this machine (min-max of ratio) | peak MiB of a rank | rows moved MiB | weights moved MiB | "
        "plan ms | difference | least_loaded |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        f = summary(result)
        cells = [
            f"{result['skew']}" + ("" if result["shape"] == MANY.name else f", {result['shape']}"),
            " -> ".join(f"{max(result[f'{side} rows']):,}" for side in SIDES),
            f"{result['experts moved']}",
            " -> ".join(f"{f[f'{side} makespan'] * 1e3:,.0f}" for side in SIDES) + f" (**{f['makespan ratio']:.2f}x**)",
            " -> ".join(f"{f[f'{side} step'] * 1e3:,.0f}" for side in SIDES)
            + f" (**{f['step ratio']:.2f}x**, {f['lowest']:.2f}-{f['highest']:.2f})",
            " -> ".join(f"{f[f'{side} peak'] / 2**20:,.1f}" for side in SIDES) + f" (**{f['peak ratio']:.2f}x**)",
            " -> ".join(f"{result[f'{side} row bytes'] / 2**20:,.1f}" for side in SIDES),
            f"{result['weight bytes'] / 2**20:,.1f}",
            f"{result['planning seconds'] * 1e3:.2f}",
            f"{result['largest relative difference']:.0e}" if result["largest relative difference"] else "0",
            verdict(f, result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="two cases only")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--json", type=Path, default=ROOT / ".cache" / "skewed_load.json", help="where numbers go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.steps, arguments.quick)
    options = ["--worker", "--steps", str(arguments.steps), *(["--quick"] if arguments.quick else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    command = [sys.executable, *launcher, __file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    results = [json.loads(line[len("RESULT ") :]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not results:
        raise SystemExit(f"the ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    facts = (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {arguments.ranks} processes x 1 thread, gloo; `make bench-skew`"
    )
    shapes = "\n".join(
        f"- {s.name}: " + ", ".join(f"{name} {value}" for name, value in asdict(s).items() if name != "name")
        for s in (MANY, FEW)
    )
    text = f"{facts}\n\n{table(results)}\n\nShapes (fp32; `tokens` of a rank, one slot each):\n\n{shapes}"
    print(text)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    if arguments.write:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

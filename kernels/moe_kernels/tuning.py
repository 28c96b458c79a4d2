"""Measure which implementation and which tiles are fastest for one shape on this machine.

Each product is timed alone with each of its candidate tiles, after its result has been compared with plain torch; then
the whole operation, forward and backward, with what was best, against the other implementations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_kernels.choice import (
    AMPERE,
    GATHERED,
    INTERPRETER,
    PLAIN,
    SPECIALIZED,
    Entry,
    ExpertKernel,
    KernelConfig,
    Problem,
    Tile,
    device_name,
    entry_values,
    refusal,
)
from moe_kernels.combine import gather
from moe_kernels.counting_sort import sort_slots
from moe_kernels.expert_rows import expert_rows
from moe_kernels.grad_hidden import grad_hidden
from moe_kernels.grad_weight import grad_weight
from moe_kernels.grouped import Groups
from moe_kernels.moe_mlp import moe_mlp
from moe_kernels.triton_support import INTERPRETED, SPECIALIZES, triton
from moe_kernels.up_projection import up_projection

Say = Callable[[str], None]

LARGEST_ERROR = 2.0**-6
"""Of the norm, against plain torch in the same type: some roundings of bf16, and nothing like a wrong row."""


@dataclass(frozen=True)
class Operands:
    """Random operands of one layer, with the loads of a random choice of experts."""

    x_TD: Tensor
    gate_up: Tensor
    down: Tensor
    grad_TD: Tensor
    weight_N: Tensor
    token_N: Tensor
    slot_TK: Tensor
    count_E: Tensor
    end_E: Tensor

    @staticmethod
    def draw(problem: Problem, top_k: int) -> Operands:
        """As many tokens as fill the rows of the problem."""
        device, dtype = problem.device, problem.dtype
        tokens = max(problem.num_rows // top_k, 1)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        score_TE = torch.rand(tokens, problem.num_experts, generator=generator, device=device)
        order_N, count_E, place_N = sort_slots(score_TE.topk(top_k, dim=-1).indices, problem.num_experts)
        dim, hidden = problem.dim, problem.expert_dim
        return Operands(
            x_TD=normal(tokens, dim),
            gate_up=normal(problem.num_experts, 2 * hidden, dim) * dim**-0.5,
            down=normal(problem.num_experts, dim, hidden) * hidden**-0.5,
            grad_TD=normal(tokens, dim),
            weight_N=torch.rand(tokens * top_k, generator=generator, device=device),
            token_N=(order_N // top_k).int(),
            slot_TK=place_N.view(tokens, top_k).int(),
            count_E=count_E,
            end_E=count_E.cumsum(0, dtype=torch.int32),
        )


def tune(problem: Problem, top_k: int, say: Say = print) -> dict[str, Any]:
    """The line of a table for this shape: see `choice.entry_values`.

    Args:
        top_k: slots of a token; the rows of the problem are those of `num_rows / top_k` tokens.
    Raises:
        ValueError: nothing can compute this shape here.
    """
    operands = Operands.draw(problem, top_k)
    sides: dict[str, tuple[ExpertKernel, KernelConfig]] = {}
    for how in (ExpertKernel.loop, ExpertKernel.grouped_mm):
        why = refusal(how, problem)
        if why is None:
            sides[how.value] = (how, PLAIN)
        else:
            say(f"{how.value}: {why}")
    why = refusal(ExpertKernel.triton, problem)
    if why is None:
        for name, config in _tuned_configs(problem, operands, say).items():
            sides[name] = (ExpertKernel.triton, config)
    else:
        say(f"triton: {why}")
    milliseconds = _compare(problem, operands, sides, say)
    if not milliseconds:
        raise ValueError(f"nothing can compute {problem}")
    best = min(milliseconds, key=milliseconds.__getitem__)
    how, config = sides[best]
    say(f"fastest: {best}")
    kind, rows = str(problem.dtype).removeprefix("torch."), max(problem.num_rows // problem.num_experts, 1)
    shape = (device_name(problem.device), kind, problem.dim, problem.expert_dim, problem.num_experts, rows)
    made_with = {"torch": torch.__version__, "triton": None if triton is None else triton.__version__}
    return entry_values(Entry(*shape, how, config), milliseconds=milliseconds, top_k=top_k, made_with=made_with)


def _compare(
    problem: Problem, operands: Operands, sides: dict[str, tuple[ExpertKernel, KernelConfig]], say: Say
) -> dict[str, float]:
    """Milliseconds of forward and backward. Sides take turns, so that a machine that slows down slows all."""
    steps = {name: _step(problem, operands, *side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for name in list(steps):
            try:
                times[name].append(milliseconds_of(steps[name], problem.device))
            except Exception as error:  # a compiler or a launch that fails must not take the other sides with it
                say(f"{name}: {_short(error)}")
                del steps[name], times[name]
    found = {name: min(values) for name, values in times.items()}
    for name, value in found.items():
        say(f"{name:24} forward and backward {value:9.3f} ms")
    return found


def _step(problem: Problem, operands: Operands, how: ExpertKernel, config: KernelConfig) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in (operands.x_TD, operands.gate_up, operands.down, operands.weight_N)]
    kind, rows = str(problem.dtype).removeprefix("torch."), max(problem.num_rows // problem.num_experts, 1)
    shape = (device_name(problem.device), kind, problem.dim, problem.expert_dim, problem.num_experts, rows)
    table = (Entry(*shape, how, config),)

    def step() -> object:
        out = moe_mlp(
            leaves[0], leaves[1], leaves[2], operands.token_N, operands.count_E, leaves[3], operands.slot_TK, how=how,
            table=table,
        )  # fmt: skip
        return torch.autograd.grad(out, leaves, operands.grad_TD)

    return step


def _tuned_configs(problem: Problem, operands: Operands, say: Say) -> dict[str, KernelConfig]:
    """The best tiles where products gather their rows, and where these are copied into order first."""
    found = {}
    for name, copies in (("triton, gathered", False), ("triton, copied", True)):
        config = starting_config(problem.device, copies)
        calls = _calls(operands, copies)
        for product, call in calls.items():
            tiles = candidates(product, config, copies)
            best: dict[str, Any] = {product: _best_tile(f"{name} {product}", tiles, call, problem.device, say)}
            config = replace(config, **best)
        found[name] = config
    return found


def starting_config(device: torch.device, copies: bool) -> KernelConfig:
    """Tiles that are known to compile for a device."""
    if INTERPRETED:
        return replace(INTERPRETER, copy_rows=copies)
    if torch.cuda.get_device_capability(device) < (9, 0):
        return replace(AMPERE, copy_rows=copies)
    return SPECIALIZED if copies and SPECIALIZES else replace(GATHERED, copy_rows=copies)


def candidates(product: str, config: KernelConfig, copies: bool) -> list[Tile]:
    """Tiles worth measuring for one product; the one in the configuration first."""
    first: Tile = getattr(config, product)
    wide = [(128, 256), (256, 128), (128, 128)]
    if INTERPRETED:
        return [first, replace(first, depth=32)]
    if product == "up":
        sizes = [(128, 64), (64, 64), (64, 128), (128, 128)]
    elif product == "grad_hidden":
        sizes = [(128, 128), (64, 256), (64, 128)]
    else:
        sizes = wide
    plain = [
        Tile(rows, columns, first.depth, warps=8, stages=stages, parts=first.parts if not first.specialize else 1)
        for rows, columns in sizes
        for stages in (3, 4)
    ]
    # More programs than run at once leave it to the device to fill in for those that wait.
    crowded = [replace(tile, per_processor=count) for tile in plain for count in (2, 64) if tile.stages == 3]
    alone = []
    if copies and SPECIALIZES and product not in ("grad_hidden", "add_weight"):
        sizes = [(128, 128), (128, 64)] if product == "up" else wide
        alone = [Tile(r, c, 64, warps=4, stages=stages, specialize=True) for r, c in sizes for stages in (3, 4)]
    return list(dict.fromkeys([first, *plain, *crowded, *alone]))


def _calls(o: Operands, copies: bool) -> dict[str, Callable[[Tile | None], Sequence[Tensor | None]]]:
    """Each product of the operation as a function of its tile; None computes it in plain torch."""
    how = ExpertKernel.loop if refusal(ExpertKernel.grouped_mm, _problem_of(o)) else ExpertKernel.grouped_mm
    groups = Groups.of(o.end_E, how, o.count_E.tolist())
    index_N = None if copies else o.token_N
    x, grad = (gather(t, o.token_N, False) if copies else t for t in (o.x_TD, o.grad_TD))
    hidden, activation = up_projection(x, index_N, o.gate_up, groups, None)
    grad_h, weighted, _ = grad_hidden(grad, index_N, o.weight_N, o.down, hidden, groups, None)

    mains = [torch.zeros(weight.shape, device=weight.device) for weight in (o.down, o.gate_up)]
    checked: set[Tile | None] = set()

    def add(tile: Tile | None) -> list[Tensor]:
        if tile not in checked:  # the call that is compared; those that are timed add on
            checked.add(tile)
            for main in mains:
                main.zero_()
        grad_weight(grad, index_N, weighted, None, groups, tile, mains[0])
        grad_weight(grad_h, None, x, index_N, groups, tile, mains[1])
        return [main.clone() for main in mains] if tile is None else mains

    return {
        "up": lambda tile: up_projection(x, index_N, o.gate_up, groups, tile),
        "down": lambda tile: [expert_rows(activation, o.down.mT, groups, tile)],
        "grad_hidden": lambda tile: grad_hidden(grad, index_N, o.weight_N, o.down, hidden, groups, tile),
        "grad_rows": lambda tile: [expert_rows(grad_h, o.gate_up, groups, tile)],
        "grad_weight": lambda tile: [
            grad_weight(grad, index_N, weighted, None, groups, tile),
            grad_weight(grad_h, None, x, index_N, groups, tile),
        ],
        "add_weight": add,
    }


def _problem_of(o: Operands) -> Problem:
    return Problem.of(o.x_TD, o.gate_up, o.token_N.shape[0])


def _best_tile(
    name: str, tiles: list[Tile], call: Callable[[Tile | None], Sequence[Tensor | None]], device: torch.device, say: Say
) -> Tile:
    """The fastest whose result is right. The first must run: it is what is used untuned."""
    wanted = call(None)
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            error = max(_relative_error(a, b) for a, b in zip(call(tile), wanted) if a is not None and b is not None)
            if not error <= LARGEST_ERROR:
                say(f"{name} {tile}: WRONG, relative error {error:.1e}")
                continue
            times[tile] = milliseconds_of(partial(call, tile), device)
        except Exception as error:  # such as more shared memory than there is
            say(f"{name} {tile}: {_short(error)}")
    if not times:
        raise ValueError(f"{name}: no tile of {len(tiles)} computes the right result here")
    best = min(times, key=times.__getitem__)
    say(f"{name:34} {times[best]:8.3f} ms, {len(times)} of {len(tiles)} tiles ran; {best}")
    return best


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return float(difference)  # a NaN is not below any limit


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:120] if lines else ''}"


def milliseconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median of repeated calls after a warm-up."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"))
    call()
    times: list[float] = []
    stop = time.perf_counter() + 0.3
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)

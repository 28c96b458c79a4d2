"""How much of a slow exchange is hidden: one MoE layer, forward and backward, on two ranks with a slow link.

The link is that of `two_nodes.py`: two network namespaces joined by a cable of limited rate. In one run, with arms in
turn: the same layer with each exchange waited for as soon as it starts, with the shared experts beside it, and with
the routed experts in chunks as well. Times of the exchange alone and of the products alone stand beside them.

    sudo python benchmarks/overlap.py               prints a table; needs `ip` and `tc`
    sudo python benchmarks/overlap.py --write       also writes it into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from report import processor, write_between
from torch import nn
from two_nodes import Refused, network, run_ranks

from moe_parallel import launch
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.local import LocalDispatcher
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import LayerContext
from moe_parallel.row_exchange import RowExchange

BEGIN, END = "<!-- overlap -->", "<!-- /overlap -->"
RANKS, EXPERTS, TOP_K, TOKENS, WIDTH, EXPERT_WIDTH = 2, 16, 2, 1024, 512, 512


def waiting() -> AbstractContextManager[Any]:
    """Within it each exchange is waited for where it starts."""
    start = RowExchange._send

    def send_and_wait(self: RowExchange, part: int, *arguments: Any) -> None:
        start(self, part, *arguments)
        self._under_way[part][0].wait()

    return mock.patch.object(RowExchange, "_send", send_and_wait)


def make_layer(num_experts: int) -> MoELayer:
    """A layer whose experts are all held here."""
    config = MoEConfig(num_experts=num_experts, expert_dim=EXPERT_WIDTH, num_shared_experts=1)
    layer = MoELayer(WIDTH, config, TokenChoiceConfig(top_k=TOP_K, forced_balance=True), BalanceConfig(), 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    return layer


def exchange_alone(dispatcher: AllToAllDispatcher, layer: MoELayer) -> Callable[[], None]:
    """Rows to the experts and back, and their gradients, with nothing in between."""
    x_TD, grad_TD = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    context = LayerContext(layer=0, batch_shape=(1, TOKENS))

    def once() -> None:
        routing, _ = layer.route(x_TD, layer.router, context)
        tokens, ticket = dispatcher.dispatch(x_TD, routing, context)
        results = [part.send(part.receive(token)[0]) for token, part in zip(tokens, ticket.parts)]
        dispatcher.combine(results, routing, ticket).backward(grad_TD)

    return once


def whole(layer: MoELayer, context_manager: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    """The layer, forward and backward."""
    x_TD, grad_TD = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    context = LayerContext(layer=0, batch_shape=(1, TOKENS))

    def once() -> None:
        layer.zero_grad()
        with context_manager():
            layer(x_TD, context)[0].backward(grad_TD)

    return once


def make_arms() -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    group = dist.group.WORLD
    alone = make_layer(EXPERTS)
    alone.dispatcher = LocalDispatcher()
    arms = {
        "exchange alone": exchange_alone(AllToAllDispatcher(group), alone),
        "exchange alone, 4 chunks": exchange_alone(AllToAllDispatcher(group, 4), alone),
        "products alone (no exchange)": whole(alone, nullcontext),
    }
    for name, chunks, context_manager in (
        ("each exchange waited for", 1, waiting),
        ("shared experts beside it", 1, nullcontext),
        ("and 2 chunks", 2, nullcontext),
        ("and 4 chunks", 4, nullcontext),
        ("and 8 chunks", 8, nullcontext),
    ):
        layer = make_layer(EXPERTS)
        for weight in ("gate_up", "down"):  # this rank's experts
            mine = getattr(layer.experts, weight).data.chunk(RANKS)[dist.get_rank()].clone()
            setattr(layer.experts, weight, nn.Parameter(mine))
        layer.dispatcher = AllToAllDispatcher(group, chunks)
        arms[name] = whole(layer, context_manager)
    return arms


def worker(result: Path, rounds: int) -> None:
    """Time the arms in turn; the slowest rank of each round counts."""
    torch.set_num_threads(1)
    here = launch.start(timeout_seconds=300)
    arms = make_arms()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        for name, once in list(arms.items())[:: 1 if index % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            once()
            longest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            if index > 0:
                seconds[name].append(float(longest))
    if here.is_first:
        result.write_text(json.dumps(seconds))
    launch.finish()


def report(seconds: dict[str, list[float]], megabits: int, rounds: int) -> str:
    """The table, in Markdown."""
    base = min(seconds["each exchange waited for"])
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "",
        f"Two ranks of one core each, {megabits} Mbit/s between them; {TOKENS} tokens a rank, width {WIDTH}, {EXPERTS}",
        f"experts of {EXPERT_WIDTH}, top {TOP_K}, one shared expert, even load, float32; {rounds} rounds, the slower",
        "rank of each. Speed by the fastest round: other work ran on the machine.",
        "",
        "| arm | fastest, ms | median, ms | speed |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        speed = "" if "alone" in name else f"{base / min(values):.2f}"
        lines.append(f"| {name} | {min(values) * 1e3:.0f} | {statistics.median(values) * 1e3:.0f} | {speed} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=int, default=200, help="rate of the cable, each way")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each arm")
    parser.add_argument("--write", action="store_true", help="also write the table into docs/benchmarks.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.rounds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through `finally`, as Ctrl-C does
    try:
        with network(arguments.megabits) as names:
            seconds = run_ranks(names, ["--rounds", str(arguments.rounds)], __file__, RANKS)
    except Refused as reason:
        return print(f"skipped: no two nodes on this machine: {reason}")
    text = report(seconds, arguments.megabits, arguments.rounds)
    print(text)
    if arguments.write:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

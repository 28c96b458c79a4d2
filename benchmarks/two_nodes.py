"""Flat against two-hop exchange over a slow link between two nodes, on one machine.

Four gloo ranks live in two network namespaces, two in each. The namespaces are joined by a virtual cable whose rate a
token-bucket filter limits; ranks of one namespace talk over its loopback. In one run, with arms in turn: the exchange
alone (dispatch and combine, forward and backward), and whole training steps. All-to-alls are counted by level, on their
way in; what the cable carried is read from its counters. A model of time = messages * alpha + bytes / beta, with both
measured in the same run, stands beside the measured times and is carried over to 16 nodes of 8 GPUs.

    sudo python benchmarks/two_nodes.py             prints tables; needs `ip` and `tc`
    sudo python benchmarks/two_nodes.py --write     also writes them into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from against_transformers import Shape, batch_of
from hydra import compose, initialize_config_dir
from report import processor, write_between
from torch import Tensor
from two_nodes_report import report

from moe_parallel import launch, options
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_parallel.moe.dispatch.two_hop import TwoHopDispatcher
from moe_parallel.moe.routing import Choice, LayerContext, Routing

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- two_nodes -->", "<!-- /two_nodes -->"
CABLE, PORT = "cable", "29500"
RANKS, PER_NODE = 4, 2
EXPERTS, TOKENS, FEW, WIDTH = 16, 1024, 16, 256
"""Of the exchange alone: tokens of a rank, also few of them, numbers of a row."""
LARGE = 2**18
"""Numbers in a message that measures the rate: as large as those of the exchanges, since rates depend on it."""

SHAPE = Shape("two nodes", 128, 4, 4, EXPERTS, 1, 128, 257, 512, 4)
MODEL = (
    "model=tiny", "model.dim=128", "model.num_layers=4", "model.first_dense_layers=0", f"moe.num_experts={EXPERTS}",
    "moe.expert_dim=128", "moe.num_shared_experts=0", "balance=micro_batch", f"parallel.ep={RANKS}", "parallel.shard=1",
)  # fmt: skip
"""Dense weights are few and replicated: their gradients cross the cable too, equally in all arms, and are counted."""
ROUTERS = {
    "flat top-1 (Switch)": ("router=softmax", "router.top_k=1"),
    "SMILE top-1": ("router=smile", "router.top_k=1", "router.num_nodes=2"),
    "SMILE top-4": ("router=smile", "router.top_k=4", "router.num_nodes=2"),
    "flat top-2": ("router=softmax", "router.top_k=2"),
    "flat top-4": ("router=softmax", "router.top_k=4"),
    "top-4 of one node": ("router=node_limited", "router.top_k=4", "router.num_groups=2", "router.top_groups=1"),
}
TRANSPORTS = ("all_to_all", "two_hop")


# -- the network ---------------------------------------------------------------------------------------------------


class Refused(RuntimeError):
    """This machine does not let us build the network."""


def command(*words: str) -> None:
    """Run it, or raise Refused with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(f"`{' '.join(words)}`: {done.stderr.strip() or done.stdout.strip()}")


@contextmanager
def network(megabits: int) -> Iterator[list[str]]:
    """Names of two namespaces with a cable of limited rate between them; gone afterwards, whatever happens."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise Refused("needs root, `ip` and `tc`")
    names = [f"two_nodes_{os.getpid()}_{place}" for place in "ab"]
    try:
        for name in names:
            command("ip", "netns", "add", name)
        ends = ["type", "veth", "peer", "name", CABLE, "netns", names[1]]
        command("ip", "link", "add", "name", CABLE, "netns", names[0], *ends)
        for place, name in enumerate(names):
            command("ip", "-n", name, "addr", "add", f"10.77.0.{place + 1}/24", "dev", CABLE)
            command("ip", "-n", name, "link", "set", "lo", "up")
            command("ip", "-n", name, "link", "set", CABLE, "up")
            limit = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "2000ms"]  # queues, drops nothing
            command("tc", "-n", name, "qdisc", "add", "dev", CABLE, "root", "tbf", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run_ranks(names: list[str], arguments: list[str], script: str = __file__, ranks: int = RANKS) -> dict[str, Any]:
    """Start the ranks in their namespaces and read what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result, started = Path(folder) / "result.json", []
        try:
            per_node = ranks // len(names)
            for rank in range(ranks):
                environment = dict(
                    os.environ, RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank % per_node),
                    LOCAL_WORLD_SIZE=str(per_node), MASTER_ADDR="10.77.0.1", MASTER_PORT=PORT,
                    GLOO_SOCKET_IFNAME=CABLE, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1",
                )  # fmt: skip
                inside = ["ip", "netns", "exec", names[rank // per_node], sys.executable, script]
                started.append(subprocess.Popen([*inside, "--worker", str(result), *arguments], env=environment))
            while any(process.poll() is None for process in started):
                if any(process.poll() for process in started):
                    raise RuntimeError("a rank failed; its error is above")
                time.sleep(0.2)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return json.loads(result.read_text())


# -- what a rank does ----------------------------------------------------------------------------------------------


class Meter:
    """Counts what this rank hands to collectives, and what the cable of its node carried."""

    def __init__(self) -> None:
        self.node = dist.get_rank() // PER_NODE
        self.reset()
        exchange = dist.all_to_all_single

        def all_to_all_single(out, rows, received=None, sent=None, group=None, **rest):
            self._see_exchange(rows, sent, dist.get_process_group_ranks(group))
            return exchange(out, rows, received, sent, group=group, **rest)

        dist.all_to_all_single = all_to_all_single
        reduce = dist.all_reduce

        def all_reduce(tensor, *arguments, group=None, **rest):
            if dist.get_world_size(group) > 1:
                self.seen["reduced_bytes"] += tensor.nbytes
            return reduce(tensor, *arguments, group=group, **rest)

        dist.all_reduce = all_reduce

    def reset(self) -> None:
        """Start again from zero."""
        names = ("across_bytes", "across_messages", "within_bytes", "within_messages", "reduced_bytes")
        self.seen, self.carried = dict.fromkeys(names, 0), self._cable()

    def counts(self) -> dict[str, int]:
        """Since `reset`: bytes and non-empty messages to other ranks by level, bytes put into reductions of several
        ranks, and bytes that left the node, protocol included."""
        return {**self.seen, "cable_bytes": self._cable() - self.carried}

    def _see_exchange(self, rows: Tensor, sent: list[int] | None, ranks: list[int]) -> None:
        sizes = [rows.shape[0] // len(ranks)] * len(ranks) if sent is None else sent
        for rank, size in zip(ranks, sizes):
            if rank != dist.get_rank() and size > 0:
                level = "within" if rank // PER_NODE == self.node else "across"
                self.seen[f"{level}_bytes"] += size * rows[0].nbytes
                self.seen[f"{level}_messages"] += 1

    def _cable(self) -> int:
        return int(Path(f"/sys/class/net/{CABLE}/statistics/tx_bytes").read_text())


def measure_link(group: dist.ProcessGroup, streams: int) -> dict[str, float]:
    """Seconds of an empty exchange with the one other rank of the group, and bytes per second of a large one.

    Args:
        streams: groups that share the link; they measure at the same time.
    """
    seconds = {}
    for size, in_a_row, repeats in ((1, 10, 30), (LARGE, 4, 9)):
        rows, times = torch.zeros(2 * size), []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(in_a_row):
                dist.all_to_all_single(torch.empty_like(rows), rows, group=group)
            times.append((time.perf_counter() - began) / in_a_row)
        longest = torch.tensor(times[1:], dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        seconds[size] = float(longest.median())
    return {"alpha_seconds": seconds[1], "bytes_per_second": streams * 4 * LARGE / (seconds[LARGE] - seconds[1])}


def choose(routing: str, tokens: int, rank: int) -> Choice:
    """Experts of random tokens."""
    generator = torch.Generator().manual_seed(rank)
    score_TE = torch.rand(tokens, EXPERTS, generator=generator)
    if routing == "top-4 of one node":
        half = EXPERTS // 2
        first_T1 = torch.randint(0, 2, (tokens, 1), generator=generator) * half
        return Choice(score_TE[:, :half].topk(4).indices + first_T1)
    return Choice(score_TE.topk(int(routing.removeprefix("top-"))).indices)


def exchange_arms(mesh: ParallelMesh) -> dict[str, Callable[[int], None]]:
    """Dispatch, combine and their backward pass, without experts."""
    dispatchers = {
        "all_to_all": AllToAllDispatcher(mesh.ep.get_group()),
        "two_hop": TwoHopDispatcher(*mesh.node_groups(PER_NODE)),
    }
    context = LayerContext(layer=0, batch_shape=(1, TOKENS))

    def arm(routing: str, tokens: int, transport: str) -> Callable[[int], None]:
        choice, dispatcher = choose(routing, tokens, dist.get_rank()), dispatchers[transport]
        x_TD = torch.randn(tokens, WIDTH, requires_grad=True)
        weight_TK = torch.rand(choice.expert.shape, requires_grad=True)
        upstream_TD = torch.randn(tokens, WIDTH)

        def once(index: int) -> None:
            chosen = Routing.of(choice, weight_TK, EXPERTS)
            (token,), ticket = dispatcher.dispatch(x_TD, chosen, context)
            rows_RD, _ = ticket.parts[0].receive(token)
            dispatcher.combine([ticket.parts[0].send(rows_RD)], chosen, ticket).backward(upstream_TD)

        return once

    routings = {name: (name, TOKENS) for name in ("top-1", "top-2", "top-4", "top-4 of one node")}
    routings[f"top-1, {FEW} tokens"] = ("top-1", FEW)
    return {
        f"{name} | {transport}": arm(*what, transport) for name, what in routings.items() for transport in TRANSPORTS
    }


def compose_config(overrides: tuple[str, ...]) -> options.Config:
    """The configuration of a command line."""
    options.register()
    with initialize_config_dir(config_dir=str(ROOT / "configs"), version_base=None):
        return options.to_config(compose("train", overrides=list(overrides)))


def training_arms() -> dict[str, Callable[[int], None]]:
    """Whole steps: forward, loss, backward, reductions, clipping, AdamW, router updates."""

    def arm(router: str, transport: str) -> Callable[[int], None]:
        config = compose_config((*MODEL, *ROUTERS[router], f"dispatch={transport}"))
        mesh = ParallelMesh(make_layout(config.parallel, RANKS, EXPERTS), "cpu")
        shape = options.architecture(config, SHAPE.vocabulary)
        engine = NativeEngine(
            shape, mesh, config.parallel, config.optim, torch.device("cpu"), torch.float32, dispatch=config.dispatch
        )
        engine.init_weights(config.init, seed=0)
        targets = RANKS * SHAPE.rows * SHAPE.sequence

        def once(index: int) -> None:
            batch = batch_of(*SHAPE.batch, index * RANKS + dist.get_rank())
            sums, _ = engine.forward_backward([batch], index, targets, targets)
            engine.step(1e-3, engine.gradient_norm())
            engine.update_routers(sums.summed(engine.group))

        return once

    return {f"{router} | {transport}": arm(router, transport) for router in ROUTERS for transport in TRANSPORTS}


def take_turns(arms: dict[str, Callable[[int], None]], rounds: int, meter: Meter) -> dict[str, Any]:
    """Seconds of the slowest rank in each round, and mean counts of ranks, for each arm."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts: dict[str, list[dict[str, int]]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        for name, once in list(arms.items())[:: 1 if index % 2 else -1]:
            dist.barrier()
            meter.reset()
            began = time.perf_counter()
            once(index)
            longest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            seen = meter.counts()  # after all ranks are done, so that nothing is still on its way
            if index > 0:  # the first builds caches and optimizer state
                seconds[name].append(float(longest))
                counts[name].append(seen)
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, counts)

    def mean(name: str, what: str) -> float:
        return statistics.mean(seen[what] for rank in gathered for seen in rank[name])

    return {
        name: {"seconds": seconds[name], **{what: mean(name, what) for what in counts[name][0]}} for name in arms
    }  # fmt: skip


def worker(result: Path, rounds: int, steps: int) -> None:
    """Measure the links, the exchange, the training steps; rank 0 writes what came out."""
    torch.set_num_threads(1)
    here = launch.start(timeout_seconds=300)
    mesh, meter = ParallelMesh(make_layout(ParallelConfig(ep=RANKS), RANKS, EXPERTS), "cpu"), Meter()
    across, within = mesh.node_groups(PER_NODE)
    found: dict[str, Any] = {
        "across": measure_link(across, streams=PER_NODE),
        "within": measure_link(within, streams=1),
        "exchange": take_turns(exchange_arms(mesh), rounds, meter),
    }
    if steps > 0:
        found["training"] = take_turns(training_arms(), steps, meter)
    if here.is_first:
        result.write_text(json.dumps(found))
    launch.finish()


# -- the command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=int, default=200, help="rate of the cable, each way")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each exchange")
    parser.add_argument("--steps", type=int, default=7, help="timed training steps of each arm; 0 has none")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    parser.add_argument("--write", action="store_true", help="also write the tables into docs/benchmarks.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.rounds, arguments.steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through `finally`, as Ctrl-C does
    try:
        with network(arguments.megabits) as names:
            found = run_ranks(names, ["--rounds", str(arguments.rounds), "--steps", str(arguments.steps)])
    except Refused as reason:
        return print(f"skipped: no two nodes on this machine: {reason}")
    found["facts"] = {
        "date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count(),
        "torch": torch.__version__, "megabits": arguments.megabits, "tokens": TOKENS, "width": WIDTH,
        "experts": EXPERTS, "model": MODEL, "training_tokens": SHAPE.rows * SHAPE.sequence,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    text = report(found)
    print(text)
    if arguments.write:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()

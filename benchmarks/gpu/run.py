"""Times one layer of experts on this GPU, ours and every peer's, and writes a table and JSON. One command, ten minutes.

    python -m benchmarks.gpu.run                                  everything, peers in the configurations they ship
    python -m benchmarks.gpu.run --shapes qwen3_30b_a3b --tokens 8192 --tune sonic liger
                                                                  peers search for their best first: minutes a shape
    python -m benchmarks.gpu.run --dry-run                        on a CPU, tiny: every path of this harness

In this order: ceilings of the device (products, a copy); for each case the check of every side against float64, with
memory poisoned beforehand; then timing in turns, there and back, together with the balanced torch.bmm chain that all
times are divided by. Cases come in the order of their weight, so that a run whose time is up has the important ones.
What a peer cannot do stands in the table with its reason. PEERS=path brings peers that are not installed here, see
bundle.py. Needs `moe_kernels` on the path: installed, or PYTHONPATH=kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import BOUND
from benchmarks.gpu.peers import PEERS, unpacked_bundle
from benchmarks.gpu.report import BEGIN, END, full_table, summary
from benchmarks.gpu.routing_sets import ROUTINGS
from benchmarks.gpu.shapes import DRY_SHAPES, DRY_TOKENS, SHAPES, TOKENS
from benchmarks.gpu.worker import LOST, Plan
from benchmarks.report import write_between

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("device", "inputs", BOUND)
"""Steps that belong to no side: if they fail there is nothing to go on with."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; every one of them changes the run."""
    shapes = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, metavar="SHAPE", help=", ".join(shapes))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="in the order of measuring")
    parser.add_argument("--routing", nargs="+", choices=list(ROUTINGS), default=list(ROUTINGS), help="likewise")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--tune", nargs="+", choices=["sonic", "liger"], default=[], help="search for their best first")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all; the rest is listed as not reached")
    parser.add_argument("--step-seconds", type=float, help="silence after which a side is ended; 150, with --tune 480")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_gpu", help="folder of the results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; runs on a CPU")
    chosen = parser.parse_args(arguments)
    if chosen.dry_run:
        chosen.shapes, chosen.tokens = [shape.name for shape in DRY_SHAPES], list(DRY_TOKENS)
        if chosen.write:
            parser.error("--write with --dry-run: times of a dry run say nothing; write those of a GPU")
    elif not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here; --dry-run tries the whole harness on a CPU")
    chosen.out = chosen.out.resolve()
    if chosen.step_seconds is None:
        chosen.step_seconds = 480.0 if chosen.tune else 150.0
    if chosen.peers is None:  # on a GPU the loop waits for counts at every layer: measured only when asked for
        chosen.peers = [name for name in PEERS if name != "ours_loop" or not torch.cuda.is_available()]
    return chosen


def run_worker(plan: Plan, out: Path, step_seconds: float) -> tuple[int | None, list[dict[str, Any]]]:
    """One process over the plan.

    Returns:
        Its exit code, None if it was ended for its silence or at the deadline; and the lines that it wrote.
    """
    lines_path = out / "lines.jsonl"
    lines_path.touch()
    begin = lines_path.stat().st_size
    (out / "plan.json").write_text(json.dumps(asdict(plan)))
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(out / "plan.json"), str(lines_path)]
    environment = dict(os.environ)
    # Sides of different appetite take turns: without this, memory in blocks of the wrong size runs out.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with (out / "worker.log").open("a") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        heard, size = time.time(), begin
        try:
            while worker.poll() is None:
                time.sleep(0.1)
                if lines_path.stat().st_size != size:
                    heard, size = time.time(), lines_path.stat().st_size
                if time.time() - heard > step_seconds or time.time() > plan.deadline + 30:
                    break
        finally:
            code = worker.poll()
            if code is None:
                worker.kill()
                worker.wait()
    with lines_path.open() as file:
        file.seek(begin)
        return code, [json.loads(line) for line in file if line.endswith("\n")]


def measure(plan: Plan, out: Path, step_seconds: float) -> list[dict[str, Any]]:
    """Workers one after another, until all is measured or the time is up; each leaves out who ended the last one.

    Something that fails and belongs to no side ends the measuring, as a line "failed".
    """
    lines: list[dict[str, Any]] = []
    while True:
        code, new = run_worker(plan, out, step_seconds)
        lines += new
        if code == 0 or time.time() > plan.deadline:
            return lines
        last = next((line for line in reversed(new) if line["kind"] == "progress"), None)
        if last is None or last["peer"] in ELSEWHERE:
            log = (out / "worker.log").read_text()[-2000:]
            return [*lines, {"kind": "failed", "code": code, "during": last, "log": log}]
        lost = next((line["reason"] for line in new if line["kind"] == "lost"), None)
        if code is None:
            why = f"ended after {step_seconds:g} s without an answer"
        else:
            why = lost if code == LOST and lost else f"ended the process (exit code {code})"
        peer, shape = last["peer"], last["case"][1]
        reason = f"{why}, during {last['stage']}"
        again = any(name.endswith(f"/{peer}") for name in plan.excluded)
        for name in {case[1] for case in plan.cases} if again else {shape}:
            plan.excluded.setdefault(f"{name}/{peer}", reason)
        done = [line["case"] for line in new if line["kind"] == "case"]
        plan = Plan(
            **{
                **asdict(plan),
                "cases": [case for case in plan.cases if case not in done],
                "ceilings": plan.ceilings and not any(line["kind"] == "ceilings" for line in new),
            }
        )


def collect(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last word on each side of each case, and the facts of the machine."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    states = []
    for line in lines:
        content = {key: value for key, value in line.items() if key != "kind"}
        if line["kind"] == "row":
            content.pop("time")
            rows[(content["dtype"], content["case"], content["peer"])] = content
        elif line["kind"] in ("machine", "ceilings", "failed"):
            facts[line["kind"]] = content
        elif line["kind"] == "case":
            states.append(content)
    return {**facts, "rows": list(rows.values()), "states": states}


def make_plan(arguments: argparse.Namespace, began: float) -> Plan:
    """All cases, routing by routing, so that every shape has been measured early."""
    dtypes = ["bfloat16", "float32"] if arguments.dry_run else ["bfloat16"]
    order = product(dtypes, arguments.routing, arguments.tokens, arguments.shapes)
    cases: list[list[Any]] = [[dtype, shape, tokens, routing] for dtype, routing, tokens, shape in order]
    # Once a shape: the smallest number of tokens, where a separate sum costs the largest share.
    fewest, first = min(arguments.tokens), arguments.routing[0]
    return Plan(
        cases=cases,
        accumulate=[case for case in cases if case[2:] == [fewest, first]],
        peers=arguments.peers,
        tune=arguments.tune,
        excluded={},
        deadline=began + arguments.seconds,
        dry=arguments.dry_run,
        ceilings=True,
    )


def main() -> None:
    """Measure, print, write."""
    arguments = parse()
    began = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("lines.jsonl", "worker.log"):
        (arguments.out / name).unlink(missing_ok=True)
    plan = make_plan(arguments, began)
    with unpacked_bundle() as bundle:
        print(bundle, flush=True)
        results = collect(measure(plan, arguments.out, arguments.step_seconds))
    reached = {(row["dtype"], row["case"]) for row in results["rows"]}
    keys = [(dtype, f"{shape}/{tokens}/{routing}") for dtype, shape, tokens, routing in plan.cases]
    results["not_reached"] = [f"{case} ({dtype})" for dtype, case in keys if (dtype, case) not in reached]
    results |= {"bundle": bundle, "took_s": time.time() - began}
    results["arguments"] = {key: str(value) for key, value in vars(arguments).items()}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    everything = full_table(results)
    (arguments.out / "table.md").write_text(f"{summary(results)}\n\n{everything}\n")
    # The summary last: it is what the end of a long log should show.
    print(f"{everything}\n\n{summary(results)}\n\nWritten to {arguments.out}")
    if failed := results.get("failed"):
        raise SystemExit(
            f"the measuring process failed (exit code {failed['code']}) at {failed['during']}:\n{failed['log']}"
        )
    if arguments.write:
        write_between(BEGIN, END, f"{summary(results)}\n\n{full_table(results, arguments.routing[0])}")


if __name__ == "__main__":
    main()

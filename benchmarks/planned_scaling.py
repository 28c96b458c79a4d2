"""What the planner predicts for 16, 256 and 2,048 GPUs. Nothing is measured; it takes minutes.

python benchmarks/planned_scaling.py [--write] [--cluster h200_x64] [MODEL ...]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds itself alone

from benchmarks.report import write_between
from moe_parallel.planner.report import GIB, assumptions, tokens_per_second, utilization
from moe_parallel.planner.search import search
from scripts.plan import question_of

MODELS = ["olmoe_1b_7b", "qwen3_30b_a3b", "deepseek_v3"]
RANKS = [16, 256, 2048]
BEGIN, END = "<!-- planned scaling: begin -->", "<!-- planned scaling: end -->"
HEAD = (
    "| model | GPUs | layout | recompute | micro-batch | GiB a GPU | step in s | tokens/s a GPU | MFU % "
    "| most of the time |"
)


def row(model: str, ranks: int, cluster: str) -> tuple[str, list[str]]:
    """A line of the table, and what it rests on."""
    question, _ = question_of(
        [f"model={model}", f"cluster={cluster}", f"cluster.nodes={ranks // 8}", "plan.simulate=1"]
    )
    answer = search(question)
    assumed = list(assumptions(question))
    if not answer.best:
        least = answer.least.peak_bytes / GIB if answer.least else float("nan")
        usable = question.cluster.usable_bytes / GIB
        return (
            f"| {model} | {ranks:,} | does not fit: {least:.0f} GiB needed, {usable:.0f} usable |" + " |" * 7,
            assumed,
        )
    best = answer.best[0]
    parallel, layout = best.config.parallel, best.layout
    degrees = [f"{name} {getattr(layout, name)}" for name in ("pp", "tp", "cp", "ep") if getattr(layout, name) > 1]
    degrees.append(f"shard {layout.shard}")
    cells = [
        model,
        f"{ranks:,}",
        ", ".join(degrees) + (f", {parallel.schedule.value}" if layout.pp > 1 else ""),
        parallel.recompute.value,
        str(best.config.train.micro_batch_sequences),
        f"{best.peak_bytes / GIB:.0f}{'' if best.traces else ' *'}",
        f"{best.time.seconds:.2f}",
        f"{tokens_per_second(question, best) / ranks:,.0f}",
        f"{100 * utilization(question, best):.0f}",
        best.time.bottleneck,
    ]
    return "| " + " | ".join(cells) + " |", assumed


def main() -> None:
    """Plan, print, and write where asked to."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"presets; default: {' '.join(MODELS)}")
    parser.add_argument("--cluster", default="h200_x64", help="whose machines; the number of nodes is replaced")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines, assumed = [HEAD, "|---" * 10 + "|"], []
    for model in arguments.models or MODELS:
        for ranks in RANKS:
            line, assumed = row(model, ranks, arguments.cluster)
            lines.append(line)
            print(line, flush=True)
    text = "\n".join(
        [*lines, "", "Assumed, besides a batch of 8 sequences of 4,096 tokens a GPU:", "", *(f"- {a}" for a in assumed)]
    )
    if arguments.write:
        write_between(BEGIN, END, text)
    else:
        print(text)


if __name__ == "__main__":
    main()

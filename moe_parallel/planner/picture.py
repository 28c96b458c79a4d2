"""A plan as one picture: memory over a step by kind, and where the time of the best layouts goes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_parallel.planner.search import Answer, Planned, Question
from moe_parallel.planner.step_time import PARTS

GIB = 2**30


def draw(question: Question, answer: Answer, path: Path) -> None:
    """Write the picture of a plan that fits."""
    figure = Figure(figsize=(12, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    best = answer.best[0]
    if best.traces:
        _timeline(left, question, best)
    else:
        _estimate(left, best)
    left.axhline(question.cluster.usable_bytes / GIB, color="black", linestyle="--", linewidth=0.8, label="usable")
    left.set(ylabel="GiB on the fullest rank", ylim=(0, None))
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    _bars(right, answer.best[: min(8, question.plan.show)])
    figure.suptitle(f"{question.cluster.ranks} x {question.cluster.name}: prediction")
    figure.savefig(path)


def _timeline(axes: Axes, question: Question, planned: Planned) -> None:
    timeline = planned.fullest.timeline
    kinds = {name: values for name, values in timeline.bytes_by_kind.items() if any(values)}
    axes.stackplot(timeline.time, [[v / GIB for v in values] for values in kinds.values()], labels=list(kinds))
    for name, start in timeline.phases if len(timeline.phases) < 12 else []:
        axes.axvline(start, color="0.5", linewidth=0.6)
        axes.text(start, 0.01, f" {name}", rotation=90, fontsize=6, transform=axes.get_xaxis_transform(), va="bottom")
    axes.set(xlabel="operations of a step", title=f"memory of rank {planned.fullest.rank}, seen on fake tensors")


def _estimate(axes: Axes, planned: Planned) -> None:
    bottom = 0.0
    for name, value in vars(planned.memory).items():
        axes.bar(["by formulas"], [value / GIB], bottom=bottom, label=name)
        bottom += value / GIB
    axes.set_title("memory, estimated")


def _bars(axes: Axes, best: list[Planned]) -> None:
    names = [f"{i + 1}{'' if p.traces else ' *'}" for i, p in enumerate(best)]
    start = [0.0] * len(best)
    for part, text in PARTS.items():
        seconds = [planned.time.parts[part] for planned in best]
        if any(value > 0.002 * planned.time.seconds for value, planned in zip(seconds, best)):
            axes.barh(names, seconds, left=start, label=text)
            start = [a + b for a, b in zip(start, seconds)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step", title="layouts in the order of the table (* by formulas)")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)

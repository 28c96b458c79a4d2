"""A comparison: arms that differ in what is asked and in nothing else, each with several seeds.

It is a folder of configs/experiment with one experiment for each arm, and `_comparison.yaml`, which says what is asked.
Here: whether arms are alike, what there is to run, and what came out of it as numbers and as a table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from moe_parallel.measured import Measured
from moe_parallel.metrics_file import read_metrics
from moe_parallel.run_folder import RunFolder

LOSS = "validation/cross_entropy_nats"
SPEED = "speed/tokens_per_second"
SPECIALIZATION = "specialization"
EXPERT_COSINE = "expert_cosine"
START, START_GAP = "start_nats", "start_gap_nats"
"""Validation loss before the first step, and that minus the baseline's; with evaluation.at_start."""
EQUAL_FLOPS = "equal_flops_nats"
"""Validation loss where a run has cost as much as the cheapest one of its seed in all."""

TOKENS = ("train.steps", "train.global_batch_tokens", "train.sequence_tokens")
"""Options that no comparison may vary: its arms would see other tokens."""
ALIKE = ("data", "evaluation", "init", "optim", "tokenizer", "train")
"""Sections that arms share, but for the options that the comparison says it varies."""
APART = ("run", "resume", "dry_run")
"""What tells runs apart without changing what they compute."""

TAIL = 0.1
"""Part of the steps at the end over which training metrics are averaged."""

Flat = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What `_comparison.yaml` says."""

    name: str
    question: str
    baseline: str
    """The arm that others are compared with."""
    arms: list[str]
    """In the order of the table."""
    varies: list[str] = field(default_factory=list)
    """Options of the shared sections that arms may differ in, as patterns."""
    columns: list[str] = field(default_factory=list)
    """Training metrics that the table shows besides the loss, and what is measured: `specialization`, `expert_cosine`,
    `start_gap_nats`, `equal_flops_nats`."""
    first: list[str] = field(default_factory=list)
    """Runs that are no arms and that arms, or later ones of this list, start from: made before them for each seed, one
    after the other, of other tokens."""
    prepared: dict[str, str] = field(default_factory=dict)
    """What else arms start from, by name: commands of scripts/, run after `first` for each seed, one after the other.
    `{runs}` stands for the folder of all runs, `{run}` for `seed_1` and so on."""


def read_comparison(folder: Path) -> Comparison:
    """Raises ValueError, in one line, where the folder is no comparison or its file is not as it should be."""
    path = folder / "_comparison.yaml"
    if not path.is_file():
        known = sorted(other.parent.name for other in folder.parent.glob("*/_comparison.yaml"))
        raise ValueError(f"{folder.name} is not a comparison; choose from {', '.join(known)}, or write {path}")
    try:
        given = yaml.safe_load(path.read_text())
        comparison = Comparison(name=folder.name, **given)
    except (yaml.YAMLError, TypeError) as error:
        keys = ", ".join(f.name for f in fields(Comparison) if f.name != "name")
        raise ValueError(f"{path}: {' '.join(str(error).split())}; its keys are {keys}") from error
    if not isinstance(comparison.prepared, dict) or not all(map(_is_command, comparison.prepared.values())):
        raise ValueError(f"{path}: prepared={comparison.prepared} must have a command for each name")
    for name, text in comparison.prepared.items():
        try:
            text.format(runs="", run="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{path}: prepared.{name} has {{runs}} and {{run}} only, not {error}") from error
    files = {arm.stem for arm in folder.glob("[!_]*.yaml")}
    if wrong := sorted(files ^ {*comparison.arms, *comparison.first}):
        raise ValueError(
            f"{path}: `arms`, `first` and the files beside it differ in {', '.join(wrong)}; make them the same"
        )
    if comparison.baseline not in comparison.arms:
        raise ValueError(f"{path}: baseline={comparison.baseline} is no arm; choose from {', '.join(comparison.arms)}")
    return comparison


def _is_command(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


# -- alike, but for what is asked ----------------------------------------------------------------------------------


def flatten(config_yaml: str) -> Flat:
    """Options of a resolved configuration by their full names; lists are values."""

    def walk(node: Any, prefix: str) -> Flat:
        if not isinstance(node, dict):
            return {prefix: node}
        return {n: v for key, item in node.items() for n, v in walk(item, f"{prefix}.{key}" if prefix else key).items()}

    flat = walk(yaml.safe_load(config_yaml), "")
    return {name: value for name, value in flat.items() if name.split(".")[0] not in APART}


def differences(options: dict[str, Flat]) -> dict[str, dict[str, Any]]:
    """Options that are not the same in all arms: option -> arm -> value; None where an arm has no such option."""
    names = dict.fromkeys(name for flat in options.values() for name in flat)
    found = {name: {arm: flat.get(name) for arm, flat in options.items()} for name in names}
    return {name: values for name, values in found.items() if len({repr(value) for value in values.values()}) > 1}


def check_alike(comparison: Comparison, options: dict[str, Flat]) -> None:
    """Raises ValueError where arms differ in tokens, or in another shared option without saying so."""
    problems = []
    for name, values in differences(options).items():
        shared = name.split(".")[0] in ALIKE and not any(fnmatchcase(name, varied) for varied in comparison.varies)
        if name in TOKENS or shared:
            told = ", ".join(f"{arm} {value}" for arm, value in values.items())
            remedy = "" if name in TOKENS else f", or name it in `varies` of {comparison.name}/_comparison.yaml"
            problems.append(f"arms are not alike in {name}: {told}; make it the same{remedy}")
    if problems:
        raise ValueError("\nerror: ".join(problems))


def is_finished(run: Path, options: Flat) -> bool:
    """Whether the run has its result. Raises ValueError if it was started with another configuration."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        return False
    changed = differences({"then": flatten(folder.config.read_text()), "now": options})
    if changed:
        told = ", ".join(f"{name} {values['then']} then and {values['now']} now" for name, values in changed.items())
        raise ValueError(f"{run} was run with another configuration: {told}; delete it, or choose another --runs")
    return folder.result.is_file()


# -- what came out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Values of the seeds, in their order."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation; not a number of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def summary(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        deviation = None if math.isnan(self.deviation) else self.deviation
        ends = {"min": min(self.values), "max": max(self.values)}
        return {"mean": self.mean, "standard_deviation": deviation, **ends, "values": self.values}

    def text(self, digits: int, signed: bool = False) -> str:
        """Mean and standard deviation."""
        mean = f"{self.mean:{'+' if signed else ''},.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Outcome:
    """One run."""

    metrics: dict[str, float]
    """Validation at the end, training metrics over the last steps, the median speed, and what was measured."""
    curve: list[tuple[int, float]]
    """Tokens, and the validation loss there."""
    parameters: tuple[int, int]
    """Total and active."""
    flops_per_token: float
    revision: str | None


def read_outcome(run: Path, measured: Measured) -> Outcome:
    """Of a finished run, from what it left in its folder."""
    folder = RunFolder(run)
    rows = read_metrics(folder.metrics)
    last = rows[-1]["step"]
    tail = [row for row in rows if row["step"] > last * (1 - TAIL)]
    trained = {name for row in tail for name in row if not name.startswith("validation/")} - {"step", "tokens"}
    metrics = {name: statistics.fmean(row[name] for row in tail if name in row) for name in sorted(trained)}
    speeds = [row[SPEED] for row in rows if SPEED in row]
    metrics |= {SPEED: statistics.median(speeds)} if speeds else {}
    metrics |= {name: value for name, value in rows[-1].items() if name.startswith("validation/")}
    metrics[SPECIALIZATION] = measured.specialization
    metrics |= {} if measured.expert_cosine is None else {EXPERT_COSINE: measured.expert_cosine}
    metrics |= {START: rows[0][LOSS]} if rows[0]["step"] == 0 else {}
    if LOSS not in metrics:
        raise ValueError(f"{run} has no validation loss; set data.validation_sequences and a validation_fraction")
    facts = json.loads(folder.model.read_text())
    git = json.loads(folder.environment.read_text())["git"]
    return Outcome(
        metrics=metrics,
        curve=[(int(row["tokens"]), row[LOSS]) for row in rows if LOSS in row],
        parameters=(facts["parameters_total"], facts["parameters_active"]),
        flops_per_token=measured.flops_per_token,
        revision=git and git["revision"][:12] + ("*" if git["dirty"] else ""),
    )


def loss_at(curve: Sequence[tuple[int, float]], tokens: float) -> float:
    """Validation loss at a number of tokens, on a straight line between two evaluations. Raises ValueError beyond."""
    for (before, high), (after, low) in pairwise(curve):
        if before <= tokens <= after:
            return high + (low - high) * (tokens - before) / (after - before)
    raise ValueError(f"there is no evaluation on both sides of {tokens:.0f} tokens; lower evaluation.every_steps")


def add_relations(comparison: Comparison, outcomes: dict[str, list[Outcome]]) -> None:
    """Metrics that need the other arms of the same seed."""
    for index, reference in enumerate(outcomes[comparison.baseline]):
        runs = [arm[index] for arm in outcomes.values()]
        budget = min(run.flops_per_token * run.curve[-1][0] for run in runs)
        for run in runs:
            if EQUAL_FLOPS in comparison.columns:
                run.metrics[EQUAL_FLOPS] = loss_at(run.curve, min(budget / run.flops_per_token, run.curve[-1][0]))
            if START in run.metrics and START in reference.metrics:
                run.metrics[START_GAP] = run.metrics[START] - reference.metrics[START]


@dataclass(frozen=True)
class Results:
    """All runs of a comparison: arm -> outcomes, one for each seed."""

    comparison: Comparison
    seeds: list[int]
    options: dict[str, dict[str, Any]]
    """Options that differ between arms."""
    outcomes: dict[str, list[Outcome]]

    def spread(self, arm: str, metric: str) -> Spread | None:
        """None where the arm does not have the metric."""
        found = [outcome.metrics.get(metric, math.nan) for outcome in self.outcomes[arm]]
        return None if any(math.isnan(value) for value in found) else Spread(found)

    def loss(self, arm: str) -> Spread:
        """Validation loss at the end."""
        return Spread([outcome.metrics[LOSS] for outcome in self.outcomes[arm]])

    def paired(self, arm: str) -> Spread:
        """Validation loss minus that of the baseline with the same seed."""
        ours, theirs = self.loss(arm).values, self.loss(self.comparison.baseline).values
        return Spread([mine - other for mine, other in zip(ours, theirs)])

    def flops(self, arm: str) -> Spread:
        """Measured FLOPs per token."""
        return Spread([outcome.flops_per_token for outcome in self.outcomes[arm]])

    @property
    def domains(self) -> list[str]:
        """Domains that were validated."""
        names = self.outcomes[self.comparison.baseline][0].metrics
        return [name.split("/")[1] for name in names if name.startswith("validation/") and name != LOSS]

    @property
    def revisions(self) -> list[str]:
        """Of the code that made the runs; a star says that files were changed."""
        return sorted({outcome.revision or "unknown" for runs in self.outcomes.values() for outcome in runs})

    def as_json(self) -> dict[str, Any]:
        """Everything that tables and plots show, and every metric of every arm."""
        arms = {}
        for arm, runs in self.outcomes.items():
            spreads = {name: self.spread(arm, name) for name in runs[0].metrics}
            arms[arm] = {
                "parameters_total": runs[0].parameters[0],
                "parameters_active": runs[0].parameters[1],
                "flops_per_token": self.flops(arm).summary(),
                "paired_difference_nats": self.paired(arm).summary(),
                "metrics": {name: spread.summary() for name, spread in spreads.items() if spread is not None},
                "curves": [outcome.curve for outcome in runs],
            }
        about = {"comparison": self.comparison.name, "question": self.comparison.question, "seeds": self.seeds}
        return {**about, "revisions": self.revisions, "options": self.options, "arms": arms}


# -- as text -------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Two tables: what was asked, and the loss of each domain."""
    comparison = results.comparison
    columns = [name.removeprefix("experts/").replace("_", " ") for name in comparison.columns]
    columns = ["training nats" if name == "loss/cross entropy nats" else name for name in columns]
    head = ["arm", "parameters, active", "MFLOPs a token", "validation nats", "against baseline", "lower"]
    rows = [[*head, *columns, "tokens a second"]]
    for arm in comparison.arms:
        total, active = results.outcomes[arm][0].parameters
        ratio = results.flops(arm).mean / results.flops(comparison.baseline).mean
        loss, paired = results.loss(arm), results.paired(arm)
        better = f"{sum(value < 0 for value in paired.values)} of {len(paired.values)}"
        same = arm == comparison.baseline
        rows.append([
            arm,
            f"{total / 1e6:.2f}M, {active / 1e6:.2f}M",
            f"{results.flops(arm).mean / 1e6:.2f} ({ratio:.3f}x)",
            f"{loss.text(4)} ({min(loss.values):.4f} to {max(loss.values):.4f})",
            "" if same else paired.text(4, signed=True),
            "" if same else better,
            *(_cell(results.spread(arm, name), 3) for name in comparison.columns),
            _cell(results.spread(arm, SPEED), 0),
        ])  # fmt: skip
    domains = [["arm", *results.domains]]
    for arm in comparison.arms:
        losses = [results.spread(arm, f"validation/{domain}/cross_entropy_nats") for domain in results.domains]
        domains.append([arm, *(_cell(loss, 3) for loss in losses)])
    tables = [_table(rows)] + ([_table(domains)] if len(results.domains) > 1 else [])
    return "\n".join(tables)


def _cell(spread: Spread | None, digits: int) -> str:
    return "" if spread is None else spread.text(digits)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return head + f"|{'---|' * len(rows[0])}\n" + "".join(body)


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of a comparison. Raises ValueError where the page has none."""
    begin, end = f"<!-- compare {name} -->\n", f"<!-- end {name} -->\n"
    old = page.read_text() if page.is_file() else ""
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise ValueError(f"{page} needs these two lines, once each, for the results: {begin.strip()} {end.strip()}")
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}{text}{end}{rest.split(end)[1]}")

"""Plan a run before it queues: which layouts fit on a cluster, how long a step takes, what limits it.

python scripts/plan.py model=deepseek_v3 cluster=h200_x2048
python scripts/plan.py experiment=pretrain_olmoe_1b_7b cluster=h100_x256 parallel.ep=8 plan.expert_imbalance=1.5
python scripts/plan.py model=olmoe_1b_7b cluster=a100_x64 cluster.nodes=2 cluster.matmul_efficiency=0.55

Takes the options of train.py; those of `parallel` that are given stay as they are, the search chooses the others
(plan.search=false plans the given layout). Besides: cluster=NAME and cluster.OPTION (machines, rates, what is reached
of them), plan.OPTION (how to plan). Writes plan.txt, plan.png and experiment/plan.yaml, which train.py accepts, into
the run's folder. Nothing is trained, no GPU is needed. Exit code 0 if a layout fits, 1 if none does, 2 for a mistake.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import ValidationError

from moe_parallel import options
from moe_parallel.option_texts import describe
from moe_parallel.planner.cluster import ClusterConfig
from moe_parallel.planner.picture import draw
from moe_parallel.planner.report import report
from moe_parallel.planner.search import Answer, PlanConfig, Question, search
from moe_parallel.run_folder import RunFolder, write_text_atomic

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = re.compile(r"(cluster|plan)(\.\w+)?=")


@dataclasses.dataclass
class PlanOptions:
    """What planning needs besides the options of a run."""

    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)


def question_of(arguments: list[str]) -> tuple[Question, list[str]]:
    """What the command line asks, and overrides that stand for what it left open. Raises ConfigError."""
    own = [argument for argument in arguments if OWN.match(argument)]
    rest = [argument for argument in arguments if argument not in own]
    ConfigStore.instance().store(name="plan_schema", node=PlanOptions)
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            asked: Any = OmegaConf.to_object(compose("plan", overrides=own))
    except ValidationError as error:
        raise options.ConfigError([str(e["msg"]).removeprefix("Value error, ") for e in error.errors()]) from error
    except options.COMPOSITION_ERRORS as error:
        raise options.ConfigError(options.explain(error, [])) from error
    added = _batch(rest, asked)
    config = options.composed([*rest, *added], CONFIGS)
    fixed = frozenset(argument.split("=")[0] for argument in rest if argument.startswith(("parallel.", "train.")))
    return Question(config, asked.cluster, asked.plan, fixed), added


def _batch(given: list[str], asked: PlanOptions) -> list[str]:
    """A batch of a real run, where the command line names none: the default one is for a laptop's two processes."""
    names = {argument.split("=")[0] for argument in given}
    added = []
    if "experiment" in names:
        return added
    if "train.sequence_tokens" not in names:
        limit = options.composed(given, CONFIGS).model.max_sequence_tokens or asked.plan.sequence_tokens
        added.append(f"train.sequence_tokens={min(limit, asked.plan.sequence_tokens)}")
    if "train.global_batch_tokens" not in names:
        length = next(int(a.split("=")[1]) for a in (*given, *added) if a.startswith("train.sequence_tokens="))
        added.append(f"train.global_batch_tokens={length * asked.plan.sequences_per_rank * asked.cluster.ranks}")
    return added


def write(question: Question, answer: Answer, lines: list[str], given: list[str], folder: Path) -> None:
    """The report, the picture, and the winner as an experiment of its own."""
    write_text_atomic(folder / "plan.txt", "\n".join(lines) + "\n")
    if answer.best:
        draw(question, answer, folder / "plan.png")
        write_text_atomic(folder / "experiment" / "plan.yaml", experiment(answer, given))


def experiment(answer: Answer, given: list[str]) -> str:
    """The winner as a file for --config-dir: what the command line chose, and what was found."""
    parsed = OverridesParser.create().parse_overrides(given)
    groups = {
        o.key_or_group: o.value() for o in parsed if "." not in o.key_or_group and (CONFIGS / o.key_or_group).is_dir()
    }
    defaults: list[Any] = [groups.pop("experiment")] if "experiment" in groups else []
    defaults += [{f"override /{group}": choice} for group, choice in groups.items()]
    values = OmegaConf.from_dotlist([a for a in given if "." in a.split("=")[0]])
    winner = answer.best[0].config
    chosen = {
        "parallel": {
            k: v for k, v in options.plain(dataclasses.asdict(winner.parallel)).items() if k != "timeout_seconds"
        },
        "train": {"micro_batch_sequences": winner.train.micro_batch_sequences},
    }
    merged = OmegaConf.to_container(OmegaConf.merge(values, chosen))
    text = yaml.safe_dump({"defaults": [*defaults, "_self_"], **merged}, sort_keys=False)
    return f"# @package _global_\n# Written by scripts/plan.py {' '.join(given)}\n{text}"


def overrides_of(answer: Answer) -> list[str]:
    """What the search chose, for the command line."""
    winner = answer.best[0].config
    parallel = options.plain(dataclasses.asdict(winner.parallel))
    defaults = options.plain(dataclasses.asdict(type(winner.parallel)()))
    found = [f"parallel.{name}={_literal(value)}" for name, value in parallel.items() if value != defaults[name]]
    return [*found, f"train.micro_batch_sequences={winner.train.micro_batch_sequences}"]


def _literal(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def help_text() -> str:
    """The options of this command; those of a run are listed by train.py."""
    assert __doc__ is not None
    clusters = ", ".join(sorted(path.stem for path in (CONFIGS / "cluster").glob("*.yaml")))
    lines = [__doc__, f"cluster: {clusters}", ""]
    for option in describe(PlanOptions):
        lines.append(f"{option.name}={option.default}\n    {option.text}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Plan, print, write; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text())
        return 0
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    try:
        question, added = question_of(arguments)
        answer = search(question)
    except (options.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given = [argument for argument in arguments if not OWN.match(argument)] + added
    lines = report(question, answer)
    if added:
        lines.append(f"  the batch: {' '.join(added)}; name an experiment or set them")
    chosen = dict(argument.split("=", 1) for argument in given)
    what = chosen.get("experiment") or chosen.get("model") or "default"
    name = question.config.run.name or f"plan_{what.replace('/', '_')}_{question.cluster.ranks}"
    folder = RunFolder(Path(question.config.run.dir) / name).path
    if answer.best:
        lines += ["", f"train with  torchrun ... train.py {' '.join([*given, *overrides_of(answer)])}"]
        lines.append(f"or with     torchrun ... train.py --config-dir {folder} experiment=plan")
    lines.append(f"planned in {time.perf_counter() - started:.0f} s; written to {folder}")
    print("\n".join(lines))
    write(question, answer, lines, given, folder)
    return 0 if answer.best else 1


if __name__ == "__main__":
    sys.exit(main())

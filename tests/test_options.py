"""Options: each has a text and an effect, every shipped file composes, users' own files are checked like ours."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moe_parallel import options, relations
from tests.runs import ROOT, TRAIN, Runner, checkpoints, curve

CONFIGS = ROOT / "configs"
GROUPS = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir() and folder.name != "cluster")
"""Of train.py: `cluster` is scripts/plan.py's."""


def composed(*overrides: str) -> options.Config:
    """As train.py composes and converts, in this process."""
    options.register()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return options.to_config(compose("train", overrides=list(overrides)))


@cache
def attributes_read() -> dict[str, set[str]]:
    """By file, the names that its code reads as attributes, but those of the methods that only check options."""
    found: dict[str, set[str]] = {}
    for path in (*ROOT.glob("moe_parallel/**/*.py"), *ROOT.glob("data/moe_data/*.py"), TRAIN):
        tree = ast.parse(path.read_text())
        checks = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name in ("__post_init__", "_refuse_meaningless")
            for node in ast.walk(function)
        }
        found[str(path)] = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
        }
    return found


@pytest.mark.parametrize("option", options.options(), ids=lambda option: option.name)
def test_every_option_has_a_text_and_a_reader(option: options.Option) -> None:
    """Would catch: an option that `--help` cannot explain, and one that is accepted and does nothing.

    A reader is an attribute access of that name outside of the checks of the option itself. A name that two options
    share could hide one without a reader; the names below are long enough for that to be rare.
    """
    assert len(option.text) > 5, "no text under the field"
    assert option.text.rstrip().endswith((".", ":", "?", ")")), "a sentence"
    name = option.name.rsplit(".", 1)[-1]
    assert any(name in names for names in attributes_read().values()), "nothing reads it"


def test_options_are_all_fields() -> None:
    """Would catch: a field without an annotation, which is no option, and a section that the walk leaves out."""
    config = options.plain(options.dataclasses.asdict(composed("model=tiny")))
    named = {option.name for option in options.options()}

    def walk(value: object, prefix: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else key)
        else:
            assert prefix in named, prefix

    walk(config, "")


@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_choice_composes(group: str) -> None:
    """Would catch: a YAML file with an option that is gone, a wrong type, or values that its own section refuses; a
    choice that changes nothing, or that leaves a key behind which no dataclass has.
    """
    plugin = f"router.plugin={ROOT}/examples/top_p_router.py:TopPConfig"
    overrides = {"tokenizer=bpe": ["tokenizer.vocab_size=500"], "router=plugin": [plugin]}
    texts = []
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        choice = f"{group}={path.stem}"
        config = composed(choice, *overrides.get(choice, []))
        options.architecture(config, config.model.vocab_size or 257)
        texts.append(options.config_yaml(config))
    assert len(texts) >= 2, "a group exists when it has two choices"
    assert len(set(texts)) == len(texts), "two choices that are the same"


def contains(config: Any, chosen: Any) -> bool:
    """Whether everything that was chosen, at any depth, is what the configuration holds."""
    if isinstance(chosen, dict):
        return all(contains(config[name], value) for name, value in chosen.items())
    return bool(config == chosen)


@pytest.mark.parametrize("model", ["small_cpu", "deepseek_v3"])
def test_a_choice_wins_over_the_model(model: str) -> None:
    """Would catch: `moe=classic` that changes nothing, because the preset of the model is merged after it."""
    for group in ("moe", "router", "balance", "optim", "parallel"):
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            if path.stem == "plugin":  # no router until it is told which
                continue
            chosen = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(chosen, dict)
            chosen.pop("defaults", None)
            config = options.plain(options.dataclasses.asdict(composed(f"model={model}", f"{group}={path.stem}")))
            assert contains(config[group], chosen), path.stem


def test_what_the_device_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a run that builds its model and dies in its first step; a dry run on a laptop, which plans for
    other machines, that is refused."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = composed("model=tiny", "attention.core=flex", "parallel.compile=blocks")
    with pytest.raises(options.ConfigError) as raised:
        relations.check(config, 1, "cpu")
    assert [problem.split(" ")[0] for problem in raised.value.problems] == [
        "attention.core=flex",
        "parallel.compile=blocks",
    ]
    relations.check(config, 1)
    relations.check(composed("model=tiny"), 1, "cpu")


def test_config_yaml_reads_back() -> None:
    """Would catch: a config.yaml in a run folder from which the run cannot be repeated."""
    for overrides in (("model=deepseek_v3",), ("model=tiny", "data=parquet", "optim=wsd")):
        config = composed(*overrides)
        again = OmegaConf.create(options.config_yaml(config))
        assert OmegaConf.to_container(again) == options.plain(options.dataclasses.asdict(config))


def write_user_configs(folder: Path, texts: Path) -> Path:
    """A folder outside of the repository with an experiment and a data set of the user's own, and wrong ones."""
    for group in ("experiment", "data"):
        (folder / group).mkdir(parents=True)
    source = f"name: mine, kind: text, validation_fraction: 0.1, paths: [{texts}]"
    (folder / "data/mine.yaml").write_text(f"sources:\n  - {{{source}}}\n")
    (folder / "data/typo.yaml").write_text(f"sources:\n  - {{{source.replace('paths', 'pathes')}}}\n")
    header = "# @package _global_\n"
    (folder / "experiment/mine.yaml").write_text(
        header + "defaults:\n  - override /model: tiny\n  - override /data: mine\ntrain:\n  steps: 3\n"
    )
    (folder / "experiment/typo.yaml").write_text(header + "router:\n  topk: 4\n")
    (folder / "experiment/section.yaml").write_text(header + "rooter:\n  top_k: 4\n")
    (folder / "experiment/type.yaml").write_text(header + "train:\n  steps: many\n")
    (folder / "experiment/range.yaml").write_text(header + "optim:\n  beta1: 2.0\n")
    (folder / "experiment/yaml.yaml").write_text(header + "train: {steps: 3\n")
    return folder


def test_configs_of_a_user(runner: Runner, tmp_path: Path) -> None:
    """Would catch: own files that need a copy of the repository; typos in them that pass although the command line
    is checked. A real start, from another working directory, with a relative folder.
    """
    folder = write_user_configs(tmp_path / "own", runner.corpus / "texts")
    overrides = ["train.sequence_tokens=32", "train.global_batch_tokens=64", "tracking=none", "run.name=own_run"]
    arguments = [f"data.cache_dir={runner.corpus / 'cache'}", "evaluation.sample_tokens=0", *overrides]
    command = [sys.executable, str(TRAIN), "--config-dir", "own", "experiment=mine", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(curve(tmp_path / "runs/own_run")) == 3, "steps of the experiment"
    assert "validation/mine/cross_entropy_nats" in curve(tmp_path / "runs/own_run")[3]
    for choice, text in (
        ("experiment=typo", "unknown option router.topk in experiment/typo.yaml; did you mean router.top_k"),
        ("experiment=section", "unknown option rooter in experiment/section.yaml; did you mean router"),
        ("experiment=type", "train.steps in experiment/type.yaml: Value 'many' of type 'str' could not be converted"),
        ("experiment=range", "optim.beta1=2.0 must lie in 0..1"),
        ("experiment=yaml", "experiment/yaml.yaml"),
        ("experiment=miner", "experiment=miner: there is no such choice; did you mean mine?"),
        ("data=typo", "unknown option pathes in data/typo.yaml; did you mean data.sources[].paths"),
    ):
        running = runner.run("run", f"--config-dir={folder}", choice, codes=2)
        lines = running.err.splitlines()
        assert len(lines) == 1
        assert text in lines[0]


def test_help_and_composed_configuration(runner: Runner) -> None:
    """Would catch: Hydra's own help in place of ours; a `--cfg job` that starts a run or shows something else than
    what the run would take.
    """
    shown = runner.run("run", "--help")
    assert shown.err == ""
    for text in ("router.top_k=4  (int)\n      Experts per token,", "balance=data_parallel|", "stop: End the run with"):
        assert text in shown.out
    missing = [option.name for option in options.options() if f"  {option.name}=" not in shown.out]
    assert not missing
    shown = runner.run("run", "--cfg", "job", "router.top_k=3")
    config = OmegaConf.to_container(OmegaConf.create(shown.out))
    assert isinstance(config, dict)
    assert config["router"]["top_k"] == 3
    assert config["model"]["num_layers"] == 2
    assert not runner.runs.exists()


def test_sweep(runner: Runner) -> None:
    """Would catch: jobs of a sweep that share a folder or a process group; a failed one that is not told, or that
    takes those after it along; names that depend on options which are the same in all.
    """
    overrides = ("-m", "router.top_k=9,1,2", "train.steps=2", "optim=cosine,wsd")
    running = runner.run("sweep", *overrides, codes=2)
    names = {path.name for path in (runner.runs / "sweep").iterdir()}
    assert names == {f"router.top_k={k},optim={optim}" for k in (1, 2) for optim in ("cosine", "wsd")}
    assert all(checkpoints(runner.runs / "sweep" / name) == ["step_00000002"] for name in names)
    assert running.err.count("error: router.top_k=9 is larger than moe.num_experts=8") == 2
    failed = "router.top_k=9,optim=cosine (code 2), router.top_k=9,optim=wsd (code 2)"
    assert running.err.splitlines()[-1] == f"sweep: 2 of 6 runs failed: {failed}"
    saved = (runner.runs / "sweep/router.top_k=1,optim=wsd/config.yaml").read_text()
    assert OmegaConf.create(saved).router.top_k == 1
    two = runner.run("ranks", "-m", "train.seed=1,2", "train.steps=2", "parallel.ep=2", ranks=2)
    losses = [curve(two.folder / f"train.seed={seed}")[1]["loss/cross_entropy_nats"] for seed in (1, 2)]
    assert losses[0] != losses[1]
    one = runner.run("whole", "train.seed=2", "train.steps=2")
    assert losses[1] == pytest.approx(curve(one.folder)[1]["loss/cross_entropy_nats"], rel=1e-6), "float32 sums"


def test_dry_run(runner: Runner) -> None:
    """Would catch: a plan that needs the machines it plans for, or whose numbers are not those of the run."""
    plan = runner.run("plan", "dry_run=true", "parallel.ranks=8", "parallel.ep=4")
    assert "8 ranks: dense 1 x replicated, 8 x sharded; experts ep 4, 1 x replicated, 2 x sharded" in plan.out
    facts = json.loads((plan.folder / "model.json").read_text())
    assert [path.name for path in plan.folder.iterdir()] == ["model.json"]
    run = runner.run("run", "train.steps=1")
    same = ("parameters_total", "parameters_active", "flops_per_token")
    assert {name: json.loads((run.folder / "model.json").read_text())[name] for name in same} == {
        name: facts[name] for name in same
    }
    wrong = runner.run("wrong", "dry_run=true", "tokenizer=file", "tokenizer.path=/nowhere.json", codes=2)
    assert "/nowhere.json" in wrong.err
    assert "Traceback" not in wrong.err


def test_a_saved_configuration_of_an_older_version(tmp_path: Path) -> None:
    """Would catch: a run that can no longer be resumed or read since its dispatcher got an option, `dispatch: {}` then;
    an option that no kind has, taken for the nearest kind."""
    config = composed("model=tiny")
    saved = OmegaConf.create(options.config_yaml(config))
    path = tmp_path / "config.yaml"
    saved.dispatch = {}
    path.write_text(OmegaConf.to_yaml(saved))
    assert options.load_config(path) == config
    saved.dispatch = {"capacity_factor": 2.0}
    path.write_text(OmegaConf.to_yaml(saved))
    assert type(options.load_config(path).dispatch).__name__ == "LeastLoadedConfig"
    saved.dispatch = {"chunk": 2}
    path.write_text(OmegaConf.to_yaml(saved))
    with pytest.raises(options.ConfigError, match=r"no kind of dispatch has the options \['chunk'\]"):
        options.load_config(path)

"""Comparisons: arms that are alike, FLOPs that are counted whole, runs that are not repeated, numbers that are right.

Cheapest first; the last tests start scripts/compare.py on runs of seconds.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_data import embedded
from moe_parallel import launch, measured, options, relations
from moe_parallel.comparison import (
    ALIKE,
    EQUAL_FLOPS,
    LOSS,
    START,
    START_GAP,
    Comparison,
    Outcome,
    Results,
    Spread,
    add_relations,
    check_alike,
    differences,
    flatten,
    is_finished,
    loss_at,
    markdown,
    read_comparison,
    write_between_marks,
)
from moe_parallel.engines.native import NativeEngine
from moe_parallel.launch import Launch
from moe_parallel.mesh import ParallelMesh
from moe_parallel.metrics_file import read_metrics
from moe_parallel.model.counts import count_parameters
from moe_parallel.options import load_config
from tests.batches import make_batch
from tests.runs import ROOT
from tests.test_options import composed

EXPERIMENTS = ROOT / "configs/experiment"
COMPARISONS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/_comparison.yaml"))
SIZES = ("", "+experiment/_size=one_gpu")


@pytest.fixture
def here() -> Iterator[Launch]:
    """A process group of one rank."""
    yield launch.start(timeout_seconds=60)
    launch.finish()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COMPARISONS)
def test_arms_compose_and_are_alike(name: str, size: str) -> None:
    """Would catch: an arm with an option that is gone, with other tokens or another optimizer, or one that is the same
    as another; a size for one GPU that fits some arms only."""
    if size and name.endswith("_one_gpu"):
        pytest.skip("has its own size")
    comparison = read_comparison(EXPERIMENTS / name)
    flats = {}
    for arm in comparison.arms:
        config = composed(f"experiment={name}/{arm}", *([size] if size else []))
        relations.check(config, 1)
        flats[arm] = flatten(options.config_yaml(config))
    check_alike(comparison, flats)
    assert len({repr(flat) for flat in flats.values()}) == len(flats)


@pytest.mark.parametrize("name", ["granularity", "granularity_one_gpu"])
def test_granularity_has_equal_expert_weights(name: str) -> None:
    """Would catch: an arm that is better because it is larger."""
    sizes = set()
    for arm in read_comparison(EXPERIMENTS / name).arms:
        moe = (config := composed(f"experiment={name}/{arm}")).moe
        total, active = moe.num_experts + moe.num_shared_experts, config.router.top_k + moe.num_shared_experts
        sizes.add((total * moe.expert_dim, active * moe.expert_dim))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("overrides", "forwards"),
    [
        ((), 1),
        (("moe.chain.iterations=2",), 1),
        (("attention=mla",), 1),
        (("train.micro_batch_sequences=1",), 1),
        (("balance.global_estimator=exact", "train.micro_batch_sequences=1"), 2),
    ],
)
def test_measured_products_are_the_analytic_ones(here: Launch, overrides: tuple[str, ...], forwards: int) -> None:
    """Would catch: products that the counter does not see, such as those that write into a given tensor inside of our
    own autograd operation; then arms whose experts differ would look equally cheap. Exact: without drops a token costs
    6 FLOPs for each weight that it is multiplied with."""
    config = composed("experiment=granularity/shared_top3_of_31", *overrides)
    shape = options.architecture(config, 257)
    mesh = ParallelMesh(relations.check(config, 1), "cpu")
    engine = NativeEngine(shape, mesh, config.parallel, config.optim, here.device, torch.float32)
    engine.init_weights(config.init, 1)
    rows = 1 if "train.micro_batch_sequences=1" in overrides else 2
    batches = [make_batch([[32]] * rows, 32, 257, first=first) for first in range(0, 2, rows)]
    found = {str(operation): flops for operation, flops in measured.training_flops(engine, batches, 0).items()}
    counts = count_parameters(shape)
    layers, head = counts.matrices + counts.routed_active + counts.repeated, counts.head or counts.embedding
    # A forward pass that only counts ends before the head.
    assert found.pop("aten.mm") == 2 * 64 * (layers * (forwards + 2) + head * 3)
    attention = found.pop("aten._scaled_dot_product_flash_attention_for_cpu")
    if "attention=mla" not in overrides:  # two products of whole squares in each sequence; heads together are dim wide
        assert attention == shape.model.num_layers * 2 * 2 * 2 * 32 * 32 * shape.model.dim * forwards
    backward = found.pop("aten._scaled_dot_product_flash_attention_for_cpu_backward")
    assert backward == 2.5 * attention / forwards, "four products and the scores once more"
    assert not found, "an operation without a test"


def test_grouped_products_are_counted() -> None:
    """Would catch: experts that cost nothing on a GPU, where one kernel computes them all."""
    rows, weight = torch.randn(64, 32, requires_grad=True), torch.randn(4, 32, 16, requires_grad=True)
    ends = torch.tensor([16, 16, 48, 64], dtype=torch.int32)
    with FlopCounterMode(display=False, custom_mapping=measured.FORMULAS) as counter:
        out = torch.nn.functional.grouped_mm(rows, weight, offs=ends)
        (out * torch.randn_like(out)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 32 * 16


def test_specialization() -> None:
    """Two domains with experts of their own, the same experts, and half of each; by hand."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert measured.specialization([one, other]) == 0.5
    assert measured.specialization([one, one]) == 0.0
    assert measured.specialization([torch.cat([one, one]), torch.cat([other, one])]) == 0.25
    assert measured.specialization([]) == 0.0


def test_random_letters_are_even_and_new() -> None:
    """Would catch: a text with less entropy than log(32), in which a low loss proves nothing."""
    documents = embedded.collect("random", 1.0)
    assert len(set(documents)) == len(documents)
    text = "".join(documents)
    letters = sorted(set(text))
    assert len(letters) == 32
    pairs = torch.zeros(32, 32)
    index = torch.tensor([letters.index(letter) for letter in text])
    pairs.view(-1).index_add_(0, index[:-1] * 32 + index[1:], torch.ones(len(index) - 1))
    # The expected value of chi-squared over 1024 cells is 1023, its standard deviation 45.
    expected = len(text) / 1024
    assert abs(float(((pairs - expected) ** 2 / expected).sum()) - 1023) < 5 * 45


COMPARISON = Comparison(name="it", question="Is it?", baseline="a", arms=["a", "b"], columns=["experts/dead"])


def test_differences_and_what_is_alike() -> None:
    """Would catch: arms of other tokens, data or optimizer that pass; an option that only one arm has that hides."""
    a = flatten("train: {steps: 5, seed: 1}\nrouter: {top_k: 2}\nrun: {name: x}\ndata: {sources: [{name: s}]}")
    assert a == {"train.steps": 5, "train.seed": 1, "router.top_k": 2, "data.sources": [{"name": "s"}]}
    assert differences({"a": a, "b": a | {"router.pool": "p"}}) == {"router.pool": {"a": None, "b": "p"}}
    check_alike(COMPARISON, {"a": a, "b": a | {"router.top_k": 3}})
    with pytest.raises(ValueError, match=r"not alike in train\.steps: a 5, b 6; make it the same$"):
        check_alike(COMPARISON, {"a": a, "b": a | {"train.steps": 6}})
    other = {"a": a, "b": a | {"data.rows": 2}}
    with pytest.raises(ValueError, match=r"data\.rows: a None, b 2; make it the same, or name it in `varies`"):
        check_alike(COMPARISON, other)
    check_alike(Comparison(**{**vars(COMPARISON), "varies": ["data.rows"]}), other)
    with pytest.raises(ValueError, match=r"train\.steps"):
        check_alike(
            Comparison(**{**vars(COMPARISON), "varies": ["train.steps"]}), {"a": a, "b": a | {"train.steps": 6}}
        )
    assert set(ALIKE) <= set(options.plain(vars(composed())))


def test_spread_and_table() -> None:
    """Would catch: differences that are not paired by seed, a deviation of n, a NaN in JSON."""

    def outcome(loss: float, flops: float) -> Outcome:
        metrics = {LOSS: loss, "validation/code/cross_entropy_nats": loss, "experts/dead": 1.0}
        return Outcome(
            metrics=metrics, curve=[(1, 3.0), (2, loss)], parameters=(9, 5), flops_per_token=flops, revision=None
        )

    runs = {"a": [outcome(2.0, 1e6), outcome(3.0, 1e6)], "b": [outcome(1.9, 2e6), outcome(2.9, 2e6)]}
    results = Results(COMPARISON, [1, 2], {}, runs)
    assert results.loss("a").deviation == pytest.approx(math.sqrt(0.5))
    assert results.paired("b").mean == pytest.approx(-0.1)
    assert results.paired("b").deviation == pytest.approx(0.0, abs=1e-12)
    row = markdown(results).splitlines()[3]
    assert "2.00 (2.000x) | 2.4000 ± 0.7071 (1.9000 to 2.9000) | -0.1000 ± 0.0000 | 2 of 2 | 1.000 ± 0.000 |" in row
    assert Spread([1.0]).summary()["standard_deviation"] is None
    json.dumps(results.as_json(), allow_nan=False)


def test_equal_flops_and_the_start() -> None:
    """By hand: arm b costs twice as much a token, so what a has in all 200 tokens buys b the first 100, between its
    evaluations at 80 and 120. Would catch: a budget of the dearest arm, or of another seed; a gap of the wrong sign."""

    def outcome(curve: list[tuple[int, float]], flops: float) -> Outcome:
        start = {START: curve[0][1]}
        return Outcome(metrics=start, curve=curve, parameters=(9, 5), flops_per_token=flops, revision=None)

    dear = [(0, 4.0), (80, 3.0), (120, 2.0), (200, 1.0)]
    runs = {
        "a": [outcome([(0, 3.5), (200, 1.5)], 1.0), outcome([(0, 3.0), (200, 1.0)], 1.0)],
        "b": [outcome(dear, 2.0), outcome(dear, 2.0)],
    }
    add_relations(replace(COMPARISON, columns=[EQUAL_FLOPS]), runs)
    assert [run.metrics[EQUAL_FLOPS] for arm in runs.values() for run in arm] == [1.5, 1.0, 2.5, 2.5]
    assert [run.metrics[START_GAP] for arm in runs.values() for run in arm] == [0.0, 0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="no evaluation on both sides of 10 tokens; lower"):
        loss_at([(50, 3.0), (100, 2.0)], 10)


def test_arms_start_from_a_first_run_of_other_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: arms that run before what they start from is there, or that start from nothing; a first run
    that is taken for an arm, or that has seen the tokens of the arms."""
    few = ["train.steps=2", "train.global_batch_tokens=512", "evaluation.every_steps=1", "data.validation_sequences=2"]
    sources = ["data.sources=[{name: random, kind: embedded, max_megabytes: 1}]", f"data.cache_dir={tmp_path}/cache"]
    given = ("upcycling", f"--runs={tmp_path}/runs", "--seeds=2", "--jobs=2", *few, *sources)
    assert main(*given, arms=["dense_continued", "sparse"]) == 0
    base = tmp_path / "runs/upcycling"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert [line.split("/")[-2:] for line in told[:1]] == [["dense", "seed_2"]]
    assert len(told) == 3
    arms = json.loads((base / "comparison.json").read_text())["arms"]
    assert list(arms) == ["dense_continued", "sparse"]
    end = read_metrics(base / "dense/seed_2/metrics.jsonl")[-1][LOSS]
    for arm in arms.values():  # a copy of the network in each expert: the same function but for rounding
        assert arm["curves"][0][0] == [0, pytest.approx(end, rel=1e-6)]
    assert load_config(base / "dense/seed_2/config.yaml").train.seed == 1002
    assert load_config(base / "sparse/seed_2/config.yaml").train.seed == 2
    assert arms["sparse"]["metrics"]["expert_cosine"]["mean"] == pytest.approx(1.0, abs=0.01)


def test_what_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a file that is made of another seed's runs, made twice, or half, or not anew for another command."""
    compare = command()
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    code = "import sys\nopen(sys.argv[1], 'a').write(sys.argv[2] + '\\n')\nsys.exit(sys.argv[2] == 'bad')"
    (tmp_path / "scripts/note.py").write_text(code)
    made = tmp_path / "runs/note/seed_2"
    for _ in range(2):
        compare.prepare(made, "note.py {runs}/note/{run}.txt {runs}/first/{run}", tmp_path / "runs")
    assert made.with_suffix(".txt").read_text() == f"{tmp_path}/runs/first/seed_2\n"
    with pytest.raises(ValueError, match=r"seed_2.done is of another command"):
        compare.prepare(made, "note.py {runs}/note/{run}.txt other", tmp_path / "runs")
    for _ in range(2):  # what failed is tried again
        with pytest.raises(compare.RunFailed, match="bad ended with code 1"):
            compare.prepare(made.with_name("seed_3"), "note.py {runs}/note/{run}.txt bad", tmp_path / "runs")
    assert (made.parent / "seed_3.txt").read_text() == "bad\nbad\n"


def test_marks(tmp_path: Path) -> None:
    """Would catch: text of a person that is overwritten, results that are put in twice."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compare it -->\nold\n<!-- end it -->\nafter\n")
    for _ in range(2):
        write_between_marks(page, "it", "new\n")
    assert page.read_text() == "before\n<!-- compare it -->\nnew\n<!-- end it -->\nafter\n"
    with pytest.raises(ValueError, match="needs these two lines"):
        write_between_marks(page, "other", "new\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not a comparison; choose from it, or write"),
        ("question: [", r"_comparison.yaml: .*; its keys are question, baseline, arms, varies, columns"),
        ("{question: q, baseline: a, arms: [a], colour: []}", r"colour"),
        ("{question: q, baseline: a, arms: [a, c]}", r"`arms`, `first` and the files beside it differ in b, c"),
        (
            "{question: q, baseline: a, arms: [a, b], prepared: {it: 'x.py {seed}'}}",
            r"prepared.it has {runs} and {run} only",
        ),
        ("{question: q, baseline: c, arms: [a, b]}", r"baseline=c is no arm; choose from a, b"),
    ],
)
def test_bad_comparisons(tmp_path: Path, text: str | None, message: str) -> None:
    """Each is refused in one line."""
    for name in ("it", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "it/_comparison.yaml").write_text(text or "")
    for arm in ("a", "b", "_base"):
        (tmp_path / f"it/{arm}.yaml").touch()
    with pytest.raises(ValueError, match=message) as found:
        read_comparison(tmp_path / ("it" if text else "new"))
    assert "\n" not in str(found.value)


def arguments(tmp_path: Path, *more: str) -> list[str]:
    """Of the command, for runs of a few steps."""
    few = ["train.steps=4", "train.global_batch_tokens=512", "evaluation.every_steps=2", "data.validation_sequences=8"]
    sources = ["data.sources=[{name: random, kind: embedded, max_megabytes: 1}]", f"data.cache_dir={tmp_path}/cache"]
    return ["balance_scope", f"--runs={tmp_path}/runs", *few, *sources, *more]


def main(*given: str, arms: Sequence[str] = ("micro_batch", "global")) -> int:
    """scripts/compare.py in this process, with some arms only; its runs are processes all the same."""
    module = command()
    module.read_comparison = lambda folder: replace(read_comparison(folder), arms=list(arms))
    return module.main(list(given))


def command() -> Any:
    """scripts/compare.py as a module."""
    spec = importlib.util.spec_from_file_location("compare_command", ROOT / "scripts/compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: arms or seeds that share a folder, runs that are repeated, a changed configuration that goes on or
    is mixed with the old one."""
    assert main(*arguments(tmp_path, "--seeds=1,2", "--jobs=2")) == 0
    assert capsys.readouterr().out.count("\nrun ") == 4
    base = tmp_path / "runs/balance_scope"
    arms = json.loads((base / "comparison.json").read_text())["arms"]
    assert list(arms) == ["micro_batch", "global"]
    assert all(len(set(arm["metrics"][LOSS]["values"])) == 2 for arm in arms.values()), "seeds"
    assert [len(curve) for curve in arms["global"]["curves"]] == [2, 2]
    assert (base / "comparison.png").stat().st_size > 10_000
    times = {path: path.stat().st_mtime_ns for path in base.glob("*/*/metrics.jsonl")}
    (base / "global/seed_1/result.json").rename(tmp_path / "kept")  # as if it had been stopped before its end
    assert main(*arguments(tmp_path, "--seeds=1,2")) == 0
    assert capsys.readouterr().out.count("\nrun ") == 1
    assert json.loads((base / "comparison.json").read_text())["arms"] == arms
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.parent for path in changed} <= {base / "global/seed_1"}
    assert main(*arguments(tmp_path, "--seeds=1,2", "router.route_scale=2.0")) == 2
    told = "router.route_scale 1.0 then and 2.0 now; delete it, or choose another --runs"
    assert told in capsys.readouterr().err
    assert is_finished(base / "global/seed_9", {}) is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seeds=1,x",), "--seeds 1,x must be whole numbers"),
        (("--seeds=1,1",), "has a seed twice"),
        (("--jobs=0",), "--jobs 0 must be at least 1"),
        (("train.seed=3",), "train.seed=3: this command sets it by itself"),
        (("train.stepps=3",), "unknown option train.stepps; did you mean train.steps"),
        (("router.top_k=99",), "router.top_k=99 is larger than moe.num_experts=16"),
        (("--size=mars",), "there is no such choice"),
    ],
)
def test_bad_arguments(tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, code 2, and nothing has run."""
    assert main(*arguments(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

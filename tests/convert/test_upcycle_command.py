"""From a dense run to one with experts: the command, its report, starts of training, and what AdamW takes along."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_data.tokenizers import BytesTokenizer
from moe_parallel import options
from moe_parallel.convert.checkpoint_source import CheckpointTensor, weights_of_checkpoint
from moe_parallel.convert.lazy import Lazy, whole
from moe_parallel.convert.plan_text import plan_text
from moe_parallel.convert.upcycle.map import Preserves, UpcycleConfig, make_plan
from moe_parallel.convert.upcycle.sparse import SparseConfig
from moe_parallel.convert.verify import batches_of_text, expert_cosine
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.layer import MoELayer
from tests.convert.models import SEED, pretrained, with_experts
from tests.engines.test_megatron_run import ON_CPU
from tests.runs import ROOT, Runner, at_step, curve

LOSS = "validation/cross_entropy_nats"
DENSE = ("model.first_dense_layers=2", "balance=none")
SPARSE = ("moe.num_experts=4", "moe.expert_dim=128", "moe.num_shared_experts=0", "router=softmax_normalized")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Runner:
    """With a dense run of 12 steps called `dense`."""
    runner = Runner(tmp_path_factory.mktemp("upcycle"), small_corpus)
    runner.run("dense", *DENSE)
    return runner


def init(runs: Runner, *more: str) -> tuple[str, ...]:
    return ("init=upcycle", f"init.sources=[{runs.runs / 'dense'}]", *SPARSE, *more)


@pytest.fixture(scope="module")
def command() -> Any:
    """scripts/upcycle.py as a module."""
    spec = importlib.util.spec_from_file_location("upcycle_command", ROOT / "scripts/upcycle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_write_and_report(runs: Runner, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: a report on other text or another model than it says, a model that is written other than it is
    planned, a start of training that differs from the written model.

    The source's loss is that of its own run's last evaluation: sums of float32 in another order, 1e-5. Both starts
    have the same weights, and the same curve without tolerance.
    """
    given = runs.arguments("run.name=written", *init(runs))
    assert command.main([*given, "--plan"]) == 0
    assert "layers.1.ffn.experts.down 4 x 64 x 128 128.00 KiB" in " ".join(capsys.readouterr().out.split())
    assert not (runs.runs / "written").exists()
    assert command.main(given) == 0
    found = json.loads((runs.runs / "written/upcycle.json").read_text())
    assert 0 < found["tokens"] <= 16_384
    (against,) = found["against"]
    dense_loss = curve(runs.runs / "dense")[12][LOSS]
    assert against["source_nats"] == pytest.approx(dense_loss, rel=1e-5)
    assert against["new_nats"] == pytest.approx(dense_loss, rel=1e-5)
    assert against["logits_relative_difference"] < 1e-6
    assert (found["promise"], found["is_kept"]) == ("exact", True)
    assert found["expert_cosine"] == {"layer_1": pytest.approx(1.0)}
    assert 1.0 < found["router_entropy_nats"]["layer_1"] < math.log(4)
    told = (runs.runs / "written/upcycle.md").read_text()
    assert "exact, kept" in told
    assert "layers.0-1.attention.query.weight" in told
    few = ("train.steps=3", "evaluation.every_steps=1")
    start = runs.run("from_written", *few, *SPARSE, f"init.weights={runs.runs / 'written'}")
    direct = runs.run("direct", *few, *init(runs))
    assert curve(start.folder) == curve(direct.folder)
    refused = runs.run("written", *few, *SPARSE, "resume=auto", codes=2)
    assert "step_00000000 is a model without a training state; start with init.weights=" in refused.err


def test_a_broken_promise_is_an_error(
    runs: Runner, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: a verification that nobody looks at. Without normalized weights the layer is not the dense one."""
    monkeypatch.setattr(SparseConfig, "preserves", lambda *_: Preserves.exact)
    given = runs.arguments("run.name=broken", *init(runs, "router.normalize=false"))
    assert command.main(given) == 1
    assert "error: init promises the same function, but logits differ by" in capsys.readouterr().err
    assert json.loads((runs.runs / "broken/upcycle.json").read_text())["is_kept"] is False


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("init=fresh",), "the options ask for no map; add one of init=upcycle"),
        (("run.name=null",), "run.name is not set"),
        (("run.name=dense",), "dense has checkpoints already"),
        (("init.optimizer_state=source",), "init.optimizer_state=source is for a start of training"),
        (("init.sources=[/nowhere]",), "init.sources.0=/nowhere is not a checkpoint"),
        (("data.validation_sequences=0",), "hold no validation data out; give --text FILE"),
        (("--text=/nowhere.txt",), "/nowhere.txt"),
        (("--text=/dev/null",), "the text has no token to predict"),
        (("moe.expert_dim=99",), "moe.expert_dim=99 must be 128"),
        (("--tokens=-1",), "--tokens -1 must not be negative"),
    ],
)
def test_mistakes(
    runs: Runner, command: Any, more: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, code 2, and nothing is written."""
    start = [] if more[0] == "init=fresh" else init(runs)
    assert command.main([*runs.arguments("run.name=mistake", *start), *more]) == 2
    assert text in capsys.readouterr().err
    assert not (runs.runs / "mistake").exists()


def moments(folder: Path, step: int) -> dict[str, tuple[Lazy, Lazy]]:
    weights = weights_of_checkpoint(folder / f"checkpoints/step_{step:08}")
    return {name: (lazy.moment(1), lazy.moment(2)) for name, lazy in weights.items()}


def steps(folder: Path, weight: str) -> float:
    """That the optimizer had counted of a weight before the first one."""
    stored = weights_of_checkpoint(folder / "checkpoints/step_00000000")[weight]
    assert isinstance(stored, CheckpointTensor)
    return float(whole(CheckpointTensor(stored._files, f"optimizer.{weight}.step")))


@pytest.mark.parametrize(
    ("name", "ranks", "more", "patch"),
    [
        ("one", 1, (), ""),
        ("ep", 2, ("parallel.ep=2",), ""),
        ("deepspeed", 2, ("parallel.ep=2", "engine=deepspeed"), ""),
        ("megatron", 2, ("parallel.ep=2", "engine=megatron", "model.vocab_size=257"), ON_CPU),
    ],
)
def test_optimizer_state(runs: Runner, name: str, ranks: int, more: tuple[str, ...], patch: str) -> None:
    """Would catch: moments of another weight or layer, experts that get those of their neighbors under `ep`, a count of
    steps that starts anew, moments that are drawn up and then not used. No tolerance: they are copies."""
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    if name == "megatron":
        pytest.importorskip("megatron.core")
    given = (*init(runs, "init.optimizer_state=source"), "train.steps=1", *more)
    run = runs.run(name, *given, ranks=ranks, patch=patch + at_step(0, "self.save()"))
    dense, new = moments(runs.runs / "dense", 12), moments(run.folder, 0)
    for order in (0, 1):
        gate, up, down = (whole(dense[f"layers.1.ffn.{part}.weight"][order]) for part in ("gate", "up", "down"))
        assert gate.abs().max() > 0
        assert torch.equal(whole(new["layers.1.ffn.experts.gate_up"][order]), torch.cat([gate, up]).expand(4, -1, -1))
        assert torch.equal(whole(new["layers.1.ffn.experts.down"][order]), down.expand(4, -1, -1))
        assert not whole(new["layers.1.ffn.router.weight"][order]).any()
        assert steps(run.folder, "layers.1.ffn.experts.down") == 12
        assert steps(run.folder, "layers.1.ffn.router.weight") == (12 if name == "deepspeed" else 0)
        for same in ("embedding.weight", "layers.0.attention.query.weight", "layers.0.ffn.up.weight", "norm.weight"):
            assert torch.equal(whole(new[same][order]), whole(dense[same][order])), same
    if name == "one":
        fresh = runs.run("fresh", *init(runs), "train.steps=1", patch=at_step(0, "self.save()"))
        with_past, without = (curve(r.folder)[1] for r in (run, fresh))
        assert with_past["loss/cross_entropy_nats"] == without["loss/cross_entropy_nats"]
        assert with_past[LOSS] != without[LOSS]


SLICES = ("moe.expert_dim=32", "router.top_k=4", "router=softmax_normalized")
MAPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "upcycle": ("dense", SPARSE, "exact"),
    "upcycle_granular": ("dense", (*SLICES, "moe.num_experts=8", "moe.num_shared_experts=0"), "exact"),
    "upcycle_drop": ("dense", SPARSE, "approximate"),
    "upcycle_shared": ("dense", (*SLICES, "moe.num_experts=8", "moe.num_shared_experts=4"), "exact"),
    "merge": ("dense,{0}/dense", (*SPARSE, "moe.num_experts=2"), "exact"),
    "delta": ("dense", (*SPARSE, "moe.expert_form=delta", "moe.delta_rank=4"), "exact"),
    "ternary": ("dense", (*SLICES, "moe.num_experts=8", "moe.num_shared_experts=4", "moe.expert_form=ternary"), "none"),
    "chain": ("moe", (*SPARSE, "moe.chain.iterations=2", "moe.chain.learned_scale=true"), "exact"),
    "resize": ("moe", (*SPARSE, "moe.num_experts=8", "router.top_k=4"), "exact"),
    "densify": ("moe", ("model.first_dense_layers=2",), "none"),
    "adjugate": ("moe", (*SPARSE, "moe.adjugate_groups=2", "moe.adjugate_dim=16"), "exact"),
}
"""Where each map starts from, the model that it makes, and what it promises for it. The MoE is one of copies."""
NEEDS_A_CALIBRATION = {"add_domain"}
"""Has a test of its own beside the calibration."""


def test_every_map(runs: Runner, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: a map that cannot be written part by part or read back, a config that cannot; a promise that does
    not hold for a trained model; a map that nobody has tried."""
    maps = {name for name, kind in options.INITS.items() if issubclass(kind, UpcycleConfig)}
    assert maps == MAPS.keys() | NEEDS_A_CALIBRATION
    assert command.main([*runs.arguments("run.name=moe", *init(runs)), "--tokens=0"]) == 0
    assert not (runs.runs / "moe/upcycle.json").exists()
    for name, (sources, model, promise) in MAPS.items():
        given = (f"init={name}", f"init.sources=[{runs.runs}/{sources.format(runs.runs)}]", *model)
        assert command.main([*runs.arguments(f"run.name=by_{name}", *given), "--tokens=600"]) == 0, name
        found = json.loads((runs.runs / f"by_{name}/upcycle.json").read_text())
        assert 0 < found["tokens"] <= 600, "more text than was asked for"
        assert (name, found["promise"], found["is_kept"]) == (name, promise, True)
        meta = json.loads((runs.runs / f"by_{name}/checkpoints/step_00000000/meta.json").read_text())
        assert options.architecture_of(meta["identity"], name).num_moe_layers == (0 if name == "densify" else 1)
        options.load_config(runs.runs / f"by_{name}/config.yaml")


# -- parts of it ---------------------------------------------------------------------------------------------------


def test_plan_text() -> None:
    """Would catch: layers in one line whose recipes differ, and those with one recipe in many."""
    source, target = pretrained(), with_experts(4, 48, 2)
    plan = make_plan(SparseConfig(), [source], target, SEED)
    lines = plan_text(plan).splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    assert len(names) == len(set(names)) == 17
    assert "layers.1-2.ffn.experts.gate_up" in names
    assert "layers.0-2.attention.query.weight" in names
    swapped = dict(plan)
    swapped["layers.1.ffn_norm.weight"] = plan["layers.2.ffn_norm.weight"]
    names = [line.split()[0] for line in plan_text(swapped).splitlines()]
    assert {"layers.0,2.ffn_norm.weight", "layers.1.ffn_norm.weight"} <= set(names)


def test_expert_cosine() -> None:
    """Against the mean over pairs, written out in float64; the sums are the same but for rounding."""
    torch.manual_seed(0)
    layer = next(m for m in Transformer(with_experts(5, 16, 2)).modules() if isinstance(m, MoELayer))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.normal_()
            weight += 0.5 * weight[:1].clone()
        rows = [
            torch.cat([layer.experts.gate_up[e].flatten(), layer.experts.down[e].flatten()]).double() for e in range(5)
        ]
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(5) for j in range(5) if i != j]
    assert expert_cosine(layer) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-9)


def test_text_is_cut_without_loss() -> None:
    """Would catch: a token between two windows that is never predicted, or twice; a text that takes all the room."""
    texts = ["abcdefghij" * 10, "0123456789" * 2]
    batches = batches_of_text(texts, BytesTokenizer(), 16, 80, rows=2)
    assert sum(batch.num_targets for batch in batches) == 39 + 19
    assert sum(batch.num_valid for batch in batches) == 40 + 20

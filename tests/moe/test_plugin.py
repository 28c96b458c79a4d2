"""Routers of a user's own: the worked example, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_parallel import options
from moe_parallel.moe.routers.plugin import PluginConfig
from moe_parallel.moe.routing import LayerContext
from tests.parity.cases import Case, run_engine, run_reference
from tests.parity.test_parity import check
from tests.ranks import run_ranks, run_threads
from tests.runs import ROOT

FILE = ROOT / "examples/top_p_router.py"
EXAMPLE = f"{FILE}:TopPConfig"
ROUTER = {"plugin": EXAMPLE, "top_k": 3, "options": {"threshold": 0.6}}
LOSSES = {"global_coefficient": 0.3, "z_coefficient": 0.01}
CASES = [
    Case("top-p plug-in", 1, kind="plugin", router=ROUTER, balance=LOSSES),
    Case("top-p plug-in, ep 2", 2, ep=2, kind="plugin", router=ROUTER, balance=LOSSES, recompute="full"),
    Case("top-p plug-in, ep 4", 4, ep=4, kind="plugin", router=ROUTER, balance=LOSSES, micro_batches=2),
]


def run_cases(cases: list[Case]) -> list:
    return [run_engine(case) for case in cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity_without_touching_the_core(case):
    """A router that the package does not know must train on any layout as in one process; tolerance and comparison are
    those of the parity suite. Tokens get different numbers of experts, which no built-in table router does."""
    run = run_ranks if case.world == 2 else run_threads
    for got in run(run_cases, case.world, [case])[:1]:
        check(case, got[0], run_reference(case), "threads", lambda *row: None)


def test_the_example_takes_experts_until_it_has_enough():
    """An expert too many or too few at the threshold: against a loop."""
    config = PluginConfig(**ROUTER)
    router = config.build(6, 5, with_bias=False).double()
    x_TD = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    context = LayerContext(layer=0, batch_shape=(1, 50))
    with torch.no_grad():
        router.weight.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    expert_TK = router.route(router(x_TD, context), context).choice.expert
    for token, score_E in enumerate((x_TD @ router.weight.T).softmax(-1)):
        wanted, total = [], 0.0
        for expert in score_E.argsort(descending=True).tolist()[:3]:
            if total < 0.6:
                wanted.append(expert)
            total += float(score_E[expert])
        assert [e for e in expert_TK[token].tolist() if e < 5] == wanted
    assert len({int((row < 5).sum()) for row in expert_TK}) > 1


def test_the_example_is_what_the_page_shows():
    """A page that shows other code than what is tested; and the promise of forty lines."""
    text = FILE.read_text()
    assert text in (ROOT / "docs/routers.md").read_text()
    assert len(text.splitlines()) <= 40


def test_options_on_the_command_line_and_in_config_yaml(tmp_path):
    """Options of a plug-in that Hydra refuses, or that a run's own config.yaml cannot give back."""
    overrides = ["router=plugin", f"router.plugin={EXAMPLE}", "router.options.threshold=0.25", "router.top_k=2"]
    config = options.composed(overrides, ROOT / "configs")
    assert (config.router.inner.threshold, config.router.inner.top_k) == (0.25, 2)
    (tmp_path / "config.yaml").write_text(options.config_yaml(config))
    again = options.load_config(tmp_path / "config.yaml")
    assert dataclasses.asdict(again.router) == dataclasses.asdict(config.router)


@pytest.mark.parametrize(
    ("plugin", "given", "words"),
    [
        ("", {}, "path/to/file.py:ClassConfig"),
        ("nowhere.py:X", {}, "there is no file"),
        ("no.such.package:X", {}, "cannot be imported"),
        (f"{FILE}:Nothing", {}, "Nothing"),
        (f"{FILE}:TopPRouter", {}, "TopPRouter"),
        (EXAMPLE, {"threshhold": 0.3}, "threshhold"),
        (EXAMPLE, {"threshold": 2.0}, "router.options.threshold=2.0 must lie in 0..1"),
        (EXAMPLE, {"threshold": "much"}, "router.options.threshold"),
        ("{tmp}/broken.py:X", {}, "broken.py"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, plugin, given, words):
    """A traceback, or a mistake that shows only when the model is built on all ranks."""
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"(?s)^.*$") as error:
        PluginConfig(plugin=plugin.replace("{tmp}", str(tmp_path)), options=given)
    assert words in str(error.value)
    assert "Traceback" not in str(error.value)

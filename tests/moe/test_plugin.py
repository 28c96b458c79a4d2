"""Routers from outside of the package: the worked example, what is told of mistakes, and a life as a run.

1. the example against a loop   2. docs say what the code is   3. mistakes   4. loading   5. runs   6. parity
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe_parallel import options
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig, MoELayer
from moe_parallel.moe.routers.plugin import PluginConfig, _load
from moe_parallel.moe.routing import ForwardContext, LayerContext
from tests.parity.cases import Case, run_reference
from tests.parity.table import ALL_LOSSES, CAPACITY_BY_WEIGHT, CHAIN, GLOBAL, SPILL, TWO_NODES
from tests.parity.test_parity import check, run_cases
from tests.ranks import run_ranks, run_threads
from tests.runs import ROOT, Runner, checkpoints, curve

CONFIGS, EXAMPLE, DOCS = ROOT / "configs", ROOT / "examples/top_p_router.py", ROOT / "docs/routers.md"
PLUGIN = f"{EXAMPLE}:TopPConfig"
DIM, TOKENS, EXPERTS = 8, 24, 6


# -- the example ---------------------------------------------------------------------------------------------------


def make_layer(threshold: float, top_k: int = 4) -> MoELayer:
    router = PluginConfig(top_k=top_k, plugin=PLUGIN, options={"threshold": threshold})
    layer = MoELayer(DIM, MoEConfig(num_experts=EXPERTS, expert_dim=5), router, BalanceConfig(), 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def context() -> LayerContext:
    return LayerContext(layer=0, batch_shape=(1, TOKENS), forward=ForwardContext())


def rows() -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def taken(score_E: torch.Tensor, threshold: float, top_k: int) -> list[int]:
    """Experts of one token, written out."""
    chosen: list[int] = []
    for expert in score_E.argsort(descending=True).tolist():
        if sum(float(score_E[e]) for e in chosen) < threshold and len(chosen) < top_k:
            chosen.append(expert)
    return chosen


@pytest.mark.parametrize("threshold", [0.05, 0.6, 1.0])
def test_example_equals_a_loop_with_all_gradients(threshold: float) -> None:
    """Would catch: an unused slot that computes or counts, a token without its best expert, a threshold that is off by
    one expert. float64: 1e-12 is rounding of sums of some tens of terms; an expert more moves outputs by 0.1.
    """
    layer, x_TD = make_layer(threshold), rows().requires_grad_()
    out_TD, (stats,) = layer(x_TD, context())
    wanted, counts = [], torch.zeros(EXPERTS, dtype=torch.int64)
    for x_D in x_TD:
        score_E = (layer.router.weight @ x_D).softmax(-1)
        y_D = layer.shared(x_D[None])[0]
        for e in taken(score_E.detach(), threshold, 4):
            gate, up = (layer.experts.gate_up[e] @ x_D).chunk(2)
            y_D = y_D + score_E[e] * (layer.experts.down[e] @ (F.silu(gate) * up))
            counts[e] += 1
        wanted.append(y_D)
    torch.testing.assert_close(out_TD, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    assert torch.equal(stats.count_E, counts)
    lowest, highest = {0.05: (TOKENS, TOKENS), 0.6: (TOKENS + 1, 4 * TOKENS - 1), 1.0: (4 * TOKENS, 4 * TOKENS)}[
        threshold
    ]
    assert lowest <= int(counts.sum()) <= highest, "one expert, a mixture, all four"
    assert int(stats.unserved) == 0
    inputs, grad = [x_TD, *layer.parameters()], rows().flip(0)
    for a, b in zip(torch.autograd.grad(out_TD, inputs, grad), torch.autograd.grad(torch.stack(wanted), inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_docs_show_the_example() -> None:
    """Would catch: a page whose code no longer runs, and an example that has grown too long to be one."""
    text = EXAMPLE.read_text()
    assert f"```python\n{text}```" in DOCS.read_text()
    assert len(text.splitlines()) <= 40


def test_docs_list_all_routers() -> None:
    """Would catch: a shipped choice that the table leaves out, or of which it says something else than the code."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    table = {
        row[0].strip("`"): row for row in cells if len(row) == 6 and row[0].startswith("`") and row[0] != "`router=`"
    }
    assert set(table) == {path.stem for path in (CONFIGS / "router").glob("*.yaml")}
    known = {option.name for option in options.options()}
    for choice, row in table.items():
        named = [name for name in row[4].replace("`", "").split(", ") if name and name != "the same"]
        assert all(f"router.{name}" in known for name in named), choice
        for name in row[5].replace("`", "").split(", "):
            assert name in ("", "all but loss_free") or (CONFIGS / "experiment" / name).is_dir(), choice
        if choice != "plugin":
            config = options.composed([f"router={choice}"], CONFIGS)
            looks = str(config.router.build(DIM, 16, False).looks_at(True))
            assert row[3] == looks.removeprefix("itself and "), choice


# -- mistakes ------------------------------------------------------------------------------------------------------

FILES = {
    "typo.py": "import torch\nclass MyConfig(:\n",
    "raises.py": "import torch\n\nMyConfig = undefined\n",
    "imports.py": "import no_such_module\n",
    "plain.py": "from moe_parallel.moe.routers.router import RouterConfig\nclass MyConfig(RouterConfig):\n    pass\n",
    "other.py": "class MyConfig:\n    pass\n",
    "needs.py": """from pydantic.dataclasses import dataclass
from moe_parallel.moe.routers.router import RouterConfig
@dataclass(kw_only=True)
class MyConfig(RouterConfig):
    size: int
""",
    "checks.py": """from pydantic.dataclasses import dataclass
from moe_parallel.moe.routers.router import RouterConfig
@dataclass(kw_only=True)
class MyConfig(RouterConfig):
    def check_experts(self, num_experts):
        raise ValueError(f"moe.num_experts={num_experts} must be a prime")
""",
}

MISTAKES = [
    (["router.plugin="], "router.plugin='' must be path/to/file.py:ClassConfig or package.module:ClassConfig"),
    (["router.plugin=example.py"], "router.plugin='example.py' must be path/to/file.py:ClassConfig"),
    (["router.plugin=nowhere.py:MyConfig"], "nowhere.py; paths start at the working folder"),
    (["router.plugin=no.such.module:MyConfig"], "cannot be imported: ModuleNotFoundError: No module named 'no'"),
    (["router.plugin={folder}/typo.py:MyConfig"], "typo.py:MyConfig cannot be imported: SyntaxError: "),
    (["router.plugin={folder}/raises.py:MyConfig"], "name 'undefined' is not defined ({folder}/raises.py, line 3)"),
    (["router.plugin={folder}/imports.py:MyConfig"], "No module named 'no_such_module' ({folder}/imports.py, line 1)"),
    (["router.plugin={folder}/plain.py:MyConfig"], "decorated with pydantic.dataclasses.dataclass(kw_only=True)"),
    (["router.plugin={folder}/other.py:MyConfig"], "MyConfig must be a class derived from RouterConfig"),
    (["router.plugin={folder}/needs.py:MyConfig"], "router.options.size: Field required"),
    (["router.plugin={folder}/checks.py:MyConfig"], "moe.num_experts=16 must be a prime"),
    (["router.plugin={example}:TopP"], "top_p_router.py has no TopP; it has: TopPConfig"),
    (["router.plugin={example}:TopPRouter"], "TopPRouter must be a class derived from RouterConfig"),
    (["router.options.tresh=0.3"], "tresh is not an option of router.plugin={example}:TopPConfig; it has: threshold"),
    (["router.options.top_k=2"], "router.options.top_k is an option of every router; set router.top_k"),
    (["router.options.threshold=high"], "router.options.threshold='high': Input should be a valid number"),
    (["router.options.threshold=0"], "router.options.threshold=0.0 must lie in 0..1, 0 excluded"),
    (["router.top_k=17"], "router.top_k=17 is larger than moe.num_experts=16"),
    (["balance=loss_free"], "balance.bias_rate=0.001 moves a bias on the scores, which this router does not have"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("overrides", "text"), MISTAKES, ids=[" ".join(o) for o, _ in MISTAKES])
def test_mistakes_are_one_line(folder: Path, overrides: list[str], text: str) -> None:
    """Would catch: a traceback through Hydra for a typo in the user's file, or a message without name and place."""
    names = {"folder": folder, "example": EXAMPLE}
    given = [override.format(**names) for override in overrides]
    with pytest.raises(ValueError, match=r".") as caught:
        options.architecture(options.composed(["router=plugin", f"router.plugin={PLUGIN}", *given], CONFIGS), 257)
    assert text.format(**names) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_end_with_code_2(runner: Runner, folder: Path) -> None:
    """Would catch: a broken file that ends as a fault with a traceback, or that leaves a run folder behind."""
    for place in ("raises.py:MyConfig", "typo.py:MyConfig", "nowhere.py:MyConfig"):
        running = runner.run("run", "router=plugin", f"router.plugin={folder}/{place}", codes=2)
        assert running.err.startswith(f"error: router.plugin={folder}/{place}"), running.err
        assert len(running.err.splitlines()) == 1, running.err
        assert not running.folder.exists()


# -- options and loading -------------------------------------------------------------------------------------------


def test_options_compose_and_read_back(tmp_path: Path) -> None:
    """Would catch: options that need a plus sign, that lose their type, or a config.yaml that cannot be loaded."""
    given = ["router=plugin", f"router.plugin={PLUGIN}", "router.top_k=3"]
    config = options.composed([*given, "router.options.threshold=0.25"], CONFIGS)
    assert config == options.composed([*given, "+router.options.threshold=0.25"], CONFIGS)
    assert isinstance(config.router, PluginConfig)
    assert config.router.options == {"threshold": 0.25}
    assert (config.router.inner.top_k, config.router.inner.threshold) == (3, 0.25)  # type: ignore[attr-defined]
    (tmp_path / "config.yaml").write_text(options.config_yaml(config))
    again = options.load_config(tmp_path / "config.yaml")
    assert again == config
    assert type(again.router.inner) is type(config.router.inner)  # type: ignore[attr-defined]


def test_loaded_once_by_several_threads(tmp_path: Path) -> None:
    """Would catch: a thread that finds the module while another one is still executing it, and misses the class."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(0.2)\n" + FILES["needs.py"])
    found: list[type] = []

    def load() -> None:
        found.append(_load(f"{slow}:MyConfig"))  # not `inner`, which Python 3.11 happens to lock

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


# -- a life as a run -----------------------------------------------------------------------------------------------


def test_run_resume_and_another_plugin(runner: Runner, tmp_path: Path) -> None:
    """Would catch: a relative path that does not start at the working folder, a resumed run that is not the unbroken
    one, a checkpoint that is loaded into another router. Curves are compared to the bit: the layout is the same.
    """
    place = tmp_path / "elsewhere"
    place.mkdir()
    shutil.copy(EXAMPLE, place / "mine.py")
    shutil.copy(EXAMPLE, place / "other.py")
    there = f"import os; os.chdir({str(place)!r})"
    plugin = ("router=plugin", "router.plugin=mine.py:TopPConfig", "router.options.threshold=0.3")
    whole = runner.run("whole", *plugin, patch=there)
    runner.run("part", *plugin, "train.steps=6", patch=there)
    resumed = runner.run("part", *plugin, "resume=auto", patch=there)
    assert curve(whole.folder)[12] == curve(resumed.folder)[12]
    config = options.OmegaConf.load(whole.folder / "config.yaml")
    assert config.router.plugin == "mine.py:TopPConfig"
    for changed in (("router.plugin=other.py:TopPConfig",), ("router.options.threshold=0.4",)):
        before = checkpoints(whole.folder)
        more = (*plugin, *changed, "resume=auto", "train.steps=18")
        refused = runner.run("whole", *more, patch=there, codes=2)
        name = changed[0].split("=")[0]
        assert "is a checkpoint of another model: " + name in refused.err, refused.err
        assert checkpoints(whole.folder) == before


# -- parity --------------------------------------------------------------------------------------------------------


def case(name: str, world: int, threshold: float = 0.95, **more: object) -> Case:
    router = {"plugin": PLUGIN, "options": {"threshold": threshold}, "top_k": 3}
    return Case(name, world, kind="plugin", router=router, **more)  # type: ignore[arg-type]


PARITY = {
    1: [case("plug-in, one rank", 1, balance=ALL_LOSSES)],
    2: [
        case("plug-in, ep 2, 2 micro-batches", 2, ep=2, micro_batches=2, balance=ALL_LOSSES),
        case("plug-in, sharded, full recompute", 2, recompute="full", balance=GLOBAL),
        case("plug-in, ep 2, capacity, full recompute", 2, ep=2, recompute="full", moe=CAPACITY_BY_WEIGHT),
        case("plug-in, least loaded", 2, ep=2, dispatch=SPILL, balance=GLOBAL),
    ],
    4: [
        case("plug-in, ep 4, idle rank", 4, ep=4, idle_rank=True, balance=GLOBAL),
        case("plug-in, ep 2 x replicas 2, chain of 2", 4, ep=2, shard=2, moe=CHAIN, balance=ALL_LOSSES),
        case("plug-in, two hops", 4, ep=4, dispatch=TWO_NODES, balance=ALL_LOSSES, micro_batches=2),
    ],
}


@pytest.mark.parametrize("world", PARITY)
def test_parity(world: int, parity_table) -> None:
    """A router from outside gets right gradients on every layout without a change to the package. Would catch: slots
    that are unused on one layout and sent on another, counts that the engine sums wrongly where tokens have different
    numbers of experts. `check` has float64 and 1e-12; what is missing or doubled shows at 1e-3 and above.
    """
    torch.set_num_threads(1)
    cases = PARITY[world]
    wanted = [run_reference(case) for case in cases]
    for case, got, outcomes in zip(cases, run_threads(run_cases, world, cases)[0], wanted, strict=True):
        tokens = sum(case.batch(0, m, r).num_valid for m in range(case.micro_batches) for r in range(world))
        assert 1.1 < float(outcomes[0].counts.sum()) / tokens / len(outcomes[0].counts) < 2.9, "some 1 expert, some 3"
        check(case, got, outcomes, "threads", parity_table)
    if world > 1:
        for everyone in run_ranks(run_cases, world, cases):
            for case, got, outcomes in zip(cases, everyone, wanted, strict=True):
                check(case, got, outcomes, "processes", parity_table)

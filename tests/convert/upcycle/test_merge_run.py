"""From models of domains to a run that starts from all of them, by commands alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.lazy import whole
from scripts import calibrate, upcycle
from tests.runs import Runner, checkpoints, curve

DENSE = ("model.first_dense_layers=2", "balance=none")
MERGED = ("init=merge", "model.first_dense_layers=1", "moe.num_experts=2", "moe.expert_dim=128")
MERGED += ("moe.num_shared_experts=0", "balance=none", "router=softmax_normalized", "router.top_k=1")
MERGED += ("router.logit_offset=true", "init.router=ridge", "optim.frozen=[*.router.*]")
STILL = ("optim.learning_rate=1e-30", "optim.warmup_steps=0", "train.steps=1")


def write_domain(folder: Path, letters: str) -> None:
    """Twenty documents of words of these letters."""
    generator = random.Random(letters)
    folder.mkdir()
    for number in range(20):
        words = ["".join(generator.choices(letters, k=generator.randint(2, 8))) for _ in range(300)]
        (folder / f"{number:02}.txt").write_text(" ".join(words))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run's last checkpoint."""
    found = weights_of_checkpoint(folder / "checkpoints" / checkpoints(folder)[-1])
    return {name: whole(lazy) for name, lazy in found.items()}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> dict[str, Path]:
    """Two dense models, each trained on its own letters: folders of their runs by what --text says of them."""
    folder = tmp_path_factory.mktemp("domains")
    runner, running = Runner(folder, small_corpus), {}
    for name, letters in (("ab", "abcdefgh"), ("st", "stuvwxyz")):
        write_domain(folder / name, letters)
        running[name] = runner.start(name, *DENSE, f"data.sources.0.paths=[{folder / name}]")
    assert {code for run in running.values() for code in run.finish()} == {0}
    return {f"{name}={folder / name}": run.folder for name, run in running.items()}


def test_merged_run(runner: Runner, tmp_path: Path, domains: dict[str, Path], capsys) -> None:
    """Would catch: a command line that no test of parts has seen, experts that land on the wrong rank, routers that are
    not those of the file, routers that do not find the text's domain. Experts and routers are copied bit for bit."""
    file, cache = tmp_path / "ridge.safetensors", str(runner.corpus / "cache")
    size = ["--tokens", "4096", "--sequence-tokens", "32", "--cache-dir", cache]
    sources = [str(folder) for folder in domains.values()]
    common = ["--sources", *sources, "--text", *domains, *size]
    assert calibrate.main(["--method", "ridge", "--to", str(file), *common]) == 0
    assert "ridge of ab, st" in capsys.readouterr().out
    start = (*MERGED, *STILL, f"init.sources=[{','.join(sources)}]", f"init.calibration={file}")
    one, two = runner.start("one", *start), runner.start("two", *start, "parallel.ep=2", ranks=2)
    assert (one.finish(), two.finish()) == ([0], [0, 0])
    merged, (first, second), router = weights(two.folder), map(weights, domains.values()), load_file(file)
    for expert, source in enumerate((first, second)):
        network = [source[f"layers.1.ffn.{what}.weight"] for what in ("gate", "up", "down")]
        assert torch.equal(merged["layers.1.ffn.experts.gate_up"][expert], torch.cat(network[:2]))
        assert torch.equal(merged["layers.1.ffn.experts.down"][expert], network[2])
    for what in ("weight", "offset"):
        assert torch.equal(merged[f"layers.1.ffn.router.{what}"], router[f"layers.1.{what}"])
    name = "layers.0.ffn.up.weight"
    assert torch.equal(merged[name], ((first[name].double() + second[name].double()) / 2).float())
    alone, shared = curve(one.folder)[1], curve(two.folder)[1]
    # float32 sums in another order
    assert shared["loss/cross_entropy_nats"] == pytest.approx(alone["loss/cross_entropy_nats"], rel=1e-5)
    assert shared["experts/max_over_mean"] == alone["experts/max_over_mean"]


NEXUS = ("model.first_dense_layers=1", "moe.expert_dim=128", "moe.num_shared_experts=0", "balance=none")
NEXUS += ("router=domain", "router.domain_dim=64", "router.top_k=1")


def test_a_domain_is_added(runner: Runner, tmp_path: Path, domains: dict[str, Path], capsys) -> None:
    """Would catch: embeddings of the first file that do not reach a model on the disk, a second map that cannot read
    what the first has written. Copies have no tolerance."""
    (first, second), texts = map(str, domains.values()), list(domains)
    size = ["--tokens", "4096", "--sequence-tokens", "32", "--cache-dir", str(runner.corpus / "cache")]
    files = [tmp_path / "two", tmp_path / "one"]
    for file, text in zip(files, (texts, texts[:1])):
        assert (
            calibrate.main(["--method", "domains", "--to", str(file), "--sources", first, "--text", *text, *size]) == 0
        )
    merged = ("run.name=nexus", "init=merge", "init.router=domains", f"init.sources=[{first},{second}]")
    larger = ("run.name=larger", "init=add_domain", f"init.sources=[{runner.runs / 'nexus'},{first}]")
    for start, file, experts in zip((merged, larger), files, (2, 3)):
        given = runner.arguments(*start, *NEXUS, f"init.calibration={file}", f"moe.num_experts={experts}")
        assert upcycle.main([*given, "--tokens=200"]) == 0, capsys.readouterr().err
    before, after, dense = (weights(runner.runs / "nexus"), weights(runner.runs / "larger"), weights(Path(first)))
    old, new = (load_file(file)["domains"] for file in files)
    assert torch.equal(before["layers.1.ffn.router.domains"], old)
    assert torch.equal(after["layers.1.ffn.router.domains"], torch.cat([old, new]))
    for what in ("router.gate_up", "router.project"):
        assert torch.equal(after[f"layers.1.ffn.{what}"], before[f"layers.1.ffn.{what}"])
    assert torch.equal(after["layers.1.ffn.experts.down"][:2], before["layers.1.ffn.experts.down"])
    assert torch.equal(after["layers.1.ffn.experts.down"][2], dense["layers.1.ffn.down.weight"])


def test_other_methods_and_mistakes(runner: Runner, tmp_path: Path, domains: dict[str, Path], capsys) -> None:
    """Would catch: a method that cannot be called, mistakes that end in a traceback."""
    cache, (first, second) = str(runner.corpus / "cache"), map(str, domains.values())
    size = ["--tokens", "8192", "--sequence-tokens", "32", "--cache-dir", cache]
    for method, sources, shapes in (
        ("gates", [first, second], {"layers.0.weight": (2, 64), "layers.1.weight": (2, 64)}),
        ("domains", [first], {"domains": (2, 64)}),
    ):
        file = tmp_path / method
        arguments = ["--method", method, "--to", str(file), "--sources", *sources, "--text", *domains, *size]
        assert calibrate.main(arguments) == 0
        assert {name: tuple(value.shape) for name, value in load_file(file).items()} == shapes
    capsys.readouterr()
    for arguments, text in (
        (["domains", "--sources", first, second], "embeds all texts with one model; --sources names 2"),
        (["ridge", "--sources", first], "--sources names 1 models, --text 2 texts"),
        (["ridge", "--sources", first, second, "--ridge", "0"], "--ridge 0.0 must be positive"),
        (["ridge", "--sources", first, second, "--tokens", "100"], "--tokens 100 must lie in 256"),
        (["ridge", "--sources", first, str(tmp_path)], "is not a checkpoint"),
    ):
        rest = [] if "--tokens" in arguments else size
        shorter = ["--sequence-tokens", "32", "--cache-dir", cache] if not rest else []
        command = ["--method", *arguments, "--to", str(tmp_path / "x"), "--text", *domains, *rest, *shorter]
        assert calibrate.main(command) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

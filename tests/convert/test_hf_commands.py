"""scripts/import_hf.py and scripts/export_hf.py, from a run to transformers and back, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_data.tokenizers import (
    BytesTokenizer,
    LibraryTokenizer,
    Tokenizer,
    TokenizerConfig,
    TokenizerKind,
    build_tokenizer,
    train_bpe,
)
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.huggingface.folder import contents, open_model
from moe_parallel.convert.huggingface.tokenizer import copy_tokenizer, loads_otherwise, write_tokenizer
from moe_parallel.convert.huggingface.write_files import write_folder
from moe_parallel.convert.upcycle.map import UpcycleConfig
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.counts import count_parameters
from moe_parallel.model.initialize import FreshConfig
from moe_parallel.model.rope import RopeConfig
from moe_parallel.moe.routing import ForwardContext
from moe_parallel.options import architecture, composed
from moe_parallel.start import start
from tests.batches import make_batch
from tests.convert.models import DENSE, pretrained, relative, with_experts
from tests.convert.test_safetensors import OPENED, _Evil
from tests.runs import ROOT, Runner, curve

BYTES = TokenizerConfig(kind=TokenizerKind.bytes)
TEXT = "".join(chr(code) for code in [*range(0, 0xD800, 11), *range(0xE000, 0x11000, 7), 0x1F600, 0x10FFFF])
"""Characters of one to four bytes, in which every byte that UTF-8 can have occurs; in no normal form."""
STILL = ("optim.learning_rate=1e-30", "optim.warmup_steps=0", "train.steps=1")
PUBLIC = ("moe.num_shared_experts=0", "router=softmax_normalized", "attention.qk_norm=head", "balance=none")
"""What makes model=tiny one that transformers has a class for: Qwen3-MoE with a dense layer."""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_command", ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a script prints; its message if it refuses."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        script(name).main()
    except SystemExit as error:
        return str(error.code)
    return capsys.readouterr().out


def public_folder(folder: Path, shape: Architecture, tokenizer: bool = True) -> Path:
    """A Hugging Face folder of a random model, with the tokenizer of bytes."""

    def add_files(partial: Path) -> None:
        if tokenizer:
            write_tokenizer(partial, BYTES, BytesTokenizer(), None)

    config, weights = contents(shape, pretrained(shape).weights, torch.float32)
    write_folder(folder, config, weights, add_files)
    return folder


SHAPE = replace(with_experts(4, 24, 2), vocab_size=300)


# -- tokenizers ----------------------------------------------------------------------------------------------------


def _bpe(folder: Path) -> tuple[TokenizerConfig, Tokenizer]:
    library = train_bpe([(ROOT / "README.md").read_text()], 600)
    return TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=600), LibraryTokenizer(library, "bpe")


def _file(folder: Path) -> tuple[TokenizerConfig, Tokenizer]:
    train_bpe([(ROOT / "README.md").read_text()], 500).save(str(folder / "tokenizer.json"))
    config = TokenizerConfig(kind=TokenizerKind.file, path=str(folder / "tokenizer.json"))
    return config, build_tokenizer(config)


def _folder(folder: Path) -> tuple[TokenizerConfig, Tokenizer]:
    library = train_bpe([(ROOT / "README.md").read_text()], 500)
    library.add_special_tokens(["<bos>", "<end>"])
    library.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    about |= {"auto_map": {"AutoTokenizer": ["code.Evil", None]}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text("raise SystemExit")
    config = TokenizerConfig(kind=TokenizerKind.file, path=str(folder), end_of_document="<end>")
    return config, LibraryTokenizer(library, "folder", "<end>")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "file", "folder"])
def test_tokenizers(tmp_path: Path, kind: str) -> None:
    """Would catch: ids that differ from those of training for some character, a normalizer, another end of document,
    code that travels along, a class that transformers puts in the place of ours without a word."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    makers = {"bytes": lambda folder: (BYTES, BytesTokenizer()), "bpe": _bpe, "file": _file, "folder": _folder}
    config, ours = makers[kind](source)
    write_tokenizer(out, config, ours, 4096)
    assert not list(out.glob("*.py"))
    for model_type in ("llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3"):
        (out / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(out)
        ids = theirs(TEXT, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(TEXT).tolist(), model_type
        assert theirs.eos_token_id == ours.end_of_document
        if kind != "folder":  # it has a second end, whose text is one token there
            assert theirs("a" + theirs.eos_token)["input_ids"] == [*ours.encode("a"), ours.end_of_document]
    assert theirs.decode(ids) == TEXT
    assert loads_otherwise(out, ours) is None
    if kind == "folder":
        assert (theirs.bos_token, theirs.chat_template) == ("<bos>", "{{ messages }}")
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert loads_otherwise(out, ours) == "makes a Qwen2Tokenizer of it, with other ids"
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (out / "tokenizer_config.json").write_text("{")
    assert "fails with " in str(loads_otherwise(out, ours))


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a tokenizer that was named, not copied, and is missing from the export. Out of the Hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--some--name/snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    config, ours = _folder(snapshot)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", replace(config, path="some/name"), ours, None)
    assert loads_otherwise(tmp_path / "out", ours) is None


# -- there and back ------------------------------------------------------------------------------------------------


def test_there_and_back(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: any part that does not fit the others: weights, config, tokenizer, preset, run, start on one and two
    ranks. Equal bytes after a round trip; losses from the same weights equal to the last bit on one rank, to the order
    of sums in float32 on two."""
    plain = runner.run("plain", *PUBLIC)
    name = "validation/cross_entropy_nats"
    loss = curve(plain.folder)[max(curve(plain.folder))][name]
    out = tmp_path / "out"
    said = call("export_hf", monkeypatch, capsys, plain.folder, out, "--dtype", "float32", "--jobs", 2)
    assert "Qwen3MoeForCausalLM in float32" in said
    assert "warning" not in said

    one = runner.run("one", *PUBLIC, *STILL, f"init.weights={out}")
    assert "new: none" in one.err
    assert curve(one.folder)[1][name] == loss
    two = runner.run("two", *PUBLIC, *STILL, f"init.weights={out}", "parallel.ep=2", ranks=2)
    assert curve(two.folder)[1][name] == pytest.approx(loss, rel=1e-5)

    said = call("import_hf", monkeypatch, capsys, out, "--config-to", tmp_path / "my", "--run", tmp_path / "back")
    counts = count_parameters(open_model(out).architecture)
    assert f"{counts.total:,} total, {counts.active:,} active" in said
    again = tmp_path / "again"
    call("export_hf", monkeypatch, capsys, tmp_path / "back", again, "--dtype", "float32", "--shard-gigabytes", 1e-4)
    parts = [load_file(file) for file in again.glob("*.safetensors")]
    assert len(parts) > 3
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    theirs = load_file(out / "model.safetensors")
    assert joined.keys() == theirs.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in theirs.items())
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (again / file).read_text() == (out / file).read_text(), file

    preset = composed([f"hydra.searchpath=[file://{tmp_path / 'my'}]", "model=out"], ROOT / "configs")
    tokenizer = build_tokenizer(preset.tokenizer)
    shape = open_model(out).architecture
    assert architecture(preset, tokenizer.vocab_size) == shape
    assert preset.init == FreshConfig(weights=str(out))
    other = ["init=upcycle", f"init.sources=[{out}]"]  # a choice of weights besides the preset's
    other = composed([f"hydra.searchpath=[file://{tmp_path / 'my'}]", "model=out", *other], ROOT / "configs")
    assert isinstance(other.init, UpcycleConfig)


def test_another_function_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch: weights of equal shapes that compute something else under other options, without a word."""
    folder = public_folder(tmp_path / "model", SHAPE)
    assert isinstance(SHAPE.attention, GroupedQueryConfig)
    other = replace(SHAPE, attention=replace(SHAPE.attention, rope=RopeConfig(theta=5000.0)))
    for shape, told in ((SHAPE, False), (other, True)):
        caplog.clear()
        start(FreshConfig(weights=str(folder)), shape, 0)
        assert ("computes something else: attention.rope.theta=5000.0, there 10000.0" in caplog.text) == told


def test_the_same_model_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: an export whose parts are right one by one, and not together. float32 on their side: 1e-5."""
    shape = replace(SHAPE, vocab_size=257)
    public_folder(tmp_path / "source", shape)
    call("import_hf", monkeypatch, capsys, tmp_path / "source", "--run", tmp_path / "run")
    call("export_hf", monkeypatch, capsys, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.eos_token_id == 256
    assert model.config.bos_token_id is None
    batch = make_batch([(24,)], 24, 50)
    ours = build_model(shape, pretrained(shape).weights).eval()
    with torch.no_grad():
        wanted = ours(batch, ForwardContext(step=0, training=False))[0]
        theirs = model(batch.token_BS).logits
    assert relative(theirs.view_as(wanted), wanted) < 1e-5


def test_nothing_of_a_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: code of a model or tokenizer that runs, or that travels into a run; a pickle that is opened."""
    folder = public_folder(tmp_path / "model", SHAPE)
    evil = f"open({str(tmp_path / 'evil')!r}, 'w')"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(evil)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (folder / "config.json").write_text(json.dumps(config))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["tokenization_evil.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Evil()))
    OPENED.clear()
    said = call("import_hf", monkeypatch, capsys, folder, "--run", tmp_path / "run", "--config-to", tmp_path / "my")
    assert "checkpoint" in said, said
    assert "not used    code and pickles in the folder (.bin, .pt, .py)" in said
    said = call("export_hf", monkeypatch, capsys, tmp_path / "run", tmp_path / "out")
    assert "written" in said, said
    assert not [
        name for name in OPENED if "evil" in name or (name.startswith(str(folder)) and name.endswith((".bin", ".pt")))
    ]
    assert not (tmp_path / "evil").exists()
    assert not [file for where in ("run", "out") for file in (tmp_path / where).rglob("*.py")]
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: folders that are written over, runs that cannot be used, models that lose an option on the way."""

    def refused(name: str, *arguments: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        said = call(name, monkeypatch, capsys, *arguments)
        assert said.startswith("error: "), said
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return said

    folder = public_folder(tmp_path / "model", SHAPE)
    bare = public_folder(tmp_path / "bare", DENSE, tokenizer=False)
    call("import_hf", monkeypatch, capsys, folder, "--run", tmp_path / "run", "--config-to", tmp_path)
    assert "has no config.json; give the folder" in refused("import_hf", tmp_path / "model" / "absent")
    assert "exists already" in refused("import_hf", folder, "--config-to", tmp_path)
    assert "exists already" in refused("import_hf", folder, "--run", tmp_path / "run")
    said = refused("import_hf", folder, "--config-to", tmp_path / "my", "--name", "deepseek_v3")
    assert "model=deepseek_v3 is a file of this project" in said  # whose weights would be new ones
    said = refused("import_hf", folder, "--config-to", tmp_path / "my", "--name", "upcycle")
    assert "init=upcycle is a file of this project" in said
    assert "a run needs one; give it by --tokenizer" in refused("import_hf", bare, "--run", tmp_path / "new")
    copied = tmp_path / "copied"
    copied.mkdir()
    copy_tokenizer(folder, copied)
    said = refused("import_hf", bare, "--run", tmp_path / "new", "--tokenizer", copied)
    assert "ids up to 256, the embedding 50 rows" in said
    (bare / "tokenizer.json").write_text("{}")
    assert "or give another tokenizer.json by --tokenizer" in refused("import_hf", bare, "--run", tmp_path / "new")
    looked = call("import_hf", monkeypatch, capsys, bare)  # without a use for it
    assert "warning     tokenizer.path=" in looked
    assert "parameters" in looked
    assert "exists already" in refused("export_hf", tmp_path / "run", folder)
    for size in ("nan", "inf"):
        assert f"gigabytes {size} must be" in refused(
            "export_hf", tmp_path / "run", tmp_path / "new", "--shard-gigabytes", size
        )
    assert "--jobs 0 must be a number above 0" in refused("export_hf", tmp_path / "run", tmp_path / "new", "--jobs", 0)
    assert "MixtralForCausalLM" in refused("export_hf", tmp_path / "run", tmp_path / "new", "--family", "mixtral")
    stored = next((tmp_path / "run" / "checkpoints").glob("*/*.distcp"))
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(bytes(content))
    assert "damaged" in refused("export_hf", tmp_path / "run", tmp_path / "new")
    assert "written" in call("export_hf", monkeypatch, capsys, tmp_path / "run", tmp_path / "new", "--no-verify")


def test_no_class_for_it(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: an export that leaves an option out which the model was trained with."""
    run = runner.run("chain", *STILL, *PUBLIC, "moe.chain.iterations=2")
    said = call("export_hf", monkeypatch, capsys, run.folder, tmp_path / "out")
    assert "no public class of transformers expresses this model" in said
    assert "moe.chain.iterations=2, there 1. --remote-code writes any model" in said
    assert not (tmp_path / "out").exists()
    said = call("export_hf", monkeypatch, capsys, run.folder, tmp_path / "out", "--remote-code", "--family", "olmoe")
    assert "--family olmoe is a public class; leave --remote-code out" in said
    said = call("export_hf", monkeypatch, capsys, run.folder, tmp_path / "out", "--remote-code", "--dtype", "float32")
    assert "MoEParallelForCausalLM in float32" in said
    assert "warning" not in said  # of a tokenizer that is read otherwise
    said = call("import_hf", monkeypatch, capsys, tmp_path / "out")
    assert "give it as init.weights or init.sources" in said
    # Without a step that counts, training from the export starts where the run ended.
    again = runner.run("again", *STILL, *PUBLIC, "moe.chain.iterations=2", f"init.weights={tmp_path / 'out'}")
    assert curve(again.folder)[1]["loss/cross_entropy_nats"] == curve(run.folder)[1]["loss/cross_entropy_nats"]

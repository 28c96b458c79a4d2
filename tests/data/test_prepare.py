"""Preparing: built once, never half; held-out documents are apart; tokens are those of the documents."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from moe_data.cache import build_once
from moe_data.prepare import bpe_trainer, prepare_source
from moe_data.shards import Shard
from moe_data.sources import SourceConfig, held_out_below, text_hash
from moe_data.tokenizers import BytesTokenizer, TokenizerConfig, build_tokenizer
from tests.data.conftest import texts_of

TOKENIZER = BytesTokenizer()


def documents_of(store: object) -> list[str]:
    tokens, _ = store.read(0, store.num_tokens)  # type: ignore[attr-defined]
    ends = np.flatnonzero(tokens == TOKENIZER.end_of_document)
    assert ends[-1] == len(tokens) - 1
    return [TOKENIZER.decode(part) for part in np.split(tokens, ends + 1)[:-1]]


def jsonl(corpus: Path, **options: object) -> SourceConfig:
    return SourceConfig(name="s", kind="jsonl", paths=[str(corpus / "*.jsonl")], **options)


def test_split_by_hash_is_whole_and_apart(corpus: Path, tmp_path: Path) -> None:
    """A document in both parts (validation would be memory) or in neither."""
    prepared = prepare_source(jsonl(corpus, validation_fraction=0.3), TOKENIZER, tmp_path / "cache", 0)
    train, validation = documents_of(prepared.train), documents_of(prepared.validation)
    assert train == [t for t in texts_of(61) if text_hash(t) >= held_out_below(0.3)]
    assert validation == [t for t in texts_of(61) if text_hash(t) < held_out_below(0.3)]
    assert train
    assert validation


def test_a_tiny_fraction_still_holds_out_one(corpus: Path, tmp_path: Path) -> None:
    """A fraction of 1e-9 of 61 documents is none, and validation would silently not take place."""
    prepared = prepare_source(jsonl(corpus, validation_fraction=1e-9), TOKENIZER, tmp_path / "cache", 0)
    least = min(texts_of(61), key=text_hash)
    assert documents_of(prepared.validation) == [least]
    assert documents_of(prepared.train) == [t for t in texts_of(61) if t != least]
    none = prepare_source(jsonl(corpus, validation_fraction=0), TOKENIZER, tmp_path / "cache", 0)
    assert none.validation is None
    assert documents_of(none.train) == texts_of(61)


def test_validation_paths(corpus: Path, tmp_path: Path) -> None:
    """With files of their own, nothing is held out of the training files."""
    source = SourceConfig(
        name="s", kind="jsonl", paths=[str(corpus / "a.jsonl")], validation_paths=[str(corpus / "b.jsonl")]
    )
    prepared = prepare_source(source, TOKENIZER, tmp_path / "cache", 0)
    assert documents_of(prepared.train) == texts_of(61)[:40]
    assert documents_of(prepared.validation) == texts_of(61)[40:]


def test_second_time_reads_the_cache(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a run would tokenize again; or a changed tokenizer would read the old tokens."""
    prepare_source(jsonl(corpus), TOKENIZER, tmp_path / "cache", 0)
    monkeypatch.setattr("moe_data.prepare.build", lambda *_: pytest.fail("built again"))
    prepare_source(jsonl(corpus), TOKENIZER, tmp_path / "cache", 0)
    monkeypatch.setattr(TOKENIZER, "fingerprint", "another", raising=False)
    with pytest.raises(pytest.fail.Exception, match="built again"):
        prepare_source(jsonl(corpus), TOKENIZER, tmp_path / "cache", 0)


def test_a_failed_build_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    """Half a corpus under the final name would be used for ever after."""
    (corpus / "c.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl row 0"):
        prepare_source(jsonl(corpus), TOKENIZER, tmp_path / "cache", 0)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []
    (corpus / "c.jsonl").unlink()
    assert prepare_source(jsonl(corpus), TOKENIZER, tmp_path / "cache", 0).train is not None


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    """Training on nothing."""
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n')
    source = SourceConfig(name="e", kind="jsonl", paths=[str(tmp_path / "e.jsonl")])
    with pytest.raises(ValueError, match=r"source 'e' has no training document: .*e\.jsonl holds no text"):
        prepare_source(source, TOKENIZER, tmp_path / "cache", 0)
    (tmp_path / "one.txt").write_text("one document")
    source = SourceConfig(name="one", paths=[str(tmp_path / "one.txt")])
    with pytest.raises(ValueError, match=r"'one' has 1 document\(s\), all held out .* unit=paragraph"):
        prepare_source(source, TOKENIZER, tmp_path / "cache", 0)


def count_builds(final: Path, log: Path, die: bool) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)  # the others find the lock taken
        (folder / "content").write_text("whole")
        if die:
            os._exit(1)

    build_once(final, build)


def test_one_process_builds_and_a_dead_builder_blocks_nobody(tmp_path: Path) -> None:
    """Two builders waste time and mix files; a lock that outlives its holder stops the next run for ever."""
    context = multiprocessing.get_context("fork")
    dead = context.Process(target=count_builds, args=(tmp_path / "x", tmp_path / "log", True))
    dead.start()
    dead.join(20)
    assert not (tmp_path / "x").exists()
    others = [context.Process(target=count_builds, args=(tmp_path / "x", tmp_path / "log", False)) for _ in range(4)]
    for process in others:
        process.start()
    for process in others:
        process.join(20)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n" * 2
    assert (tmp_path / "x" / "content").read_text() == "whole"
    assert not list(tmp_path.glob(".x.*.partial"))


def test_bpe_is_learned_once_from_training_text_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learning on every start; or a cache that does not see changed sources."""
    source = jsonl(corpus, validation_fraction=0)
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    first = build_tokenizer(config, bpe_trainer([source], tmp_path / "cache"))
    assert first.vocab_size == 280
    assert first.name == "bpe-280"
    monkeypatch.setattr("moe_data.prepare.train_bpe", lambda *_: pytest.fail("learned again"))
    again = build_tokenizer(config, bpe_trainer([source], tmp_path / "cache"))
    assert again.fingerprint == first.fingerprint
    (corpus / "a.jsonl").write_text('{"text": "changed"}\n')
    with pytest.raises(pytest.fail.Exception, match="learned again"):
        build_tokenizer(config, bpe_trainer([source], tmp_path / "cache"))


def run_script(name: str, *arguments: str) -> int:
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


def test_scripts_make_shards_that_train(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands end to end: a tokenizer, shards of it, and a source that reads them back."""
    tokenizer = tmp_path / "out" / "tokenizer.json"
    made = run_script(
        "train_tokenizer",
        *(
            "--kind",
            "jsonl",
            "--paths",
            str(corpus / "a.jsonl"),
            "--vocab-size",
            "270",
            "--output",
            str(tokenizer),
        ),
    )
    assert made == 0
    shard = tmp_path / "out" / "web"
    made = run_script(
        "prepare_data",
        *("--kind", "jsonl", "--paths", str(corpus / "a.jsonl"), str(corpus / "b.jsonl")),
        *("--tokenizer", str(tokenizer), "--output", str(shard), "--validation-fraction", "0.2"),
    )
    assert made == 0
    info = json.loads(Path(f"{shard}.json").read_text())
    held = Shard(f"{shard}_validation")
    assert info["documents"] + held.num_documents == 61
    assert sorted(p.name for p in shard.parent.iterdir() if p.name.startswith(".")) == []
    loaded = build_tokenizer(TokenizerConfig(kind="file", path=str(tokenizer)))
    source = SourceConfig(name="web", kind="tokens", paths=[str(shard)], validation_paths=[f"{shard}_validation"])
    prepared = prepare_source(source, loaded, tmp_path / "cache", 0)
    assert prepared.train is not None
    assert prepared.train.num_tokens == info["tokens"]
    with pytest.raises(ValueError, match=r"web was made with tokenizer .*tokenizer\.json .* this run has bytes"):
        prepare_source(source, TOKENIZER, tmp_path / "cache", 0)
    failed = run_script(
        "prepare_data", "--kind", "text", "--paths", "none", "--tokenizer", "bytes", "--output", str(shard)
    )
    assert failed == 2
    assert "none does not exist" in capsys.readouterr().err


def test_tokens_hold_out_the_last_documents(corpus: Path, tmp_path: Path) -> None:
    """The border of what ready-made shards hold out must be a document's, counted over several shards."""
    from moe_data.shards import ShardWriter

    for name, documents in (("a", [[1, 256], [2, 2, 256]]), ("b", [[3, 256], [4, 4, 4, 256]])):
        with ShardWriter(tmp_path / name, 257) as writer:
            for document in documents:
                writer.add(np.array(document))
    source = SourceConfig(
        name="t", kind="tokens", paths=[str(tmp_path / "a"), str(tmp_path / "b")], validation_fraction=0.6
    )
    prepared = prepare_source(source, TOKENIZER, tmp_path / "cache", 0)
    assert prepared.train is not None
    assert prepared.validation is not None
    assert prepared.train.read(0, prepared.train.num_tokens)[0].tolist() == [1, 256]
    assert prepared.validation.read(0, prepared.validation.num_tokens)[0].tolist() == [
        *(2, 2, 256, 3, 256, 4, 4, 4, 256)
    ]

"""Sources: every format yields the same documents from any place; bad input names file, row and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_data import embedded
from moe_data.sources import DocumentReader, SourceConfig, SourceKind, describe_content, resolve_paths
from tests.data.conftest import texts_of

FORMATS = {
    "jsonl": {"paths": ["{}/a.jsonl", "{}/b.jsonl"]},
    "parquet": {"paths": ["{}/*.parquet"]},
    "arrow": {"paths": ["{}/saved_a", "{}/saved_b"]},
    "text": {"paths": ["{}/texts"]},
}


def source_of(kind: str, corpus: Path, **options: object) -> SourceConfig:
    paths = [path.format(corpus) for path in FORMATS[kind]["paths"]]
    return SourceConfig(name=kind, kind=kind, paths=paths, **options)


def reader_of(source: SourceConfig) -> DocumentReader:
    return DocumentReader(source, resolve_paths(source, source.paths))


@pytest.mark.parametrize("kind", FORMATS)
def test_all_documents_in_order(corpus: Path, kind: str) -> None:
    """Files in the order of the directory, a lost last row, or a row twice."""
    found = [document.text for document in reader_of(source_of(kind, corpus))]
    assert found == texts_of(61)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("taken", [0, 1, 39, 40, 60])
def test_resume_from_any_place(corpus: Path, kind: str, taken: int) -> None:
    """A state that is one row off, within a file or at the seam of two. Through JSON, as in a checkpoint."""
    first = reader_of(source_of(kind, corpus))
    documents = iter(first)
    for _ in range(taken):
        next(documents)
    state = json.loads(json.dumps(first.state_dict()))
    second = reader_of(source_of(kind, corpus))
    second.load_state_dict(state)
    again = json.loads(json.dumps(second.state_dict()))
    third = reader_of(source_of(kind, corpus))
    third.load_state_dict(again)
    for reader in (second, third):
        assert [document.text for document in reader] == texts_of(61)[taken:]


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_from_a_local_copy(corpus: Path, tmp_path: Path, streaming: bool) -> None:
    """The Hub's path through the library, without a network: a folder of parquet files is a data set too."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in "ab":
        (corpus / f"{name}.parquet").rename(folder / f"train-0000{name}.parquet")
    source = SourceConfig(name="hub", kind=SourceKind.hub, paths=[str(folder)], streaming=streaming)
    reader = reader_of(source)
    documents = iter(reader)
    head = [next(documents).text for _ in range(45)]
    assert head == texts_of(61)[:45]
    resumed = reader_of(source)
    resumed.load_state_dict(reader.state_dict())
    assert [document.text for document in resumed] == texts_of(61)[45:]


def test_units_of_text(tmp_path: Path) -> None:
    """A paragraph or line lost at the end of a file without a newline."""
    (tmp_path / "t.txt").write_text("a b\nc\n\nd\ne")
    found = {}
    for unit in ("file", "paragraph", "line"):
        source = SourceConfig(name="t", paths=[str(tmp_path / "t.txt")], unit=unit)
        found[unit] = [document.text for document in reader_of(source)]
    assert found["file"] == ["a b\nc\n\nd\ne"]
    assert found["paragraph"] == ["a b\nc", "d\ne"]
    assert found["line"] == ["a b", "c", "d", "e"]


def test_bad_rows_are_named(corpus: Path, tmp_path: Path) -> None:
    """Text with the wrong field, type or bytes: file, row and remedy in the message."""
    (tmp_path / "kind.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "field.jsonl").write_text('{"body": "b", "id": 1}\n')
    (tmp_path / "json.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"PK\x00\x01")
    (tmp_path / "not.parquet").write_bytes(b"PAR1 not at all")
    for kind, name, message in [
        ("jsonl", "kind.jsonl", r"kind\.jsonl row 1: field 'text' holds .*3.* and not text"),
        ("jsonl", "none.jsonl", r"none\.jsonl row 1: field 'text' holds NoneType"),
        (
            "jsonl",
            "field.jsonl",
            r"field\.jsonl row 0 has no field 'text', it has body, id; set .*text_field",
        ),
        ("jsonl", "json.jsonl", r"json\.jsonl row 1 is not JSON: Expecting value"),
        ("text", "latin.txt", r"latin\.txt row 0 is not UTF-8 text: byte 0xe9 at 3; convert it"),
        ("text", "binary.txt", r"binary\.txt row 0 is binary .* take it out of the paths"),
        ("parquet", "not.parquet", r"not\.parquet, after row 0, could not be read as parquet"),
    ]:
        source = SourceConfig(name="bad", kind=kind, paths=[str(tmp_path / name)])
        with pytest.raises(ValueError, match=message):
            list(reader_of(source))


def test_missing_paths_suggest_neighbors(corpus: Path) -> None:
    """A typing error in a path is the commonest mistake of all."""
    source = SourceConfig(name="s", kind="jsonl", paths=[str(corpus / "aa.jsonl")])
    with pytest.raises(ValueError, match=r"aa\.jsonl does not exist .*did you mean .*/a\.jsonl"):
        resolve_paths(source, source.paths)
    source = SourceConfig(name="s", kind="jsonl", paths=[str(corpus / "texts")])
    with pytest.raises(ValueError, match=r"folder .*texts holds no \.jsonl .* for kind=jsonl"):
        resolve_paths(source, source.paths)
    source = SourceConfig(name="s", kind="jsonl", paths=[str(corpus / "*.nothing")])
    with pytest.raises(ValueError, match=r"\*\.nothing does not exist"):
        resolve_paths(source, source.paths)


def test_hub_without_network() -> None:
    """The library's own message does not say what to do instead."""
    source = SourceConfig(name="s", kind="hub", paths=["nobody/nothing-here"])
    with pytest.raises(ValueError, match=r"nobody/nothing-here .* could not be read from the Hub .* data=embedded"):
        list(reader_of(source))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b", "paths": ["x"]}, r"name='a/b' must be a word"),
        (
            {"name": "a", "paths": ["x"], "weight": -1},
            r"sources\[a\]\.weight=-1\.0 must be a number of 0 or more",
        ),
        ({"name": "a", "paths": ["x"], "weight": float("nan")}, r"sources\[a\]\.weight=nan must be"),
        ({"name": "a"}, r"sources\[a\]\.paths is empty but kind=text"),
        (
            {"name": "a", "paths": ["x"], "validation_fraction": 1},
            r"validation_fraction=1\.0 must be in 0\.\.1",
        ),
        ({"name": "a", "paths": ["x"], "text_field": "t"}, r"text_field=t means nothing for kind=text"),
        ({"name": "a", "paths": ["x"], "max_megabytes": 0}, r"max_megabytes=0\.0 must be above 0"),
        (
            {"name": "code", "kind": "embedded", "streaming": True},
            r"streaming=True means nothing for kind=embedded",
        ),
        ({"name": "cobol", "kind": "embedded"}, r"name=cobol is not a domain .* choose from code, "),
        ({"name": "a", "kind": "hub", "paths": ["x", "y"]}, r"must be one data set name"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    """Refused when the options are made, with the name, the value and what would do."""
    with pytest.raises(ValueError, match=message):
        SourceConfig(**options)


def test_content_hash_follows_files_and_options(corpus: Path) -> None:
    """A cache that survives a changed file, or that a moved clock invalidates."""
    source = source_of("jsonl", corpus)
    paths = resolve_paths(source, source.paths)
    before = describe_content(source, paths)
    assert before == describe_content(source, paths)
    assert before != describe_content(source_of("jsonl", corpus, text_field="number"), paths)
    (corpus / "a.jsonl").write_text('{"text": "another"}\n')
    assert before != describe_content(source, paths)


SHIPPED = ["code", "prose", "reference", "legal", "markdown", "headers"]


@pytest.mark.parametrize("domain", SHIPPED)
def test_embedded_domains_exist_and_repeat_nothing(domain: str) -> None:
    """The default data must work on any machine; a text twice could be trained on and validated on."""
    documents = embedded.collect(domain, 1.0)
    assert sum(map(len, documents)) > 100_000
    assert len(documents) >= 10
    assert len({embedded.essence(document) for document in documents}) == len(documents)
    assert documents == embedded.collect(domain, 1.0)
    assert all("\x00" not in document and document.strip() for document in documents)


def test_embedded_code_has_no_docstrings_and_prose_no_code() -> None:
    """Two domains that share their text would make the router's specialization a sham."""
    module = '"""Top of it."""\n\ndef f():\n    """Says what."""\n    return """kept"""\n'
    assert embedded.code_of(module) == '\ndef f():\n    return """kept"""\n'
    long = "word " * 20
    assert embedded.prose_of(f'"""{long}\n\n    indented\n    """\nx = 1\n').startswith(long.strip())


def test_embedded_domain_with_too_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without its test suite must not train on nothing."""
    described, _, extract = embedded.DOMAINS["tests"]
    monkeypatch.setitem(embedded.DOMAINS, "tests", (described, list, extract))
    with pytest.raises(ValueError, match=r"source 'tests': this machine has 0 bytes .* or choose from code, prose"):
        embedded.collect("tests")

"""Documents from files, folders, the Hugging Face Hub or this machine's Python; which are held out."""

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from moe_data import embedded


class SourceKind(StrEnum):
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"
    tokens = "tokens"


class TextUnit(StrEnum):
    file = "file"
    paragraph = "paragraph"
    line = "line"


SUFFIXES = {
    SourceKind.text: (".txt", ".md", ".text"),
    SourceKind.jsonl: (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    SourceKind.parquet: (".parquet",),
    SourceKind.arrow: (".arrow",),
    SourceKind.tokens: (".idx",),
}
"""Files that a folder stands for."""

BUILDERS = {
    SourceKind.text: "text",
    SourceKind.jsonl: "json",
    SourceKind.parquet: "parquet",
    SourceKind.arrow: "arrow",
}
"""Builders of the `datasets` library."""

ONLY_FOR: dict[str, set[SourceKind]] = {
    "paths": {kind for kind in SourceKind if kind is not SourceKind.embedded},
    "validation_paths": set(BUILDERS) | {SourceKind.tokens},
    "text_field": {SourceKind.jsonl, SourceKind.parquet, SourceKind.arrow, SourceKind.hub},
    "unit": {SourceKind.text},
    "split": {SourceKind.hub},
    "validation_split": {SourceKind.hub},
    "subset": {SourceKind.hub},
    "revision": {SourceKind.hub},
    "streaming": set(BUILDERS) | {SourceKind.hub},
    "max_megabytes": {kind for kind in SourceKind if kind is not SourceKind.tokens},
}
"""Options that only some kinds read: set for another they would be ignored, so they are refused."""


@dataclass(kw_only=True)
class SourceConfig:
    name: str
    """Domain in metrics and messages; kind=embedded: which domain (embedded.DOMAINS lists them)."""
    kind: SourceKind = SourceKind.text
    """Where the documents come from."""
    weight: float = 1.0
    """Share of the training samples, relative to the other sources; 0 only validates on it."""
    paths: list[str] = field(default_factory=list)
    """Files, folders or globs; hub: one data set name; tokens: prefixes of .bin/.idx pairs."""
    text_field: str = "text"
    """jsonl, parquet, arrow, hub: the column that holds the text."""
    unit: TextUnit = TextUnit.file
    """text: what is one document, a whole file, a paragraph (blank line after it) or a line."""
    split: str = "train"
    """hub: the split to train on."""
    subset: str | None = None
    """hub: name of the data set's configuration, if it has several."""
    revision: str | None = None
    """hub: branch, tag or commit to pin."""
    streaming: bool = False
    """Tokenize while training, in file order, instead of once into shards: for data larger than the disk."""
    validation_paths: list[str] = field(default_factory=list)
    """Held-out files; when empty, validation_fraction decides."""
    validation_split: str | None = None
    """hub: the held-out split; when not set, validation_fraction decides."""
    validation_fraction: float = 0.01
    """Held-out share of the documents, by a hash of their text (tokens: the last ones); 0 for none."""
    max_megabytes: float | None = None
    """Take no more text than this, in units of 10^6 bytes of UTF-8; no limit when not set."""

    def __post_init__(self) -> None:
        where = f"data.sources[{self.name}]"
        if not self.name or "/" in self.name:
            raise ValueError(f"data.sources: name={self.name!r} must be a word without '/': it names metrics")
        if not self.weight >= 0 or self.weight == float("inf"):
            raise ValueError(f"{where}.weight={self.weight} must be a number of 0 or more; 0 only validates")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"{where}.validation_fraction={self.validation_fraction} must be in 0..1, below 1; 0.01 is usual"
            )
        if self.max_megabytes is not None and not self.max_megabytes > 0:
            raise ValueError(f"{where}.max_megabytes={self.max_megabytes} must be above 0, or null for no limit")
        self._refuse_meaningless(where)
        if self.kind is SourceKind.embedded:
            embedded.check_domain(self.name)
        elif not self.paths:
            raise ValueError(
                f"{where}.paths is empty but kind={self.kind.value} reads from paths; set it, or use "
                "data=embedded, which needs no files"
            )
        if self.kind is SourceKind.hub and len(self.paths) != 1:
            raise ValueError(
                f"{where}.paths={self.paths} must be one data set name for kind=hub; make a source for each data set"
            )

    def _refuse_meaningless(self, where: str) -> None:
        defaults: dict[str, Any] = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)
        }
        for name, kinds in ONLY_FOR.items():
            value = getattr(self, name)
            if value != defaults[name] and self.kind not in kinds:
                raise ValueError(
                    f"{where}.{name}={value} means nothing for kind={self.kind.value}, only for "
                    f"{', '.join(sorted(kind.value for kind in kinds))}; remove it or change the kind"
                )


class Document(NamedTuple):
    text: str
    file: str
    row: int


def resolve_paths(source: SourceConfig, paths: Iterable[str]) -> list[str]:
    """Files that the paths stand for, each once: in the given order, sorted within folders and globs.

    For kind=tokens the results are prefixes. Addresses (with `://`) and Hub names pass through.
    Raises:
        ValueError: a path matches nothing; the message has the nearest names.
    """
    if source.kind in (SourceKind.embedded, SourceKind.hub):
        return list(paths)
    found: dict[str, None] = {}
    for path in paths:
        path = os.path.expanduser(path)
        if source.kind is SourceKind.tokens:
            path = path.removesuffix(".bin").removesuffix(".idx")
            found.update(dict.fromkeys(file.removesuffix(".idx") for file in _match(source, path, ".idx")))
        else:
            found.update(dict.fromkeys(_match(source, path, "")))
    return list(found)


def _match(source: SourceConfig, path: str, end: str) -> list[str]:
    if "://" in path or os.path.isfile(path + end):
        return [path + end]
    if os.path.isdir(path):
        suffixes = SUFFIXES[source.kind]
        files = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and p.name.endswith(suffixes))
        if files:
            return files
        raise ValueError(
            f"data.sources[{source.name}].paths: folder {path} holds no {' '.join(suffixes)} file for "
            f"kind={source.kind.value}; give a glob such as {path}/*, or change the kind"
        )
    if glob.has_magic(path):
        pattern = path if path.endswith(end) else path + end
        files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
        if files:
            return files
    raise ValueError(
        f"data.sources[{source.name}].paths: {path + end} does not exist (working folder: "
        f"{os.getcwd()}){_nearest(path)}"
    )


def _nearest(path: str) -> str:
    """What was probably meant: like-named neighbors in the deepest folder of `path` that exists."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    names = sorted(os.listdir(missing.parent)) if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    folder = f"{missing.parent} holds {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}"
    return f"; did you mean {' or '.join(str(missing.parent / n) for n in close)}?" if close else f"; {folder}"


class DocumentReader:
    """One pass over the documents of a source, in order, from any saved place.

    Args:
        source: the options.
        paths: from resolve_paths, of the training or of the validation files.
        split: hub: which split.
    Raises (on iteration):
        ValueError: a row is not text: the message names the file, the row and the remedy.
    """

    def __init__(self, source: SourceConfig, paths: list[str], split: str | None = None) -> None:
        self._source = source
        self._paths = [source.name] if source.kind is SourceKind.embedded else paths
        self._split = split or source.split
        self._file = 0
        self._row = 0
        self._rows: Any = None
        self._resume: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Place of the next document; plain values for JSON. Too dear to ask after each document."""
        inner = self._rows.state_dict() if hasattr(self._rows, "state_dict") else self._resume
        return {"file": self._file, "row": self._row, "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._file, self._row, self._resume = state["file"], state["row"], state["inner"]

    def __iter__(self) -> Iterator[Document]:
        while self._file < len(self._paths):
            path = self._paths[self._file]
            self._rows = self._open(path)
            rows = iter(self._rows)
            while (row := self._next_row(rows, path)) is not None:
                text = self._text_of(row, path)
                self._row += 1
                if text:
                    yield Document(text, path, self._row - 1)
            self._file, self._row, self._rows, self._resume = self._file + 1, 0, None, None

    def _next_row(self, rows: Iterator[dict[str, Any]], path: str) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:  # pyarrow, datasets, OS and decoding errors: all mean that this file is not as told
            raise ValueError(self._explain(path, error)) from error

    def _open(self, path: str) -> Any:
        """Rows of one file from self._row on, by the library's own state where there is one: it is faster."""
        source = self._source
        if source.kind is SourceKind.embedded:
            texts = embedded.collect(source.name, source.max_megabytes)
            return [{"text": text} for text in texts[self._row :]]
        import datasets

        try:
            if source.kind is SourceKind.hub:
                rows = datasets.load_dataset(
                    path,
                    source.subset,
                    split=self._split,
                    revision=source.revision,
                    streaming=source.streaming,
                )
                if not source.streaming:
                    return rows.skip(self._row)
            else:
                options = {"sample_by": "document" if source.unit is TextUnit.file else source.unit.value}
                rows = datasets.load_dataset(
                    BUILDERS[source.kind],
                    data_files=[path],
                    split="train",
                    streaming=True,
                    **(options if source.kind is SourceKind.text else {}),
                )
        except Exception as error:
            raise ValueError(self._explain(path, error)) from error
        if self._resume is not None:
            rows.load_state_dict(self._resume)
            return rows
        return rows.skip(self._row) if self._row else rows

    def _text_of(self, row: dict[str, Any], path: str) -> str:
        field_name = self._source.text_field
        where = f"source '{self._source.name}': {path} row {self._row}"
        if field_name not in row:
            raise ValueError(
                f"{where} has no field '{field_name}', it has {', '.join(sorted(row))}; set "
                f"data.sources[{self._source.name}].text_field"
            )
        text = row[field_name]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: field '{field_name}' holds {type(text).__name__} {str(text)[:40]!r} and not text; "
                "correct or remove the row, or choose another text_field"
            )
        if self._source.kind is SourceKind.text and "\x00" in text:
            raise ValueError(f"{where} is binary (it holds a zero byte); take it out of the paths")
        return text

    def _explain(self, path: str, error: Exception) -> str:
        source = self._source
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if source.kind is SourceKind.hub:
            return (
                f"source '{source.name}': data set {path} (split {self._split}) could not be read from the "
                f"Hub ({said}); check the name, subset and split, and that this machine has a network; "
                "without one use a local copy with kind=parquet, or data=embedded"
            )
        if isinstance(error, UnicodeDecodeError):
            return (
                f"source '{source.name}': {path} row {self._row} is not UTF-8 text: byte "
                f"{error.object[error.start]:#04x} at {error.start:,}; convert it (iconv -t utf-8) or take "
                "it out of the paths"
            )
        if source.kind is SourceKind.jsonl and path.endswith((".jsonl", ".json")):
            row, reason = find_bad_json(path)
            if row is not None:
                return f"source '{source.name}': {path} row {row} is not JSON: {reason}; correct or remove it"
        return (
            f"source '{source.name}': {path}, after row {self._row}, could not be read as "
            f"{source.kind.value} ({said}); check the file, or change the kind"
        )


def find_bad_json(path: str) -> tuple[int | None, str]:
    """First line that is not a JSON object, counted from 0, and why; (None, "") if every line is one."""
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return row, f"a {type(json.loads(line)).__name__} and not an object"
            except ValueError as error:  # includes invalid UTF-8
                return row, str(error)
    return None, ""


def text_hash(text: str) -> int:
    """64-bit hash of a document, the same on every machine: what decides whether it is held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def held_out_below(fraction: float) -> int:
    """Documents whose text_hash is below this are held out."""
    return int(fraction * 2**64)


def describe_content(source: SourceConfig, paths: list[str]) -> str:
    """Hash of the options that decide the documents, and of the names, sizes and times of the files.

    It keys caches: changed files give another one. Hub data is as old as its options say: pin `revision`.
    """
    listing: list[Any] = []
    if source.kind is SourceKind.embedded:
        listing = embedded.listing(source.name)
    else:
        for path in paths:
            if os.path.isfile(path):
                status = os.stat(path)
                listing.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
            else:
                listing.append([path])
    deciding = ["kind", "text_field", "unit", "split", "subset", "revision", "max_megabytes"]
    deciding += ["validation_split", "validation_fraction"]
    options = {name: getattr(source, name) for name in deciding}
    return hashlib.sha256(json.dumps([options, listing], sort_keys=True).encode()).hexdigest()

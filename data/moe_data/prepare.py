"""Sources + tokenizer -> token stores, tokenized once into cached shards and shared by all ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moe_data.cache import build_once, explain_full_disk, replaced
from moe_data.shards import Shard, ShardWriter, StoreRange, TokenStore
from moe_data.sources import (
    Document,
    DocumentReader,
    SourceConfig,
    SourceKind,
    describe_content,
    held_out_below,
    resolve_paths,
    text_hash,
)
from moe_data.tokenizers import Tokenizer, TokenizerConfig, train_bpe

log = logging.getLogger(__name__)

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22
"""Work handed to the tokenizer's threads at once; bounds memory."""

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class PreparedSource:
    """Tokens of one source; `train` is None when it streams, `validation` when nothing is held out."""

    config: SourceConfig
    train: TokenStore | None
    validation: TokenStore | None


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each document, int32, closed by the end-of-document token; in order."""
    end = np.array([tokenizer.end_of_document], dtype=np.int32)
    iterator = iter(documents)
    while texts := take_batch(iterator):
        for ids in tokenizer.encode_batch(texts):
            yield np.concatenate((ids, end))


def take_batch(documents: Iterator[Document]) -> list[str]:
    texts: list[str] = []
    size = 0
    for document in islice(documents, BATCH_DOCUMENTS):
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            break
    return texts


def limited(documents: Iterable[Document], max_megabytes: float | None) -> Iterator[Document]:
    """Documents until their UTF-8 text passes the limit."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode(errors="surrogatepass"))
        if max_megabytes is not None and size >= max_megabytes * 1e6:
            return


def training_documents(source: SourceConfig) -> Iterator[Document]:
    """One pass over the documents to train on."""
    reader = DocumentReader(source, resolve_paths(source, source.paths))
    documents = limited(reader, source.max_megabytes)
    if source.validation_paths or source.validation_split or not source.validation_fraction:
        return documents
    threshold = held_out_below(source.validation_fraction)
    return (document for document in documents if text_hash(document.text) >= threshold)


def validation_documents(source: SourceConfig) -> Iterator[Document] | None:
    """Documents of the files or split named for validation; None if a hash of the text decides."""
    if source.validation_paths:
        return iter(DocumentReader(source, resolve_paths(source, source.validation_paths)))
    if source.validation_split:
        return iter(DocumentReader(source, source.paths, source.validation_split))
    return None


def prepare_source(
    source: SourceConfig, tokenizer: Tokenizer, cache_dir: str | Path, validation_tokens: int
) -> PreparedSource:
    """Tokens of a source, from the cache if it has them. Any number of processes may ask at once: one builds.

    Args:
        validation_tokens: streaming sources hold out no more than this, for they cannot be read to the end.
    Raises:
        ValueError: bad input, by file and row; or a source without documents.
        OSError: no space left.
    """
    if source.kind is SourceKind.tokens:
        return open_shards(source, tokenizer)
    paths = resolve_paths(source, source.paths)
    content = [describe_content(source, paths), tokenizer.fingerprint, "format 1"]
    if source.validation_paths:
        content.append(describe_content(source, resolve_paths(source, source.validation_paths)))
    if source.streaming:
        content.append(f"streaming {validation_tokens}")
    name = f"{source.name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    final = Path(cache_dir) / name
    build_once(final, lambda folder: build(folder, source, tokenizer, validation_tokens))
    return PreparedSource(
        config=source,
        train=None if source.streaming else Shard(final / "train"),
        validation=Shard(final / "validation") if (final / "validation.idx").exists() else None,
    )


def build(folder: Path, source: SourceConfig, tokenizer: Tokenizer, validation_tokens: int) -> None:
    """Write `train` and `validation` shards of one source into a folder."""
    apart = validation_documents(source)
    if apart is not None:
        limit = validation_tokens if source.streaming else None
        counted = write_shard(folder / "validation", tokenize(apart, tokenizer), tokenizer, source.name, limit)
        refuse_empty(source, "validation", counted)
        if not source.streaming:
            counted = write_shard(
                folder / "train", tokenize(training_documents(source), tokenizer), tokenizer, source.name
            )
            refuse_empty(source, "training", counted)
    elif source.streaming:
        if source.validation_fraction and validation_tokens:
            build_stream_validation(folder, source, tokenizer, validation_tokens)
    else:
        build_by_hash(folder, source, tokenizer)


def refuse_empty(source: SourceConfig, part: str, documents: int) -> None:
    if documents == 0:
        paths = source.validation_paths if part == "validation" and source.validation_paths else source.paths
        raise ValueError(
            f"source '{source.name}' has no {part} document: {', '.join(paths) or 'it'} holds no text; check "
            f"data.sources[{source.name}].paths and text_field, or remove the source"
        )


def build_by_hash(folder: Path, source: SourceConfig, tokenizer: Tokenizer) -> None:
    """One pass that sends each document to one of two shards by the hash of its text.

    Of few documents a small fraction may hold out none. Then a second pass holds out the one of least hash,
    which is what a slightly larger fraction would have chosen.
    """
    threshold = held_out_below(source.validation_fraction)
    for _ in range(2):
        least, total, held = 2**64, 0, 0
        reader = DocumentReader(source, resolve_paths(source, source.paths))
        progress = Progress(source.name)
        with (
            ShardWriter(folder / "train", tokenizer.vocab_size) as train,
            ShardWriter(folder / "validation", tokenizer.vocab_size) as validation,
        ):
            documents, hashes = tee_hash(limited(reader, source.max_megabytes))
            for ids, value in zip(tokenize(documents, tokenizer), hashes):
                (validation if value < threshold else train).add(ids)
                least, total, held = min(least, value), total + 1, held + (value < threshold)
                progress.add(len(ids))
        refuse_empty(source, "training", total)
        if held or not source.validation_fraction:
            break
        threshold = least + 1
    if held == total:
        raise ValueError(
            f"source '{source.name}' has {total} document(s), all held out by "
            f"data.sources[{source.name}].validation_fraction={source.validation_fraction}: nothing is left "
            "to train on; set validation_fraction=0 or validation_paths, or for kind=text unit=paragraph"
        )
    progress.done()
    for part, writer in (("train", train), ("validation", validation)):
        write_info(folder / part, writer, tokenizer, source.name)
    if not held:
        for end in (".bin", ".idx", ".json"):
            (folder / f"validation{end}").unlink()


def tee_hash(documents: Iterable[Document]) -> tuple[Iterator[Document], Iterator[int]]:
    """The documents, and their hashes in the same order: two iterators, because tokenize() reads ahead."""
    hashes: deque[int] = deque()

    def watched() -> Iterator[Document]:
        for document in documents:
            hashes.append(text_hash(document.text))
            yield document

    def drained() -> Iterator[int]:
        while True:
            yield hashes.popleft()

    return watched(), drained()


def build_stream_validation(folder: Path, source: SourceConfig, tokenizer: Tokenizer, tokens: int) -> None:
    """The first held-out documents of a stream; training leaves out every document that the hash picks."""
    threshold = held_out_below(source.validation_fraction)
    reader = limited(DocumentReader(source, resolve_paths(source, source.paths)), source.max_megabytes)
    held = (document for document in reader if text_hash(document.text) < threshold)
    found = write_shard(folder / "validation", tokenize(held, tokenizer), tokenizer, source.name, tokens)
    if not found:
        raise ValueError(
            f"source '{source.name}': validation_fraction={source.validation_fraction} holds out none of its "
            f"documents; raise data.sources[{source.name}].validation_fraction, or set it to 0"
        )


def write_shard(
    prefix: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer, name: str, limit: int | None = None
) -> int:
    """Write a shard and its description, to the document that reaches the limit; returns their number."""
    progress = Progress(name)
    with ShardWriter(prefix, tokenizer.vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
            progress.add(len(ids))
            if limit is not None and writer.num_tokens >= limit:
                break
    progress.done()
    write_info(prefix, writer, tokenizer, name)
    return len(writer.lengths)


def write_info(prefix: Path, writer: ShardWriter, tokenizer: Tokenizer, name: str) -> None:
    """`<prefix>.json` beside a shard: with which tokenizer it was made, and a hash to quote in reports."""
    info = {
        "source": name,
        "documents": len(writer.lengths),
        "tokens": writer.num_tokens,
        "sha256": writer.sha256.hexdigest(),
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
    }
    with explain_full_disk(prefix), replaced(Path(f"{prefix}.json")) as file:
        file.write_text(json.dumps(info, indent=2) + "\n")


class Progress:
    """A log line now and then while a source is tokenized."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._said = time.monotonic()
        self._documents = self._tokens = 0

    def add(self, tokens: int) -> None:
        self._documents += 1
        self._tokens += tokens
        if time.monotonic() - self._said > PROGRESS_SECONDS:
            self._said = time.monotonic()
            self._say("tokenizing")

    def done(self) -> None:
        self._say("tokenized")

    def _say(self, verb: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        log.info(
            "data: %s source '%s': %s documents, %s tokens, %.2f M tokens/s",
            verb,
            self._name,
            f"{self._documents:,}",
            f"{self._tokens:,}",
            self._tokens / seconds / 1e6,
        )


def open_shards(source: SourceConfig, tokenizer: Tokenizer) -> PreparedSource:
    """A source that is tokenized already; its last documents are held out unless it names files for that."""
    shards = [open_shard(prefix, tokenizer) for prefix in resolve_paths(source, source.paths)]
    whole = StoreRange(shards)
    if source.validation_paths:
        apart = [open_shard(prefix, tokenizer) for prefix in resolve_paths(source, source.validation_paths)]
        return PreparedSource(config=source, train=whole, validation=StoreRange(apart))
    documents = sum(shard.num_documents for shard in shards)
    held = -int(-source.validation_fraction * documents // 1)
    if not held:
        return PreparedSource(config=source, train=whole, validation=None)
    if held >= documents:
        raise ValueError(
            f"source '{source.name}' has {documents} document(s): with "
            f"data.sources[{source.name}].validation_fraction={source.validation_fraction} nothing is left "
            "to train on; set it to 0"
        )
    border = whole.num_tokens
    for shard in reversed(shards):
        taken = min(held, shard.num_documents)
        held -= taken
        border -= shard.num_tokens - shard.start(shard.num_documents - taken)
    return PreparedSource(config=source, train=StoreRange(shards, 0, border), validation=StoreRange(shards, border))


def open_shard(prefix: str, tokenizer: Tokenizer) -> Shard:
    """A shard made elsewhere; if it has a description, its tokenizer must be this one."""
    info_path = Path(f"{prefix}.json")
    if info_path.is_file():
        try:
            info = json.loads(info_path.read_text())
        except ValueError as error:
            raise ValueError(f"corrupt description {info_path}: {error}; write the shard again") from error
        if info.get("tokenizer_fingerprint") != tokenizer.fingerprint:
            raise ValueError(
                f"shard {prefix} was made with tokenizer {info.get('tokenizer')} (fingerprint "
                f"{str(info.get('tokenizer_fingerprint'))[:12]}), this run has {tokenizer.name} "
                f"({tokenizer.fingerprint[:12]}); choose that tokenizer, or tokenize again with "
                "scripts/prepare_data.py"
            )
    return Shard(prefix, end_of_document=tokenizer.end_of_document)


def bpe_trainer(sources: Sequence[SourceConfig], cache_dir: str | Path) -> Callable[[TokenizerConfig], Path]:
    """What `build_tokenizer` asks for: learns from these sources, or finds what it learned before."""

    def train(config: TokenizerConfig) -> Path:
        import tokenizers

        vocab_size = config.vocab_size
        assert vocab_size is not None
        for source in sources:
            if source.kind is SourceKind.tokens:
                raise ValueError(
                    f"source '{source.name}' is tokenized already, tokenizer.kind=bpe would learn another "
                    "vocabulary; set tokenizer.kind=file with the tokenizer that made it"
                )
        shares = [(source, bpe_share(source, sources, config.train_megabytes)) for source in sources]
        content = [[describe_content(source, resolve_paths(source, source.paths)), share] for source, share in shares]
        decides = json.dumps([content, config.vocab_size, tokenizers.__version__])
        name = f"bpe-{config.vocab_size}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

        def learn(folder: Path) -> None:
            began = time.monotonic()
            texts = (
                document.text
                for source, share in shares
                if share
                for document in limited(training_documents(source), share)
            )
            train_bpe(texts, vocab_size).save(str(folder / "tokenizer.json"))
            log.info("data: learned a BPE of %d entries in %.1f s", vocab_size, time.monotonic() - began)

        build_once(Path(cache_dir) / name, learn)
        return Path(cache_dir) / name / "tokenizer.json"

    return train


def bpe_share(source: SourceConfig, sources: Sequence[SourceConfig], train_megabytes: float) -> float:
    """Megabytes of a source to learn from: by weight, so that frequent domains get short encodings."""
    return train_megabytes * source.weight / sum(s.weight for s in sources)

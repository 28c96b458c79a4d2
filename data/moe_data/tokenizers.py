"""Text <-> token ids: bytes, a tokenizer file or folder, or a byte-level BPE learned from the sources."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic.dataclasses import dataclass

END_OF_DOCUMENT = "<|endoftext|>"
"""Text of the end-of-document token in tokenizers that this module trains."""

KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
)
"""Tried in this order when a tokenizer.json does not say which token ends a document."""


class TokenizerKind(StrEnum):
    bytes = "bytes"
    file = "file"
    bpe = "bpe"


@dataclass(kw_only=True)
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.bytes
    """bytes: 256 bytes and an end; file: an existing tokenizer; bpe: learned from the run's sources."""
    path: str | None = None
    """file: a tokenizer.json, a folder with one, or a name on the Hugging Face Hub."""
    vocab_size: int | None = None
    """bpe: entries to learn, end of document included; else a check: must equal the tokenizer's own."""
    end_of_document: str | None = None
    """file: text of the token that ends a document; by default the tokenizer's end of sequence."""
    train_megabytes: float = 64.0
    """bpe: text to learn from, shared out among the sources by weight."""

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.file and not self.path:
            raise ValueError(
                "tokenizer.path is not set but tokenizer.kind=file needs a tokenizer.json, a folder or a "
                "Hub name; set tokenizer.path, or choose tokenizer=bytes"
            )
        if self.kind is not TokenizerKind.file and (self.path or self.end_of_document):
            raise ValueError(
                f"tokenizer.path={self.path} and tokenizer.end_of_document={self.end_of_document} belong to "
                f"tokenizer.kind=file, this is tokenizer.kind={self.kind.value}; remove them or choose "
                "tokenizer=file"
            )
        if self.kind is TokenizerKind.bpe and (self.vocab_size is None or self.vocab_size < 257):
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least 257 for tokenizer.kind=bpe: 256 "
                "bytes and the end of document come before the first merge; 4096 suits a small model"
            )
        if self.train_megabytes <= 0:
            raise ValueError(f"tokenizer.train_megabytes={self.train_megabytes} must be above 0; 64 is usual")


class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer. No method adds special tokens."""

    name: str
    """For people: logs and messages."""
    fingerprint: str
    """Hex hash of all that decides the ids; shards made under another fingerprint are not reused."""
    vocab_size: int
    """One more than the largest id."""
    end_of_document: int
    """Id that closes every document."""

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32 [n]. The text of a special token is ordinary text: data cannot forge a boundary."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on several threads where the library has them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; invalid UTF-8 becomes the replacement character."""
        ...


class BytesTokenizer:
    """UTF-8 bytes 0..255, and 256 as end of document."""

    name = "bytes"
    fingerprint = hashlib.sha256(b"bytes-257").hexdigest()
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library (tokenizer.json)."""

    def __init__(self, inner: Any, name: str, end_of_document: str | None = None) -> None:
        inner.encode_special_tokens = True
        # A file may carry the truncation or padding of its last user: both would lose or invent tokens.
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.name = name
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        special = sorted(token.content for token in inner.get_added_tokens_decoder().values() if token.special)
        self.end_of_document = find_end_of_document(vocabulary, special, end_of_document, name)
        self.fingerprint = fingerprint_of(inner.to_str(), self.end_of_document)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The fast form leaves out character offsets, which nobody reads here.
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


class TransformersTokenizer:
    """A tokenizer that only `transformers` can load (no tokenizer.json behind it)."""

    def __init__(self, inner: Any, name: str, end_of_document: str | None = None) -> None:
        self.inner = inner
        self.name = name
        vocabulary = inner.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        wanted = end_of_document or inner.eos_token
        self.end_of_document = find_end_of_document(vocabulary, sorted(inner.all_special_tokens), wanted, name)
        self.fingerprint = fingerprint_of(
            type(inner).__name__ + json.dumps(vocabulary, sort_keys=True), self.end_of_document
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self.inner(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [np.asarray(ids, dtype=np.int32) for ids in rows["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


def fingerprint_of(content: str, end_of_document: int) -> str:
    return hashlib.sha256(f"{end_of_document}\n{content}".encode()).hexdigest()


def find_end_of_document(vocabulary: dict[str, int], special: Sequence[str], wanted: str | None, name: str) -> int:
    """Id of the token that ends a document: the wanted one, else the first of KNOWN_ENDS that exists."""
    for token in (wanted,) if wanted else KNOWN_ENDS:
        if token in vocabulary:
            return vocabulary[token]
    asked = f"{wanted!r}" if wanted else f"none of {', '.join(KNOWN_ENDS)}"
    raise ValueError(
        f"tokenizer {name} has no end-of-document token: {asked} {'is not' if wanted else 'is'} in its "
        f"vocabulary of {len(vocabulary):,}; set tokenizer.end_of_document to one of its special tokens: "
        f"{', '.join(special[:20]) or '(it has none: add one to the tokenizer)'}"
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE over `texts`; the same texts in the same order give the same tokenizer, byte for byte.

    Returns:
        A `tokenizers.Tokenizer`; id 0 is END_OF_DOCUMENT, 1..256 the bytes, then merges by frequency.
    Raises:
        ValueError: the texts hold too few different pairs for `vocab_size` entries.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} but the sources have text for {library.get_vocab_size()} "
            f"entries only; set tokenizer.vocab_size={library.get_vocab_size()} or less, or give more text"
        )
    return library


def load_tokenizer_file(path: str, end_of_document: str | None = None) -> Tokenizer:
    """A tokenizer.json, a folder, or a Hub name; code that comes with a tokenizer is never run."""
    from tokenizers import Tokenizer as Library

    file = Path(path)
    if file.is_dir() and (file / "tokenizer.json").is_file() and not (file / "tokenizer_config.json").is_file():
        file = file / "tokenizer.json"
    if file.is_file():
        try:
            library = Library.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(
                f"tokenizer.path={path} is not a tokenizer.json of the `tokenizers` library: {error}"
            ) from error
        return LibraryTokenizer(library, path, end_of_document)
    if not file.exists() and (path.count("/") > 1 or path.startswith((".", "/", "~")) or path.endswith(".json")):
        raise ValueError(
            f"tokenizer.path={path} does not exist (working folder: {os.getcwd()}); give a tokenizer.json, a "
            "folder or a Hub name such as openai-community/gpt2"
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # missing network, missing repository, missing files: one remedy
        raise ValueError(
            f"tokenizer.path={path} could not be loaded by transformers.AutoTokenizer "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); check "
            "the name, or without a network give a local folder or tokenizer.json"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is not None:
        return LibraryTokenizer(backend, path, end_of_document or loaded.eos_token)
    return TransformersTokenizer(loaded, path, end_of_document)


def build_tokenizer(config: TokenizerConfig, train: Callable[[TokenizerConfig], Path] | None = None) -> Tokenizer:
    """The run's tokenizer.

    Args:
        config: the options.
        train: kind=bpe: gives the tokenizer.json learned from the run's sources, from its cache if it can
            (`prepare.bpe_trainer` makes one); None where there are no sources.
    """
    tokenizer: Tokenizer
    if config.kind is TokenizerKind.bytes:
        tokenizer = BytesTokenizer()
    elif config.kind is TokenizerKind.file:
        assert config.path is not None
        tokenizer = load_tokenizer_file(config.path, config.end_of_document)
    else:
        if train is None:
            raise ValueError(
                "tokenizer.kind=bpe learns from the run's sources and there are none here; train one with "
                "scripts/train_tokenizer.py and set tokenizer.kind=file, tokenizer.path=<tokenizer.json>"
            )
        tokenizer = load_tokenizer_file(str(train(config)), END_OF_DOCUMENT)
        tokenizer.name = f"bpe-{config.vocab_size}"
    if config.vocab_size is not None and config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} but tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} entries; remove tokenizer.vocab_size or make them equal"
        )
    return tokenizer

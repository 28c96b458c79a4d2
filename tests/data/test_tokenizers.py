"""Tokenizers: any text comes back, data cannot forge a boundary, learning is deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_data.tokenizers import (
    END_OF_DOCUMENT,
    BytesTokenizer,
    LibraryTokenizer,
    Tokenizer,
    TokenizerConfig,
    TokenizerKind,
    build_tokenizer,
    load_tokenizer_file,
    train_bpe,
)

TEXTS = [f"def f{i}(x):\n    return x + {i}  # {'naïve ' * (i % 5)}\n" for i in range(200)]


@pytest.fixture(scope="module")
def bpe() -> LibraryTokenizer:
    return LibraryTokenizer(train_bpe(TEXTS, 300), "bpe")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: LibraryTokenizer) -> Tokenizer:
    return BytesTokenizer() if request.param == "bytes" else bpe


@given(text=st.text())
def test_round_trip_of_any_text(bpe: LibraryTokenizer, text: str) -> None:
    """A normalizer, a prefix space or an unknown token would change the text on the way."""
    for tokenizer in (BytesTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32
        assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    """Padding or truncation in the batched form adds or loses tokens."""
    texts = [*TEXTS[:20], "", "x" * 5000]
    for one, row in zip(map(tokenizer.encode, texts), tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(one, row)


def test_text_of_the_end_token_is_ordinary_text(tokenizer: Tokenizer) -> None:
    """A web page that quotes <|endoftext|> must not end its document, and must come back whole."""
    text = f"before {END_OF_DOCUMENT} after"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids.tolist()
    assert tokenizer.decode(ids) == text


def test_decode_leaves_out_the_end_and_survives_broken_utf8(tokenizer: Tokenizer) -> None:
    """Samples of an untrained model are arbitrary ids."""
    assert tokenizer.decode([*tokenizer.encode("hi"), tokenizer.end_of_document]) == "hi"
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)


def test_learning_is_deterministic_and_of_the_asked_size(bpe: LibraryTokenizer) -> None:
    """Ties between pairs broken by the order of a hash table would give each run another tokenizer."""
    again = LibraryTokenizer(train_bpe(TEXTS, 300), "again")
    assert again.fingerprint == bpe.fingerprint
    assert again.vocab_size == 300
    other = LibraryTokenizer(train_bpe(TEXTS[:100], 300), "other")
    assert other.fingerprint != bpe.fingerprint


def test_too_little_text_for_the_vocabulary() -> None:
    """A smaller vocabulary than asked would silently change the model's size."""
    with pytest.raises(ValueError, match=r"vocab_size=5000 but .* for \d+ entries only; set tokenizer\.vocab_size="):
        train_bpe(TEXTS, 5000)


def test_file_and_folder_load_alike(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    """A reloaded tokenizer must be the same one, by its fingerprint too, so that shards are found again."""
    bpe.inner.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer_file(str(path))
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.end_of_document == bpe.end_of_document
    config = TokenizerConfig(kind=TokenizerKind.file, path=str(tmp_path), vocab_size=300)
    assert build_tokenizer(config).vocab_size == 300


def test_folder_through_transformers(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    """A Hugging Face folder decides its own end of sequence, and loads without running its code."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=bpe.inner, eos_token=END_OF_DOCUMENT).save_pretrained(tmp_path)
    loaded = load_tokenizer_file(str(tmp_path))
    assert loaded.end_of_document == bpe.end_of_document
    assert np.array_equal(loaded.encode(TEXTS[3]), bpe.encode(TEXTS[3]))


def test_truncation_in_the_file_is_switched_off(tmp_path: Path) -> None:
    """A tokenizer.json saved with truncation to 8 would cut every document to 8 tokens."""
    library = train_bpe(TEXTS, 300)
    library.enable_truncation(8)
    library.enable_padding(length=16)
    library.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer_file(str(tmp_path / "t.json"))
    assert loaded.decode(loaded.encode("x" * 100)) == "x" * 100
    assert len(loaded.encode_batch(["x"])[0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "file"}, r"tokenizer\.path is not set"),
        ({"kind": "bytes", "path": "x"}, r"tokenizer\.path=x .* belong to tokenizer\.kind=file"),
        ({"kind": "bpe"}, r"tokenizer\.vocab_size=None must be at least 257"),
        ({"kind": "bpe", "vocab_size": 100}, r"tokenizer\.vocab_size=100 must be at least 257"),
        ({"train_megabytes": 0}, r"tokenizer\.train_megabytes=0\.0 must be above 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    """Found when the options are made, not after the data is tokenized."""
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


def test_bad_files(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    """Each names the path and what to do."""
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*/none\.json does not exist"):
        load_tokenizer_file(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer_file(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match=r"nobody/nothing could not be loaded .* without a network give a local"):
        load_tokenizer_file("nobody/nothing")
    text = json.dumps(json.loads(bpe.inner.to_str())).replace(END_OF_DOCUMENT, "<stop>")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"no end-of-document token: none of .* special tokens: <stop>"):
        load_tokenizer_file(str(tmp_path / "t.json"))
    assert load_tokenizer_file(str(tmp_path / "t.json"), "<stop>").end_of_document == 0
    with pytest.raises(ValueError, match=r"'<halt>' is not in its vocabulary"):
        load_tokenizer_file(str(tmp_path / "t.json"), "<halt>")


def test_vocab_size_is_checked_where_it_is_not_chosen() -> None:
    """An option that is set must hold, not be ignored."""
    with pytest.raises(ValueError, match=r"vocab_size=300 but tokenizer bytes has 257 entries"):
        build_tokenizer(TokenizerConfig(vocab_size=300))
    with pytest.raises(ValueError, match=r"scripts/train_tokenizer\.py"):
        build_tokenizer(TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=300))

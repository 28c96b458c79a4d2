"""Tokenizers into and out of Hugging Face folders. Code that comes with a tokenizer is neither run nor copied."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from moe_data.tokenizers import (
    END_OF_DOCUMENT,
    BytesTokenizer,
    LibraryTokenizer,
    Tokenizer,
    TokenizerConfig,
    TokenizerKind,
)

FILE, ABOUT = "tokenizer.json", "tokenizer_config.json"
_FILES = (
    *(FILE, ABOUT, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json"),
)
"""Everything that a tokenizer may be made of; none of them can run anything."""
_VOCABULARIES = (FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
_PROBE = (
    "def f(x):\n\treturn x  ** 2 + 1234567890  # na\u00efve, e\u0301t\u00e9, \u03b1\u03b2, \u4e2d\u6587, "
    "\U0001f600\r\n\n   It's HERE, don't\u00a0you think?"
)


def has_tokenizer(folder: Path) -> bool:
    """A folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer into a folder that exists; where it names code of its own, without that name."""
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / ABOUT).is_file():
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about.pop("auto_map", None) is not None:
            _write_json(folder / ABOUT, about)


def write_tokenizer(folder: Path, config: TokenizerConfig, tokenizer: Tokenizer, max_tokens: int | None) -> None:
    """Put a run's tokenizer into a folder, so that transformers' AutoTokenizer gives the same ids.

    Args:
        tokenizer: what `config` stands for.
        max_tokens: the longest sequence of the model.
    """
    source = Path(config.path or "")
    if config.kind is TokenizerKind.file and not source.exists():  # a name on the Hub, in its cache by now
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(str(config.path), allow_patterns=list(_FILES)))
    if config.kind is TokenizerKind.file and source.is_dir() and (source / ABOUT).is_file():
        copy_tokenizer(source, folder)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if config.end_of_document is not None:
            _write_json(folder / ABOUT, about | {"eos_token": config.end_of_document})
        return
    inner: Any = tokenizer.inner if isinstance(tokenizer, LibraryTokenizer) else _library_of_bytes()
    assert isinstance(tokenizer, LibraryTokenizer | BytesTokenizer)
    inner.save(str(folder / FILE))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": inner.id_to_token(tokenizer.end_of_document),
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / ABOUT, about if max_tokens is None else about | {"model_max_length": max_tokens})


def special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` for the config of a model: its class may have others by default.

    Args:
        folder: with the files of the tokenizer.
    """
    begin = None
    if (folder / ABOUT).is_file() and (folder / FILE).is_file():
        from tokenizers import Tokenizer as Library

        named = json.loads((folder / ABOUT).read_text(encoding="utf-8")).get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        begin = None if named is None else Library.from_file(str(folder / FILE)).token_to_id(named)
    return {"bos_token_id": begin, "eos_token_id": tokenizer.end_of_document}


def loads_otherwise(folder: Path, tokenizer: Tokenizer) -> str | None:
    """What AutoTokenizer does with a written folder, if it is not to give the tokenizer's ids; None if all is well.

    For some model types transformers builds a class of its own around the vocabulary, whatever the file says.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    # The model's own config would have to be run; without one the tokenizer's files decide, as then, too.
    known = {"config": PretrainedConfig()} if _has_code(folder / "config.json") else {}
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **known)
    except Exception as error:  # of whatever class it took; the folder is good all the same
        return f"fails with {type(error).__name__}: {error}"
    ids = loaded(_PROBE, add_special_tokens=False)["input_ids"]
    same = list(ids) == tokenizer.encode(_PROBE).tolist() and loaded.eos_token_id == tokenizer.end_of_document
    return None if same else f"makes a {type(loaded).__name__} of it, with other ids"


def _has_code(config: Path) -> bool:
    return config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))


def imported(source: Path, folder: Path, config: TokenizerConfig) -> TokenizerConfig:
    """Copy what a tokenizer's options name into a folder of a run, and the options that name the copy.

    Args:
        source: a tokenizer.json or a folder with one.
    """
    folder.mkdir(parents=True)
    if source.is_dir():
        copy_tokenizer(source, folder)
    else:
        shutil.copyfile(source, folder / FILE)
    return dataclasses.replace(config, path=str(folder.resolve()))


def _library_of_bytes() -> Any:
    """BytesTokenizer as a tokenizer.json: every byte an entry, in their order, and nothing to merge."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    # The library writes bytes as characters: printable ones of Latin-1 as themselves, others from 256 on in turn.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    assert library.token_to_id(END_OF_DOCUMENT) == BytesTokenizer.end_of_document
    return library


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

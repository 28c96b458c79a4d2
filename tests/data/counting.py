"""A tokenizer whose every token is unique, so that a token lost or seen twice shows by its id alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

END = 99_999


class CountingTokenizer:
    """The text "start length" stands for the ids start, start+1, ..., start+length-1."""

    name = "counting"
    fingerprint = "counting"
    vocab_size = 100_000
    end_of_document = END

    def encode(self, text: str) -> np.ndarray:
        start, length = map(int, text.split())
        return np.arange(start, start + length, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


def write_counting(path: Path, num_documents: int, first: int = 0) -> list[list[int]]:
    """jsonl of documents whose ids count up from `first`, 1..29 long, some 120. Returns their ids."""
    documents, lines = [], []
    for i in range(num_documents):
        length = 120 if i % 17 == 5 else 1 + i * 11 % 29
        documents.append(list(range(first, first + length)))
        lines.append(json.dumps({"text": f"{first} {length}"}) + "\n")
        first += length
    path.write_text("".join(lines))
    return documents


def stream_of(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [*document, END]]

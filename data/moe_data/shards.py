"""Token shards as Megatron-LM's `.bin/.idx` (MMapIndexedDataset, version 1): atomic writer, mapped reader.

Layout of `.idx`, little endian: magic (9 bytes), version (u64 = 1), dtype code (u8), number of sequences n
(u64), length of the document index m (u64), lengths int32 [n], byte offsets in `.bin` int64 [n], document
index int64 [m] (sequence at which each document begins, then n). `.bin` is the tokens of all sequences, end
to end.
Source: megatron/core/datasets/indexed_dataset.py (megatron-core 0.16).
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np

from moe_data.cache import explain_full_disk

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
CHECK_ROWS = 1 << 20
"""Index rows verified at a time, to bound memory."""


def shard_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 entries, else int32: Megatron's own rule, so that files are equal byte for byte."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Writes one shard, document by document, beside its final place; a clean `with` or commit() renames it.

    The `.idx` is renamed last: a prefix that has one is complete.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = shard_dtype(vocab_size)
        self.num_tokens = 0
        self.lengths = array("i")
        self.sha256 = hashlib.sha256()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._partial = {
            end: self.prefix.parent / f".{self.prefix.name}{end}.{os.getpid()}.partial" for end in (".bin", ".idx")
        }
        self._bin: BinaryIO = open(self._partial[".bin"], "wb")  # noqa: SIM115 - lives as long as the writer

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, its end-of-document token included.

        Raises:
            ValueError: an id outside 0..vocab_size-1.
            OSError: no space left; nothing is left behind under the final name.
        """
        if len(tokens) and (int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0):
            raise ValueError(
                f"document {len(self.lengths)} for {self.prefix} has token ids "
                f"{int(tokens.min())}..{int(tokens.max())}, outside the vocabulary 0..{self.vocab_size - 1}; "
                "tokenize with the tokenizer of the run"
            )
        stored = tokens.astype(self.dtype).tobytes()
        with explain_full_disk(self.prefix):
            self._bin.write(stored)
        self.sha256.update(stored)
        self.lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def commit(self) -> None:
        """Flush to the disk, then rename into place."""
        with explain_full_disk(self.prefix):
            close_synced(self._bin)
            lengths = np.frombuffer(self.lengths, dtype=np.int32) if self.lengths else np.zeros(0, np.int32)
            offsets = np.zeros(len(lengths), dtype="<i8")
            np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
            offsets *= self.dtype.itemsize
            with open(self._partial[".idx"], "wb") as index:
                code = CODE_OF_DTYPE[self.dtype]
                index.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
                index.write(lengths.astype("<i4").tobytes())
                index.write(offsets.tobytes())
                index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
                close_synced(index)
        for end in (".bin", ".idx"):
            os.replace(self._partial[end], f"{self.prefix}{end}")

    def discard(self) -> None:
        """Leave nothing behind."""
        self._bin.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class TokenStore(Protocol):
    """Documents end to end, each closed by an end-of-document token; read by position."""

    num_tokens: int

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [stop-start], and where in them documents begin, int64, ascending."""
        ...


class Shard:
    """One mapped `.bin/.idx` pair, verified when opened.

    Args:
        prefix: path without `.bin` or `.idx`.
        end_of_document: if given, documents that lack this last token are read as if they had it.
    Raises:
        ValueError: a file is missing or corrupt; the message has the file and the numbers that disagree.
    """

    def __init__(self, prefix: str | Path, end_of_document: int | None = None) -> None:
        self.prefix = str(prefix)
        self._read_index()
        self._verify_index()
        # A mapping of nothing is an error of the operating system, so an empty shard maps nothing.
        self._tokens = (
            np.asarray(np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r"))
            if self.num_stored
            else np.zeros(0, self.dtype)
        )
        self._end = end_of_document
        self._appended = int(end_of_document is not None and not self._ends_are_stored(end_of_document))
        self.num_tokens = self.num_stored + self._appended * self.num_documents

    def _read_index(self) -> None:
        path = f"{self.prefix}.idx"
        for end in (".idx", ".bin"):
            if not os.path.isfile(self.prefix + end):
                raise ValueError(
                    f"shard {self.prefix}{end} does not exist; give the path without .bin or .idx, and both files there"
                )
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise ValueError(f"corrupt shard {path}: {size} bytes, a header alone has {HEADER.size}; write it again")
        magic, version, code, sequences, documents = HEADER.unpack(head)
        if magic != MAGIC or version != 1:
            raise ValueError(
                f"corrupt shard {path}: begins with {magic!r} version {version}, expected {MAGIC!r} version "
                "1; it is not a Megatron index of this format: write it with scripts/prepare_data.py"
            )
        if code not in DTYPE_OF_CODE:
            raise ValueError(
                f"corrupt shard {path}: dtype code {code}, token shards have 8 (uint16) or 4 (int32); write it again"
            )
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size != expected:
            raise ValueError(
                f"corrupt shard {path}: {size} bytes, but {sequences} sequences and {documents} index "
                f"entries take {expected}; truncated or of a multimodal data set: write it again"
            )
        self.dtype = DTYPE_OF_CODE[code]
        # A plain view of the mapping: the subclass is slow to index, and the search below indexes a lot.
        index = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        at = HEADER.size
        self.lengths = index[at : at + 4 * sequences].view("<i4")
        self._offsets = index[at + 4 * sequences : at + 12 * sequences].view("<i8")
        self._documents = index[at + 12 * sequences :].view("<i8")

    def _verify_index(self) -> None:
        path, total, itemsize = f"{self.prefix}.idx", 0, self.dtype.itemsize
        for begin in range(0, len(self.lengths), CHECK_ROWS):
            lengths = self.lengths[begin : begin + CHECK_ROWS].astype(np.int64)
            if (lengths < 0).any():
                raise ValueError(f"corrupt shard {path}: a sequence has negative length; write it again")
            expected = total + np.concatenate(([0], np.cumsum(lengths)[:-1])) * itemsize
            wrong = np.flatnonzero(self._offsets[begin : begin + CHECK_ROWS] != expected)
            if len(wrong):
                row = begin + int(wrong[0])
                raise ValueError(
                    f"corrupt shard {path}: sequence {row} begins at byte {self._offsets[row]}, the lengths "
                    f"before it end at {expected[wrong[0]]}; write it again"
                )
            total += int(lengths.sum()) * itemsize
        size = os.path.getsize(f"{self.prefix}.bin")
        if size != total:
            raise ValueError(
                f"corrupt shard {self.prefix}.bin: {size} bytes, but {path} describes {total}; truncated or "
                "of another index: write both again"
            )
        documents = self._documents
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(self.lengths):
            raise ValueError(
                f"corrupt shard {path}: the document index spans {documents[:1]}..{documents[-1:]}, expected "
                f"0..{len(self.lengths)}; write it again"
            )
        if (np.diff(documents) < 0).any():
            raise ValueError(f"corrupt shard {path}: the document index does not ascend; write it again")
        self.num_stored = total // itemsize
        self.num_documents = len(documents) - 1

    def _stored_start(self, document: int) -> int:
        """Position in `.bin` at which a document begins, in tokens; num_documents gives the end."""
        sequence = int(self._documents[document])
        if sequence == len(self.lengths):
            return self.num_stored
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def start(self, document: int) -> int:
        """Position at which a document begins, as `read` counts; `start(num_documents)` is num_tokens."""
        return self._stored_start(document) + self._appended * document

    def _ends_are_stored(self, end_of_document: int) -> bool:
        """Whether documents close with the token, judged by the first thousand."""
        stops = [self._stored_start(d + 1) for d in range(min(self.num_documents, 1000))]
        closed = [stop > 0 and int(self._tokens[stop - 1]) == end_of_document for stop in stops]
        if any(closed) and not all(closed):
            raise ValueError(
                f"shard {self.prefix}: document {closed.index(False)} does not end with the end-of-document "
                f"token {end_of_document} but others do; write it again with one tokenizer throughout"
            )
        return all(closed)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop), int64, and the offsets in them at which documents begin."""
        documents = range(self.num_documents + 1)
        first = bisect_right(documents, start - 1, key=self.start)
        last = bisect_right(documents, stop - 1, key=self.start)
        begins = np.array([self.start(d) for d in range(first, last)], dtype=np.int64)
        # Empty documents begin where the next one does, and the end of the shard is no beginning.
        begins = np.unique(begins[begins < self.num_tokens]) - start
        if not self._appended:
            return self._tokens[start:stop].astype(np.int64), begins
        return self._read_appended(start, stop), begins

    def _read_appended(self, start: int, stop: int) -> np.ndarray:
        """The range, with an end-of-document token put after each document on the way."""
        tokens = np.empty(stop - start, dtype=np.int64)
        document = bisect_right(range(self.num_documents + 1), start, key=self.start) - 1
        at = start
        while at < stop:
            end = self.start(document + 1) - 1
            if at < end:
                upto = min(stop, end)
                tokens[at - start : upto - start] = self._tokens[at - document : upto - document]
                at = upto
            if at < stop:
                assert self._end is not None
                tokens[at - start] = self._end
                at += 1
            document += 1
        return tokens


class StoreRange:
    """Documents of several stores end to end, limited to tokens [0, num_tokens) of `begin` onwards."""

    def __init__(self, stores: Sequence[TokenStore], begin: int = 0, end: int | None = None) -> None:
        self._stores = list(stores)
        self._starts = [0]
        for store in self._stores:
            self._starts.append(self._starts[-1] + store.num_tokens)
        self._begin = begin
        self.num_tokens = (self._starts[-1] if end is None else end) - begin

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As TokenStore.read."""
        start, stop = start + self._begin, stop + self._begin
        tokens, begins = [], []
        for store, first in zip(self._stores, self._starts):
            low, high = max(start, first), min(stop, first + store.num_tokens)
            if low < high:
                part, at = store.read(low - first, high - first)
                tokens.append(part)
                begins.append(at + (low - start))
        return np.concatenate(tokens), np.concatenate(begins)

"""Token shards: the exact bytes of Megatron's format, round trips, and every way to break a file."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_data.shards import Shard, ShardWriter, StoreRange


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 300) -> None:
    with ShardWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int32))


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i")])
def test_bytes_are_megatrons(tmp_path: Path, vocab_size: int, code: int, letter: str) -> None:
    """Any change of layout, byte order, dtype rule or field width makes files that Megatron cannot read.

    The expectation is packed by hand from the format, field by field."""
    write(tmp_path / "s", [[1, 2, 3], [], [4, 5]], vocab_size)
    size = struct.calcsize(letter)
    assert (tmp_path / "s.bin").read_bytes() == struct.pack(f"<5{letter}", 1, 2, 3, 4, 5)
    assert (tmp_path / "s.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<QQ", 3, 4)
        + struct.pack("<3i", 3, 0, 2)
        + struct.pack("<3q", 0, 3 * size, 3 * size)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


documents_strategy = st.lists(st.lists(st.integers(0, 299), max_size=6), min_size=1, max_size=8)


@given(documents=documents_strategy, data=st.data())
def test_read_equals_the_documents_end_to_end(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    """Reads that begin or end on a document's edge, in empty documents, or span shards."""
    folder = tmp_path_factory.mktemp("shard")
    cut = data.draw(st.integers(0, len(documents)))
    write(folder / "a", documents[:cut])
    write(folder / "b", documents[cut:])
    store = StoreRange([Shard(folder / "a"), Shard(folder / "b")])
    flat = [token for document in documents for token in document]
    edges = set(np.cumsum([0, *map(len, documents)]).tolist())
    assert store.num_tokens == len(flat)
    if flat:
        start = data.draw(st.integers(0, len(flat) - 1))
        stop = data.draw(st.integers(start + 1, len(flat)))
        tokens, begins = store.read(start, stop)
        assert tokens.tolist() == flat[start:stop]
        assert begins.tolist() == [e - start for e in sorted(edges) if start <= e < stop]


@given(documents=documents_strategy, data=st.data())
def test_missing_ends_of_documents_are_added(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    """Shards made without an end-of-document token must read as if they had it, at every offset."""
    folder = tmp_path_factory.mktemp("shard")
    write(folder / "a", documents, 400)
    shard = Shard(folder / "a", end_of_document=399)
    flat = [token for document in documents for token in [*document, 399]]
    assert shard.num_tokens == len(flat)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    tokens, begins = shard.read(start, stop)
    assert tokens.tolist() == flat[start:stop]
    edges = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1]
    assert begins.tolist() == [e - start for e in edges.tolist() if start <= e < stop]


def test_stored_ends_of_documents_are_not_doubled(tmp_path: Path) -> None:
    """Adding a second end after one that is stored shifts every later token."""
    write(tmp_path / "a", [[1, 299], [2, 3, 299]])
    assert Shard(tmp_path / "a", end_of_document=299).num_tokens == 5


def test_mixed_ends_of_documents_are_refused(tmp_path: Path) -> None:
    """Half the documents with an end and half without: no reading of it is right."""
    write(tmp_path / "a", [[1, 299], [2, 3]])
    with pytest.raises(ValueError, match=r"a: document 1 does not end with the end-of-document token 299"):
        Shard(tmp_path / "a", end_of_document=299)


def test_sequences_grouped_in_documents(tmp_path: Path) -> None:
    """Megatron may store a document as several sequences: their seams are no boundaries."""
    write(tmp_path / "a", [[1, 2], [3], [4, 5]])
    index = (tmp_path / "a.idx").read_bytes()
    head, body = index[:26], index[34 : -4 * 8]
    (tmp_path / "a.idx").write_bytes(head + struct.pack("<Q", 3) + body + struct.pack("<3q", 0, 2, 3))
    shard = Shard(tmp_path / "a")
    assert shard.num_documents == 2
    assert shard.read(0, 5)[1].tolist() == [0, 3]


def corrupt(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(bytes(content))


BREAKAGES = {
    "header cut off": (
        ".idx",
        lambda p: p.write_bytes(p.read_bytes()[:20]),
        r"20 bytes, a header alone has 34",
    ),
    "magic": (".idx", lambda p: corrupt(p, 0, b"X"), r"begins with b'XMIDIDX"),
    "version": (".idx", lambda p: corrupt(p, 9, b"\x02"), r"version 2, expected .* version 1"),
    "dtype": (".idx", lambda p: corrupt(p, 17, b"\x06"), r"dtype code 6, token shards have 8"),
    "index cut off": (".idx", lambda p: p.write_bytes(p.read_bytes()[:-8]), r"74 bytes, but 2 .* take 82"),
    "length": (
        ".idx",
        lambda p: corrupt(p, 34, struct.pack("<i", 4)),
        r"sequence 1 begins at byte 6, .* at 8",
    ),
    "negative length": (".idx", lambda p: corrupt(p, 34, struct.pack("<i", -1)), r"negative length"),
    "first pointer": (".idx", lambda p: corrupt(p, 42, struct.pack("<q", 2)), r"sequence 0 begins at byte 2"),
    "document index": (".idx", lambda p: corrupt(p, 66, struct.pack("<q", 5)), r"does not ascend"),
    "document end": (
        ".idx",
        lambda p: corrupt(p, 74, struct.pack("<q", 9)),
        r"document index spans .*expected 0\.\.2",
    ),
    "tokens cut off": (
        ".bin",
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        r"bin: 9 bytes, but .* describes 10",
    ),
    "tokens too many": (".bin", lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), r"bin: 12 bytes, but"),
    "tokens missing": (".bin", lambda p: p.unlink(), r"s\.bin does not exist"),
    "index missing": (".idx", lambda p: p.unlink(), r"s\.idx does not exist"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_files_are_refused(tmp_path: Path, breakage: str) -> None:
    """A broken shard read as if whole trains on garbage; the message has the file and what disagrees."""
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    end, break_it, message = BREAKAGES[breakage]
    break_it(tmp_path / f"s{end}")
    with pytest.raises(ValueError, match=message) as caught:
        Shard(tmp_path / "s")
    assert f"s{end}" in str(caught.value) or end == ".bin"


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """70,000 stored in 16 bits is 4,464: a wrong token and no error."""
    with pytest.raises(ValueError, match=r"token ids 1\.\.70000, outside the vocabulary 0\.\.299"):
        write(tmp_path / "s", [[1, 70000]])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    """A crash in the middle must not leave a file that a later run takes for whole."""
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write(tmp_path / "s", [[1, 2], [300]])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_says_so(tmp_path: Path) -> None:
    """OSError 28 without a path sends the user searching."""

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            return None

    writer = ShardWriter(tmp_path / "s", 300)
    writer._bin.close()
    writer._bin = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"no space left while writing .*/s.*set data\.cache_dir"), writer:
        writer.add(np.array([1]))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_reads_as_empty(tmp_path: Path) -> None:
    """Mapping a file of no bytes is an error of the operating system."""
    write(tmp_path / "s", [])
    assert Shard(tmp_path / "s").num_tokens == 0

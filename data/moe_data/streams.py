"""Sources that are tokenized while training, dealt to lanes so that resuming is exact on any world size.

A streaming source has G lanes, one per row of the global batch. Training document i belongs to lane i mod G
and a lane's sequences are cut from its documents end to end. Which rank serves a row changes with the world
size; what is in the row does not. The state of a lane is two numbers: its next document and how much of it is
used up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_data.sources import DocumentReader, SourceConfig, held_out_below, resolve_paths, text_hash
from moe_data.tokenizers import Tokenizer

MARK_DOCUMENTS = 256
"""Documents between places that a resumed stream can jump to; it reads on from there."""

BEGINNING: dict[str, Any] = {
    "number": 0,
    "first_of_pass": 0,
    "bytes": 0,
    "reader": {"file": 0, "row": 0, "inner": None},
}
"""Place of the first document."""


class EndlessDocuments:
    """Training documents of a source numbered 0, 1, ...: pass after pass, without the held-out ones."""

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._paths = resolve_paths(source, source.paths)
        apart = source.validation_paths or source.validation_split
        self._threshold = 0 if apart else held_out_below(source.validation_fraction)
        self._limit = float("inf") if source.max_megabytes is None else source.max_megabytes * 1e6
        self.load(BEGINNING)

    def place(self) -> dict[str, Any]:
        """Where the next document is; plain values for JSON."""
        return {
            "number": self._number,
            "first_of_pass": self._first_of_pass,
            "bytes": self._bytes,
            "reader": self._reader.state_dict(),
        }

    def load(self, place: dict[str, Any]) -> None:
        self._number, self._first_of_pass = place["number"], place["first_of_pass"]
        self._bytes = place["bytes"]
        self._begin_pass()
        self._reader.load_state_dict(place["reader"])

    def _begin_pass(self) -> None:
        self._reader = DocumentReader(self._source, self._paths)
        self._documents = iter(self._reader)

    def next(self) -> tuple[int, str]:
        """Number and text of the next document."""
        while True:
            # A document that reaches the limit is still used, as when a source is tokenized once.
            document = next(self._documents, None) if self._bytes < self._limit else None
            if document is not None:
                self._bytes += len(document.text.encode(errors="surrogatepass"))
                if text_hash(document.text) >= self._threshold:
                    self._number += 1
                    return self._number - 1, document.text
            elif self._number == self._first_of_pass:
                raise ValueError(
                    f"source '{self._source.name}' has no training document: {', '.join(self._paths)} holds "
                    f"no text, or validation_fraction={self._source.validation_fraction} holds out all of "
                    f"it; check data.sources[{self._source.name}]"
                )
            else:
                self._first_of_pass, self._bytes = self._number, 0
                self._begin_pass()


@dataclass
class Lane:
    document: int = 0
    """Documents of this lane that are used up."""
    offset: int = 0
    """Tokens of the next one that are used up."""
    tokens: deque[np.ndarray] | None = None
    """What is left of tokenized documents, the first from `offset` on; None before the first read."""


class Lanes:
    """The lanes of one source that this rank serves.

    Args:
        source: a streaming source.
        tokenizer: of the run.
        num_lanes: G, sequences in the global batch.
    """

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer, num_lanes: int) -> None:
        self._tokenizer = tokenizer
        self._num_lanes = num_lanes
        self._documents = EndlessDocuments(source)
        self._marks: deque[dict[str, Any]] = deque([BEGINNING])
        self._lanes: dict[int, Lane] = {}
        self._waiting: dict[int, deque[str]] = {}

    def serve(self, rows: Iterable[int]) -> None:
        """Say which rows this rank serves, before the first take(); others' documents are not tokenized."""
        self._lanes = {row: self._lanes.get(row, Lane()) for row in rows}
        self._waiting = {row: deque() for row in self._lanes}
        needed = self._first_needed()
        mark = max((m for m in self._marks if m["number"] <= needed), key=lambda m: m["number"])
        self._documents.load(mark)
        self._marks = deque([mark])

    def take(self, row: int, sequence_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The lane's next sequence: S+1 tokens of which S are used up, and where in them its parts begin."""
        lane = self._lanes[row]
        if lane.tokens is None:
            lane.tokens = deque([self._tokenized(row)[lane.offset :]])
        while sum(map(len, lane.tokens)) <= sequence_tokens:
            lane.tokens.append(self._tokenized(row))
        parts, begins, length = [], [], 0
        for part in lane.tokens:
            begins.append(length)
            parts.append(part[: sequence_tokens + 1 - length])
            length += len(part)
            if length > sequence_tokens:
                break
        left = sequence_tokens
        while left >= len(lane.tokens[0]):
            left -= len(lane.tokens.popleft())
            lane.document, lane.offset = lane.document + 1, 0
        lane.tokens[0] = lane.tokens[0][left:]
        lane.offset += left
        return np.concatenate(parts), np.array(begins, dtype=np.int64)

    def _tokenized(self, row: int) -> np.ndarray:
        while not self._waiting[row]:
            number, text = self._documents.next()
            owner = number % self._num_lanes
            lane = self._lanes.get(owner)
            # A resumed stream starts before the place of most lanes.
            if lane is not None and number >= owner + lane.document * self._num_lanes:
                self._waiting[owner].append(text)
            if (number + 1) % MARK_DOCUMENTS == 0:
                self._marks.append(self._documents.place())
        ids = self._tokenizer.encode(self._waiting[row].popleft())
        return np.append(ids, self._tokenizer.end_of_document).astype(np.int64)

    def _first_needed(self) -> int:
        """Number of the first document that is not used up, over this rank's lanes."""
        return min(row + lane.document * self._num_lanes for row, lane in self._lanes.items())

    def state_dict(self) -> dict[str, Any]:
        """This rank's lanes, and a place to start reading from; plain values for JSON."""
        if self._lanes:
            needed = self._first_needed()
            while len(self._marks) > 1 and self._marks[1]["number"] <= needed:
                self._marks.popleft()
        lanes = {str(row): [lane.document, lane.offset] for row, lane in sorted(self._lanes.items())}
        # The later marks lie beyond what some lane still needs.
        return {"lanes": lanes, "marks": [self._marks[0]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lanes of any number of ranks; serve() then keeps this rank's."""
        self._lanes = {int(row): Lane(document, offset) for row, (document, offset) in state["lanes"].items()}
        self._marks = deque([BEGINNING, *state["marks"]])


def merge_lanes(states: list[dict[str, Any]], num_lanes: int, source: str) -> dict[str, Any]:
    """One state of a source from the states of all ranks; complete or refused."""
    lanes: dict[str, Any] = {}
    marks = {mark["number"]: mark for state in states for mark in state["marks"]}
    for state in states:
        for row, place in state["lanes"].items():
            if lanes.setdefault(row, place) != place:
                raise ValueError(
                    f"data state of source '{source}': row {row} is at {lanes[row]} and at {place}; the "
                    "states are not of one step: use those of one checkpoint"
                )
    missing = sorted(set(range(num_lanes)) - {int(row) for row in lanes})
    if lanes and missing:
        raise ValueError(
            f"data state of source '{source}' lacks rows {missing[:8]} of {num_lanes}; merge the states of all ranks"
        )
    return {"lanes": lanes, "marks": [marks[number] for number in sorted(marks)]}

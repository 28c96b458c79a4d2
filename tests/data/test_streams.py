"""Streaming sources: each document to one lane, each token once, resumed exactly on any world size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_data import streams
from moe_data.loader import DataConfig, TrainingData, ValidationData, merge_states
from moe_data.sources import SourceConfig
from tests.data.counting import CountingTokenizer, stream_of, write_counting
from tests.data.test_loader import rows_of

S, G = 16, 8
TOKENIZER = CountingTokenizer()


@pytest.fixture(autouse=True)
def frequent_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places to jump to every 8 documents, so that resuming uses them here."""
    monkeypatch.setattr(streams, "MARK_DOCUMENTS", 8)


def config_of(tmp_path: Path, num_documents: int = 500, **options: object) -> DataConfig:
    write_counting(tmp_path / "a.jsonl", num_documents)
    source = {"name": "a", "kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "streaming": True}
    return DataConfig(
        sources=[SourceConfig(**{**source, "validation_fraction": 0, **options})],
        cache_dir=str(tmp_path / "cache"),
    )


class Run:
    """All ranks of a run in one process; the state goes through JSON, as in a checkpoint."""

    def __init__(self, config: DataConfig, world: int, size: int, state: dict | None = None) -> None:
        self.world, self.size = world, size
        self.ranks = [TrainingData(config, TOKENIZER, S, G, 1, 100_000) for _ in range(world)]
        for data in self.ranks:
            if state is not None:
                data.load_state_dict(state)

    def step(self, step: int) -> list[tuple]:
        batches = [
            self.ranks[rank].batch(step, micro_batch, rank, self.world, self.size)
            for micro_batch in range(G // (self.world * self.size))
            for rank in range(self.world)
        ]
        return [row for batch in batches for row in rows_of(batch)]

    def state(self) -> dict:
        return json.loads(json.dumps(merge_states([data.state_dict() for data in self.ranks])))


def lanes_by_hand(documents: list[list[int]]) -> list[list[int]]:
    """Document i to lane i mod G, end to end."""
    return [stream_of(documents[lane::G]) for lane in range(G)]


def test_lanes_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """What a lane gives, put end to end, is its documents in order: counted against a deal by hand."""
    run = Run(config_of(tmp_path), 2, 2)
    documents = write_counting(tmp_path / "again.jsonl", 500)
    rows = [run.step(step) for step in range(40)]
    for lane, expected in enumerate(lanes_by_hand(documents)):
        given = [token for step in rows for token in step[lane][3]]
        assert given == expected[: len(given)]


@pytest.mark.parametrize("num_documents", [500, 37])
def test_resume_on_other_world_sizes(tmp_path: Path, num_documents: int) -> None:
    """2 ranks, then 1, then 4: rows, targets and positions equal those of a run that was never stopped.

    With 37 documents the source is read several times over, and places lie in different passes."""
    config = config_of(tmp_path, num_documents)
    straight = Run(config, 1, 8)
    expected = [straight.step(step) for step in range(40)]
    run, found, state = None, [], None
    for begin, end, world, size in ((0, 13, 2, 2), (13, 21, 1, 4), (21, 22, 8, 1), (22, 40, 4, 1)):
        run = Run(config, world, size, state)
        found += [run.step(step) for step in range(begin, end)]
        state = run.state()
    assert found == expected


def test_resume_reads_on_from_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a terabyte from its beginning to go on in its middle."""
    config = config_of(tmp_path, 2000)
    run = Run(config, 1, 8)
    for step in range(100):
        run.step(step)
    state = run.state()
    resumed = Run(config, 1, 8, state)
    read = 0
    original = streams.EndlessDocuments.next

    def counted(self: streams.EndlessDocuments) -> tuple[int, str]:
        nonlocal read
        read += 1
        return original(self)

    monkeypatch.setattr(streams.EndlessDocuments, "next", counted)
    assert resumed.step(100) == run.step(100)
    used = min(row + lane[0] * G for row, lane in ((int(r), v) for r, v in state["streams"]["a"]["lanes"].items()))
    assert used > 300
    # From the mark before the slowest lane to the fastest one: lanes differ by some tens of documents.
    assert read < used / 2


def test_state_again_right_after_loading(tmp_path: Path) -> None:
    """A run that is stopped before its first step must not lose the place."""
    config = config_of(tmp_path)
    run = Run(config, 2, 4)
    for step in range(5):
        run.step(step)
    state = run.state()
    again = Run(config, 4, 2, state).state()
    assert Run(config, 1, 8, again).step(5) == run.step(5)


def test_streams_mix_with_stored_sources(tmp_path: Path) -> None:
    """A row takes from the source that the mixture names, and from its own lane there."""
    config = config_of(tmp_path)
    write_counting(tmp_path / "b.jsonl", 60, first=50_000)
    config.sources.append(SourceConfig(name="b", kind="jsonl", paths=[str(tmp_path / "b.jsonl")]))
    expected_run, run = Run(config, 1, 8), Run(config, 2, 2)
    for step in range(10):
        rows = run.step(step)
        assert rows == expected_run.step(step)
        assert all((row[3][0] >= 50_000) == (row[1] == 1) for row in rows if row[3][0] != 99_999)
    resumed = Run(config, 4, 1, run.state())
    assert resumed.step(10) == expected_run.step(10)


def test_held_out_documents_are_left_out(tmp_path: Path) -> None:
    """A stream that trains on what it validates on."""
    config = config_of(tmp_path, 120, validation_fraction=0.25)
    config.validation_sequences = 3
    validation = ValidationData(config, TOKENIZER, S, 100_000)
    held = {int(t) for batch in validation.batches("a", 0, 1, 3) for t in batch.token_BS[batch.document_BS >= 0]}
    assert len(held) > 40
    run = Run(config, 1, 8)
    trained = {t for step in range(60) for row in run.step(step) for t in row[3]}
    assert held & trained <= {99_999}


def test_max_megabytes_limits_each_pass(tmp_path: Path) -> None:
    """A limit counted over all passes would end the data; one not restored would move with each restart."""
    config = config_of(tmp_path, 200, max_megabytes=0.0003)
    straight = Run(config, 1, 8)
    rows = [straight.step(step) for step in range(40)]
    seen = {t for step in rows for row in step for t in row[3]} - {99_999}
    assert max(seen) < 1500
    first = Run(config, 2, 2)
    for step in range(17):
        first.step(step)
    second = Run(config, 4, 2, first.state())
    assert [second.step(step) for step in range(17, 40)] == rows[17:]


def test_errors(tmp_path: Path) -> None:
    """Orders and states that cannot be exact are refused."""
    config = config_of(tmp_path)
    run = Run(config, 2, 4)
    run.step(0)
    with pytest.raises(ValueError, match=r"read in order by one rank: expected step, micro-batch \(1, 0\)"):
        run.ranks[0].batch(2, 0, 0, 2, 4)
    with pytest.raises(ValueError, match=r"read in order by one rank"):
        run.ranks[0].batch(1, 0, 1, 2, 4)
    with pytest.raises(ValueError, match=r"source 'a' lacks rows \[4, 5, 6, 7\] of 8; merge the states of all ranks"):
        Run(config, 1, 8, run.ranks[0].state_dict())
    state = run.state()
    run.step(1)
    with pytest.raises(ValueError, match=r"disagree on step: 1 and 2; use those of one checkpoint"):
        merge_states([state, run.state()])
    with pytest.raises(ValueError, match=r"global_batch_sequences=8, this run has 4"):
        TrainingData(config, TOKENIZER, S, 4, 1, 100_000).load_state_dict(state)
    config.sources[0].streaming = False
    with pytest.raises(ValueError, match=r"data state has tokens=|data state streams \['a'\], this run streams \[\]"):
        TrainingData(config, TOKENIZER, S, G, 1, 100_000).load_state_dict(state)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    config.sources[0].streaming = True
    with pytest.raises(ValueError, match=r"source 'a' has no training document: .*a\.jsonl holds no text"):
        Run(config, 1, 8).step(0)


def test_state_asked_within_a_step_is_refused(tmp_path: Path) -> None:
    """Half a step drawn: no step number describes it."""
    run = Run(config_of(tmp_path), 1, 4)
    run.ranks[0].batch(0, 0, 0, 1, 4)
    with pytest.raises(ValueError, match=r"finish the step"):
        run.state()

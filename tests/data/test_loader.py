"""Batches: every token once, the same rows on any world size, errors that name the remedy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_data.batch import IGNORE, TokenBatch
from moe_data.loader import DataConfig, TrainingData, ValidationData
from moe_data.sources import SourceConfig
from moe_data.tokenizers import BytesTokenizer
from tests.data.counting import END, CountingTokenizer, stream_of, write_counting

S, G = 16, 8
LAYOUTS = [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)]
TOKENIZER = CountingTokenizer()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sources, 3 : 1."""
    write_counting(tmp_path / "a.jsonl", 150)
    write_counting(tmp_path / "b.jsonl", 60, first=50_000)
    sources = [
        SourceConfig(name="a", kind="jsonl", weight=3, paths=[str(tmp_path / "a.jsonl")], validation_fraction=0.2),
        SourceConfig(name="b", kind="jsonl", weight=1, paths=[str(tmp_path / "b.jsonl")], validation_fraction=0.2),
    ]
    return DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), validation_sequences=5)


def training(config: DataConfig, **changes: object) -> TrainingData:
    options = {"sequence_tokens": S, "global_batch_sequences": G, "seed": 1, "vocabulary": 100_000, **changes}
    return TrainingData(config, TOKENIZER, **options)


def rows_of(batch: TokenBatch) -> list[tuple]:
    """Everything of each row, to compare batches of different shapes."""
    tensors = (batch.token_BS, batch.target_BS, batch.position_BS, batch.document_BS)
    return [
        (
            int(batch.sequence_B[i]),
            int(batch.source_B[i]),
            batch.document_lengths[i],
            *(t[i].tolist() for t in tensors),
        )
        for i in range(len(batch.sequence_B))
    ]


def all_rows(data: TrainingData, steps: range, world: int, size: int) -> list[tuple]:
    return [
        row
        for step in steps
        for micro_batch in range(G // (world * size))
        for rank in range(world)
        for row in rows_of(data.batch(step, micro_batch, rank, world, size))
    ]


def test_each_token_once_per_epoch(config: DataConfig, tmp_path: Path) -> None:
    """A sequence drawn twice or never, or cut one token off: every input id of an epoch is counted.

    What remains at the end of a source, shorter than a sequence, is the only loss."""
    data = training(config)
    epochs = 2
    for source in (0, 1):
        name = data.source_names[source]
        sequences = data.source_tokens[name] // S
        steps = range(epochs * sequences * 5 // G)
        rows = [row for row in all_rows(data, steps, 2, 2) if row[1] == source][: epochs * sequences]
        assert len(rows) == epochs * sequences
        for epoch in range(epochs):
            inputs = [t for row in rows[epoch * sequences : (epoch + 1) * sequences] for t in row[3]]
            tokens = [t for t in inputs if t != END]
            assert max(Counter(tokens).values()) == 1
            assert len(inputs) == sequences * S > data.source_tokens[name] - S
            if epoch == 0:
                first = set(tokens)
            assert set(tokens) == first


@pytest.mark.parametrize(("world", "size"), LAYOUTS[1:])
def test_rows_do_not_depend_on_the_layout(config: DataConfig, world: int, size: int) -> None:
    """Another order or packing on another world size makes runs incomparable and resuming inexact."""
    data = training(config)
    steps = range(3, 30)
    assert all_rows(data, steps, world, size) == all_rows(training(config), steps, *LAYOUTS[0])


def test_sequence_indices_count_through(config: DataConfig) -> None:
    """Random routing hashes sequence_B * S + offset: two rows of one index would draw the same numbers."""
    rows = all_rows(training(config), range(5, 9), 4, 1)
    assert [row[0] for row in rows] == list(range(5 * G, 9 * G))


def test_targets_follow_the_stream(config: DataConfig) -> None:
    """The target of id n is n+1 or the end of the document, and an end predicts nothing."""
    for keep in (True, False):
        config.keep_boundaries = keep
        for row in all_rows(training(config), range(20), 1, 8):
            for token, target in zip(row[3], row[4]):
                if token == END:
                    assert target == IGNORE if keep else target != END
                else:
                    assert target in (token + 1, END)


def test_mixture_has_the_asked_shares(config: DataConfig) -> None:
    """3 : 1 exactly, over one block of 4,096 samples."""
    count = Counter(row[1] for row in all_rows(training(config), range(4096 // G), 1, 8))
    assert count == {0: 3072, 1: 1024}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_one_source_make_pure_micro_batches(config: DataConfig, streaming: bool) -> None:
    """Groups that begin anew on each rank or micro-batch: another order on another layout, or mixed micro-batches."""
    config.rows_per_source = 4
    for source in config.sources:
        source.streaming = streaming
    steps = range(20)
    reference = all_rows(training(config), steps, *LAYOUTS[0])
    assert all(len({row[1] for row in reference[first : first + 4]}) == 1 for first in range(0, len(reference), 4))
    assert len({row[1] for row in reference}) == 2
    for world, size in LAYOUTS[1:]:
        if streaming:  # each rank has its own reader, which goes forward only
            ranks = [training(config) for _ in range(world)]
            rows = [
                row
                for step in steps
                for micro_batch in range(G // (world * size))
                for rank, data in enumerate(ranks)
                for row in rows_of(data.batch(step, micro_batch, rank, world, size))
            ]
        else:
            rows = all_rows(training(config), steps, world, size)
        assert rows == reference


def test_each_token_once_with_groups(config: DataConfig) -> None:
    """A group that ends an epoch must go on in the next one, not repeat or leave out sequences."""
    config.rows_per_source = 3
    data = training(config)
    for source in (0, 1):
        sequences = data.source_tokens[data.source_names[source]] // S
        rows = [row for row in all_rows(data, range(sequences * 8 // G), 2, 2) if row[1] == source][:sequences]
        tokens = [t for row in rows for t in row[3] if t != END]
        assert len(rows) == sequences
        assert max(Counter(tokens).values()) == 1


def test_state_of_stored_sources_is_the_step_alone(config: DataConfig) -> None:
    """A state that changed with the step would have to be right on every rank."""
    data = training(config)
    before = data.state_dict()
    data.batch(7, 0, 0, 1, 8)
    assert data.state_dict() == before
    data.load_state_dict(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_tokens": 8}, r"sequence_tokens=16, this run has 8"),
        ({"global_batch_sequences": 16}, r"global_batch_sequences=8, this run has 16"),
        ({"seed": 2}, r"seed=1, this run has 2"),
    ],
)
def test_state_of_other_data_is_refused(config: DataConfig, change: dict, message: str) -> None:
    """With another order, going on repeats some tokens and misses others, and nobody notices."""
    state = training(config).state_dict()
    with pytest.raises(ValueError, match=message):
        training(config, **change).load_state_dict(state)
    config.rows_per_source = 4
    with pytest.raises(ValueError, match=r"rows_per_source=1, this run has 4"):
        training(config).load_state_dict(state)
    del state["identity"]["rows_per_source"]  # a state of before there was the option
    with pytest.raises(ValueError, match=r"rows_per_source=1, this run has 4"):
        training(config).load_state_dict(state)
    config.rows_per_source = 1
    training(config).load_state_dict(state)
    config.sources[0].weight = 1.0
    with pytest.raises(ValueError, match=r"weights=.* repeat some tokens"):
        training(config).load_state_dict(state)


def test_errors_of_training(config: DataConfig) -> None:
    """Each names the numbers and the remedy."""
    with pytest.raises(ValueError, match=r"sequence_tokens=90000 is longer than source 'a' \([\d,]+ tokens\); shorten"):
        training(config, sequence_tokens=90_000)
    with pytest.raises(ValueError, match=r"counting has 100000 entries, model\.vocab_size=300 is smaller; set"):
        training(config, vocabulary=300)
    with pytest.raises(ValueError, match=r"global batch of 8 sequences is not a multiple of .*=3 times .*=2"):
        training(config).batch(0, 0, 0, 3, 2)


def test_foreign_ids_are_refused_when_read(config: DataConfig, tmp_path: Path) -> None:
    """A shard of a larger vocabulary indexes past the embedding: a device-side assert, hours later."""
    import numpy as np

    from moe_data.shards import ShardWriter

    with ShardWriter(tmp_path / "w", 60_000) as writer:
        writer.add(np.array([1] * 40 + [50_000] + [256]))
    source = SourceConfig(name="w", kind="tokens", paths=[str(tmp_path / "w")], validation_fraction=0)
    bytes_config = DataConfig(sources=[source], cache_dir=str(tmp_path / "cache"))
    data = TrainingData(bytes_config, BytesTokenizer(), 21, 2, 0, 300)
    with pytest.raises(ValueError, match=r"source 'w' holds token id 50000 at token 40, .* 0\.\.299; .* another"):
        data.batch(0, 0, 0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, r"data\.sources is empty"),
        ({"sources": [{"name": "code", "kind": "embedded"}] * 2}, r"name=code is given 2 times; rename one"),
        ({"sources": [{"name": "code", "kind": "embedded", "weight": 0}]}, r"all weights are 0 \(code\)"),
        ({"validation_sequences": -1}, r"data\.validation_sequences=-1 must be 0 or more"),
        ({"rows_per_source": 0}, r"data\.rows_per_source=0 must be at least 1"),
        ({"prefetch_steps": 0}, r"data\.prefetch_steps=0 must be at least 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    """Refused when the options are made."""
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize(("world", "size"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (3, 1)])
def test_validation_counts_each_token_once(config: DataConfig, world: int, size: int) -> None:
    """Ranks that overlap weigh tokens twice; ranks with fewer batches leave the others waiting for ever."""
    data = ValidationData(config, TOKENIZER, S, 100_000)
    assert data.domains == ["a", "b"]
    for source, domain in enumerate(data.domains):
        by_rank = [list(data.batches(domain, rank, world, size)) for rank in range(world)]
        assert len({len(batches) for batches in by_rank}) == 1
        batches = [batch for rank in by_rank for batch in rank]
        valid = torch.cat([batch.token_BS[batch.document_BS >= 0] for batch in batches])
        reference = next(iter(data.batches(domain, 0, 1, 8)))
        expected = reference.token_BS[reference.document_BS >= 0]
        assert sorted(valid.tolist()) == sorted(expected.tolist())
        assert len(valid) == sum(batch.num_valid for batch in batches)
        assert all((batch.source_B == source).all() for batch in batches)
        assert {batch.token_BS.shape for batch in batches} == {(size, S)}


def test_validation_is_apart_from_training(config: DataConfig) -> None:
    """A validation token that was trained on measures memory. All ids are unique, so sets decide."""
    data = training(config)
    trained = {t for row in all_rows(data, range(200), 1, 8) for t in row[3]} - {END}
    validation = ValidationData(config, TOKENIZER, S, 100_000)
    held = {
        int(t)
        for domain in validation.domains
        for batch in validation.batches(domain, 0, 1, 4)
        for t in batch.token_BS[batch.document_BS >= 0]
    } - {END}
    assert len(held) > 50
    assert not trained & held


def test_validation_pads_the_last_sequence(config: DataConfig) -> None:
    """All that is held out counts, the incomplete last sequence too, and padding does not."""
    config.validation_sequences = 1000
    data = ValidationData(config, TOKENIZER, S, 100_000)
    sequences = data.num_sequences("b")
    (batch,) = data.batches("b", 0, 1, sequences)
    assert batch.has_padding
    assert (sequences - 1) * S < batch.num_valid < sequences * S
    assert (batch.target_BS[batch.document_BS < 0] == IGNORE).all()
    padding = sequences * S - batch.num_valid
    assert batch.document_lengths[-1][-1] == padding


def test_no_validation_when_not_wanted(config: DataConfig) -> None:
    """0 sequences must not tokenize anything."""
    config.validation_sequences = 0
    assert ValidationData(config, TOKENIZER, S, 100_000).domains == []


def test_weight_zero_only_validates(config: DataConfig) -> None:
    """A held-out domain is not trained on, and keeps its index."""
    config.sources[0].weight = 0.0
    assert {row[1] for row in all_rows(training(config), range(20), 1, 8)} == {1}
    assert ValidationData(config, TOKENIZER, S, 100_000).domains == ["a", "b"]


def test_stream_of_documents_is_what_is_read(config: DataConfig, tmp_path: Path) -> None:
    """The inputs of an epoch are the documents with their ends, cut by hand into sequences."""
    config.sources = config.sources[1:]
    config.sources[0].validation_fraction = 0.0
    data = training(config)
    documents = write_counting(tmp_path / "again.jsonl", 60, first=50_000)
    flat = stream_of(documents)
    sequences = len(flat) // S
    rows = all_rows(data, range(-(-sequences // G)), 1, 8)[:sequences]
    assert sorted(row[3] for row in rows) == sorted(flat[i * S : (i + 1) * S] for i in range(sequences))

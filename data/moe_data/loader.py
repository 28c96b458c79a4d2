"""Batches for training and validation: which tokens are in which row, at any step, on any world size."""

from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from moe_data.batch import TokenBatch
from moe_data.order import Mixture, shuffled
from moe_data.packing import Piece, pack
from moe_data.prepare import prepare_source
from moe_data.shards import TokenStore
from moe_data.sources import SourceConfig, SourceKind
from moe_data.streams import Lanes, merge_lanes
from moe_data.tokenizers import Tokenizer

EMBEDDED_WEIGHTS = {
    "code": 4.0,
    "prose": 2.0,
    "reference": 1.0,
    "legal": 1.0,
    "markdown": 1.0,
    "headers": 3.0,
}


def embedded_sources() -> list[SourceConfig]:
    """The default: domains that every machine has; small ones hold out more, to have enough to validate."""
    return [
        SourceConfig(
            name=name,
            kind=SourceKind.embedded,
            weight=weight,
            max_megabytes=8.0,
            validation_fraction=0.02 if name in ("code", "headers") else 0.1,
        )
        for name, weight in EMBEDDED_WEIGHTS.items()
    ]


@dataclass(kw_only=True)
class DataConfig:
    sources: list[SourceConfig] = field(default_factory=embedded_sources)
    """Where documents come from, one entry per domain."""
    cache_dir: str = ".cache/data"
    """Folder for tokenized sources and learned tokenizers; safe to delete, safe to share between runs."""
    keep_boundaries: bool = True
    """No attention and no loss from one document to the next within a sequence."""
    restart_positions: bool = True
    """Positions count from 0 in each document, else through the whole sequence."""
    rows_per_source: int = 1
    """Neighboring sequences of the global order that come from one source; the sequences of a micro-batch make its
    batches domain-pure."""
    validation_sequences: int = 32
    """Sequences per domain and validation, the same ones each time; 0 for none."""
    prefetch_steps: int = 2
    """Steps that a background thread prepares ahead."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names:
            raise ValueError("data.sources is empty; add a source, or choose data=embedded")
        if twice:
            raise ValueError(f"data.sources: name={twice[0]} is given {names.count(twice[0])} times; rename one")
        if not any(source.weight for source in self.sources):
            raise ValueError(
                f"data.sources: all weights are 0 ({', '.join(names)}): there is nothing to train on; raise one"
            )
        if self.validation_sequences < 0:
            raise ValueError(f"data.validation_sequences={self.validation_sequences} must be 0 or more")
        if self.rows_per_source < 1:
            raise ValueError(f"data.rows_per_source={self.rows_per_source} must be at least 1; 1 mixes every sequence")
        if self.prefetch_steps < 1:
            raise ValueError(f"data.prefetch_steps={self.prefetch_steps} must be at least 1; 2 is usual")


class StoredSequences:
    """Sequences of one tokenized source: windows of S tokens end to end, the tail shorter than S left out."""

    def __init__(self, name: str, store: TokenStore, sequence_tokens: int, vocabulary: int) -> None:
        self.name = name
        self.num_tokens = store.num_tokens
        self._store = store
        self._sequence_tokens = sequence_tokens
        self._vocabulary = vocabulary

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to S+1 tokens from index * S on, and where documents begin in them."""
        start = index * self._sequence_tokens
        tokens, begins = self._store.read(start, min(start + self._sequence_tokens + 1, self.num_tokens))
        # Shards made elsewhere are trusted no further than they are read.
        if int(tokens.max()) >= self._vocabulary or int(tokens.min()) < 0:
            place = start + int(np.flatnonzero((tokens >= self._vocabulary) | (tokens < 0))[0])
            raise ValueError(
                f"source '{self.name}' holds token id {tokens[place - start]} at token {place:,}, the "
                f"vocabulary is 0..{self._vocabulary - 1}; it was made with another tokenizer: choose that "
                "one or tokenize again"
            )
        return tokens, begins


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int) -> None:
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, model.vocab_size={vocabulary} "
            f"is smaller; set model.vocab_size to {tokenizer.vocab_size} or more"
        )


class TrainingData:
    """Batches by step: a pure function of the arguments, but for streaming sources, which go forward only.

    Args:
        config: the options.
        tokenizer: of the run.
        sequence_tokens: S.
        global_batch_sequences: G, sequences of all ranks and micro-batches in one step.
        seed: of the order.
        vocabulary: ids that the model knows; may exceed the tokenizer's.
    Raises:
        ValueError: bad sources or options.
        OSError: no space left for tokenized sources.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        sequence_tokens: int,
        global_batch_sequences: int,
        seed: int,
        vocabulary: int,
    ) -> None:
        check_vocabulary(tokenizer, vocabulary)
        self.source_names = [source.name for source in config.sources]
        self._config = config
        self._sequence_tokens = sequence_tokens
        self._rows = global_batch_sequences
        self._seed = seed
        weights = [source.weight for source in config.sources]
        self._mixture = Mixture(weights, seed, rows_per_source=config.rows_per_source)
        self._stored: dict[int, StoredSequences] = {}
        self._streams: dict[int, Lanes] = {}
        for index, source in enumerate(config.sources):
            if source.weight == 0:
                continue
            if source.streaming:
                self._streams[index] = Lanes(source, tokenizer, global_batch_sequences)
                continue
            prepared = prepare_source(source, tokenizer, config.cache_dir, 0)
            assert prepared.train is not None
            stored = StoredSequences(source.name, prepared.train, sequence_tokens, vocabulary)
            if stored.num_tokens < sequence_tokens:
                raise ValueError(
                    f"train.sequence_tokens={sequence_tokens} is longer than source '{source.name}' "
                    f"({stored.num_tokens:,} tokens); shorten the sequence, or give the source more text"
                )
            self._stored[index] = stored
        # What the order depends on: a state of other values would repeat some tokens and miss others.
        self._identity: dict[str, Any] = {
            "sequence_tokens": sequence_tokens,
            "global_batch_sequences": global_batch_sequences,
            "seed": seed,
            "tokenizer": tokenizer.fingerprint,
            "weights": {source.name: source.weight for source in config.sources},
            "tokens": {stored.name: stored.num_tokens for stored in self._stored.values()},
            "rows_per_source": config.rows_per_source,
        }
        self._served: tuple[int, int, int] | None = None
        self._next: tuple[int, int] | None = None

    @property
    def source_tokens(self) -> dict[str, int]:
        """Training tokens of each tokenized source; streaming ones are not counted."""
        return dict(self._identity["tokens"])

    def batch(self, step: int, micro_batch: int, rank: int, world: int, micro_batch_sequences: int) -> TokenBatch:
        """One micro-batch of one data-parallel rank.

        Row i has the global sample index step*G + (micro_batch*world + rank)*b + i, which is its
        `sequence_B`.
        Raises:
            ValueError: G is not a multiple of world*b, or a streaming source is asked out of order.
        """
        rows = self._rows
        if rows % (world * micro_batch_sequences):
            raise ValueError(
                f"global batch of {rows} sequences is not a multiple of data-parallel ranks={world} times "
                f"train.micro_batch_sequences={micro_batch_sequences}; change one of the three"
            )
        if self._streams:
            self._go_forward(step, micro_batch, (rank, world, micro_batch_sequences))
        first = (micro_batch * world + rank) * micro_batch_sequences
        pieces = [self._piece(step, row) for row in range(first, first + micro_batch_sequences)]
        return pack(
            pieces,
            self._sequence_tokens,
            keep_boundaries=self._config.keep_boundaries,
            restart_positions=self._config.restart_positions,
        )

    def _piece(self, step: int, row: int) -> Piece:
        sample = step * self._rows + row
        source, index = self._mixture.locate(sample)
        if source in self._streams:
            tokens, begins = self._streams[source].take(row, self._sequence_tokens)
        else:
            stored = self._stored[source]
            sequences = stored.num_tokens // self._sequence_tokens
            tokens, begins = stored.read(shuffled(index, sequences, self._seed, stored.name))
        return Piece(tokens=tokens, begins=begins, sequence=sample, source=source)

    def _go_forward(self, step: int, micro_batch: int, served: tuple[int, int, int]) -> None:
        """Streams have a state, so batches are drawn once each, in order, by one rank."""
        rank, world, size = served
        micro_batches = self._rows // (world * size)
        if self._served is None:
            rows = [(m * world + rank) * size + i for m in range(micro_batches) for i in range(size)]
            for lanes in self._streams.values():
                lanes.serve(rows)
            self._served = served
        expected = self._next or (0, 0)
        if served != self._served or (step, micro_batch) != expected:
            raise ValueError(
                f"streaming sources are read in order by one rank: expected step, micro-batch {expected} of "
                f"rank, ranks, size {self._served}, got {(step, micro_batch)} of {served}; load the data "
                "state of that step"
            )
        self._next = (step, micro_batch + 1) if micro_batch + 1 < micro_batches else (step + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """State before the first batch of the next step; plain values for JSON.

        The same on all ranks unless sources stream: then it has the rows of this rank, and merge_states makes
        one state of them all.
        """
        step, micro_batch = self._next or (0, 0)
        if micro_batch:
            raise ValueError(f"data state asked after micro-batch {micro_batch - 1} of step {step}: finish the step")
        streams = {self.source_names[index]: lanes.state_dict() for index, lanes in self._streams.items()}
        return {"identity": self._identity, "step": step if self._streams else None, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, merged by merge_states if there were several ranks.

        Raises:
            ValueError: the state is of other data or another global batch, or lacks rows.
        """
        for name, ours in self._identity.items():
            theirs = state["identity"].get(name, 1 if name == "rows_per_source" else None)  # old states lack it
            if theirs != ours:
                raise ValueError(
                    f"data state has {name}={theirs}, this run has {ours}: going on would repeat some tokens "
                    f"and miss others; restore {name}, or start from the weights alone as a new run"
                )
        ours, theirs = [self.source_names[i] for i in self._streams], sorted(state["streams"])
        if sorted(ours) != theirs:
            raise ValueError(f"data state streams {theirs}, this run streams {sorted(ours)}; restore `streaming`")
        state = merge_states([state])
        for index, lanes in self._streams.items():
            lanes.load_state_dict(state["streams"][self.source_names[index]])
        self._served = None
        self._next = (state["step"], 0) if self._streams else None


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, which TrainingData.load_state_dict takes on any world size. Pure.

    Raises:
        ValueError: they are not of one step of one run, or rows are missing.
    """
    first = states[0]
    for state in states[1:]:
        for name in ("identity", "step"):
            if state[name] != first[name]:
                raise ValueError(
                    f"data states disagree on {name}: {first[name]} and {state[name]}; use those of one checkpoint"
                )
    rows = first["identity"]["global_batch_sequences"]
    streams = {name: merge_lanes([state["streams"][name] for state in states], rows, name) for name in first["streams"]}
    return {"identity": first["identity"], "step": first["step"], "streams": streams}


class ValidationData:
    """Held-out sequences of each domain, the same ones each time and on any world size.

    Args: as TrainingData; `config.validation_sequences` per domain.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sequence_tokens: int, vocabulary: int) -> None:
        check_vocabulary(tokenizer, vocabulary)
        self._config = config
        self._sequence_tokens = sequence_tokens
        self._domains: dict[str, tuple[int, StoredSequences]] = {}
        wanted = config.validation_sequences * sequence_tokens
        for index, source in enumerate(config.sources if wanted else []):
            held_out = prepare_source(source, tokenizer, config.cache_dir, wanted).validation
            if held_out is not None and held_out.num_tokens:
                stored = StoredSequences(source.name, held_out, sequence_tokens, vocabulary)
                self._domains[source.name] = (index, stored)

    @property
    def domains(self) -> list[str]:
        """Names of the sources that hold something out, in their order."""
        return list(self._domains)

    def num_sequences(self, domain: str) -> int:
        """Sequences of the domain, a padded last one included."""
        tokens = self._domains[domain][1].num_tokens
        return min(self._config.validation_sequences, -(-tokens // self._sequence_tokens))

    def batches(self, domain: str, rank: int, world: int, micro_batch_sequences: int) -> Iterator[TokenBatch]:
        """Batches of one data-parallel rank. All ranks get equally many, so that collectives line up: where
        sequences run out, rows are all padding."""
        source, stored = self._domains[domain]
        total = self.num_sequences(domain)
        per_round = world * micro_batch_sequences
        for begin in range(0, total, per_round):
            pieces = []
            for row in range(micro_batch_sequences):
                index = begin + rank * micro_batch_sequences + row
                nothing = (np.empty(0, np.int64), np.empty(0, np.int64))
                tokens, begins = stored.read(index) if index < total else nothing
                pieces.append(Piece(tokens=tokens, begins=begins, sequence=index, source=source))
            yield pack(
                pieces,
                self._sequence_tokens,
                keep_boundaries=self._config.keep_boundaries,
                restart_positions=self._config.restart_positions,
            )

"""Ask text what the routers of a merged model should start from, in one process, on a GPU if there is one.

python scripts/calibrate.py --method ridge --to ridge.safetensors --sources runs/code runs/prose --text code prose
python scripts/calibrate.py --method gates --to gates.safetensors --sources runs/a runs/b --text a=a.jsonl b=texts/
python scripts/calibrate.py --method domains --to domains.safetensors --sources runs/seed --text code prose legal

ridge and gates: each dense model with the text of its own domain, in the order of the experts. domains: one model,
which embeds all texts. A text is name=FILE or name=FOLDER, or the name alone of a domain of data=embedded. The file is
for init=merge init.calibration=FILE, or init=add_domain; see docs/upcycling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moe_data.batch import TokenBatch
from moe_data.embedded import check_domain
from moe_data.loader import DataConfig, TrainingData, embedded_sources
from moe_data.sources import SourceConfig, SourceKind
from moe_data.tokenizers import Tokenizer
from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.convert.upcycle import calibration
from moe_parallel.convert.upcycle.calibration import Calibration, Method
from moe_parallel.convert.upcycle.map import check_dense, check_same
from moe_parallel.model.transformer import Transformer
from moe_parallel.start import open_pretrained, tokenizer_of


def main(arguments: list[str] | None = None) -> int:
    """Calibrate and write the file. Exit code 2 for a mistake in the arguments."""
    try:
        calibrate(parse(arguments))
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", required=True, type=Method, help=f"{', '.join(method.value for method in Method)}")
    parser.add_argument("--to", required=True, type=Path, help="file to write")
    parser.add_argument("--sources", required=True, nargs="+", help="runs, checkpoints or models' folders")
    parser.add_argument("--text", required=True, nargs="+", help="name=path of each domain, or an embedded one's name")
    parser.add_argument("--tokens", type=int, default=131_072, help="of each domain (%(default)s)")
    parser.add_argument("--sequence-tokens", type=int, default=512, help="of each sequence (%(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=8, help="computed at once (%(default)s)")
    parser.add_argument("--ridge", type=float, default=0.01, help="ridge: added to the sums of squares (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="ridge: divides the logits (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="gates: of AdamW, each batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument("--cache-dir", default=".cache/data", help="folder for tokenized text (%(default)s)")
    return parser.parse_args(arguments)


def calibrate(arguments: argparse.Namespace) -> None:
    """All of it. Raises ValueError where models, texts and method do not fit."""
    for name in ("tokens", "sequence_tokens", "batch_sequences", "ridge", "temperature", "learning_rate"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be positive")
    sources = [open_pretrained("--sources", value) for value in arguments.sources]
    texts = [text_source(text) for text in arguments.text]
    check_sources(arguments.method, sources, texts)
    tokenizer = same_tokenizer(sources)
    vocabulary = sources[0].architecture.vocab_size
    read = [Text(arguments, text, tokenizer, vocabulary) for text in texts]
    tensors = METHODS[arguments.method](arguments, sources, read)
    calibrated = Calibration(arguments.method, [text.name for text in texts], tensors)
    calibrated.save(arguments.to)
    print(f"{arguments.to}: {arguments.method.value} of {', '.join(calibrated.domains)}")


class Text:
    """Batches of one domain, on the device that computes."""

    def __init__(
        self, arguments: argparse.Namespace, source: SourceConfig, tokenizer: Tokenizer, vocabulary: int
    ) -> None:
        rows, length = arguments.batch_sequences, arguments.sequence_tokens
        config = DataConfig(sources=[source], cache_dir=arguments.cache_dir)
        self.name, self._rows = source.name, rows
        self._data = TrainingData(config, tokenizer, length, rows, arguments.seed, vocabulary)
        self._batches = arguments.tokens // (rows * length)
        available = self._data.source_tokens[source.name] // length // rows * rows * length
        if not 0 < self._batches * rows * length <= available:
            raise ValueError(
                f"--tokens {arguments.tokens} must lie in {rows * length} (--sequence-tokens * --batch-sequences).."
                f"{available} (what there is of {source.name})"
            )

    def batches(self, device: torch.device) -> Iterator[TokenBatch]:
        """The same ones each time."""
        for step in range(self._batches):
            yield self._data.batch(step, 0, 0, 1, self._rows).to(device)


def ridge(arguments: argparse.Namespace, sources: list[Pretrained], texts: list[Text]) -> dict[str, torch.Tensor]:
    """Each domain through its own model, layer by layer into sums that all domains share."""
    device, shape = compute_device(), sources[0].architecture
    sums = {n: calibration.RidgeSums(shape.model.dim, len(texts), device) for n in range(shape.model.num_layers)}
    for domain, (source, text) in enumerate(zip(sources, texts, strict=True)):
        print(f"{text.name}: {source.path}", file=sys.stderr)
        calibration.collect(built(source), text.batches(device), domain, sums)
    return calibration.ridge_router(sums, arguments.ridge, arguments.temperature)


def gates(arguments: argparse.Namespace, sources: list[Pretrained], texts: list[Text]) -> dict[str, torch.Tensor]:
    """A gate for each layer of each model, trained on its own domain."""
    device, found = compute_device(), []
    for source, text in zip(sources, texts, strict=True):
        gate_LD, losses = calibration.train_gates(built(source), text.batches(device), arguments.learning_rate)
        print(f"{text.name}: {source.path}, loss {losses[0]:.4f} -> {losses[-1]:.4f} nats", file=sys.stderr)
        found.append(gate_LD)
    return calibration.gate_router(found)


def domains(arguments: argparse.Namespace, sources: list[Pretrained], texts: list[Text]) -> dict[str, torch.Tensor]:
    """The mean of what the head of one model sees of each text."""
    device, model = compute_device(), built(sources[0])
    return {"domains": torch.stack([calibration.mean_hidden(model, text.batches(device)) for text in texts])}


METHODS: dict[Method, Callable[[argparse.Namespace, list[Pretrained], list[Text]], dict[str, torch.Tensor]]] = {
    Method.ridge: ridge,
    Method.gates: gates,
    Method.domains: domains,
}


def built(source: Pretrained) -> Transformer:
    """The whole model in float32, to be evaluated."""
    return build_model(source.architecture, source.weights, device=compute_device()).eval()


def compute_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def text_source(text: str) -> SourceConfig:
    """What one argument of --text names."""
    name, equals, path = text.partition("=")
    if equals:
        kind = SourceKind.jsonl if ".json" in Path(path).name else SourceKind.text
        return SourceConfig(name=name, kind=kind, paths=[path])
    check_domain(name)
    usual = {source.name: source for source in embedded_sources()}  # so that what is held out is never seen here
    return usual.get(name) or SourceConfig(name=name, kind=SourceKind.embedded, max_megabytes=8.0)


def check_sources(method: Method, sources: list[Pretrained], texts: list[SourceConfig]) -> None:
    """Raises ValueError where models do not fit the method, the texts or each other."""
    if method is Method.domains:
        if len(sources) != 1:
            raise ValueError(f"--method domains embeds all texts with one model; --sources names {len(sources)}")
        return
    if len(sources) != len(texts):
        raise ValueError(f"--sources names {len(sources)} models, --text {len(texts)} texts; each model has its own")
    for source in sources:
        check_dense(source.architecture, str(source.path))
    check_same([source.architecture for source in sources[1:]], sources[0].architecture)


def same_tokenizer(sources: list[Pretrained]) -> Tokenizer:
    """Of all sources. Raises ValueError if they have different ones, or none that can be found."""
    found = [tokenizer_of(source.path) for source in sources]
    for source, tokenizer in zip(sources, found):
        if tokenizer.fingerprint != found[0].fingerprint:
            raise ValueError(
                f"{source.path} has the tokenizer {tokenizer.name}, {sources[0].path} has {found[0].name}: "
                "only models of the same one can be merged"
            )
    return found[0]


if __name__ == "__main__":
    sys.exit(main())

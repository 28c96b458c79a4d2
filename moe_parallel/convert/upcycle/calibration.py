"""What text tells of trained models before they are merged: routers by ridge regression, domain embeddings, gates.

All of it comes from models and text of one process and ends in one small file, which `init=merge` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_parallel.model.block import Block
from moe_parallel.model.dense import DenseNetwork
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.routing import ForwardContext

EVALUATION = ForwardContext(training=False)


class Method(str, Enum):
    ridge = "ridge"
    """Rows and offsets of a linear router that tells the domains' tokens apart (DUME)."""
    gates = "gates"
    """A row for each model by itself: of a gate before its own networks, trained on its own text (PHATGOOSE)."""
    domains = "domains"
    """An embedding of each domain (Nexus)."""


# -- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, expert by expert in the order of the domains."""

    method: Method
    domains: list[str]
    """Names, for people."""
    tensors: dict[str, Tensor]
    """float32. ridge: `layers.<n>.weight` (E, D), `layers.<n>.offset` (E) of each layer; gates: the former alone;
    domains: `domains` (E, width)."""

    def save(self, path: Path) -> None:
        """Written beside and renamed, so that a file is whole or not there."""
        beside = path.with_name(f"{path.name}.part")
        about = {"method": self.method.value, "domains": json.dumps(self.domains)}
        save_file({name: tensor.float().contiguous() for name, tensor in self.tensors.items()}, beside, metadata=about)
        beside.replace(path)


def load_calibration(path: str, method: Method) -> Calibration:
    """What `init.calibration` names. Raises ValueError if it is none, or one of another method."""
    option = f"init.calibration={path}"
    if not Path(path).is_file():
        raise ValueError(f"{option} is not a file; scripts/calibrate.py --method {method.value} --to {path} writes it")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{option} is no file of scripts/calibrate.py: {error}") from error
    if about.get("method") != method.value:
        raise ValueError(
            f"{option} was made with --method {about.get('method')}, this start needs one of --method {method.value}"
        )
    return Calibration(method, json.loads(about["domains"]), tensors)


# -- what layers see -----------------------------------------------------------------------------------------------


@contextmanager
def network_inputs(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """While it lasts, a forward pass leaves here what each layer's feed-forward network saw, (B, S, D) by layer."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[layer] = output

        return hook

    handles = [block.ffn_norm.register_forward_hook(keep(block.layer)) for block in decoder(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def decoder(model: Transformer) -> list[Block]:
    """The layers, without those of multi-token prediction."""
    return model.blocks[: model.architecture.model.num_layers]


def valid_tokens(batch: TokenBatch) -> Tensor:
    """bool (B, S): False for padding."""
    return batch.document_BS >= 0


# -- ridge regression ----------------------------------------------------------------------------------------------


class RidgeSums:
    """Sums over tokens from which a linear router follows in closed form; those of parts of the text add up.

    In float64: a sum of 1e7 squares in float32 loses what the last tokens add. Memory: 8 (D + 1)^2 bytes.
    Source: arXiv 2603.29765.
    """

    def __init__(self, dim: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        """Products of all pairs of features; the last one is the constant 1."""
        self.target = torch.zeros(dim + 1, num_experts, dtype=torch.float64, device=device)
        """Column e: the sum of the features of the tokens of domain e."""

    def add(self, x_TD: Tensor, domain: int) -> None:
        """Tokens of one domain; no padding among them."""
        x_TX = torch.nn.functional.pad(x_TD.double(), (0, 1), value=1.0)
        self.gram += x_TX.T @ x_TX
        self.target[:, domain] += x_TX.sum(0)

    def solve(self, ridge: float, temperature: float) -> tuple[Tensor, Tensor]:
        """Rows of a router, (E, D), and its offsets, (E): regression of which domain a token is of, rows divided by
        their length and by the temperature, offsets by the same.

        Raises ValueError for a domain that the features tell nothing of.
        """
        identity = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        row_EX = torch.linalg.solve(self.gram + ridge * identity, self.target).T
        length_E1 = row_EX[:, :-1].norm(dim=1, keepdim=True)
        if not bool((length_E1 > 0).all()):
            raise ValueError("a domain has no text, or its tokens are like those of all others: no router follows")
        row_EX = row_EX / (length_E1 * temperature)
        return row_EX[:, :-1], row_EX[:, -1]


@torch.no_grad()
def collect(model: Transformer, batches: Iterable[TokenBatch], domain: int, sums: dict[int, RidgeSums]) -> None:
    """Add what each layer of a domain's own model sees of the domain's text to the sums of that layer."""
    with network_inputs(model) as seen:
        for batch in batches:
            model(batch, EVALUATION, Output.hidden)
            for layer, x_BSD in seen.items():
                sums[layer].add(x_BSD[valid_tokens(batch)], domain)


def ridge_router(sums: dict[int, RidgeSums], ridge: float, temperature: float) -> dict[str, Tensor]:
    """The tensors of `Method.ridge`."""
    found: dict[str, Tensor] = {}
    for layer, layer_sums in sums.items():
        rows, offsets = layer_sums.solve(ridge, temperature)
        found |= {f"layers.{layer}.weight": rows, f"layers.{layer}.offset": offsets}
    return found


# -- domain embeddings ---------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_hidden(model: Transformer, batches: Iterable[TokenBatch]) -> Tensor:
    """The mean over a text's tokens of what the model's head sees, float64 (D). A stand-in for Nexus' embeddings, which
    come from a model that was made for that.

    Raises ValueError if there is no token.
    """
    total: Tensor | None = None
    tokens = 0
    for batch in batches:
        x_TD = model(batch, EVALUATION, Output.hidden)[0][valid_tokens(batch)].double()
        total = x_TD.sum(0) if total is None else total + x_TD.sum(0)
        tokens += len(x_TD)
    if total is None or tokens == 0:
        raise ValueError("there is no token to take a mean of")
    return total / tokens


# -- gates ---------------------------------------------------------------------------------------------------------


def train_gates(model: Transformer, batches: Iterable[TokenBatch], learning_rate: float) -> tuple[Tensor, list[float]]:
    """A gate for each layer of a dense model: its network's output for token x is multiplied with sigmoid(v . x).

    Only gates learn, one AdamW step a batch, from v = 0. A gate opens where the network helps to predict the domain's
    text. PHATGOOSE (arXiv 2402.05859) trains gates of adapters so; here the whole network is what is gated.

    Returns:
        (layers, D), and the mean cross-entropy in nats of each batch before its step.
    """
    model.requires_grad_(False)
    some = model.embedding.weight
    gate_LD = torch.zeros(len(model.layers), some.shape[1], device=some.device, requires_grad=True)
    optimizer = torch.optim.AdamW([gate_LD], lr=learning_rate, weight_decay=0.0)
    losses = []
    with _gated(model, gate_LD):
        for batch in batches:
            loss = model(batch, EVALUATION, Output.loss)[0][0] / batch.num_targets
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return gate_LD.detach(), losses


@contextmanager
def _gated(model: Transformer, gate_LD: Tensor) -> Iterator[None]:
    def gate(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output * (inputs[0].float() @ gate_LD[layer]).sigmoid().unsqueeze(-1).to(output.dtype)

        return hook

    handles = []
    for block in decoder(model):
        assert isinstance(block.ffn, DenseNetwork), "gates are of dense models"
        handles.append(block.ffn.register_forward_hook(gate(block.layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_router(gates: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of `Method.gates` from the gates of each model, (layers, D): rows with mean 0 and variance 1, divided
    by sqrt(D), so that a logit is a mean of products of standardized features times sqrt(D).

    Raises ValueError for a gate that has not learned.
    """
    gate_LED = torch.stack(gates, dim=1)
    scale_LE1 = gate_LED.std(-1, correction=0, keepdim=True)
    if not bool((scale_LE1 > 0).all()):
        raise ValueError("a gate is still what it was at the start; train it for more tokens")
    row_LED = (gate_LED - gate_LED.mean(-1, keepdim=True)) / scale_LE1 / gate_LED.shape[-1] ** 0.5
    return {f"layers.{layer}.weight": row_ED for layer, row_ED in enumerate(row_LED)}

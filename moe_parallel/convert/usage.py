"""How often a model's experts are used: counted on text, kept in a small file, or what a checkpoint knows of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_data.batch import TokenBatch
from moe_parallel.checkpoint.folder import META
from moe_parallel.convert.checkpoint_source import counts_of_last_step
from moe_parallel.convert.pretrained import Pretrained
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.routing import ForwardContext

Usage = dict[int, Tensor]
"""float64 (E) by number of the layer: slots of each expert, all passes of a chain together."""


@torch.no_grad()
def measure_usage(model: Transformer, batches: Iterable[TokenBatch]) -> Usage:
    """Count the choices of a whole model in evaluation."""
    model.eval()
    found: Usage = {}
    for batch in batches:
        _, stats = model(batch, ForwardContext(training=False), Output.loss)  # with multi-token prediction
        for one in stats:
            count_E = one.count_E.double().cpu()
            found[one.layer] = found[one.layer] + count_E if one.layer in found else count_E
    return found


def save_usage(path: Path, usage: Usage) -> None:
    """As `layers.<number>.count` in a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"layers.{layer}.count": count_E.contiguous() for layer, count_E in sorted(usage.items())}, path)


def load_usage(path: Path, architecture: Architecture) -> Usage:
    """Raises ValueError for a file that is none, or of another model."""
    if not path.is_file():
        raise ValueError(f"init.usage={path} is no file; scripts/count_usage.py writes one")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"init.usage={path} is no file of scripts/count_usage.py: {error}") from error
    found: Usage = {}
    for layer in architecture.moe_layers:
        count_E = stored.get(f"layers.{layer}.count")
        if count_E is None or count_E.shape != (architecture.moe.num_experts,) or not bool((count_E >= 0).all()):
            held = "nothing" if count_E is None else f"{count_E.numel()} numbers"
            raise ValueError(
                f"init.usage={path} has {held} for layer {layer}, not a count for each of its "
                f"{architecture.moe.num_experts} experts; count them in init.sources[0]"
            )
        found[layer] = count_E.double()
    return found


def usage_of_checkpoint(source: Pretrained) -> Usage | None:
    """Counts of the last step of training, where a checkpoint of ours has them: for a balance loss over the batch."""
    if not (source.path / META).is_file():
        return None
    count_LIE = counts_of_last_step(source.path)
    if count_LIE is None or not bool(count_LIE.sum() > 0):
        return None
    shape = source.architecture
    count_LIE = count_LIE.view(shape.num_blocks, -1, shape.moe.num_experts)
    return {layer: count_LIE[layer].sum(0) for layer in shape.moe_layers}

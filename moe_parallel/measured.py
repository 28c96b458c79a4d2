"""What a finished run is found to cost and to do: FLOPs counted while it takes a step, experts of each domain.

FLOPs are those of matrix products and attention, as torch counts them operation by operation: attention counts whole
squares, though half of them is masked. Everything is measured with the weights that the run ended with, because some
routers give a token as many experts as it reaches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moe_data.batch import TokenBatch
from moe_data.loader import TrainingData, ValidationData
from moe_data.prepare import bpe_trainer
from moe_data.tokenizers import build_tokenizer
from moe_parallel import launch
from moe_parallel.checkpoint.checkpointer import Checkpointer
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.convert.verify import expert_cosine
from moe_parallel.engines.native import NativeEngine
from moe_parallel.launch import Launch
from moe_parallel.mesh import ParallelMesh
from moe_parallel.options import architecture, load_config, plain_architecture
from moe_parallel.relations import check
from moe_parallel.run_folder import RunFolder, write_text_atomic


@dataclass(frozen=True)
class Measured:
    """Of one finished run."""

    flops_per_token: float
    """Forward and backward of the run's first batch."""
    specialization: float
    """Total variation distance of a domain's shares of the experts from their mean over the domains, 0 to 1: mean over
    domains and layers."""
    domain_share: dict[str, list[list[float]]]
    """By domain: for each pass of a mixture-of-experts layer the share of each expert, over the validation text."""
    expert_cosine: float | None
    """Mean cosine of the weights of two experts of a layer, over all pairs and layers; None without experts."""


def measure_runs(runs: Sequence[Path]) -> dict[Path, Measured]:
    """Measure finished runs one after the other in this process; what is measured already is read back."""
    found: dict[Path, Measured] = {}
    here: Launch | None = None
    for run in runs:
        kept, result = run / "measured.json", RunFolder(run).result
        if not _is_measured(kept, result):
            here = here or launch.start(timeout_seconds=60)
            write_text_atomic(kept, json.dumps(asdict(_measure(run, here))) + "\n")
        found[run] = Measured(**json.loads(kept.read_text()))
    if here is not None:
        launch.finish()
    return found


def _is_measured(kept: Path, result: Path) -> bool:
    """All of what is measured today, and since the run has ended."""
    if not kept.is_file() or kept.stat().st_mtime < result.stat().st_mtime:
        return False
    return json.loads(kept.read_text()).keys() == {field.name for field in fields(Measured)}


def _measure(run: Path, here: Launch) -> Measured:
    folder = RunFolder(run)
    config = load_config(folder.config)
    layout = check(config, 1)
    tokenizer = build_tokenizer(config.tokenizer, bpe_trainer(config.data.sources, config.data.cache_dir))
    shape = architecture(config, tokenizer.vocab_size)
    dtype = config.train.compute_type(here.device.type)
    mesh = ParallelMesh(layout, here.device.type)
    seed = config.train.seed
    engine = NativeEngine(
        shape, mesh, config.parallel, config.optim, here.device, dtype, dispatch=config.dispatch, seed=seed
    )
    checkpointer = Checkpointer(folder.checkpoints, config.checkpoint)
    path = checkpointer.latest()
    if path is None:
        raise ValueError(f"{folder.checkpoints} has no complete checkpoint to measure; delete {run} and run it again")
    checkpointer.load(path, TorchState(engine.model, None), plain_architecture(shape))
    train = config.train
    data = TrainingData(
        config.data, tokenizer, train.sequence_tokens, train.global_batch_sequences, seed, shape.vocab_size
    )
    micro_batches, size = train.micro_batches(1)
    batches = [data.batch(0, index, 0, 1, size) for index in range(micro_batches)]
    flops = sum(training_flops(engine, batches, train.steps - 1).values())
    validation = ValidationData(config.data, tokenizer, train.sequence_tokens, shape.vocab_size)
    share = {domain: _shares(engine, validation, domain, size) for domain in validation.domains}
    cosines = [expert_cosine(layer) for layer in engine.layers]
    return Measured(
        flops_per_token=flops / sum(batch.num_valid for batch in batches),
        specialization=specialization(list(share.values())),
        domain_share={domain: share_LE.tolist() for domain, share_LE in share.items()},
        expert_cosine=sum(cosines) / len(cosines) if cosines else None,
    )


def training_flops(engine: NativeEngine, batches: list[TokenBatch], step: int) -> dict[Any, int]:
    """FLOPs of a step's forward and backward pass, counted while it runs, by operation. Leaves gradients behind."""
    targets, valid = sum(batch.num_targets for batch in batches), sum(batch.num_valid for batch in batches)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        engine.forward_backward(batches, step, targets, valid)
    return dict(counter.get_flop_counts()["Global"])


def _shares(engine: NativeEngine, validation: ValidationData, domain: str, rows: int) -> Tensor:
    """Share of each expert in the slots of a domain, for each pass."""
    count_LE = engine.zero_sums().count_LE
    for batch in validation.batches(domain, 0, 1, rows):
        count_LE += engine.evaluate(batch).count_LE
    return (count_LE / count_LE.sum(-1, keepdim=True).clamp(min=1)).cpu()


def specialization(shares: Sequence[Tensor]) -> float:
    """Mean total variation distance of the domains' shares (passes, experts) from their mean; 0 without domains."""
    if not shares or not shares[0].numel():
        return 0.0
    share_DLE = torch.stack(list(shares))
    return float((share_DLE - share_DLE.mean(0)).abs().sum(-1).mean() / 2)


# -- operations that torch does not count itself -------------------------------------------------------------------


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _grouped_product(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of rows by a weight for each group, (R, A) x (L, A, B), and of rows by rows, (A, R) x (R, B): each row once."""
    return 2 * left[0] * left[1] * right[-1]


def _up_projection(x, index, gate_up, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape[0]) * gate_up[2]


def _expert_rows(rows, weight, *args, **kwargs) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _grad_hidden(grad, index, weight, down, hidden, *args, **kwargs) -> int:
    return 2 * hidden[0] * down[1] * down[2]


def _grad_weight(left, left_index, right, right_index, end, out, *args, **kwargs) -> int:
    return 2 * (left if left_index is None else left_index)[0] * out[1] * out[2]


_aten, _kernels = torch.ops.aten, torch.ops.moe_kernels
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    _aten._grouped_mm: _grouped_product,
    _kernels.up_projection: _up_projection,
    _kernels.expert_rows: _expert_rows,
    _kernels.grad_hidden: _grad_hidden,
    _kernels.grad_weight: _grad_weight,
}

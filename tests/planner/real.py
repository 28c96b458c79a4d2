"""One step of a real run on gloo, with what it held, and what it sent by a count of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from moe_parallel import options, sequence_exchange
from moe_parallel.options import Config
from moe_parallel.planner.cluster import ClusterConfig, Device
from moe_parallel.planner.rank import build, plannable
from moe_parallel.planner.watch import Watch, Watching
from moe_parallel.relations import check
from tests.batches import make_batch

CONFIGS = Path(__file__).parents[2] / "configs"
LAPTOP = ClusterConfig(device=Device.cpu, nodes=1, ranks_per_node=4)
Sent = dict[tuple[str, int], tuple[int, int]]
"""(calls, bytes) by name of the collective and ranks of the group."""


def config_of(overrides: tuple[str, ...], ranks: int) -> Config:
    """A tiny model whose activations are larger than its tables of tokens."""
    size = ("model=tiny", "model.num_layers=4", "train.sequence_tokens=64", f"parallel.ranks={ranks}")
    return options.composed([*size, *overrides], CONFIGS)


def real_steps(cases: list[tuple[str, ...]]) -> list[tuple[int, Sent]]:
    """For each case the most bytes that were alive in the second step, and what it sent. On every rank of a group."""
    return [_real_step(config_of(overrides, dist.get_world_size())) for overrides in cases]


def _real_step(config: Config) -> tuple[int, Sent]:
    layout = check(config, dist.get_world_size(), "cpu")
    config = plannable(config)
    watch = Watch(LAPTOP)
    engine = build(Watching(watch), config, layout, LAPTOP)
    micro_batches, rows = config.train.micro_batches(layout.batch_ranks)
    length = config.train.sequence_tokens
    mine = layout.batch_rank(dist.get_rank()) * micro_batches * rows
    batches = [make_batch([[length]] * rows, length, 257, mine + i * rows) for i in range(micro_batches)]
    targets = sum(batch.num_targets for batch in batches) * layout.batch_ranks
    valid = sum(batch.num_valid for batch in batches) * layout.batch_ranks
    with engine.mode:
        engine.init_weights(config.init, config.train.seed)
        engine.forward_backward(batches, 0, targets, valid)  # makes the optimizer's state
        engine.step(1e-3, engine.gradient_norm())
    engine.tag_optimizer_state()
    sent: Sent = {}
    with _counting(sent):
        engine.watched_step(batches, 1)
    return watch.live.timeline().peak_bytes, sent


def _counting(sent: Sent) -> Any:
    """Counts calls where Python makes them, and not the operators that the planner looks at."""

    def add(op: str, group: Any, num_bytes: int) -> None:
        ranks = dist.get_world_size(group)
        if ranks > 1:
            calls, before = sent.get((op, ranks), (0, 0))
            sent[op, ranks] = calls + 1, before + num_bytes

    def counted(name: str, op: str, which: int) -> Callable[..., Any]:
        call = getattr(dist, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *(kwargs[k] for k in ("output", "input", "output_tensor", "input_tensor") if k in kwargs)]
            group = kwargs.get("group")
            add(op, group, tensors[which].nbytes)
            return call(*args, **kwargs)

        return wrapper

    send = dist.ProcessGroup.send

    def sends(group: Any, tensors: list[Any], *args: Any) -> Any:
        add("send", group, sum(tensor.nbytes for tensor in tensors))
        return send(group, tensors, *args)

    single = hasattr(dist, "all_gather_single")
    gather, scatter = ("all_gather_single", "reduce_scatter_single") if single else (
        "all_gather_into_tensor", "reduce_scatter_tensor"
    )  # fmt: skip
    stack = mock.patch.multiple(
        dist,
        **{
            "all_to_all_single": counted("all_to_all_single", "all_to_all", 1),
            "all_reduce": counted("all_reduce", "all_reduce", 0),
            gather: counted(gather, "all_gather", 0),
            scatter: counted(scatter, "reduce_scatter", 1),
        },
    )
    return _Both(stack, mock.patch.object(dist.ProcessGroup, "send", sends), mock.patch.multiple(
        sequence_exchange,
        _all_gather=counted(gather, "all_gather", 0),
        _reduce_scatter=counted(scatter, "reduce_scatter", 1),
    ))  # fmt: skip


class _Both:
    """Two context managers as one."""

    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*error)

"""The relations between sections of the options: what must hold before ranks meet, all violations at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.parallelize import sequence_problems
from moe_parallel.learning import learning_problems, routers_learn
from moe_parallel.mesh import Layout, make_layout
from moe_parallel.moe.dispatch.config import DispatchSetting
from moe_parallel.moe.routers.router import BatchShape
from moe_parallel.options import Config, ConfigError, architecture

T = TypeVar("T")


def check(config: Config, ranks: int, device_type: str | None = None) -> Layout:
    """The relations between sections, for these ranks; plans know no device. Raises ConfigError with all problems."""
    problems: list[str] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except ValueError as error:
            problems.append(str(error))
            return None

    layout = attempt(lambda: make_layout(config.parallel, ranks, config.moe.num_experts))
    # A wrong `ep` or `shard` leaves it open how batches are divided no more than a right one does.
    shared = config.parallel.pp * config.parallel.tp * config.parallel.cp
    batch_ranks = ranks // shared if shared > 0 and ranks % shared == 0 else None
    batches = None if batch_ranks is None else attempt(lambda: config.train.micro_batches(batch_ranks))
    # The tokenizer is not known yet.
    shape = attempt(lambda: architecture(config, None if config.model.vocab_size else 1))
    attempt(lambda: config.checkpoint.check_evaluation(config.evaluation.every_steps, config.data.validation_sequences))
    problems += [] if shape is None else learning_problems(config.optim, shape)
    if shape is not None and shape.num_moe_layers and routers_learn(config.optim, shape):
        attempt(config.router.check_learning)
    if device_type is not None:
        attempt(lambda: config.attention.core.check_training(device_type))
        attempt(lambda: config.moe.check_kernel(device_type, config.train.compute_type(device_type), config.model.dim))
        attempt(lambda: config.router.check_device(device_type, config.train.compute_type(device_type)))
        attempt(lambda: config.parallel.check_compiler(device_type))
    if layout is not None:
        problems += _expert_problems(config, layout)
        problems += [] if shape is None else sequence_problems(shape, layout, config.train.sequence_tokens)
        dtype = None if device_type is None else config.train.compute_type(device_type)
        sizes = layout.ep, config.moe.num_experts, config.model.dim, config.router.top_k
        attempt(lambda: config.dispatch.check(DispatchSetting(*sizes, device_type, dtype)))
        if shape is not None:
            setting = EngineSetting(
                shape, layout, config.parallel, config.dispatch, config.optim, device_type, dtype,
                micro_batches=batches,
            )  # fmt: skip
            problems += config.engine.problems(setting)
    if batch_ranks is not None and batches is not None:
        problems += _batch_problems(config)
        parts = config.parallel.cp * config.parallel.tp
        batch = BatchShape(batch_ranks, *batches, config.train.sequence_tokens, parts)
        attempt(lambda: config.router.check_batch(batch, config.moe.num_experts))
        tokens = batch.micro_batch_sequences * batch.sequence_tokens // parts
        attempt(lambda: config.moe.check_tokens(tokens, config.router.top_k))
    if layout is None or problems:
        raise ConfigError(problems)
    return layout


def _expert_problems(config: Config, layout: Layout) -> list[str]:
    model, parts = config.model, layout.expert_shard
    problems = []
    if layout.ep > 1 and model.first_dense_layers == model.num_layers:
        problems.append(
            f"parallel.ep={layout.ep} splits experts, but model.first_dense_layers={model.first_dense_layers} leaves "
            f"none of model.num_layers={model.num_layers}; set parallel.ep=1"
        )
    groups = config.moe.adjugate_groups
    if groups % layout.ep != 0:
        legal = [n for n in range(layout.ep, config.moe.num_experts + 1, layout.ep) if config.moe.num_experts % n == 0]
        problems.append(
            f"moe.adjugate_groups={groups} is not a multiple of parallel.ep={layout.ep}: experts of a group lie on one "
            f"rank; legal values: {legal}"
        )
    for name, width in (("expert_dim", config.moe.expert_dim), ("adjugate_dim", config.moe.adjugate_dim)):
        if layout.ep > 1 and model.dim % parts and width % parts and (name == "expert_dim" or groups):
            problems.append(
                f"parallel.shard={layout.shard} over parallel.ep={layout.ep} leaves {parts} ranks for each expert, "
                f"which divide neither model.dim={model.dim} nor moe.{name}={width}; change one of them"
            )
    if layout.ep > 1 and config.moe.delta_rank is not None:
        for name, (_, *sides) in config.moe.form.shapes(1, model.dim, config.moe.expert_dim).items():
            if all(side % parts for side in sides):
                problems.append(
                    f"parallel.shard={layout.shard} over parallel.ep={layout.ep} leaves {parts} ranks for each expert, "
                    f"which divide no side of its {name} ({' x '.join(map(str, sides))}); change moe.delta_rank="
                    f"{config.moe.delta_rank}, or one of parallel.shard and parallel.ep"
                )
    return problems


def _batch_problems(config: Config) -> list[str]:
    tokens, limit = config.train.sequence_tokens, config.model.max_sequence_tokens
    problems = []
    if limit is not None and tokens > limit:
        problems.append(
            f"train.sequence_tokens={tokens} is more than model.max_sequence_tokens={limit}; shorten the sequence, or "
            "raise the limit"
        )
    return problems

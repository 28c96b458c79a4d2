"""Which options decide what a trained model computes, and where two models differ in them.

Everything counts but what is named here: an option that is new, or that nobody thought of, makes a difference, and so
stands in the way of an export until a class is known that expresses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any

from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.rope import RopeScaling
from moe_parallel.moe.routers.token_choice import GroupScore, TokenChoiceConfig

_TRAINING = {
    "model.vocab_size",  # the architecture has the number that it comes to
    "model.max_sequence_tokens",
    "model.mtp_coefficient",
    "attention.core",
    "moe.capacity_factor",
    "moe.drop_order",
    "moe.renormalize_after_drop",
    "moe.token_rounding",
    "moe.token_rounding_tile",
    "moe.expert_kernel",
    "moe.kernel_table",
    "router.input_jitter",
    "router.random_second",
    "router.kernel",
}
"""Options of training alone, limits, and those that say how the same is computed."""
_ROPE = {
    RopeScaling.none: ("factor",),
    RopeScaling.linear: ("factor",),
    RopeScaling.ntk: ("factor",),
    RopeScaling.llama3: ("factor", "original_sequence_tokens", "low_frequency_factor", "high_frequency_factor"),
    RopeScaling.yarn: (
        "factor", "original_sequence_tokens", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"
    ),
}  # fmt: skip
"""Options that each kind of scaling uses."""


def function_of(architecture: Architecture) -> dict[str, Any]:
    """Options by name, without those that change nothing in this model, defaults that others imply filled in."""
    model, attention, moe, router = architecture.model, architecture.attention, architecture.moe, architecture.router
    found = {"vocab_size": architecture.vocab_size, "attention": type(attention).__name__}
    found |= dict(_flat("model", model)) | dict(_flat("attention", attention))
    used = ("theta", "scaling", *_ROPE[attention.rope.scaling])
    for name in [name for name in found if name.startswith("attention.rope.")]:
        if name.removeprefix("attention.rope.") not in used:
            del found[name]
    if isinstance(attention, GroupedQueryConfig):
        found["attention.num_kv_heads"] = attention.key_heads
        found["attention.head_dim"] = attention.head_width(model.dim)
    if model.first_dense_layers == 0:
        del found["model.ffn_dim"]
    if architecture.num_moe_layers:
        found |= dict(_flat("moe", moe)) | {"router": type(router).__name__} | dict(_flat("router", router))
        found["balance.bias_rate"] = architecture.balance.bias_rate > 0
        if isinstance(router, TokenChoiceConfig):
            if router.num_groups == 1:
                del found["router.top_groups"], found["router.group_score"]
            elif router.group_score is GroupScore.top_sum:  # its meaning depends on other options
                found["router.group_score"] = f"top_sum of {router.top_k // router.top_groups}"
    return {name: value for name, value in found.items() if name not in _TRAINING}


def differences(one: Architecture, other: Architecture) -> dict[str, tuple[Any, Any]]:
    """Options by which the second model cannot be what the first one is as a function of tokens, with both values; None
    where one has no such option. What can be without effect may be in the second one alone: a selection bias, a gate of
    shared experts."""
    a, b = function_of(one), function_of(other)
    found = {name: (a.get(name), b.get(name)) for name in (*a, *(b.keys() - a.keys())) if a.get(name) != b.get(name)}
    for name in ("balance.bias_rate", "moe.shared_expert_gate"):
        if found.get(name) == (False, True):
            del found[name]
    return found


def _flat(section: str, options: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(f"{section}.{field.name}", value)
        else:
            yield f"{section}.{field.name}", value.value if isinstance(value, Enum) else value

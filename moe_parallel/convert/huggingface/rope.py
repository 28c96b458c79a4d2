"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, and `rope_parameters` of transformers 5."""

from __future__ import annotations

from typing import Any

from moe_parallel.convert.huggingface.keys import Keys, check_kind, refuse
from moe_parallel.model.rope import RopeConfig, RopeScaling

_KINDS = {
    "default": RopeScaling.none,
    "linear": RopeScaling.linear,
    "yarn": RopeScaling.yarn,
    "llama3": RopeScaling.llama3,
}
_YARN = ("mscale", "mscale_all_dim", "attention_factor")


def read_rope(keys: Keys) -> RopeConfig:
    """Raises ValueError for a kind of scaling that has no counterpart here."""
    given = keys.several("rope_scaling", dict) or keys.several("rope_parameters", dict)
    if any(isinstance(value, dict) for value in given.values()):
        refuse("rope_parameters", given, "layers with positions of several kinds have no counterpart here")
    for name, value in given.items():
        check_kind(name, value)
    theta = given.get("rope_theta") or keys.get("rope_theta", 10000.0)
    name = given.get("rope_type", given.get("type", "default"))
    if name not in list(_KINDS):  # it may be anything, and need not have a hash
        refuse("rope_type", name, f"only {', '.join(_KINDS)} have a counterpart here")
    share = given.get("partial_rotary_factor") or keys.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        refuse("partial_rotary_factor", share, "heads are rotated as a whole here")
    kind = _KINDS[name]
    if kind is RopeScaling.none:
        return RopeConfig(theta=theta)
    original = (
        keys.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or keys.need("max_position_embeddings")
    )
    factor = given.get("factor") or keys.need("max_position_embeddings") / original
    if kind is RopeScaling.linear:
        return RopeConfig(theta=theta) if factor == 1 else RopeConfig(theta=theta, scaling=kind, factor=factor)
    common: dict[str, Any] = {
        "theta": theta, "scaling": kind, "factor": factor, "original_sequence_tokens": original
    }  # fmt: skip
    if kind is RopeScaling.llama3:
        bands = {which: given.get(f"{which}_freq_factor") for which in ("low", "high")}
        if None in bands.values():
            refuse("rope_type", name, "it needs low_freq_factor and high_freq_factor")
        return RopeConfig(**common, **{f"{which}_frequency_factor": value for which, value in bands.items()})
    if not given.get("truncate", True):
        refuse("truncate", False, "bounds of yarn's bands are whole numbers here")
    common |= {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
    common |= {key: given.get(key) or None for key in _YARN}  # 0 stands for none there
    return RopeConfig(**common)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys that transformers 4 and 5 both read."""
    if rope.scaling is RopeScaling.none:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    names = {kind: name for name, kind in _KINDS.items()}
    if rope.scaling not in names:
        raise ValueError(f"attention.rope.scaling={rope.scaling.value} is in no config.json; it is none, {legal()}")
    scaling: dict[str, Any] = {"rope_type": names[rope.scaling], "type": names[rope.scaling], "factor": rope.factor}
    if rope.scaling is not RopeScaling.linear:
        scaling["original_max_position_embeddings"] = rope.original_sequence_tokens
    if rope.scaling is RopeScaling.llama3:
        scaling |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    if rope.scaling is RopeScaling.yarn:
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {key: getattr(rope, key) for key in _YARN if getattr(rope, key) is not None}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def legal() -> str:
    """Kinds of scaling that a config.json can name."""
    return ", ".join(kind.value for kind in _KINDS.values() if kind is not RopeScaling.none)

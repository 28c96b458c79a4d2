"""A config.json as it is read: keys with the defaults of their class, and refusals of what has no counterpart here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WHOLE = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace", "n_group", "topk_group"),
    *("num_nextn_predict_layers", "num_mtp_layers"),
}
_NUMBERS = {
    *("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor", "factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
}
_SWITCHES = {"tie_word_embeddings", "norm_topk_prob", "qkv_bias", "use_sliding_window", "truncate"}


class Keys:
    """The keys of one config.json.

    Args:
        defaults: what the class in transformers takes where a key is left out.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, defaults

    def __call__(self, name: str) -> Any:
        """The value of a key. Raises ValueError if neither the file nor the class has one, or if it is not of the key's
        kind: a text, say, where a number belongs."""
        if name in self.config:
            check_kind(name, self.config[name])
            return self.config[name]
        if name in self.defaults:
            return self.defaults[name]
        raise ValueError(f"config.json has no {name}, which a model_type={self.config.get('model_type')} needs")

    def get(self, name: str, default: Any = None) -> Any:
        """The same, with a default of the caller's."""
        return self(name) if name in self.config or name in self.defaults else default

    def only(self, name: str, *values: Any) -> None:
        """Refuse a key that is there and has another value than these."""
        if name in self.config and self.config[name] not in values:
            legal = " or ".join(shown(value) for value in values)
            refuse(name, self.config[name], f"only {legal} has a counterpart here")

    def need(self, name: str) -> int:
        """The value of a key that must be a whole number."""
        value = self(name)
        if type(value) is not int:
            refuse(name, value, "a whole number is needed")
        return int(value)

    def several(self, name: str, kind: type[list] | type[dict] = list) -> Any:
        """The value of a key that must be a list, or another collection; an empty one if it is null or left out."""
        value = self.get(name)
        if value is not None and not isinstance(value, kind):
            refuse(name, value, "a list is needed" if kind is list else "an object is needed")
        return value or kind()


def check_kind(name: str, value: Any) -> None:
    """Raise ValueError if a key's value is not null and not of the key's kind."""
    for names, kinds, called in (
        (_WHOLE, (int,), "a whole number"),
        (_NUMBERS, (int, float), "a number"),
        (_SWITCHES, (bool,), "true or false"),
    ):
        if name in names and value is not None and type(value) not in kinds:
            refuse(name, value, f"{called} is needed")


def refuse(name: str, value: Any, why: str) -> None:
    """Raise the ValueError of a key that cannot be expressed."""
    raise ValueError(f"{name}={shown(value)} of config.json: {why}")


def shown(value: Any) -> str:
    """A value as JSON writes it."""
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else str(value)
    )

"""Architectures of Hugging Face's `transformers` as ours, and ours as theirs.

What a class computes is decided by the keys of config.json that its code reads, and all of these are read here. A key
that the class does not read changes nothing and is passed over, whatever its name. Keys whose value would change the
function in a way that has no counterpart here are refused, and so are those that change it only in the released models'
own code (`auto_map`), which is never run. Options of training alone, such as dropout or coefficients of balance losses,
are not taken over.

A class expresses a model of ours if its config.json, read back, gives the same function (`differences`): an option that
nobody thought of stands in the way, instead of being lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moe_parallel.convert.function import differences
from moe_parallel.convert.huggingface.classes import FAMILIES, Family
from moe_parallel.convert.huggingface.keys import Keys, refuse, shown
from moe_parallel.convert.huggingface.rope import write_rope
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig

BIAS_RATE = 0.001
"""Of a model with a selection bias: DeepSeek-V3's (arXiv 2412.19437), whose config.json does not have it."""
_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "transformers_weights": (None,)}
"""The second one names another file of weights than the usual ones."""
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def architecture_of_config(config: Mapping[str, Any]) -> Architecture:
    """What a config.json describes. Of training it says nothing: there are no balance losses.

    Raises:
        ValueError: a class that is not known here, or a key whose value has no counterpart; says which.
    """
    family = FAMILIES[_known(config.get("model_type"))]
    try:
        return _read(family, Keys(config, {**_DEFAULTS, **family.defaults}))
    except ValidationError as error:  # of our options: the text for users is within
        told = "; ".join(str(found.get("ctx", {}).get("error", found["msg"])) for found in error.errors())
        raise ValueError(f"config.json describes a model that cannot be made: {told}") from None


def _read(family: Family, keys: Keys) -> Architecture:
    for name, values in {**_ONLY, **family.only}.items():
        keys.only(name, *values)
    if family.window is not None and family.window(keys):
        _check_window(keys)
    method = keys.several("quantization_config", dict).get("quant_method", "fp8")
    if method != "fp8":
        refuse("quant_method", method, "of quantized weights only fp8 with scales of blocks can be read")
    attention, experts = family.read(keys)
    layers, vocabulary = keys.need("num_hidden_layers"), keys.need("vocab_size")
    first = layers if experts is None else min(experts.first_dense_layers, layers)
    model = ModelConfig(
        dim=keys.need("hidden_size"),
        num_layers=layers,
        first_dense_layers=first,
        ffn_dim=keys.need("intermediate_size") if first else ModelConfig.ffn_dim,
        vocab_size=vocabulary,
        tie_embeddings=bool(keys("tie_word_embeddings")),
        norm_epsilon=keys("rms_norm_eps"),
        max_sequence_tokens=keys.get("max_position_embeddings"),
        mtp_layers=_mtp_layers(keys),
    )
    moe, router = (MoEConfig(), TokenChoiceConfig()) if experts is None else (experts.moe, experts.router)
    balance = BalanceConfig(bias_rate=BIAS_RATE if experts is not None and experts.has_bias else 0.0)
    return Architecture(model, attention, moe, router, balance, vocabulary)


def config_of_architecture(architecture: Architecture, family: str | None = None) -> dict[str, Any]:
    """A config.json that describes a model, of the first class that expresses it.

    Sequences may be as long as model.max_sequence_tokens; where that is null, as what the rotary positions are for.

    Args:
        family: a model_type; None takes any class of transformers itself.
    Raises:
        ValueError: no class, or not this one, expresses it; names the options in the way.
    """
    attention = type(architecture.attention)
    public = [kind for kind, known in FAMILIES.items() if known.public and known.attention is attention]
    attempts: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for kind in public if family is None else [_known(family)]:
        config, in_the_way = attempts[kind] = _attempt(kind, architecture)
        if not in_the_way:
            return config
    if family is not None:
        raise ValueError(f"{FAMILIES[family].class_name} does not express this model: {'; '.join(in_the_way)}")
    # Where a config.json could be made, its differences are all there is in the way; else there may be more.
    made = [kind for kind, (config, _) in attempts.items() if config]
    nearest = [min(made, key=lambda kind: len(attempts[kind][1]))] if made else list(attempts)
    told = [f"{FAMILIES[kind].class_name}, but {'; '.join(attempts[kind][1])}" for kind in nearest]
    raise ValueError(f"no public class of transformers expresses this model; nearest is {'. Or '.join(told)}")


def most_positions(architecture: Architecture) -> int:
    """Tokens of the longest sequence: model.max_sequence_tokens, or what the rotary positions are for."""
    rope = architecture.attention.rope
    return architecture.model.max_sequence_tokens or int(rope.original_sequence_tokens * rope.factor)


def _known(kind: Any) -> str:
    if kind not in list(FAMILIES):  # it may be anything, and need not have a hash
        raise ValueError(f"model_type={kind} is not known here; known are {', '.join(FAMILIES)}")
    return kind


def _mtp_layers(keys: Keys) -> int:
    """Modules of multi-token prediction, by the names of the released files and of transformers."""
    if keys("model_type") != "deepseek_v3":
        return 0
    return keys.get("num_nextn_predict_layers", keys.get("num_mtp_layers")) or 0


def _check_window(keys: Keys) -> None:
    """Within sequences that are no longer than it a window leaves nothing out."""
    window, longest = keys.need("sliding_window"), keys.get("max_position_embeddings")
    if longest is None or window < longest:
        refuse(
            "sliding_window",
            window,
            f"each token sees all before it here, and max_position_embeddings={shown(longest)} is longer; for "
            f"sequences within the window set max_position_embeddings={window} in config.json",
        )


def _attempt(kind: str, architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """The config.json of one class, and what of the model it does not express. Empty if there can be none."""
    family, model, attention = FAMILIES[kind], architecture.model, architecture.attention
    if type(attention) is not family.attention:
        return {}, [f"its attention is of {family.attention.__name__}, not of {type(attention).__name__}"]
    if architecture.num_moe_layers and type(architecture.router) is not TokenChoiceConfig:
        return {}, [f"its router is of TokenChoiceConfig, not of {type(architecture.router).__name__}"]
    rope = attention.rope
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "max_position_embeddings": most_positions(architecture),
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": architecture.vocab_size,
    }
    try:
        config |= write_rope(rope) | family.write(architecture)
        found = differences(architecture, architecture_of_config(config))
    except ValueError as error:
        return {}, [str(error)]
    return config, [f"{name}={shown(ours)}, there {shown(theirs)}" for name, (ours, theirs) in found.items()]

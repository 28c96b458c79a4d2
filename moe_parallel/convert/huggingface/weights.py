"""Weights of Hugging Face's `transformers` under our names, and ours under the names of their files.

A table of links (`_links`) says which of their tensors make up one of ours; it is read in both directions. Files have
each expert's weights by themselves; transformers 5 has them stacked in memory, as we do. Both are read, the first is
written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_parallel.convert.huggingface.families import architecture_of_config
from moe_parallel.convert.lazy import (
    Cast,
    Constant,
    Joined,
    Lazy,
    Scaled,
    Stacked,
    columns_of,
    expert_of,
    row_boxes,
    rows_of,
)
from moe_parallel.convert.lazy_state import PART_BYTES
from moe_parallel.convert.pretrained import shapes_of
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig

log = logging.getLogger(__name__)

_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$|\.\d+\.(embed_tokens|shared_head\.head)\.weight$|\.mlp\.expert_bias$")
"""Tensors of files that say nothing new: frequencies, what multi-token prediction shares with the model, and a bias
that Grove's code has and does not use."""
FLOAT32 = re.compile(r"\.e_score_correction_bias$")
"""Tensors that are float32 in files of any type: rounded, they would choose other experts."""


@dataclass(frozen=True)
class _Link:
    """One of our tensors and what it is made of."""

    ours: str
    theirs: tuple[str, ...]
    """Joined along rows; with a place for the expert's number where each expert has its own."""
    experts: int = 0
    """Stacked; 0 for what is no stack."""
    stack: str = ""
    """Their name of the whole stack, in files that have it so."""
    swapped: bool = False
    """The halves of the columns have changed places."""

    def names(self) -> list[tuple[str, ...]]:
        """Of each expert, or the only ones."""
        return [tuple(name.format(e) for name in self.theirs) for e in range(max(1, self.experts))]

    def found(self, theirs: Mapping[str, Lazy]) -> list[str]:
        """What it is made of in these files."""
        return [self.stack] if self.stack in theirs else [name for group in self.names() for name in group]


def import_weights(config: Mapping[str, Any], theirs: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """All parameters and buffers of our model, float32.

    Args:
        config: config.json, see `config_of_weights`.
        theirs: all tensors of the files, by name.
    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, or is not known: none is passed over
            that could change the function.
    """
    architecture = architecture_of_config(config)
    found = {_in_memory(name): lazy for name, lazy in theirs.items()}
    links = list(_links(architecture, str(config["model_type"])))
    absent = [name for link in links for name in link.found(found) if name not in found]
    if absent:
        raise ValueError(f"the files have no {_some(absent)}, which their config.json asks for")
    used = {name for link in links for group in [(link.stack,), *link.names()] for name in group}
    used |= {"lm_head.weight"} if architecture.model.tie_embeddings else set()
    unknown = [name for name in found if name not in used and not _UNUSED.search(name)]
    further = [name for name in unknown if _is_prediction(name, architecture, config)]
    if further:
        log.warning("of multi-token prediction, which config.json has not, the files have %s: left out", _some(further))
        unknown = [name for name in unknown if name not in further]
    if unknown:
        raise ValueError(f"nothing in config.json says what {_some(unknown)} of the files are for")
    parts = {link.ours: link.found(found) for link in links}
    numbers = [name for names in parts.values() for name in names if not found[name].dtype.is_floating_point]
    if numbers:
        raise ValueError(f"{_some(numbers)} of the files are {found[numbers[0]].dtype}, which is no type of weights")
    ours = {link.ours: _float32(_made(link, found)) for link in links}
    for name, shape in shapes_of(architecture).items():
        if ours[name].shape != shape:
            told = f"{_some(parts[name])} of the files make up {name} of shape {ours[name].shape}"
            raise ValueError(f"{told}, by their config.json {shape}")
    return ours


def export_weights(architecture: Architecture, config: Mapping[str, Any], ours: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """All tensors of the files that transformers and others read, in the type of ours.

    Args:
        config: of `config_of_architecture`.
        ours: all parameters and buffers of our model.
    """
    kind = str(config["model_type"])
    found: dict[str, Lazy] = {}
    ours = {**ours, **_without_effect(architecture, architecture_of_config(config), ours)}
    for link in _links(architecture_of_config(config), kind):
        for expert, names in enumerate(link.names()):
            whole = expert_of(ours[link.ours], expert) if link.experts else ours[link.ours]
            whole = _swapped(whole) if link.swapped else whole
            rows = whole.shape[0] // len(names)
            for part, name in enumerate(names):
                found[name] = whole if len(names) == 1 else rows_of(whole, part * rows, rows)
    for layer in range(architecture.model.num_layers, architecture.num_blocks):  # as the released files have it
        found[f"model.layers.{layer}.embed_tokens.weight"] = ours["embedding.weight"]
        found[f"model.layers.{layer}.shared_head.head.weight"] = ours[
            "embedding.weight" if architecture.model.tie_embeddings else "head.weight"
        ]
    return {_in_files(name, kind): lazy for name, lazy in found.items()}


def _without_effect(ours: Architecture, theirs: Architecture, weights: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """What a class has and a model does not: a selection bias of zeros; a gate of shared experts that is 1/2 for all
    tokens, beside weights that are doubled for it."""
    found: dict[str, Lazy] = {}
    for router in [name for name in weights if name.endswith(".router.weight")]:
        layer = router.removesuffix(".router.weight")
        if theirs.balance.bias_rate > 0 and ours.balance.bias_rate == 0:
            found[f"{layer}.router.bias"] = Constant((ours.moe.num_experts,))
        if theirs.moe.shared_expert_gate and not ours.moe.shared_expert_gate:
            found[f"{layer}.shared_gate.weight"] = Constant((1, ours.model.dim))
            found[f"{layer}.shared.down.weight"] = Scaled(weights[f"{layer}.shared.down.weight"], 2.0)
    return found


def config_of_weights(config: Mapping[str, Any], theirs: Mapping[str, Lazy]) -> dict[str, Any]:
    """config.json as the files are, with a warning where they differ.

    transformers drops the weights of multi-token prediction when it saves a model, and leaves the key that announces
    them: then there is none. A head of its own beside tied embeddings is taken as it is, as transformers 5 does; to
    know it, both are read.
    """
    layers, settled = config.get("num_hidden_layers"), dict(config)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        if settled.get(name) and f"model.layers.{layers}.eh_proj.weight" not in theirs:
            log.warning("config.json says %s=%s, but the files have no such layers: set to 0", name, settled[name])
            settled[name] = 0
    embedding, head = theirs.get("model.embed_tokens.weight"), theirs.get("lm_head.weight")
    if (
        settled.get("tie_word_embeddings")
        and embedding is not None
        and head is not None
        and not _equal(embedding, head)
    ):
        log.warning(
            "config.json says tie_word_embeddings=true, but the files have another lm_head.weight: set to false"
        )
        settled["tie_word_embeddings"] = False
    return settled


def _equal(one: Lazy, other: Lazy) -> bool:
    """All of their elements, a part at a time."""
    boxes = row_boxes(one.shape, one.dtype, PART_BYTES)
    return one.shape == other.shape and all(
        torch.equal(one.read(box).float(), other.read(box).float()) for box in boxes
    )


def _is_prediction(name: str, architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether it belongs to a layer behind the last one, which transformers does not load either."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return config["model_type"] == "deepseek_v3" and layer is not None and int(layer[1]) >= architecture.num_blocks


def _made(link: _Link, theirs: Mapping[str, Lazy]) -> Lazy:
    if link.stack in theirs:
        return theirs[link.stack]
    parts = []
    for names in link.names():
        found = [theirs[name] for name in names]
        parts.append(found[0] if len(found) == 1 else Joined(found))
    made = Stacked(parts) if link.experts else parts[0]
    return _swapped(made) if link.swapped else made


def _swapped(lazy: Lazy) -> Lazy:
    half = lazy.shape[-1] // 2
    return Joined([columns_of(lazy, half, half), columns_of(lazy, 0, half)], dim=1)


def _float32(lazy: Lazy) -> Lazy:
    return lazy if lazy.dtype is torch.float32 else Cast(lazy, torch.float32)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# -- names -------------------------------------------------------------------------------------------------------------

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _in_memory(name: str) -> str:
    """A name of Mixtral's files as the other classes would have it; others are unchanged."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    for usual, theirs in _MIXTRAL.items():
        name = re.sub(rf"(\.experts\.\d+)\.{theirs}\.weight$", rf"\1.{usual}.weight", name)
    return name


def _in_files(name: str, kind: str) -> str:
    if kind != "mixtral":
        return name
    for usual, theirs in _MIXTRAL.items():
        name = re.sub(rf"(\.experts\.\d+)\.{usual}\.weight$", rf"\1.{theirs}.weight", name)
    return name.replace(".mlp.", ".block_sparse_moe.")


def _links(architecture: Architecture, kind: str) -> Iterator[_Link]:
    """All of our tensors."""
    model = architecture.model
    yield _Link("embedding.weight", ("model.embed_tokens.weight",))
    yield _Link("norm.weight", ("model.norm.weight",))
    if not model.tie_embeddings:
        yield _Link("head.weight", ("lm_head.weight",))
    for layer in range(architecture.num_blocks):
        further = layer - model.num_layers
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        if further >= 0:
            ours = f"mtp.{further}"
            yield from _of_prediction(ours, theirs)
        yield _Link(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield _Link(f"{ours}.ffn_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for name, their_name in _of_attention(architecture):
            yield _Link(f"{ours}.attention.{name}", (f"{theirs}.self_attn.{their_name}",))
        if layer in architecture.moe_layers:
            yield from _of_experts(architecture, kind, f"{ours}.ffn", f"{theirs}.mlp")
        else:
            for name in ("gate", "up", "down"):
                yield _Link(f"{ours}.ffn.{name}.weight", (f"{theirs}.mlp.{name}_proj.weight",))


def _of_prediction(ours: str, theirs: str) -> Iterator[_Link]:
    """What a module of multi-token prediction has besides its layer. It joins the token before the hidden state there,
    after it here."""
    for name, their_name in (("hidden_norm", "hnorm"), ("token_norm", "enorm"), ("norm", "shared_head.norm")):
        yield _Link(f"{ours}.{name}.weight", (f"{theirs}.{their_name}.weight",))
    yield _Link(f"{ours}.projection.weight", (f"{theirs}.eh_proj.weight",), swapped=True)


def _of_attention(architecture: Architecture) -> Iterator[tuple[str, str]]:
    attention = architecture.attention
    yield "output.weight", "o_proj.weight"
    if isinstance(attention, LatentConfig):
        if attention.q_rank is None:
            yield "query.weight", "q_proj.weight"
        else:
            yield from (("query_down.weight", "q_a_proj.weight"), ("query_up.weight", "q_b_proj.weight"))
            yield "query_norm.weight", "q_a_layernorm.weight"
        yield from (("latent_down.weight", "kv_a_proj_with_mqa.weight"), ("latent_up.weight", "kv_b_proj.weight"))
        yield "latent_norm.weight", "kv_a_layernorm.weight"
        return
    assert isinstance(attention, GroupedQueryConfig)
    for name in ("query", "key", "value"):
        yield f"{name}.weight", f"{name[0]}_proj.weight"
        if attention.qkv_bias:
            yield f"{name}_bias", f"{name[0]}_proj.bias"
    if attention.qk_norm is not QKNorm.none:
        yield from (("query_norm.weight", "q_norm.weight"), ("key_norm.weight", "k_norm.weight"))


def _of_experts(architecture: Architecture, kind: str, ours: str, theirs: str) -> Iterator[_Link]:
    moe = architecture.moe
    each = f"{theirs}.experts.{{}}"
    yield _Link(f"{ours}.router.weight", (f"{theirs}.gate.weight",))
    if architecture.balance.bias_rate > 0:
        yield _Link(f"{ours}.router.bias", (f"{theirs}.gate.e_score_correction_bias",))
    gate_up = f"{each}.gate_proj.weight", f"{each}.up_proj.weight"
    yield _Link(f"{ours}.experts.gate_up", gate_up, moe.num_experts, f"{theirs}.experts.gate_up_proj")
    yield _Link(f"{ours}.experts.down", (f"{each}.down_proj.weight",), moe.num_experts, f"{theirs}.experts.down_proj")
    if moe.adjugate_groups > 0:
        each = f"{theirs}.chunk_experts.{{}}"
        gate_up = f"{each}.gate_proj.weight", f"{each}.up_proj.weight"
        yield _Link(f"{ours}.experts.adjugates.gate_up", gate_up, moe.adjugate_groups)
        yield _Link(f"{ours}.experts.adjugates.down", (f"{each}.down_proj.weight",), moe.adjugate_groups)
    if moe.num_shared_experts > 0:
        shared = f"{theirs}.shared_expert" if kind == "qwen2_moe" else f"{theirs}.shared_experts"
        yield _Link(f"{ours}.shared.gate_up.weight", (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"))
        yield _Link(f"{ours}.shared.down.weight", (f"{shared}.down_proj.weight",))
        if moe.shared_expert_gate:
            yield _Link(f"{ours}.shared_gate.weight", (f"{shared}_gate.weight",))

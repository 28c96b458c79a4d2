"""Where each element of a Megatron-Core weight lies in our weights.

Megatron packs queries, keys and values of each group of heads into one matrix, gate and up projections into another,
and cuts both over tensor-parallel ranks. Every one of these is a list of consecutive ranges of our tensors, so that
any part of a Megatron weight, such as the range that a rank of its distributed optimizer holds, is known to be a few
ranges of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_parallel.checkpoint.pieces import Box
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a flattened Megatron weight, which are consecutive in a flattened box of one of ours."""

    name: str
    """Of our weight."""
    shape: tuple[int, ...]
    """Of the whole of it."""
    box: Box
    start: int
    """Place of the first element in the flattened box."""
    count: int


@dataclass(frozen=True)
class Cut:
    """Which part of split weights a rank has: of heads, widths and vocabulary by `tp`, of experts by `ep`."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0


class MegatronWeights:
    """Names and places of one rank's weights, layers numbered as in the whole model.

    Raises ValueError where a model has parts that Megatron-Core's layers do not.
    """

    def __init__(self, architecture: Architecture, cut: Cut = Cut()) -> None:
        problems = attention_problems(architecture)
        if problems:
            raise ValueError(problems[0])
        self.architecture, self.cut = architecture, cut

    def segments(self, name: str) -> list[Segment]:
        """The elements of a Megatron weight, in their order. Raises ValueError for a name that is none of a model's."""
        model, vocabulary = self.architecture.model, self.architecture.vocab_size
        whole = (vocabulary, model.dim)
        if name == "embedding.word_embeddings.weight":
            return [self._rows("embedding.weight", whole)]
        if name == "output_layer.weight":
            return [self._rows("embedding.weight" if model.tie_embeddings else "head.weight", whole)]
        if name == "decoder.final_layernorm.weight":
            return [_whole("norm.weight", (model.dim,))]
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if found is None:
            raise ValueError(f"{name} is no weight of a Megatron-Core GPT model that this toolkit knows")
        return list(self._of_layer(int(found[1]), found[2]))

    def _of_layer(self, layer: int, name: str) -> Iterator[Segment]:
        model, attention = self.architecture.model, self.architecture.attention
        assert isinstance(attention, GroupedQueryConfig)
        ours, dim, head = f"layers.{layer}.", model.dim, attention.head_width(model.dim)
        if name == "input_layernorm.weight":
            yield _whole(f"{ours}attention_norm.weight", (dim,))
        elif name == "pre_mlp_layernorm.weight":
            yield _whole(f"{ours}ffn_norm.weight", (dim,))
        elif name in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
            which = "query_norm" if ".q_" in name else "key_norm"
            yield _whole(f"{ours}attention.{which}.weight", (head,))
        elif name == "self_attention.linear_qkv.weight":
            yield from self._attention_inputs(ours, attention, head, ".weight", (dim,))
        elif name == "self_attention.linear_qkv.bias" and attention.qkv_bias:
            yield from self._attention_inputs(ours, attention, head, "_bias", ())
        elif name == "self_attention.linear_proj.weight":
            yield self._columns(f"{ours}attention.output.weight", (dim, attention.num_heads * head))
        elif name.startswith("mlp.") and layer < model.first_dense_layers:
            yield from self._dense_network(ours, name)
        elif name.startswith("mlp."):
            yield from self._experts(ours, name.removeprefix("mlp."))
        else:
            raise ValueError(f"layer {layer} has no weight {name} in a model that this toolkit knows")

    def _attention_inputs(
        self, ours: str, attention: GroupedQueryConfig, head: int, kind: str, row: tuple[int, ...]
    ) -> Iterator[Segment]:
        """For each head of keys: the heads of queries that share it, then the key, then the value.

        Args:
            kind, row: end of the names, and shape of a row.
        """
        groups = attention.key_heads
        shared = attention.num_heads // groups
        query, key = (attention.num_heads * head, *row), (groups * head, *row)
        first = self.cut.tp_rank * groups // self.cut.tp
        for group in range(first, first + groups // self.cut.tp):
            yield _range(f"{ours}attention.query{kind}", query, group * shared * head, shared * head)
            yield _range(f"{ours}attention.key{kind}", key, group * head, head)
            yield _range(f"{ours}attention.value{kind}", key, group * head, head)

    def _dense_network(self, ours: str, name: str) -> Iterator[Segment]:
        model = self.architecture.model
        if name == "mlp.linear_fc1.weight":
            yield self._rows(f"{ours}ffn.gate.weight", (model.ffn_dim, model.dim))
            yield self._rows(f"{ours}ffn.up.weight", (model.ffn_dim, model.dim))
        elif name == "mlp.linear_fc2.weight":
            yield self._columns(f"{ours}ffn.down.weight", (model.dim, model.ffn_dim))
        else:
            raise ValueError(f"a dense network has no weight {name}")

    def _experts(self, ours: str, name: str) -> Iterator[Segment]:
        """Of Megatron's own mixture-of-experts layer. Our layers inside of a Megatron model keep their names."""
        moe, dim = self.architecture.moe, self.architecture.model.dim
        num, wide = moe.num_experts, 2 * moe.expert_dim
        first, each = self.cut.ep_rank * num // self.cut.ep, num // self.cut.ep
        shared = moe.num_shared_experts * moe.expert_dim
        if name == "router.weight":
            yield _whole(f"{ours}ffn.router.weight", (num, dim))
        elif name == "router.expert_bias":
            yield _whole(f"{ours}ffn.router.bias", (num,))
        elif name == "experts.experts.linear_fc1.weight":
            yield _range(f"{ours}ffn.experts.gate_up", (num, wide, dim), first, each)
        elif name == "experts.experts.linear_fc2.weight":
            yield _range(f"{ours}ffn.experts.down", (num, dim, moe.expert_dim), first, each)
        elif name == "shared_experts.linear_fc1.weight":
            for half in range(2):
                yield self._rows(f"{ours}ffn.shared.gate_up.weight", (2 * shared, dim), half * shared, shared)
        elif name == "shared_experts.linear_fc2.weight":
            yield self._columns(f"{ours}ffn.shared.down.weight", (dim, shared))
        elif name == "shared_experts.gate_weight":
            yield _whole(f"{ours}ffn.shared_gate.weight", (1, dim))
        else:
            raise ValueError(f"a mixture-of-experts layer has no weight mlp.{name} that this toolkit knows")

    def _rows(self, name: str, shape: tuple[int, int], first: int = 0, rows: int | None = None) -> Segment:
        """This rank's part of `rows` rows from `first`."""
        each = (shape[0] if rows is None else rows) // self.cut.tp
        return _range(name, shape, first + self.cut.tp_rank * each, each)

    def _columns(self, name: str, shape: tuple[int, int]) -> Segment:
        each = shape[1] // self.cut.tp
        box = (0, self.cut.tp_rank * each), (shape[0], each)
        return Segment(name, shape, box, 0, shape[0] * each)


def experts_of_rank(name: str, shape: Sequence[int], weights: MegatronWeights) -> Segment:
    """A weight of our own layer inside of a Megatron model: whole, but for experts, of which a rank has some."""
    if not re.search(r"\.experts\.(adjugates\.)?(gate_up|down)$", name):
        return _whole(name, tuple(shape))
    moe, cut = weights.architecture.moe, weights.cut
    num = moe.adjugate_groups if ".adjugates." in name else moe.num_experts
    return _range(name, (num, *shape[1:]), cut.ep_rank * num // cut.ep, num // cut.ep)


def attention_problems(architecture: Architecture) -> list[str]:
    """What of attention has no counterpart in Megatron-Core's local layers."""
    attention = architecture.attention
    if not isinstance(attention, GroupedQueryConfig):
        return ["Megatron-Core's local layers have no latent attention that is equal to ours; choose attention=gqa"]
    if attention.qk_norm.value == "full":
        return [
            "attention.qk_norm=full normalizes all heads together, Megatron-Core each by itself; set "
            "attention.qk_norm=head or none"
        ]
    return []


def _whole(name: str, shape: tuple[int, ...]) -> Segment:
    return _range(name, shape, 0, shape[0])


def _range(name: str, shape: tuple[int, ...], first: int, rows: int) -> Segment:
    """Consecutive rows."""
    row = math.prod(shape[1:])
    box = (0,) * len(shape), shape
    return Segment(name, shape, box, first * row, rows * row)

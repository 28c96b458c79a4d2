"""Sizes and costs of a model from its options alone: parameters, FLOPs, memory. Nothing is built.

Conventions. Active parameters are those that one token uses: everything dense, with embedding and head, the shared
experts and its routed ones, as published counts of DeepSeekMoE, OLMoE, Qwen3 and Mixtral have it. Chained experts are
used, and counted in FLOPs, once in each iteration. Multi-token prediction, where there is any, is counted as in
training: its layers are used, and the head once for each. A multiply-add is 2 FLOPs. Backward costs twice forward.
Recomputation is not counted, nor is the second computation of the head's logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_parallel.mesh import Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.loss import slice_words
from moe_parallel.moe.chain import Renormalize


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of all parameters of a model, by what a token does with them."""

    embedding: int
    """Looked up, not multiplied."""
    head: int
    """Multiplied; 0 if tied, where the embedding's weight is used again."""
    matrices: int
    """All other weights that every token is multiplied with: attention, dense layers, shared experts, routers."""
    norms: int
    """Weights of norms, scales and biases."""
    routed: int
    """All routed experts of all layers, and their adjugates."""
    routed_active: int
    """The experts of each layer that one token takes, on average where that varies; different ones in each iteration
    of a chain, as far as there are so many, and in different groups where they have adjugates."""
    routed_products: int
    """Weights of their matrices, which a token is multiplied with: other numbers where a form makes them of fewer."""
    expert_base: int = 0
    """What the experts of each layer are differences from."""
    repeated: int = 0
    """Weights that later iterations of a chain multiply a token with again."""

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return self.embedding + self.head + self.matrices + self.norms + self.routed + self.expert_base

    @property
    def active(self) -> int:
        """What one token uses."""
        return self.total - self.routed + self.routed_active


def count_parameters(architecture: Architecture) -> ParameterCounts:
    """Count by the shapes that the modules will have."""
    model, moe = architecture.model, architecture.moe
    attention_matrices, attention_norms = _attention_parameters(architecture)
    chain, router = moe.chain, architecture.router
    later = chain.iterations - 1
    shared = 3 * model.dim * moe.num_shared_experts * moe.expert_dim + model.dim * moe.shared_expert_gate
    moe_matrices = shared + router.num_weights(model.dim, moe.num_experts) * (1 + later * chain.own_routers)
    moe_vectors = later * chain.learned_scale
    if chain.renormalize is Renormalize.per_iteration:
        moe_vectors += later * model.dim
    moe_layers, mtp = architecture.num_moe_layers, model.mtp_layers
    dense_layers = architecture.num_blocks - moe_layers
    expert = 3 * model.dim * moe.expert_dim
    taken = router.top_k * chain.iterations
    distinct = min(taken, moe.num_experts)
    repeated = later * shared * chain.shared_every_iteration + (taken - distinct) * expert
    adjugate = 3 * model.dim * moe.adjugate_dim if moe.adjugate_groups else 0
    groups_taken = min(router.top_k, moe.adjugate_groups) * chain.iterations  # at most: each once in a pass
    distinct_groups = min(groups_taken, moe.adjugate_groups)
    repeated += (groups_taken - distinct_groups) * adjugate
    if not chain.own_routers:
        repeated += later * router.num_products(model.dim, moe.num_experts)
        repeated += later * router.carry_weights(moe.num_experts)
    held = sum(math.prod(shape) for shape in moe.form.shapes(1, model.dim, moe.expert_dim).values())
    table = architecture.vocab_size * model.dim
    return ParameterCounts(
        embedding=table,
        head=0 if model.tie_embeddings else table,
        matrices=architecture.num_blocks * attention_matrices
        + dense_layers * 3 * model.dim * model.ffn_dim
        + moe_layers * moe_matrices
        + _carry_weights(architecture)
        + mtp * 2 * model.dim**2,
        norms=architecture.num_blocks * (2 * model.dim + attention_norms)
        + (1 + 3 * mtp) * model.dim
        + moe_layers * moe_vectors,
        routed=moe_layers * (moe.num_experts * held + moe.adjugate_groups * adjugate),
        routed_active=moe_layers * (distinct * held + distinct_groups * adjugate),
        routed_products=moe_layers * (distinct * expert + distinct_groups * adjugate),
        expert_base=moe_layers * expert * moe.form.uses_base,
        repeated=moe_layers * repeated,
    )


def made_weights(architecture: Architecture) -> int:
    """Elements of the experts' matrices of all layers that their form makes of the parameters; 0 if they are those."""
    moe = architecture.moe
    expert = 3 * architecture.model.dim * moe.expert_dim
    return architecture.num_moe_layers * moe.num_experts * expert * moe.form.makes_weights


def _carry_weights(architecture: Architecture) -> int:
    """Weights by which routers make use of what others hand to them: of all but the first one."""
    chain = architecture.moe.chain
    routers = architecture.num_moe_layers * (chain.iterations if chain.own_routers else 1)
    first = chain.own_routers or chain.iterations == 1  # one that a chain shares gets something all the same
    return max(0, routers - first) * architecture.router.carry_weights(architecture.moe.num_experts)


def _not_multiplied(architecture: Architecture) -> int:
    """Weights of routers that tokens are not multiplied with, such as offsets, less what is made of them instead."""
    moe, router, dim = architecture.moe, architecture.router, architecture.model.dim
    routers = architecture.num_moe_layers * (moe.chain.iterations if moe.chain.own_routers else 1)
    return routers * (router.num_weights(dim, moe.num_experts) - router.num_products(dim, moe.num_experts))


def _attention_parameters(architecture: Architecture) -> tuple[int, int]:
    """Weights in matrices, and in norms and biases, of one layer's attention."""
    dim, attention = architecture.model.dim, architecture.attention
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        query = heads * attention.query_head_dim
        expanded = heads * (attention.nope_head_dim + attention.value_head_dim)
        matrices = dim * (attention.kv_rank + attention.rope_head_dim) + attention.kv_rank * expanded
        matrices += heads * attention.value_head_dim * dim
        if attention.q_rank is None:
            return matrices + dim * query, attention.kv_rank
        return matrices + attention.q_rank * (dim + query), attention.kv_rank + attention.q_rank
    assert isinstance(attention, GroupedQueryConfig)
    head_dim = attention.head_width(dim)
    query, key = heads * head_dim, attention.key_heads * head_dim
    norms = {QKNorm.none: 0, QKNorm.head: 2 * head_dim, QKNorm.full: query + key}[attention.qk_norm]
    return 2 * dim * (query + key), norms + attention.qkv_bias * (query + 2 * key)


def _head_widths(architecture: Architecture) -> tuple[int, int]:
    """Width of a query or key head, and of a value head."""
    attention = architecture.attention
    if isinstance(attention, LatentConfig):
        return attention.query_head_dim, attention.value_head_dim
    assert isinstance(attention, GroupedQueryConfig)
    head_dim = attention.head_width(architecture.model.dim)
    return head_dim, head_dim


def forward_flops_per_token(architecture: Architecture, sequence_tokens: int) -> float:
    """FLOPs of a forward pass divided by its tokens.

    Two for every active weight that a token is multiplied with: not for norms, nor for the embedding, which is a
    lookup, nor for what makes experts' matrices of their parameters, once for any number of tokens. A token attends to
    (S + 1) / 2 tokens on average; each costs one product of the query with a key and one of a weight with a value in
    every head. Documents within a sequence make that less, which is not counted.
    """
    counts = count_parameters(architecture)
    head = counts.head or counts.embedding  # a tied head is multiplied all the same
    heads_run = 1 + architecture.model.mtp_layers
    weights = heads_run * head + counts.matrices + counts.routed_products + counts.repeated
    weights -= _not_multiplied(architecture)
    query_dim, value_dim = _head_widths(architecture)
    context = (sequence_tokens + 1) / 2
    heads = architecture.attention.num_heads
    attention = architecture.num_blocks * heads * (query_dim + value_dim) * context
    return 2.0 * (weights + attention)


def training_flops_per_token(architecture: Architecture, sequence_tokens: int) -> float:
    """FLOPs of forward and backward, per token: each product has two in the backward pass."""
    return 3.0 * forward_flops_per_token(architecture, sequence_tokens)


@dataclass(frozen=True)
class Bytes:
    """Bytes an element takes."""

    weight: int = 4
    """The weights that the optimizer updates."""
    gradient: int = 4
    """Gradients after their reduction."""
    optimizer: int = 8
    """All optimizer state of a weight: two float32 moments of Adam."""
    compute: int = 2
    """Gathered weights and activations."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights of two layers, the one computed and the one prefetched, and of embedding and head."""
    activations: int
    """What autograd keeps of a micro-batch."""
    temporary: int
    """The most that exists beside all that for a moment: a slice of logits with what is made of it, or the gradients of
    activations within one feed-forward layer and those of weights that are being reduced."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.temporary


def memory_per_rank(
    architecture: Architecture,
    micro_batch_tokens: int,
    *,
    shard: int = 1,
    ep: int = 1,
    expert_shard: int = 1,
    tp: int = 1,
    recompute: Recompute = Recompute.none,
    reshard: bool = True,
    gradients_wait: bool = False,
    embedding: bool = True,
    head: bool = True,
    in_flight: int = 1,
    imbalance: float = 1.0,
    size: Bytes | None = None,
) -> MemoryEstimate:
    """Estimate of the peak on one rank, early in a backward pass.

    Weights, gradients and optimizer state are exact but for uneven shards. Activations are what autograd keeps, by
    counting (see `_layer_activations`). Allocator slack, buffers of collectives and temporaries inside kernels are not
    in it. A pipeline stage is a model of its layers, with or without embedding and head.

    Args:
        micro_batch_tokens: tokens that one rank computes at once.
        shard: ranks that dense weights are split over.
        ep, expert_shard: ranks that experts are split over, by expert and within each.
        tp: ranks that attention and dense networks are split over, besides `shard`.
        reshard: whole weights are let go after each layer.
        gradients_wait: gradients are reduced after the last of several micro-batches only, and are whole until then.
        in_flight: micro-batches whose forward pass is done and whose backward pass is not.
        imbalance: rows of this rank's experts over the mean of the ranks.
    """
    size = Bytes() if size is None else size
    counts = count_parameters(architecture)
    outside = counts.embedding * (embedding or (head and counts.head == 0))
    outside += head * (counts.head + architecture.model.dim)
    layers, tokens = architecture.num_blocks, micro_batch_tokens
    inside = counts.total - counts.routed - counts.embedding - counts.head - architecture.model.dim
    routed = int(counts.routed * padded_experts(architecture, ep, expert_shard))
    held = (outside + inside) // (shard * tp) + routed // (ep * expert_shard)
    whole = inside // tp + counts.routed // ep
    gathered = reduced = 0
    if shard * tp > 1 or expert_shard > 1 or size.compute != size.weight:
        layer = inside // tp // layers + routed // max(1, architecture.num_moe_layers) // ep
        gathered = (outside + (min(2, layers) * layer if reshard else whole)) * size.compute
        # What is reduced waits beside its result while the next layer's begins: a shard, or a whole copy.
        reduced = int(min(2, layers) * layer * size.gradient * (1 + held / (outside + whole)))
    activations = _activation_bytes(
        architecture, tokens, recompute, size.compute, ep, tp=tp, head=head, in_flight=in_flight, imbalance=imbalance
    )
    return MemoryEstimate(
        weights=held * size.weight,
        gradients=(outside + whole if gradients_wait else held) * size.gradient,
        optimizer=held * size.optimizer,
        gathered=gathered,
        activations=activations,
        temporary=_temporary_bytes(architecture, tokens, size.compute, ep, head, imbalance, reduced),
    )


def padded_experts(architecture: Architecture, ep: int, expert_shard: int) -> float:
    """Experts that FSDP gathers and reduces over those that there are: without ep it shards by experts, and pads."""
    number = architecture.moe.num_experts
    return 1.0 if ep > 1 else -(-number // expert_shard) * expert_shard / number


def _temporary_bytes(
    architecture: Architecture, tokens: int, compute: int, ep: int, has_head: bool, imbalance: float, reduced: int
) -> int:
    model, moe, vocabulary = architecture.model, architecture.moe, architecture.vocab_size
    words = slice_words(tokens, vocabulary)
    logits = words * (8 + (0 if words == vocabulary else compute))  # two float32 copies; one slice alone is kept
    head = tokens * (logits + 4 * model.dim) + vocabulary * model.dim * compute  # and both gradients
    hidden = 3 * model.ffn_dim * min(1, model.first_dense_layers)  # gradients of the pre-activation and after it
    if architecture.num_moe_layers:
        hidden = max(hidden, int(imbalance * architecture.router.top_k * (3 * moe.expert_dim + model.dim)))
    # One layer's matrices, where a form makes them, and their gradients, where those of parameters are others.
    made = made_weights(architecture) // max(1, architecture.num_moe_layers) // ep * (1 + moe.form.uses_base)
    return max(head * has_head, (tokens * hidden + made) * compute + reduced)


def _activation_bytes(
    architecture: Architecture,
    tokens: int,
    recompute: Recompute,
    compute: int,
    ep: int,
    *,
    tp: int,
    head: bool,
    in_flight: int,
    imbalance: float,
) -> int:
    model, attention = architecture.model, architecture.attention
    dense_layer = _layer_activations(architecture, False, recompute, compute, ep, tp, imbalance)
    moe_layer = _layer_activations(architecture, True, recompute, compute, ep, tp, imbalance)
    moe_layers, blocks = architecture.num_moe_layers, architecture.num_blocks
    layers, once = (blocks - moe_layers) * dense_layer + moe_layers * moe_layer, 0
    joined = 4  # of multi-token prediction: inputs of the two norms before the projection, and of the projection
    if recompute is Recompute.full:
        once = moe_layer if moe_layers else dense_layer
        layers = model.num_layers * model.dim * compute
        joined = 1  # the first two, without the input of the last norm
    layers += model.mtp_layers * joined * model.dim * compute
    last = 2 * model.dim * compute + 4  # input and output of the last norm; log-sum-exp
    if slice_words(tokens, architecture.vocab_size) == architecture.vocab_size:
        last += architecture.vocab_size * compute
    rotated_dim = attention.rope_head_dim if isinstance(attention, LatentConfig) else _head_widths(architecture)[0]
    rotation = 4 * rotated_dim  # all layers use the same
    return tokens * (in_flight * (layers + rotation + head * (1 + model.mtp_layers) * last) + once)


def _layer_activations(
    architecture: Architecture, is_moe: bool, recompute: Recompute, compute: int, ep: int, tp: int, imbalance: float
) -> int:
    """Bytes a token that one layer keeps for its backward pass, when nothing of it is computed again."""
    model, moe, attention = architecture.model, architecture.moe, architecture.attention
    query_dim, value_dim = _head_widths(architecture)
    heads = attention.num_heads
    elements = 4 * model.dim  # input and output of both norms
    float32 = 0
    if isinstance(attention, LatentConfig):
        elements += 2 * heads * query_dim  # queries and keys
        elements += heads * (attention.nope_head_dim + value_dim)  # values lie in what they were expanded with
        elements += 2 * attention.kv_rank + attention.rope_head_dim + 2 * (attention.q_rank or 0)
    else:
        assert isinstance(attention, GroupedQueryConfig)
        elements += (heads + 2 * attention.key_heads) * query_dim
        if attention.qk_norm is not QKNorm.none:
            elements += (heads + attention.key_heads) * query_dim
    elements += heads * value_dim  # output of the core
    if tp > 1:  # inputs of projections, with the tokens of all tp ranks
        elements += tp * model.dim * (2 - is_moe)
    float32 += heads  # log-sum-exp of the core
    if not is_moe:
        return compute * (elements + 4 * model.ffn_dim) + 4 * float32
    iterations = moe.chain.iterations
    shared_runs = iterations if moe.chain.shared_every_iteration else 1
    elements += shared_runs * (4 * moe.num_shared_experts * moe.expert_dim + model.dim * moe.shared_expert_gate)
    taken = architecture.router.top_k * iterations
    arrived = int(taken * (imbalance if ep > 1 else 1))
    if ep > 1:
        elements += (arrived + taken) * model.dim  # rows that came and rows that came back
    if recompute is not Recompute.selective:
        elements += arrived * 2 * (moe.expert_dim + (moe.adjugate_dim if moe.adjugate_groups else 0))
    elements += (iterations - 1) * model.dim  # what later iterations see
    float32 += iterations * (3 * moe.num_experts + (0 if compute == 4 else model.dim))  # scores; float32 input
    return compute * elements + 4 * float32

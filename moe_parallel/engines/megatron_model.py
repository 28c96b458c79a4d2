"""A Megatron-Core GPT model around our mixture-of-experts layers, documents and rotary positions.

Megatron's are: embedding, projections of attention and dense networks, split over tensor-parallel ranks with sequence
parallelism between them; head and loss over a split vocabulary; the layers of a pipeline stage. Ours are, put in where
Megatron's own description of a layer has a place for them: the attention kernel, which rotates by the positions of the
batch, keeps documents apart and shares heads over context-parallel ranks; the norm; the whole mixture-of-experts layer.

Imports Megatron-Core: only `engines/build.py` may import this, when it was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_data.batch import TokenBatch
from moe_parallel.mesh import Layout, ParallelConfig, Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import AttentionPlan, GroupedQueryConfig, QKNorm, attend_whole
from moe_parallel.model.rope import Rotary, rotate_halves
from moe_parallel.moe.layer import Dispatcher, MoELayer
from moe_parallel.moe.routing import ForwardContext, LayerStats, Replay
from moe_parallel.sequence_exchange import SequenceExchange


@dataclass(frozen=True)
class MicroBatch:
    """What the layers must know of the micro-batch that runs through them, and what they find."""

    plan: AttentionPlan
    part: TokenBatch
    """This rank's tokens of the residual stream."""
    context: ForwardContext
    num_valid: float
    """Valid tokens of the global batch, which balance losses are divided by; infinity if this counts for nothing."""
    stats: dict[int, list[LayerStats]] = field(default_factory=dict)
    """By layer. A pass that is computed again finds nothing new."""


class Passing:
    """The micro-batch that is on its way through this rank's layers: Megatron's own modules hand on tensors only."""

    def __init__(self) -> None:
        self._micro_batch: MicroBatch | None = None

    @property
    def micro_batch(self) -> MicroBatch:
        assert self._micro_batch is not None, "no micro-batch is on its way"
        return self._micro_batch

    @contextmanager
    def through(self, micro_batch: MicroBatch) -> Iterator[None]:
        """For the time of a forward pass, or of its repetition in the backward pass."""
        before, self._micro_batch = self._micro_batch, micro_batch
        try:
            yield
        finally:
            self._micro_batch = before


class Norm(nn.RMSNorm):
    """Megatron's own wrapper of torch's norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class DocumentAttention(MegatronModule):
    """The kernel between Megatron's projections: rotation, heads to context-parallel ranks, softmax, and back."""

    def __init__(self, config: TransformerConfig, passing: Passing, exchange: SequenceExchange, **_: Any) -> None:
        super().__init__(config)
        self.passing, self.exchange = passing, exchange

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """(S / cp, B, heads of this rank, width) each -> (S / cp, B, heads * width)."""
        plan = self.passing.micro_batch.plan
        q_BHSd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        q_BHSd, k_BHSd = (rotate_halves(x, plan.rotation) for x in (q_BHSd, k_BHSd))
        out_BHSd = attend_whole((q_BHSd, k_BHSd, v_BHSd), plan, query.shape[-1] ** -0.5, self.exchange)
        return out_BHSd.permute(2, 0, 1, 3).flatten(2).contiguous()


class ExpertLayer(MegatronModule):
    """Our mixture-of-experts layer, with its routers, dispatcher, experts and balance, in the place of a network."""

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        number: int,
        passing: Passing,
        dispatcher: Dispatcher | None,
        device: torch.device,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.passing = passing
        with torch.device("meta"):
            layer = MoELayer(
                architecture.model.dim, architecture.moe, architecture.router, architecture.balance, number
            )
            if dispatcher is not None:
                layer.dispatcher = dispatcher
                for bank in filter(None, (layer.experts, layer.experts.adjugates)):
                    for name in ("gate_up", "down"):
                        whole = getattr(bank, name)
                        part = whole.data[: whole.shape[0] // config.expert_model_parallel_size]
                        setattr(bank, name, nn.Parameter(part))
        self.layer = layer.to_empty(device=device)
        self._mark()

    def _mark(self) -> None:
        """Tell Megatron over which ranks gradients are summed, and which ranks' pieces count in the norm."""
        experts = set(self.layer.experts.parameters())
        for parameter in self.layer.parameters():
            if parameter in experts:
                parameter.allreduce = False  # type: ignore[attr-defined]
                # Experts lie on ranks that `tp` tells apart; only so does each of them count.
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            else:
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBD: Tensor, **_: Any) -> tuple[Tensor, None]:
        """(s, B, D) -> (s, B, D); Megatron adds it to the stream."""
        micro_batch = self.passing.micro_batch
        context = micro_batch.context.for_layer(self.layer.layer, micro_batch.part)
        length, rows, dim = hidden_SBD.shape
        out_TD, stats = self.layer(hidden_SBD.transpose(0, 1).reshape(-1, dim), context)
        micro_batch.stats.setdefault(self.layer.layer, stats)
        if torch.is_grad_enabled():
            balance = torch.stack([s.balance for s in stats]).sum() / micro_batch.num_valid
            out_TD = _WithLoss.apply(out_TD, balance)
        return out_TD.view(rows, length, dim).transpose(0, 1).contiguous(), None


class _WithLoss(torch.autograd.Function):
    """Adds a loss to that of the step, wherever in a pipeline it arises: the first argument, unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss.new_ones(()))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (one,) = ctx.saved_tensors
        return grad, one


class Layer(TransformerLayer):
    """Megatron's layer, which may be computed again in the backward pass: with the choices of the first time."""

    def __init__(self, *args: Any, passing: Passing, recompute: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passing, self.recompute = passing, recompute

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        micro_batch = self.passing.micro_batch
        replaying = replace(micro_batch, context=replace(micro_batch.context, replay=Replay()))

        def run(hidden_states: Tensor) -> Any:
            with self.passing.through(replaying):
                return super(Layer, self).forward(hidden_states, *args, **kwargs)

        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Parts:
    """What the modules of all layers are made from."""

    architecture: Architecture
    parallel: ParallelConfig
    passing: Passing
    exchange: SequenceExchange
    dispatcher: Dispatcher | None
    """None where a rank has all experts."""
    device: torch.device


def transformer_config(
    architecture: Architecture, layout: Layout, stages_per_rank: int, device: torch.device, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's own options of a model, which say nothing of what our modules do."""
    model, attention, moe = architecture.model, architecture.attention, architecture.moe
    assert isinstance(attention, GroupedQueryConfig)
    experts: dict[str, Any] = {}
    if architecture.num_moe_layers:
        experts = {"num_moe_experts": moe.num_experts, "moe_ffn_hidden_size": moe.expert_dim}
        experts |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall"}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.dim,
        ffn_hidden_size=model.ffn_dim,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.key_heads,
        kv_channels=attention.head_width(model.dim),
        qk_layernorm=attention.qk_norm is QKNorm.head,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=attention.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=stages_per_rank if stages_per_rank > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        # Two ranks are both neighbors of each other: without overlap Megatron would mistake their messages.
        overlap_p2p_comm=stages_per_rank > 1,
        batch_p2p_comm=stages_per_rank == 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        # Losses are sums that we have divided already: gradients are summed and never scaled.
        calculate_per_token_loss=True,
        **experts,
    )


def build_chunk(config: TransformerConfig, parts: Parts, first: bool, last: bool, index: int | None) -> GPTModel:
    """The layers of one pipeline stage, without values, and what is before and after them.

    Args:
        index: which of this rank's stages it is; None if it has one.
    """
    architecture = parts.architecture
    offset = get_transformer_layer_offset(config, index)
    numbers = range(offset, offset + get_num_layers_to_build(config, index))
    layers = [_layer(config, parts, number) for number in numbers]
    with parts.device:
        chunk = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm),
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.model.max_sequence_tokens
            or 0,  # of learned positions, which there are none
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.model.tie_embeddings,
            position_embedding_type="none",
            vp_stage=index,
        )
    _mark_split(chunk)
    if config.params_dtype != torch.float32:
        chunk = chunk.to(config.params_dtype)
        for module in chunk.modules():
            if isinstance(module, ExpertLayer):  # law: routers in float32 at least
                for router in module.layer.routers:
                    router.float()
    return chunk


def _mark_split(chunk: GPTModel) -> None:
    """Tell Megatron's norm of gradients that each rank of `tp` has another part of these: 0.16 marks only weights that
    it has drawn itself, and would leave out all parts but the first rank's."""
    dims = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in chunk.modules():
        dim = dims.get(type(module))
        if dim is not None and module.weight is not None:
            for name, value in (("tensor_model_parallel", True), ("partition_dim", dim), ("partition_stride", 1)):
                setattr(module.weight, name, value)


def _layer(config: TransformerConfig, parts: Parts, number: int) -> ModuleSpec:
    """Description of a layer, in Megatron's words; `number` counts from 0."""
    norm = Norm if config.qk_layernorm else IdentityOp
    kernel = ModuleSpec(DocumentAttention, params={"passing": parts.passing, "exchange": parts.exchange})
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=kernel,
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(
        Layer,
        params={"passing": parts.passing, "recompute": parts.parallel.recompute is Recompute.full},
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=_network(parts, number),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _network(parts: Parts, number: int) -> Any:
    if number < parts.architecture.model.first_dense_layers:
        return ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    return ModuleSpec(
        ExpertLayer,
        params={
            "architecture": parts.architecture,
            "number": number,
            "passing": parts.passing,
            "dispatcher": parts.dispatcher,
            "device": parts.device,
        },
    )


def rotary_of(architecture: Architecture) -> Rotary:
    """Of all layers."""
    attention = architecture.attention
    assert isinstance(attention, GroupedQueryConfig)
    return Rotary(attention.rope, attention.head_width(architecture.model.dim))

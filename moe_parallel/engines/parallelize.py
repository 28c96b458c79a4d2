"""A model, best built on the meta device -> this rank's part of it. Reads like the list of what is done, in order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_kernels.choice import ExpertKernel
from moe_parallel.engines.engine import moe_layers
from moe_parallel.mesh import Compile, Layout, ParallelConfig, ParallelMesh, PipelineSchedule, Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.dense import DenseNetwork, SplitLinear
from moe_parallel.model.latent_attention import LatentConfig
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig, AllToAllDispatcher
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.dispatch.deepep import DeepEPConfig, DeepEPDispatcher
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig, LeastLoadedDispatcher
from moe_parallel.moe.dispatch.two_hop import TwoHopConfig, TwoHopDispatcher, node_size
from moe_parallel.moe.layer import Dispatcher, MoELayer
from moe_parallel.sequence_exchange import SequenceExchange

log = logging.getLogger(__name__)


def parallelize(
    model: Transformer,
    mesh: ParallelMesh,
    config: ParallelConfig,
    dispatch: DispatchConfig,
    dtype: torch.dtype,
    roots: Sequence[nn.Module] = (),
) -> Transformer:
    """Turn a model (best built on the meta device) into this rank's part of it.

    Order matters: weights are split before FSDP shards what is left of them, recompute and compilation are set on
    blocks before FSDP wraps its hooks around them, and FSDP comes last because it must own the final parameters.

    Args:
        dtype: compute type; weights, gradient reductions and the router stay in the type of the parameters.
        roots: stages of a pipeline, which are called in the model's place; none calls the model.
    """
    layout = mesh.layout
    if layout.sequence_ranks > 1:
        share_sequences(model, mesh)
        log.info("sequences: each is shared by cp=%d x tp=%d ranks", layout.cp, layout.tp)
    if layout.tp > 1:
        split_linears(model, mesh)
    if layout.ep > 1:
        split_experts(model, mesh, dispatch)
        log.info("experts: %d of each layer on each of ep=%d ranks", _local_experts(model), layout.ep)
    if config.recompute is not Recompute.none:
        set_recompute(model, config.recompute)
        log.info("recompute: %s", config.recompute.value)
    if config.compile is Compile.blocks:
        for block in model.blocks:
            block.compile_around_attention()
        log.info("compile: %s", config.compile.value)
    if layout.stage_ranks > 1 or dtype != next(model.parameters()).dtype:
        shard_weights(model, mesh, config, dtype, roots or [model])
        log.info(
            "fsdp: dense weights %d x replicated, %d x sharded; experts %d x replicated, %d x sharded",
            layout.replicate, layout.shard, layout.expert_replicate, layout.expert_shard,
        )  # fmt: skip
    return model


def _local_experts(model: nn.Module) -> int:
    layers = moe_layers(model)
    return layers[0].experts.local_shape[0] if layers else 0


def sequence_problems(architecture: Architecture, layout: Layout, sequence_tokens: int | None = None) -> list[str]:
    """Relations between degrees that share sequences and the shapes of a model, where they do not hold."""
    model, attention, problems = architecture.model, architecture.attention, []
    tp, both = layout.tp, layout.sequence_ranks
    product = f"parallel.cp * parallel.tp={both}" if layout.cp > 1 else f"parallel.tp={tp}"

    def need(divisor: int, product: str, **numbers: int) -> None:
        for name, number in numbers.items():
            if number % divisor != 0:
                option = name.replace("__", ".")
                legal = [d for d in range(1, number + 1) if number % d == 0]
                problems.append(f"{product} does not divide {option}={number}; legal values: {legal}")

    need(both, product, attention__num_heads=attention.num_heads)
    if sequence_tokens is not None:
        need(both, product, train__sequence_tokens=sequence_tokens)
    if tp == 1:
        return problems
    need(tp, f"parallel.tp={tp}", **({"model__ffn_dim": model.ffn_dim} if model.first_dense_layers else {}))
    inputs = {"model__dim": model.dim}  # what FSDP cuts of the weights that tp cuts by outputs
    if isinstance(attention, GroupedQueryConfig) and attention.num_kv_heads is not None:
        need(tp, f"parallel.tp={tp}", attention__num_kv_heads=attention.key_heads)
    elif isinstance(attention, LatentConfig):
        inputs |= {"attention__kv_rank": attention.kv_rank}
        inputs |= {"attention__q_rank": attention.q_rank} if attention.q_rank is not None else {}
    need(layout.shard, f"with parallel.tp={tp}, parallel.shard={layout.shard}", **inputs)
    return problems


def share_sequences(model: Transformer, mesh: ParallelMesh) -> None:
    """Let attention and dense networks meet the ranks that have the other parts of the sequences."""
    exchange = SequenceExchange(mesh.cp_group, mesh.tp_group)
    for block in model.blocks:
        block.attention.exchange = exchange
        if isinstance(block.ffn, DenseNetwork):
            block.ffn.exchange = exchange


def split_linears(model: Transformer, mesh: ParallelMesh) -> None:
    """Give each rank of `tp` its heads and its part of the width of dense networks."""
    for linear in [module for module in model.modules() if isinstance(module, SplitLinear)]:
        part = distribute_tensor(linear.weight.data, mesh.tp, [Shard(linear.split.value)], src_data_rank=None)
        linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)


def split_experts(model: Transformer, mesh: ParallelMesh, dispatch: DispatchConfig) -> None:
    """Give each rank of `ep` its experts and each layer a dispatcher that reaches the others."""
    fused = model.architecture.moe.expert_kernel is ExpertKernel.triton
    dispatcher = make_dispatcher(dispatch, mesh, fused)
    for layer in moe_layers(model):
        for bank in filter(None, (layer.experts, layer.experts.adjugates)):
            for name, whole in list(bank.named_parameters(recurse=False)):
                part = distribute_tensor(whole.data, mesh.ep, [Shard(0)], src_data_rank=None)
                setattr(bank, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        layer.dispatcher = dispatcher


def make_dispatcher(config: DispatchConfig, mesh: ParallelMesh, fused: bool) -> Dispatcher:
    """One for all layers: it holds no state of its own. `fused` packs and combines rows by Triton kernels."""
    if isinstance(config, TwoHopConfig):
        return TwoHopDispatcher(*mesh.node_groups(node_size(config, mesh.layout.ep)), fused=fused)
    if isinstance(config, LeastLoadedConfig):
        return LeastLoadedDispatcher(mesh.ep.get_group(), config, fused)
    if isinstance(config, DeepEPConfig):
        return DeepEPDispatcher(mesh.ep.get_group(), config)
    assert isinstance(config, AllToAllConfig)
    return AllToAllDispatcher(mesh.ep.get_group(), config.chunks, fused)


def set_recompute(model: Transformer, how: Recompute) -> None:
    """Mark what is computed again in the backward pass."""
    for block in model.blocks:
        block.recompute = how is Recompute.full
    for layer in moe_layers(model):
        layer.experts.recompute = how is Recompute.selective
        layer.experts.keeps_made = how is Recompute.full


def shard_weights(
    model: Transformer, mesh: ParallelMesh, config: ParallelConfig, dtype: torch.dtype, roots: Sequence[nn.Module]
) -> None:
    """FSDP2, each kind of weight over its own view. Reductions are plain sums in the type of the parameters."""
    master = next(model.parameters()).dtype
    mixed = dtype != master
    # Inputs are not cast: activations follow the weights, and FSDP would go into dataclasses and round what is in
    # float32 there on purpose, such as rotations, counts and what routers hand on.
    policy = MixedPrecisionPolicy(dtype, master, cast_forward_inputs=False) if mixed else MixedPrecisionPolicy()
    # Other schedules free a stage's weights themselves: between its forward and backward passes they may be needed.
    reshard = config.reshard_after_forward and (config.pp == 1 or config.schedule is PipelineSchedule.one_f_one_b)

    def shard(modules: nn.Module | list[nn.Module], over: DeviceMesh, place: _Place | None = None) -> None:
        fully_shard(modules, mesh=over, reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=place)

    for block in model.blocks:
        if mesh.layout.tp > 1:
            for part in (block.attention, block.ffn):
                linears: list[nn.Module] = [m for m in part.modules() if isinstance(m, SplitLinear)]
                if linears:
                    shard(linears, mesh.split, _beside_tp)
        if isinstance(block.ffn, MoELayer):
            if mixed:  # a group of its own keeps a router's weights in full precision
                for router in dict.fromkeys(block.ffn.routers):
                    fully_shard(router, mesh=mesh.whole, reshard_after_forward=reshard)
            if mesh.layout.ep > 1:
                shard(_expert_modules(block.ffn), mesh.expert, _expert_placement(mesh.layout.expert_shard))
        shard(block, mesh.whole)
    # A block's last operation works on tokens and adds the stream, so its output is a view. Nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for root in roots:
        shard(root, mesh.whole)
    for module in {module for root in roots for module in root.modules()}:
        if isinstance(module, FSDPModule):
            # Both are needed: without the forced sum gloo refuses any factor, and with it any factor but 1 is
            # applied twice on a shard group of one rank.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


_Place = Callable[[nn.Parameter], Shard | None]


def _beside_tp(parameter: nn.Parameter) -> Shard:
    """The dimension that tp leaves whole: pieces of pieces of one dimension would not be in order."""
    assert isinstance(parameter, DTensor)
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return Shard(1 - placement.dim)


def _expert_modules(layer: MoELayer) -> nn.Module | list[nn.Module]:
    """What one FSDP group of experts is made of. Experts that run several times are gathered when the first of the
    modules runs and let go after the last, with one reduction of their gradients."""
    return layer.experts if layer.config.chain.iterations == 1 else [layer.enter, layer.experts, layer.leave]


def _expert_placement(expert_shard: int) -> _Place:
    def place(parameter: nn.Parameter) -> Shard:
        # Dimension 0 is the experts', already split over ep; FSDP shards another one evenly or not at all.
        for dim in (1, 2):
            if parameter.shape[dim] % expert_shard == 0:
                return Shard(dim)
        raise ValueError(
            f"expert weights of shape {tuple(parameter.shape)} cannot be split over {expert_shard} ranks: neither "
            "their rows nor their columns divide evenly; change parallel.shard, parallel.ep or moe.expert_dim"
        )

    return place

"""The default engine: torch's own FSDP2 and all-to-all, experts and dense weights on two views of the same ranks.

The rule that keeps gradients right under every layout: losses are sums over tokens, divided by numbers of the
global batch that are known before forward; everything after that is reduced by SUM. Nothing divides by a degree.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from moe_data.batch import TokenBatch
from moe_kernels.choice import ExpertKernel
from moe_parallel.collectives import gather_over, sum_over
from moe_parallel.mesh import Compile, ParallelConfig, ParallelMesh, Recompute
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.balance import GlobalEstimator
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig, AllToAllDispatcher
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.dispatch.deepep import DeepEPConfig, DeepEPDispatcher
from moe_parallel.moe.dispatch.least_loaded import LeastLoadedConfig, LeastLoadedDispatcher
from moe_parallel.moe.dispatch.two_hop import TwoHopConfig, TwoHopDispatcher, node_size
from moe_parallel.moe.experts import local_tensor
from moe_parallel.moe.layer import Dispatcher, MoELayer
from moe_parallel.moe.routers.router import Router
from moe_parallel.moe.routing import ForwardContext, normalized_counts
from moe_parallel.optim import OptimConfig, build_optimizer, clip_gradients, global_gradient_norm
from moe_parallel.statistics import StepSums

log = logging.getLogger(__name__)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def parallelize(
    model: Transformer, mesh: ParallelMesh, config: ParallelConfig, dispatch: DispatchConfig, dtype: torch.dtype
) -> Transformer:
    """Turn a model (best built on the meta device) into this rank's part of it.

    Order matters: experts are split before FSDP shards what is left of them, recompute and compilation are set on
    blocks before FSDP wraps its hooks around them, and FSDP comes last because it must own the final parameters.

    Args:
        dtype: compute type; weights, gradient reductions and the router stay in the type of the parameters.
    """
    layout = mesh.layout
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
    if layout.ranks > 1 or dtype != next(model.parameters()).dtype:
        shard_weights(model, mesh, config, dtype)
        log.info(
            "fsdp: dense weights %d x replicated, %d x sharded; experts %d x replicated, %d x sharded",
            layout.replicate, layout.shard, layout.expert_replicate, layout.expert_shard,
        )  # fmt: skip
    return model


def _local_experts(model: nn.Module) -> int:
    layers = moe_layers(model)
    return local_tensor(layers[0].experts.gate_up).shape[0] if layers else 0


def split_experts(model: Transformer, mesh: ParallelMesh, dispatch: DispatchConfig) -> None:
    """Give each rank of `ep` its experts and each layer a dispatcher that reaches the others."""
    fused = model.architecture.moe.expert_kernel is ExpertKernel.triton
    dispatcher = make_dispatcher(dispatch, mesh, fused)
    for layer in moe_layers(model):
        for name in ("gate_up", "down"):
            whole = getattr(layer.experts, name)
            part = distribute_tensor(whole.data, mesh.ep, [Shard(0)], src_data_rank=None)
            setattr(layer.experts, name, nn.Parameter(part, requires_grad=whole.requires_grad))
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


def shard_weights(model: Transformer, mesh: ParallelMesh, config: ParallelConfig, dtype: torch.dtype) -> None:
    """FSDP2 over both views. Reductions are plain sums in the type of the parameters."""
    master = next(model.parameters()).dtype
    mixed = dtype != master
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master) if mixed else MixedPrecisionPolicy()
    reshard = config.reshard_after_forward
    for block in model.blocks:
        if isinstance(block.ffn, MoELayer):
            if mixed:  # a group of its own keeps a router's weights in full precision
                for router in dict.fromkeys(block.ffn.routers):
                    fully_shard(router, mesh=mesh.dense, reshard_after_forward=reshard)
            if mesh.layout.ep > 1:
                fully_shard(
                    _expert_modules(block.ffn),
                    mesh=mesh.expert,
                    reshard_after_forward=reshard,
                    mp_policy=policy,
                    shard_placement_fn=_expert_placement(mesh.layout.expert_shard),
                )
        fully_shard(block, mesh=mesh.dense, reshard_after_forward=reshard, mp_policy=policy)
    # A block's last operation works on tokens and adds the stream, so its output is a view. Nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    fully_shard(model, mesh=mesh.dense, reshard_after_forward=reshard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: without the forced sum gloo refuses any factor, and with it any factor but 1 is
            # applied twice on a shard group of one rank.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _expert_modules(layer: MoELayer) -> nn.Module | list[nn.Module]:
    """What one FSDP group of experts is made of. Experts that run several times are gathered when the first of the
    modules runs and let go after the last, with one reduction of their gradients."""
    return layer.experts if layer.config.chain.iterations == 1 else [layer.enter, layer.experts, layer.leave]


def _expert_placement(expert_shard: int) -> Callable[[nn.Parameter], Shard]:
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


class NativeEngine:
    """Owns the model and its optimizer on this rank: forward, backward, reduce, step."""

    def __init__(
        self,
        architecture: Architecture,
        mesh: ParallelMesh,
        parallel: ParallelConfig,
        optim: OptimConfig,
        device: torch.device,
        dtype: torch.dtype,
        master_dtype: torch.dtype = torch.float32,
        dispatch: DispatchConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.architecture = architecture
        self.mesh = mesh
        self.parallel = parallel
        self.device = device
        self.optim = optim
        self.seed = seed
        self.group = mesh.data_group
        with torch.device("meta"):
            model = Transformer(architecture)
            if master_dtype != torch.float32:
                model = model.to(master_dtype)
        self.model = parallelize(model, mesh, parallel, dispatch or AllToAllConfig(), dtype)
        self.layers = moe_layers(self.model)
        self.materialize()

    def materialize(self) -> None:
        """Give this rank's part of the model memory, without values, and an optimizer.

        Everything before it runs without memory, everything after it on `device`: a plan takes over here.
        """
        self.model.to_empty(device=self.device)
        self.optimizer = build_optimizer(self.model, self.optim)
        moe, num_layers = self.architecture.moe, self.architecture.model.num_layers
        shape = (num_layers, moe.chain.iterations, moe.num_experts)
        self.previous_count_LIE = torch.zeros(shape, dtype=torch.float64, device=self.device)
        """Slots per expert of the previous step over all ranks, for the look-ahead of the global balance loss."""

    def init_weights(self, init: InitConfig, seed: int) -> None:
        """Draw all weights; the same ones on every layout."""
        init_weights(self.model, init, seed)

    def forward_backward(
        self, batches: Sequence[TokenBatch], step: int, num_targets: int, num_valid: int
    ) -> tuple[StepSums, Tensor]:
        """Gradients of one global batch.

        Args:
            batches: this rank's micro-batches.
            num_targets, num_valid: targets and valid tokens of the global batch, over all ranks and micro-batches.
        Returns:
            This rank's sums, and the mean error of the global loss's frequency estimate (L1, 0 to 2; 0 if unused).
        """
        sums = self.zero_sums()
        total_LIE = self._count_first(batches, step)
        seen_LIE = torch.zeros_like(self.previous_count_LIE)
        used: list[tuple[tuple[int, int], Tensor]] = []
        num_tokens = sum(batch.token_BS.numel() for batch in batches) * self.mesh.layout.ranks
        for index, batch in enumerate(batches):
            self._sync_gradients(index == len(batches) - 1)
            remaining = (len(batches) - index - 1) / len(batches)
            prior_LIE = seen_LIE + self.previous_count_LIE * remaining if total_LIE is None else total_LIE
            context = replace(
                self._context(step, training=True),
                prior_count_LIE=prior_LIE,
                prior_is_total=total_LIE is not None,
                no_padding=num_valid == num_tokens,
            )
            cross_entropy, stats = self.model(batch, context, Output.loss)
            loss = cross_entropy / num_targets
            for layer in stats:
                loss = loss + layer.balance / num_valid
            loss.backward()
            sums.add(cross_entropy, stats)
            seen_LIE = seen_LIE.clone()
            for layer in stats:
                if layer.step_count_E is not None:
                    seen_LIE[layer.layer, layer.iteration] += layer.step_count_E
                if layer.used_frequency_E is not None:
                    used.append(((layer.layer, layer.iteration), layer.used_frequency_E))
        self.previous_count_LIE = seen_LIE
        return sums, _estimator_error(used, seen_LIE)

    def _context(self, step: int, training: bool) -> ForwardContext:
        return ForwardContext(
            step=step,
            training=training,
            sum_over_data=sum_over(self.group),
            gather_over_data=gather_over(self.group),
            data_rank=dist.get_rank(self.group),
            seed=self.seed,
        )

    def _count_first(self, batches: Sequence[TokenBatch], step: int) -> Tensor | None:
        """Exact mode: the whole step's counts from a forward pass without gradient."""
        balance = self.architecture.balance
        wanted = balance.global_coefficient > 0 and balance.global_estimator is GlobalEstimator.exact
        if not wanted or len(batches) == 1:
            return None
        total_LIE = torch.zeros_like(self.previous_count_LIE)
        context = self._context(step, training=True)
        with torch.no_grad():
            for batch in batches:
                for layer in self.model(batch, context, Output.hidden)[1]:
                    total_LIE[layer.layer, layer.iteration] += layer.step_count_E
        return total_LIE

    def _sync_gradients(self, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            # Gradients that wait for the last micro-batch wait whole, in the master type: more than everything else
            # of a large model. With resharding each rank keeps its shard only; replicas are summed once either way.
            self.model.set_requires_gradient_sync(last or self.parallel.reshard_after_forward)
            self.model.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)

    def gradient_norm(self) -> Tensor:
        """Global norm of all gradients."""
        return global_gradient_norm(self.model.parameters(), self.group)

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Clip by `norm`, take one optimizer step, drop the gradients."""
        clip_gradients(self.model.parameters(), norm, self.optim.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def update_routers(self, totals: StepSums) -> None:
        """Move what routers keep from step to step: the bias of loss-free balancing, the cutoffs of thresholds.

        Args:
            totals: sums of the whole step over all ranks.
        """
        row = 0
        for layer in self.layers:
            rows: dict[Router, list[int]] = {}
            for router in layer.routers:  # iterations may share one
                rows.setdefault(router, []).append(row)
                row += 1
            for router, mine in rows.items():
                observed_E = totals.observed_LE[mine].sum(0) / totals.observations_L[mine].sum().clamp(min=1)
                router.after_step(totals.count_LE[mine].sum(0), observed_E, self.architecture.balance)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> StepSums:
        """Sums of one batch without gradient; every rank must call it equally often."""
        was_training = self.model.training
        self.model.eval()
        cross_entropy, stats = self.model(batch, self.evaluation_context(), Output.loss)
        sums = self.zero_sums()
        sums.add(cross_entropy, stats)
        self.model.train(was_training)
        return sums

    def evaluation_context(self) -> ForwardContext:
        """Context of a pass that learns nothing and counts nothing for training."""
        return self._context(step=0, training=False)

    def pass_names(self) -> list[str]:
        """Names of the passes of mixture-of-experts layers, in the order of the rows of `StepSums`."""
        iterations = self.architecture.moe.chain.iterations
        suffixes = [""] if iterations == 1 else [f"/iteration_{i}" for i in range(iterations)]
        return [f"layer_{layer.layer}{suffix}" for layer in self.layers for suffix in suffixes]

    def zero_sums(self) -> StepSums:
        """Empty sums of the right shape."""
        passes = len(self.layers) * self.architecture.moe.chain.iterations
        return StepSums.zeros(passes, self.architecture.moe.num_experts, self.device)

    @torch.no_grad()
    def first_nonfinite_module(self, batch: TokenBatch) -> str | None:
        """Name of the first module whose output is not finite on any rank, in the order of execution."""
        found: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
                if not found and any(not bool(torch.isfinite(t).all()) for t in tensors):
                    found.append(name)

            return hook

        handles = [m.register_forward_hook(watch(n)) for n, m in self.model.named_modules() if n]
        try:
            with torch.compiler.set_stance("force_eager"):  # hooks see no module inside of a compiled graph
                self.model(batch, self.evaluation_context(), Output.loss)
        finally:
            for handle in handles:
                handle.remove()
        names: list[str | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(names, found[0] if found else None, group=self.group)
        return next((name for name in names if name is not None), None)


def _estimator_error(used: list[tuple[tuple[int, int], Tensor]], total_LIE: Tensor) -> Tensor:
    if not used:
        return torch.zeros((), dtype=torch.float64, device=total_LIE.device)
    true_LIE = normalized_counts(total_LIE)
    return torch.stack([(share_E - true_LIE[place]).abs().sum() for place, share_E in used]).mean()

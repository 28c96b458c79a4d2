"""The Megatron-Core engine: its parallel layers, pipeline schedules, gradient buffers and distributed optimizer.

Losses are sums that are divided by numbers of the global batch before the backward pass, as everywhere here, so
Megatron is told to add gradients and to scale nothing (its mode of a loss per token, without its last division).
Imports Megatron-Core: only `engines/build.py` may import this, when it was chosen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from moe_data.batch import IGNORE, TokenBatch, padded
from moe_kernels.choice import ExpertKernel
from moe_parallel.convert.megatron_weights import Cut, MegatronWeights
from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.engine import Engine, NonfiniteWatch, StepPass, moe_layers, ranks_by_tokens
from moe_parallel.engines.megatron_config import MegatronConfig
from moe_parallel.engines.megatron_model import (
    MicroBatch,
    Parts,
    Passing,
    build_chunk,
    rotary_of,
    transformer_config,
)
from moe_parallel.engines.megatron_state import (
    MegatronState,
    buffers_of,
    draw_weights,
    held_by,
    weights_of,
)
from moe_parallel.engines.parallelize import make_dispatcher
from moe_parallel.engines.stages import stages_per_rank
from moe_parallel.mesh import ParallelMesh, Recompute
from moe_parallel.model.attention import plan_attention
from moe_parallel.model.initialize import InitConfig, init_buffer
from moe_parallel.moe.routing import ForwardContext, LayerStats
from moe_parallel.optim import OptimConfig
from moe_parallel.sequence_exchange import SequenceExchange
from moe_parallel.statistics import StepSums

_Found = Callable[[int, Tensor | None, list[LayerStats]], Tensor | None]
"""(micro-batch, output of the last stage, statistics of this stage's layers) -> loss."""


class MegatronEngine(Engine):
    """Owns the stages of this rank and their optimizer."""

    name = "megatron"

    def __init__(
        self,
        config: MegatronConfig,
        setting: EngineSetting,
        mesh: ParallelMesh,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        problems = config.problems(setting)
        if problems:
            raise ValueError(problems[0])
        self.architecture, self.layout, self.optim = setting.architecture, mesh.layout, setting.optim
        self.config, self.mesh, self.device, self.seed = config, mesh, device, seed
        self._stages = stages_per_rank(setting.parallel)
        self.group = mesh.world
        self.data, self.rows, self.sequence = ranks_by_tokens(mesh)
        self._exchange = SequenceExchange(mesh.cp_group, mesh.tp_group)
        self._rotary, self._passing = rotary_of(setting.architecture), Passing()
        self._meet(setting.parallel.timeout_seconds)
        self._build(setting, dtype)
        self.previous_count_LIE = self.zero_counts()

    # -- construction --------------------------------------------------------------------------------------------

    def _meet(self, timeout_seconds: float) -> None:
        """Megatron's process groups, in the order of ours: tp innermost, then cp, then rows of the batch, then pp."""
        layout = self.layout
        if parallel_state.model_parallel_is_initialized():  # by an earlier run of this process
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=self._stages if self._stages > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        )
        for mine, theirs in (
            (self.mesh.tp_group, parallel_state.get_tensor_model_parallel_group()),
            (self.mesh.cp_group, parallel_state.get_context_parallel_group()),
            (self.mesh.ep.get_group(), parallel_state.get_expert_model_parallel_group()),
            (self.mesh.pp_group, parallel_state.get_pipeline_model_parallel_group()),
        ):
            assert dist.get_process_group_ranks(mine) == dist.get_process_group_ranks(theirs)
        model_parallel_cuda_manual_seed(self.seed)  # asked for by sequence parallelism, although nothing is drawn

    def _build(self, setting: EngineSetting, dtype: torch.dtype) -> None:
        layout, architecture = self.layout, self.architecture
        self._model_config = transformer_config(architecture, layout, self._stages, self.device, dtype)
        self._model_config.finalize_model_grads_func = _finalize
        fused = architecture.moe.expert_kernel is ExpertKernel.triton
        dispatcher = make_dispatcher(setting.dispatch, self.mesh, fused) if layout.ep > 1 else None
        parts = Parts(architecture, setting.parallel, self._passing, self._exchange, dispatcher, self.device)
        first = parallel_state.get_pipeline_model_parallel_rank() == 0
        last = parallel_state.get_pipeline_model_parallel_rank() == layout.pp - 1
        logging.getLogger("megatron").setLevel(logging.ERROR)  # it wonders at every layer of ours
        chunks = []
        for stage in range(self._stages):
            begins, ends = first and stage == 0, last and stage == self._stages - 1
            chunks.append(build_chunk(self._model_config, parts, begins, ends, stage if self._stages > 1 else None))
        weights = MegatronWeights(
            architecture, Cut(layout.tp, dist.get_rank(self.mesh.tp_group), layout.ep, self.mesh.ep.get_local_rank())
        )
        self._places = weights_of(chunks, weights)
        self._buffers = buffers_of(chunks)
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=self.config.distributed_optimizer,
        )
        self._chunks = [DistributedDataParallel(self._model_config, reduction, chunk) for chunk in chunks]
        self.model = nn.ModuleList(chunks)
        self.layers = moe_layers(self.model)
        for layer in self.layers:
            layer.experts.recompute = setting.parallel.recompute is Recompute.selective
            layer.experts.keeps_made = setting.parallel.recompute is Recompute.full
        # Else it takes the FusedAdam of TransformerEngine or apex where it finds one, whose state has another form.
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(self.optim, self.config, dtype), self._chunks, use_gloo_process_groups=False
        )
        self._held = held_by(self._optimizer, self._places)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = self.optim.weight_decay * group["wd_mult"]

    # -- a step --------------------------------------------------------------------------------------------------

    def init_weights(self, init: InitConfig, seed: int) -> None:
        draw_weights(self._places, self._held, init, self.architecture.model.num_layers, seed)
        for name, buffer in self._buffers.items():
            init_buffer(buffer, name, seed)
        self._publish()

    def forward_backward(
        self, batches: Sequence[TokenBatch], step: int, num_targets: int, num_valid: int
    ) -> tuple[StepSums, Tensor]:
        total_LIE = self._count_first(batches, step) if self.counts_first and len(batches) > 1 else None
        step_pass = StepPass(self, batches, step, num_targets, num_valid, total_LIE)
        self.zero_grad()

        def count(index: int, output: Tensor | None, stats: list[LayerStats]) -> Tensor | None:
            # Balance losses are in the graph of this stage already, see `ExpertLayer`.
            step_pass.count(self._counted_here(output), stats)
            return None if output is None else output / num_targets

        self._run(batches, step_pass.context, count, num_valid, learns=True)
        error = step_pass.finish()
        if self.layout.pp > 1:  # each stage has counted its own layers
            error = error * len(self.layers) / max(1, self.architecture.num_moe_layers)
            for counted in (self.previous_count_LIE, error):
                dist.all_reduce(counted, group=self.mesh.pp_group)
        return step_pass.sums, error

    def _counted_here(self, loss: Tensor | None) -> Tensor:
        """Every rank of `tp` has the loss of all their tokens: one of them counts it."""
        if loss is None or dist.get_rank(self.mesh.tp_group) > 0:
            return torch.zeros((), device=self.device)
        return loss.detach()

    def _count_first(self, batches: Sequence[TokenBatch], step: int) -> Tensor:
        total_LIE = self.zero_counts()

        def count(index: int, output: Tensor | None, stats: list[LayerStats]) -> Tensor | None:
            for layer in stats:
                assert layer.step_count_E is not None
                total_LIE[layer.layer, layer.iteration] += layer.step_count_E
            return output

        context = self.context(step, training=True)
        self._run(batches, lambda _: context, count, 1, learns=False)
        return total_LIE

    def _run(
        self,
        batches: Sequence[TokenBatch],
        context: Callable[[int], ForwardContext],
        found: _Found,
        num_valid: int,
        learns: bool,
        wants_logits: bool = False,
    ) -> None:
        """All micro-batches through all stages by Megatron's schedule, and back if gradients are wanted."""

        def forward(batches: Iterator[tuple[int, TokenBatch]], chunk: nn.Module) -> tuple[Tensor, Any]:
            index, batch = next(batches)
            repeated = index >= count
            columns = self._part(batch, self.layout.cp, dist.get_rank(self.mesh.cp_group))
            micro_batch = self._micro_batch(batch, columns, context(index % count), math.inf if repeated else num_valid)
            labels = None if wants_logits else columns.target_BS.clamp(min=0)
            with self._passing.through(micro_batch):
                output = chunk(columns.token_BS, None, None, labels=labels)
            stats = [s for _, layer in sorted(micro_batch.stats.items()) for s in layer]
            if not _is_last(chunk):
                if not repeated:
                    found(index, None, stats)
                return output, None
            if not wants_logits:
                output = torch.where(columns.target_BS != IGNORE, output, 0.0).sum()
            loss = output * 0.0 if repeated else found(index, output, stats)
            return output if loss is None else loss, _as_it_is

        # Stages in turns take micro-batches in groups of `pp`: the last ones are repeated, and count for nothing.
        count, more = len(batches), -len(batches) % self.layout.pp if self._stages > 1 else 0
        schedule = get_forward_backward_func()
        streams = [enumerate([*batches, *[batches[-1]] * more]) for _ in self._chunks]
        rows, tokens = batches[0].token_BS.shape
        schedule(
            forward_step_func=forward,
            data_iterator=streams if self._stages > 1 else streams[0],
            model=self._chunks if self._stages > 1 else self._chunks[0],
            num_microbatches=count + more,
            seq_length=tokens,
            micro_batch_size=rows,
            forward_only=not learns,
        )

    def _part(self, batch: TokenBatch, count: int, index: int) -> TokenBatch:
        """One of so many parts of whole sequences on the host, on this rank's device."""
        return (batch if count == 1 else batch.part(index, count)).to(self.device)

    def _micro_batch(
        self, batch: TokenBatch, columns: TokenBatch, context: ForwardContext, num_valid: float
    ) -> MicroBatch:
        """
        Args:
            columns: what all ranks of `tp` embed, attend to and predict together.
        """
        core = self.architecture.attention.core
        plan = plan_attention(columns, self._rotary, core, self._exchange)
        part = self._part(batch, self.sequence.count, self.sequence.place)
        return MicroBatch(plan, part, context, num_valid)

    def gradient_norm(self) -> Tensor:
        self._optimizer.prepare_grads()
        return torch.tensor(float(self._optimizer.get_grad_norm()), device=self.device)

    def step(self, learning_rate: float, norm: Tensor) -> None:
        if self.optim.max_gradient_norm > 0:
            factor = (self.optim.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([one.main.grad for one in self._held if one.main.grad is not None], factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step_with_ready_grads()
        self.zero_grad()

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def checkpoint_state(self) -> MegatronState:
        return MegatronState(self._held, self._buffers, self._publish)

    @torch.no_grad()
    def _publish(self) -> None:
        """Bring what the optimizer steps to what computes, on all ranks."""
        for optimizer in _chained(self._optimizer):
            if hasattr(optimizer, "_copy_main_params_to_model_params") and not optimizer.is_stub_optimizer:
                optimizer._copy_main_params_to_model_params()
        if self.config.distributed_optimizer:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    # -- without gradients ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> StepSums:
        sums = self.zero_sums()

        def count(index: int, output: Tensor | None, stats: list[LayerStats]) -> Tensor | None:
            self.add(sums, self._counted_here(output), stats)
            return output

        self._evaluate([batch], count)
        return sums

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        length = batch.token_BS.shape[1]
        batch = padded(batch, self.sequence.count)
        found: list[Tensor] = []

        def keep(index: int, output: Tensor | None, stats: list[LayerStats]) -> Tensor | None:
            found.extend([] if output is None else [output])
            return output

        self._evaluate([batch], keep, wants_logits=True)
        rows, tokens = batch.token_BS.shape
        shape = (rows, tokens // self.layout.cp, self.architecture.vocab_size // self.layout.tp)
        part = found[0].float() if found else torch.zeros(shape, device=self.device)
        if self.layout.pp > 1:  # all but the last stage have zeros
            dist.all_reduce(part, group=self.mesh.pp_group)
        words = _gathered(part, self.mesh.tp_group, dim=2)
        return _gathered(words, self.mesh.cp_group, dim=1)[:, :length]

    @torch.no_grad()
    def first_nonfinite_module(self, batch: TokenBatch) -> str | None:
        watch = NonfiniteWatch(self.model)
        self._evaluate([batch], lambda index, output, stats: output)
        return watch.first(self.group)

    def _evaluate(self, batches: list[TokenBatch], found: _Found, wants_logits: bool = False) -> None:
        was_training = self.model.training
        for chunk in self._chunks:
            chunk.eval()
        context = self.evaluation_context()
        self._run(batches, lambda _: context, found, 1, learns=False, wants_logits=wants_logits)
        for chunk in self._chunks:
            chunk.train(was_training)

    def close(self) -> None:
        parallel_state.destroy_model_parallel()


def _is_last(chunk: nn.Module) -> bool:
    assert isinstance(chunk, DistributedDataParallel)
    return bool(chunk.module.post_process)


def _as_it_is(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss in Megatron's form: with a number of tokens, by which `_finalize` does not divide."""
    return output, torch.zeros((), dtype=torch.int, device=output.device), {}


def _finalize(models: list[nn.Module], num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """Megatron's sums over ranks, without its division."""
    finalize_model_grads(models, None, *args, **kwargs)


def _chained(optimizer: MegatronOptimizer) -> Sequence[Any]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _gathered(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _optimizer_config(optim: OptimConfig, config: MegatronConfig, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.max_gradient_norm,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed_optimizer,
    )

"""The default engine: torch's own FSDP2 and all-to-all, every kind of weight on its own view of the same ranks.

The rule that keeps gradients right under every layout: losses are sums over tokens, divided by numbers of the
global batch that are known before forward; everything after that is reduced by SUM. Nothing divides by a degree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moe_data.batch import TokenBatch, padded
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.engines.engine import Engine, NonfiniteWatch, StepPass, moe_layers, ranks_by_tokens, ranks_of
from moe_parallel.engines.parallelize import parallelize
from moe_parallel.engines.pipeline import Pipeline
from moe_parallel.learning import freeze, keep_router_gradients
from moe_parallel.mesh import ParallelConfig, ParallelMesh
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.moe.dispatch.all_to_all import AllToAllConfig
from moe_parallel.moe.dispatch.config import DispatchConfig
from moe_parallel.moe.routing import ForwardContext, LayerStats
from moe_parallel.optim import OptimConfig, build_optimizer, clip_gradients, global_gradient_norm
from moe_parallel.statistics import StepSums


class NativeEngine(Engine):
    """Owns the model and its optimizer on this rank: forward, backward, reduce, step."""

    name = "native"
    model: Transformer

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
        self.layout = mesh.layout
        self.parallel = parallel
        self.device = device
        self.optim = optim
        self.seed = seed
        self.group = mesh.world
        self.data, self.rows, self.sequence = ranks_by_tokens(mesh)
        self.pipeline: Pipeline | None = None
        if mesh.layout.pp > 1:
            self.stages = ranks_of(mesh.pp_group)
            self.pipeline = Pipeline(mesh, parallel, architecture.model.num_layers, dtype)
        with torch.device("meta"):
            model = Transformer(architecture, None if self.pipeline is None else self.pipeline.part)
            if master_dtype != torch.float32:
                model = model.to(master_dtype)
        freeze(model, optim)
        stages = [] if self.pipeline is None else self.pipeline.cut(model)
        self.model = parallelize(model, mesh, parallel, dispatch or AllToAllConfig(), dtype, stages)
        self.layers = moe_layers(self.model)
        self.materialize()

    def materialize(self) -> None:
        """Give this rank's part of the model memory, without values, and an optimizer.

        Everything before it runs without memory, everything after it on `device`: a plan takes over here.
        """
        self.model.to_empty(device=self.device)
        self.optimizer = build_optimizer(self.model, self.optim)
        self.previous_count_LIE = self.zero_counts()

    def init_weights(self, init: InitConfig, seed: int) -> None:
        init_weights(self.model, init, seed)

    def forward_backward(
        self, batches: Sequence[TokenBatch], step: int, num_targets: int, num_valid: int
    ) -> tuple[StepSums, Tensor]:
        total_LIE = self._count_first(batches, step) if self.counts_first and len(batches) > 1 else None
        step_pass = StepPass(self, batches, step, num_targets, num_valid, total_LIE)
        if self.pipeline is not None:
            self.pipeline.train([self._mine(batch) for batch in batches], step_pass)
        else:
            for index, batch in enumerate(batches):
                self._sync_gradients(index == len(batches) - 1)
                step_pass.count(*self.model(self._mine(batch), step_pass.context(index), Output.loss)).backward()
        if step < self.optim.router_only_steps:
            keep_router_gradients(self.model)
        return step_pass.sums, step_pass.finish()

    def _mine(self, batch: TokenBatch) -> TokenBatch:
        """This rank's part of each sequence, on its device."""
        if self.sequence.count > 1:
            batch = batch.part(self.sequence.place, self.sequence.count)
        return batch.to(self.device)

    def _forward(
        self, batch: TokenBatch, context: ForwardContext, output: Output
    ) -> tuple[Tensor | None, list[LayerStats]]:
        """A pass without gradient; the output is None where another stage has it."""
        if self.pipeline is not None:
            return self.pipeline.forward(batch, context, output)
        result: tuple[Tensor, list[LayerStats]] = self.model(batch, context, output)
        return result

    def _count_first(self, batches: Sequence[TokenBatch], step: int) -> Tensor:
        """The whole step's counts, from a forward pass without gradient."""
        total_LIE = torch.zeros_like(self.previous_count_LIE)
        context = self.context(step, training=True)
        with torch.no_grad():
            for batch in batches:
                for layer in self._forward(self._mine(batch), context, Output.hidden)[1]:
                    assert layer.step_count_E is not None
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
        parameters = self.model.parameters() if self.pipeline is None else self.pipeline.counted()
        return global_gradient_norm(parameters, self.group, self.layout.stage_ranks)

    def step(self, learning_rate: float, norm: Tensor) -> None:
        clip_gradients(self.model.parameters(), norm, self.optim.max_gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def checkpoint_state(self) -> TorchState:
        return TorchState(self.model, self.optimizer)

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> StepSums:
        was_training = self.model.training
        self.model.eval()
        sums = self.zero_sums()
        losses, stats = self._forward(self._mine(batch), self.evaluation_context(), Output.loss)
        self.add(sums, sums.no_loss if losses is None else losses, stats)
        self.model.train(was_training)
        return sums

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        length = batch.token_BS.shape[1]
        batch = self._mine(padded(batch, self.sequence.count))
        logits_BSV = self._forward(batch, self.evaluation_context(), Output.logits)[0]
        self.model.train(was_training)
        if self.pipeline is not None:
            logits_BSV = self.pipeline.to_all(logits_BSV, batch.token_BS, self.architecture.vocab_size)
        assert logits_BSV is not None
        return self.sequence.gather(logits_BSV).transpose(0, 1).flatten(1, 2)[:, :length]

    @torch.no_grad()
    def first_nonfinite_module(self, batch: TokenBatch) -> str | None:
        watch = NonfiniteWatch(self.model)
        with torch.compiler.set_stance("force_eager"):  # hooks see no module inside of a compiled graph
            self._forward(self._mine(batch), self.evaluation_context(), Output.loss)
        return watch.first(self.group, (lambda name: 0) if self.pipeline is None else self.pipeline.plan.stage_of)

"""Pipeline stages on torch's schedules: what a stage runs, what its neighbors get, and passes without a schedule.

A stage is an FSDP module over parts of the rank's model. torch's schedules order forward and backward passes of
micro-batches and carry tensors between stages, whose shapes are known beforehand: nothing is run to find them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor

from moe_data.batch import TokenBatch
from moe_parallel.engines.engine import StepPass
from moe_parallel.engines.stages import StagePlan, stage_plan
from moe_parallel.mesh import ParallelConfig, ParallelMesh, PipelineSchedule
from moe_parallel.model.transformer import Output, Transformer, through
from moe_parallel.moe.routing import ForwardContext, LayerStats

_TORCH_NAMES = {
    PipelineSchedule.one_f_one_b: "1F1B",
    PipelineSchedule.interleaved: "Interleaved1F1B",
    PipelineSchedule.interleaved_zero_bubble: "InterleavedZeroBubble",
    PipelineSchedule.zero_bubble_v: "ZBVZeroBubble",
    PipelineSchedule.dual_pipe_v: "DualPipeV",
}


class Stage(nn.Module):
    """Consecutive layers of a rank's part of the model; the first stage embeds, the last one predicts.

    Its modules are those of the model. What no layer owns, FSDP gathers around a pass of the stage.
    """

    def __init__(self, model: Transformer, plan: StagePlan, index: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == plan.last
        self.layers = nn.ModuleList(model.layers.get_submodule(str(layer)) for layer in plan.layers[index])
        if self.is_first or (self.is_last and model.architecture.last_embeds):
            self.embedding = model.embedding
        if self.is_last:
            self.mtp, self.norm, self.head = model.mtp, model.norm, model.head
        self._model = (model,)  # in a tuple: the model is no part of its stage

    def forward(
        self, x_BSD: Tensor | None, batch: TokenBatch, context: ForwardContext, output: Output
    ) -> tuple[Tensor, Tensor | None, list[LayerStats]]:
        """
        Args:
            x_BSD: the stream after the stage before; None in the first one.
            context: with the carry of the stage before.
        Returns:
            The stream, or in the last stage the wanted output; what the last router hands on; statistics.
        """
        (model,) = self._model
        model.check_length(batch)
        if x_BSD is None:
            x_BSD = self.embedding(batch.token_BS)
        plan = model.blocks[0].attention.plan(batch)
        x_BSD, stats, context = through(self.layers, x_BSD, batch, plan, context)
        if not self.is_last:
            return x_BSD, context.carry, stats
        out, further = model.predict(x_BSD, batch, plan, context, output)
        return out, None, stats + further


class _WithLoss(torch.autograd.Function):
    """Hands on the outputs of a stage, and in the backward pass the gradient 1 to its own losses: what a stage adds to
    the loss of the step needs no message, for its derivative is known."""

    @staticmethod
    def forward(ctx, loss, *outputs):
        ctx.one = torch.ones_like(loss)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.one, *grads


class _ScheduledStage(PipelineStage):
    """What torch's schedules call. Only tensors pass through them: the rest of a micro-batch is found by its number."""

    submod: Stage
    batches: Sequence[TokenBatch]
    step_pass: StepPass
    number: int
    """Of the micro-batch whose forward pass runs."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """torch's forward pass of a micro-batch."""
        self.number = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The part of it that calls the stage. Counted here, since the next micro-batch must know of this one."""
        context = self.step_pass.context(self.number)
        x_BSD, carry = (*received, None, None)[:2]
        context = replace(context, carry=carry)
        out, carry, stats = self.submod(x_BSD, self.batches[self.number], context, Output.loss)
        if self.submod.is_last:
            return self.step_pass.count(out, stats)
        loss = self.step_pass.count(self.step_pass.sums.no_loss, stats)
        outputs: tuple[Tensor, ...] = _WithLoss.apply(loss, *((out,) if carry is None else (out, carry)))
        return outputs


def _loss(output: Tensor, _target: Tensor) -> Tensor:
    """The last stage's output is the loss."""
    return output


class Pipeline:
    """The stages of this rank, and their neighbors'.

    Args:
        dtype: of the stream between stages.
    """

    def __init__(self, mesh: ParallelMesh, config: ParallelConfig, num_layers: int, dtype: torch.dtype) -> None:
        self.plan = stage_plan(config, num_layers)
        self.group = mesh.pp_group
        self.rank = dist.get_rank(self.group)
        self.part = self.plan.part_of(self.rank)
        self.stages: dict[int, Stage] = {}
        """This rank's, by number."""
        self._schedule, self._dtype = config.schedule, dtype
        self._schedules: dict[tuple[int, ...], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._scheduled: dict[tuple[int, ...], list[_ScheduledStage]] = {}

    def cut(self, model: Transformer) -> list[nn.Module]:
        """Make the stages of this rank's part of the model."""
        self.model = model
        self.stages = {index: Stage(model, self.plan, index) for index in self.plan.stages_of(self.rank)}
        return list(self.stages.values())

    # -- training --------------------------------------------------------------------------------------------------

    def train(self, batches: Sequence[TokenBatch], step_pass: StepPass) -> None:
        """Forward and backward of all micro-batches, in the order of the schedule.

        Args:
            batches: this rank's part of the sequences, on its device, all of one shape.
        """
        key = (len(batches), *batches[0].token_BS.shape)
        if key not in self._schedules:
            self._prepare(key, batches[0])
        for stage in self._scheduled[key]:
            stage.batches, stage.step_pass = batches, step_pass
        targets = torch.zeros(len(batches))  # unused: a schedule hands one of them to the loss of each micro-batch
        self._schedules[key].step(target=targets, return_outputs=False)
        self._add_shared_gradients()

    def _prepare(self, key: tuple[int, ...], batch: TokenBatch) -> None:
        stages = []
        for index, stage in self.stages.items():
            before = () if index == 0 else tuple(self._handed(index - 1, batch, "meta", requires_grad=True))
            after = tuple(self._handed(index, batch, "meta", requires_grad=True))
            if index == self.plan.last:
                after = (torch.zeros((), dtype=self._wide, device="meta", requires_grad=True),)
            device = batch.token_BS.device
            stages.append(_ScheduledStage(stage, index, len(self.plan.layers), device, before, after, group=self.group))
        kind = get_schedule_class(_TORCH_NAMES[self._schedule])
        several = issubclass(kind, PipelineScheduleMulti)
        # No factor: losses are sums over numbers of the whole step.
        self._schedules[key] = kind(stages if several else stages[0], key[0], loss_fn=_loss, scale_grads=False)
        self._scheduled[key] = stages

    @property
    def _wide(self) -> torch.dtype:
        """Of losses and of what routers hand on."""
        return torch.promote_types(self._dtype, torch.float32)

    def _handed(
        self, stage: int, batch: TokenBatch, device: torch.device | str, requires_grad: bool = False
    ) -> list[Tensor]:
        """Empty tensors like those that a stage hands to the next one."""
        architecture = self.model.architecture
        rows, length = batch.token_BS.shape
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((rows, length, architecture.model.dim), self._dtype)]
        if self.plan.hands_carry(stage, architecture):
            shapes.append(((rows * length, architecture.router.carry_width(architecture.moe.num_experts)), self._wide))
        return [torch.empty(s, dtype=t, device=device, requires_grad=requires_grad) for s, t in shapes]

    # -- a weight that lives on two stages -------------------------------------------------------------------------

    def shared(self) -> list[nn.Parameter]:
        """Parameters that the first and the last stage have both, on this rank if it has one of them. Every rank of
        either keeps the same values, for it adds up the gradients of both."""
        on_end = self.part.first or self.part.last
        shared = self.model.embedding.parameters() if on_end and self.model.architecture.last_embeds else ()
        return [parameter for parameter in shared if parameter.requires_grad]

    def counted(self) -> list[nn.Parameter]:
        """This rank's parameters, but for those that the first stage has as well."""
        elsewhere = [] if self.part.first else self.shared()
        return [p for p in self.model.parameters() if not any(p is other for other in elsewhere)]

    def _add_shared_gradients(self) -> None:
        other = self.plan.rank_of(self.plan.last) if self.part.first else 0
        for parameter in self.shared():
            assert parameter.grad is not None
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            theirs = torch.empty_like(grad)
            both = ((dist.isend, grad), (dist.irecv, theirs))
            works = dist.batch_isend_irecv(
                [dist.P2POp(call, tensor, group=self.group, group_peer=other) for call, tensor in both]
            )
            for work in works:
                work.wait()
            grad += theirs

    # -- a pass without gradient -----------------------------------------------------------------------------------

    def forward(
        self, batch: TokenBatch, context: ForwardContext, output: Output
    ) -> tuple[Tensor | None, list[LayerStats]]:
        """One batch through all stages, without gradient: what the last one puts out, on its rank, and the statistics
        of this rank's layers."""
        handed: list[Tensor] = []
        layer_stats: list[LayerStats] = []
        out: Tensor | None = None
        for index, stage in self.stages.items():
            if index > 0 and self.plan.rank_of(index - 1) != self.rank:
                handed = self._handed(index - 1, batch, batch.token_BS.device)
                for tensor in handed:
                    dist.recv(tensor, group=self.group, group_src=self.plan.rank_of(index - 1))
            x_BSD, carry = (*handed, None, None)[:2]
            result, carry, stats = stage(x_BSD, batch, replace(context, carry=carry), output)
            layer_stats += stats
            if stage.is_last:
                out = result
                break
            handed = [result] if carry is None else [result, carry]
            if self.plan.rank_of(index + 1) != self.rank:
                for tensor in handed:
                    dist.send(tensor.contiguous(), group=self.group, group_dst=self.plan.rank_of(index + 1))
        return out, layer_stats

    def to_all(self, logits_BSV: Tensor | None, token_BS: Tensor, vocab_size: int) -> Tensor:
        """The logits that the last stage put out, on all ranks."""
        if logits_BSV is None:
            logits_BSV = torch.empty(*token_BS.shape, vocab_size, dtype=self._dtype, device=token_BS.device)
        logits_BSV = logits_BSV.contiguous()
        dist.broadcast(logits_BSV, group=self.group, group_src=self.plan.rank_of(self.plan.last))
        return logits_BSV

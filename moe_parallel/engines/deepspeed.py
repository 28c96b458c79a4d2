"""DeepSpeed's ZeRO around our model: it partitions, reduces, clips and steps; routing, exchange and losses are ours.

Losses are sums divided by numbers of the global batch, and gradients are to be summed. DeepSpeed averages all of them,
those of experts too, over all ranks, so that the loss is multiplied by their number before backward.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_data.batch import TokenBatch
from moe_kernels.choice import ExpertKernel
from moe_parallel.checkpoint.pieces import boxes
from moe_parallel.engines.config import EngineSetting
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig, Offload
from moe_parallel.engines.deepspeed_experts import make_groups, our_name, register
from moe_parallel.engines.engine import Engine, NonfiniteWatch, StepPass, moe_layers, ranks_by_tokens
from moe_parallel.engines.parallelize import make_dispatcher, set_recompute
from moe_parallel.engines.zero_partitions import GroupPartitions, ParameterPartitions, Partitions, ZeroState
from moe_parallel.mesh import ParallelMesh
from moe_parallel.model.initialize import InitConfig, init_buffer, init_part
from moe_parallel.model.transformer import Output, Transformer
from moe_parallel.optim import adamw, parameter_groups
from moe_parallel.statistics import StepSums

log = logging.getLogger(__name__)


class DeepSpeedEngine(Engine):
    """Owns the model and DeepSpeed's engine of it on this rank."""

    name: ClassVar[str] = "deepspeed"
    model: Transformer

    def __init__(
        self,
        config: DeepSpeedConfig,
        setting: EngineSetting,
        mesh: ParallelMesh,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        if problems := config.problems(setting):
            raise ValueError("; ".join(problems))
        self.architecture, self.layout, self.device, self.seed = setting.architecture, mesh.layout, device, seed
        self.group = mesh.world
        self.data, self.rows, self.sequence = ranks_by_tokens(mesh)
        _join(device)
        with torch.device("meta"):
            model = Transformer(setting.architecture)
        self.layers = moe_layers(model)
        self._split_experts(mesh, setting)
        set_recompute(model, setting.parallel.recompute)
        # A tied weight has the first of its names, as in a checkpoint.
        whole = {name: (p.shape, p.ndim) for name, p in model.named_parameters()}
        options = zero_options(config, dtype, setting.optim.max_gradient_norm)
        materialize(model, device, dtype, options if config.stage == 3 else None)
        parameters = dict(model.named_parameters())
        groups = parameter_groups([(p, whole[name][1]) for name, p in parameters.items()], setting.optim)
        self.zero: Any = deepspeed.initialize(
            model=model, optimizer=adamw(self._apart(groups), setting.optim), config=options
        )[0]
        self.model = model
        self.optimizer = self.zero.optimizer
        kind = ParameterPartitions if config.stage == 3 else GroupPartitions
        self.partitions: Partitions = kind(
            self.zero.optimizer,
            {
                p: (ours, *self._place(ours, whole[name][0]))
                for name, p in parameters.items()
                if (ours := our_name(name))
            },
        )
        self.previous_count_LIE = self.zero_counts()
        log.info("deepspeed: ZeRO %d, experts of each layer on %d ranks", config.stage, self.layout.ep)

    def _split_experts(self, mesh: ParallelMesh, setting: EngineSetting) -> None:
        """Give each rank of `ep` its experts, and each layer a dispatcher that reaches the others."""
        if not self.layers:
            return
        name, ep = make_groups(self.layout.ep), self.layout.ep
        for layer in self.layers:
            register(layer, ep, dist.get_rank() % ep, name)
        if ep > 1:
            fused = setting.architecture.moe.expert_kernel is ExpertKernel.triton
            dispatcher = make_dispatcher(setting.dispatch, mesh, fused)
            for layer in self.layers:
                layer.dispatcher = dispatcher

    def _apart(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of parameters with those of experts apart: they are partitioned over other ranks."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        named = [{**group, "name": f"decay_{group['weight_decay']}"} for group in groups]
        return split_params_into_different_moe_groups_for_optimizer(named) if self.layers else named

    def _place(self, name: str, shape: torch.Size) -> tuple[torch.Size, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shape of a whole parameter, and the box of it that this rank's model has."""
        if ".experts." not in name:
            return shape, ((0,) * len(shape), tuple(shape))
        first = dist.get_rank() % self.layout.ep * shape[0]
        return torch.Size((shape[0] * self.layout.ep, *shape[1:])), ((first, *[0] * (len(shape) - 1)), tuple(shape))

    @torch.no_grad()
    def init_weights(self, init: InitConfig, seed: int) -> None:
        num_layers = self.architecture.model.num_layers
        for name, buffer in self.model.named_buffers():
            init_buffer(buffer, name, seed)
        with self.partitions.published():
            for ranges, flat, _ in self.partitions.visit(write=True):
                flat.zero_()
                for held in ranges:
                    values, taken = held.range_in(flat), 0
                    first, sizes = held.box
                    for at, size in boxes(held.start, held.start + held.count, sizes):
                        part = values[taken : taken + torch.Size(size).numel()].view(size)
                        offsets = [a + b for a, b in zip(first, at, strict=True)]
                        init_part(part, held.name, held.shape, offsets, init, num_layers, seed)
                        taken += part.numel()

    def forward_backward(
        self, batches: Sequence[TokenBatch], step: int, num_targets: int, num_valid: int
    ) -> tuple[StepSums, Tensor]:
        total_LIE = self._count_first(batches, step) if self.counts_first and len(batches) > 1 else None
        step_pass = StepPass(self, batches, step, num_targets, num_valid, total_LIE)
        for index, batch in enumerate(batches):
            self.zero.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = step_pass.count(*self.zero(batch.to(self.device), step_pass.context(index), Output.loss))
            self.zero.backward(loss * self.layout.ranks, scale_wrt_gas=False)
        return step_pass.sums, step_pass.finish()

    def _count_first(self, batches: Sequence[TokenBatch], step: int) -> Tensor:
        """The whole step's counts, from a forward pass without gradient."""
        total_LIE, context = torch.zeros_like(self.previous_count_LIE), self.context(step, training=True)
        with torch.no_grad():
            for batch in batches:
                for layer in self.zero(batch.to(self.device), context, Output.hidden)[1]:
                    total_LIE[layer.layer, layer.iteration] += layer.step_count_E
        return total_LIE

    def gradient_norm(self) -> Tensor:
        return self.partitions.gradient_norm()

    def step(self, learning_rate: float, norm: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.zero.step()  # clips by the same norm: it computes it once more
        if self.zero.optimizer.overflow:
            raise RuntimeError(f"DeepSpeed has skipped a step that had a finite gradient norm of {float(norm)}")

    def zero_grad(self) -> None:
        self.partitions.drop_gradients()

    def checkpoint_state(self) -> ZeroState:
        return ZeroState(self.partitions, self.model)

    def save_own(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's own checkpoint, which its tools read: `folder`/`tag`. All ranks wait for it."""
        self.zero.save_checkpoint(str(folder), tag=tag)

    def evaluate(self, batch: TokenBatch) -> StepSums:
        sums = self.zero_sums()
        with self._evaluation():
            self.add(sums, *self.zero(batch.to(self.device), self.evaluation_context(), Output.loss))
        return sums

    def logits(self, batch: TokenBatch) -> Tensor:
        with self._evaluation():
            return self.zero(batch.to(self.device), self.evaluation_context())[0]

    def first_nonfinite_module(self, batch: TokenBatch) -> str | None:
        watch = NonfiniteWatch(self.model)
        with self._evaluation():
            self.zero(batch.to(self.device), self.evaluation_context(), Output.loss)
        return watch.first(self.group)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        was_training = self.model.training
        self.zero.eval()
        with torch.no_grad():
            yield
        self.zero.train(was_training)

    def close(self) -> None:
        self.zero.destroy()
        _leave()


def zero_options(config: DeepSpeedConfig, dtype: torch.dtype, max_gradient_norm: float) -> dict[str, Any]:
    """DeepSpeed's own configuration. Gradients are reduced and added up in float32, whatever is computed in."""
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": config.overlap_communication,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "allgather_bucket_size": config.gather_bucket_elements,
        "stage3_prefetch_bucket_size": config.gather_bucket_elements,
        "stage3_param_persistence_threshold": config.keep_elements,
    }
    pinned = torch.cuda.is_available()
    for name, offload in (
        ("offload_optimizer", config.offload_optimizer),
        ("offload_param", config.offload_parameters),
    ):
        if offload is not Offload.none:
            zero[name] = {"device": offload.value, "pin_memory": pinned}
            if offload is Offload.nvme:
                zero[name]["nvme_path"] = config.nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics: we say where a step ends
        "steps_per_print": sys.maxsize,
        "gradient_clipping": max_gradient_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def materialize(model: nn.Module, device: torch.device, dtype: torch.dtype, zero3: dict[str, Any] | None) -> None:
    """Give a model on the meta device memory, without values.

    Args:
        dtype: of the parameters; buffers keep theirs.
        zero3: DeepSpeed's configuration where each rank keeps a part of each parameter only. One at a time is whole.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in made:
                made[old] = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device), old.requires_grad)
                made[old].__dict__.update(old.__dict__)  # the marks of experts
                if zero3 is not None:
                    _partition(made[old], next(iter(made.values())), zero3, dtype)
            setattr(module, name, made[old])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device=device))


def _partition(parameter: Any, first: Any, zero3: dict[str, Any], dtype: torch.dtype) -> None:
    if parameter is not first:
        first.convert_to_zero_parameters(param_list=[parameter])
        return
    holder = nn.Module()
    holder.register_parameter("first", parameter)
    deepspeed.zero.Init(module=holder, config_dict_or_path=zero3, dtype=dtype)


def _join(device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    # It takes the device from here and would ask MPI otherwise; srun does not set it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # On a CPU it would compile an operator of its own for shared memory: half a minute, and no gain for gradients.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(verbose=False)


def _leave() -> None:
    """DeepSpeed keeps groups of ranks in its modules: the next run of this process has others."""
    sys.modules["deepspeed.utils.groups"]._release_process_group_references()  # type: ignore[attr-defined]
    sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]

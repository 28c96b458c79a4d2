"""The sides of the comparison: models with equal weights, each with a training step of equal work.

Forward, cross-entropy, backward, clipping by the global norm, fused AdamW with the same groups. One micro-batch, no
balance losses, nothing compiled, nothing computed again in the backward pass on any side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from benchmarks.gpu_train.models import PRECISIONS, Model, their_options
from benchmarks.gpu_train.titan import titan_layers
from moe_data.batch import TokenBatch
from moe_kernels.choice import ExpertKernel
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh
from moe_parallel.model.initialize import InitConfig, init_weights
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.experts import local_tensor
from moe_parallel.optim import OptimConfig, build_optimizer

LEARNING_RATE = 1e-3
PARALLEL = ParallelConfig(ep=1, shard=1, reshard_after_forward=False)
"""On one device nothing is saved by casting weights to bf16 twice."""
OPTIM = OptimConfig(learning_rate=LEARNING_RATE)
SEED = 0

TITAN = "torchtitan-equivalent"
OURS = tuple(f"ours/{kernel.value}" for kernel in (ExpertKernel.grouped_mm, ExpertKernel.triton))
THEIRS = tuple(f"transformers/{how}" for how in ("grouped_mm", "sonicmoe", "deepgemm", "eager", "batched_mm"))
"""All that it has. Those that cannot run say so; of the others the fastest is measured."""
COPIES_LIMIT = 0.25
"""Part of the memory that batched_mm may fill with its copies of weights, one for each slot of one layer."""


class Side(ABC):
    """A model with its optimizer."""

    busiest: float | None = None
    """Slots of the busiest expert over the mean, largest of all layers, in the last step; None if not counted."""

    @abstractmethod
    def step(self, batch: TokenBatch, index: int) -> float:
        """Train on one batch; the mean loss before the update. Waits for the device."""


def build(name: str, model: Model, mesh: ParallelMesh, device: torch.device) -> Side:
    """The side of this name.

    Raises:
        ValueError: it cannot train this model here.
    """
    if name == TITAN:
        return TitanSide(model, mesh, device)
    who, how = name.split("/")
    return OurSide(model, mesh, device, ExpertKernel(how)) if who == "ours" else TheirSide(model, mesh, device, how)


def make_engine(model: Model, mesh: ParallelMesh, device: torch.device, kernel: ExpertKernel) -> NativeEngine:
    """With memory, without numbers."""
    precision = PRECISIONS[model.precision]
    return NativeEngine(
        model.shape(kernel), mesh, PARALLEL, OPTIM, device, precision.compute, master_dtype=precision.weights
    )


class OurSide(Side):
    """This toolkit's engine, as a run uses it."""

    def __init__(self, model: Model, mesh: ParallelMesh, device: torch.device, kernel: ExpertKernel) -> None:
        self.engine = make_engine(model, mesh, device, kernel)
        self.engine.init_weights(InitConfig(std=model.init_std), SEED)

    def step(self, batch: TokenBatch, index: int) -> float:
        """A step of the engine."""
        sums, _ = self.engine.forward_backward([batch], index, batch.num_targets, batch.num_valid)
        self.engine.step(LEARNING_RATE, self.engine.gradient_norm())
        self.busiest = float((sums.count_LE.amax(1) / sums.count_LE.mean(1)).max())
        return float(sums.cross_entropy) / batch.num_targets


class TitanSide(OurSide):
    """The same engine and model with torchtitan's sequence of operations in place of our experts."""

    def __init__(self, model: Model, mesh: ParallelMesh, device: torch.device) -> None:
        with titan_layers():
            self.engine = make_engine(model, mesh, device, ExpertKernel.auto)
        self.copy(our_weights(model, device))

    @torch.no_grad()
    def copy(self, ours: dict[str, Tensor]) -> None:
        """Take the numbers of our weights."""
        for name, parameter in self.engine.model.named_parameters():
            stem, _, last = name.rpartition(".")
            if stem.endswith("experts") and last in ("gate", "up"):
                value = ours[f"{stem}.gate_up"].chunk(2, dim=1)[last == "up"]
            else:
                value = ours[name]
            local_tensor(parameter).copy_(value)


class TheirSide(Side):
    """A causal language model of `transformers`, with scaled dot product attention."""

    def __init__(self, model: Model, mesh: ParallelMesh, device: torch.device, experts: str) -> None:
        import transformers

        if experts == "batched_mm":
            refuse_copies(model, device)
        precision = PRECISIONS[model.precision]
        config = getattr(transformers, f"{model.peer}Config")(**their_options(model.shape(), model.peer))
        with torch.device(device):
            self.model = getattr(transformers, f"{model.peer}ForCausalLM")._from_config(
                config, dtype=precision.weights, attn_implementation="sdpa", experts_implementation=experts
            )
        copy_ours(self.model, our_weights(model, device))
        if precision.mixed:
            shard(self.model, mesh, precision.compute)
        self.model.train()
        self.optimizer = build_optimizer(self.model, OPTIM)

    def step(self, batch: TokenBatch, index: int) -> float:
        """What its users write, its own loss included: the cross-entropy of logits in float32."""
        logits = self.model(input_ids=batch.token_BS).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.target_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def refuse_copies(model: Model, device: torch.device) -> None:
    """ValueError if batched_mm would fill the device: it copies the weights of an expert for each of its slots."""
    shape = model.shape()
    width = torch.finfo(PRECISIONS[model.precision].compute).bits // 8
    size = 3 * shape.model.dim * shape.moe.expert_dim * model.tokens * shape.router.top_k * width
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**33
    if size > COPIES_LIMIT * room:
        raise ValueError(f"batched_mm would copy {size / 2**30:,.0f} GiB of weights in each layer")


def shard(model: nn.Module, mesh: ParallelMesh, compute: torch.dtype) -> None:
    """FSDP2 with the policy that our engine has: cast for use, reduce in the type of the weights."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=next(model.parameters()).dtype)
    for module in (*model.model.layers, model):  # type: ignore[union-attr,misc]
        fully_shard(module, mesh=mesh.whole, mp_policy=policy, reshard_after_forward=PARALLEL.reshard_after_forward)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # on one rank there is nothing to average, and gloo cannot
        module.set_force_sum_reduction_for_comms(True)


def our_weights(model: Model, device: torch.device) -> dict[str, Tensor]:
    """First values of all weights, whole."""
    with torch.device("meta"):
        ours = Transformer(model.shape()).to(PRECISIONS[model.precision].weights)
    ours.to_empty(device=device)
    init_weights(ours, InitConfig(std=model.init_std), SEED)
    return {name: parameter.detach() for name, parameter in ours.named_parameters()}


_OUR_NAMES = {
    "model.embed_tokens.": "embedding.",
    "lm_head.": "head.",
    "model.norm.": "norm.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.": ".attention.",
    ".q_proj.": ".query.",
    ".k_proj.": ".key.",
    ".v_proj.": ".value.",
    ".o_proj.": ".output.",
    ".q_norm.": ".query_norm.",
    ".k_norm.": ".key_norm.",
    ".mlp.gate.": ".ffn.router.",
    ".mlp.shared_expert_gate.": ".ffn.shared_gate.",
    ".mlp.shared_expert.": ".ffn.shared.",
    ".mlp.experts.": ".ffn.experts.",
    ".experts.gate_up_proj": ".experts.gate_up",
    ".experts.down_proj": ".experts.down",
    ".shared.down_proj.": ".shared.down.",
}
"""What to replace, in this order."""


@torch.no_grad()
def copy_ours(theirs: nn.Module, ours: dict[str, Tensor]) -> None:
    """Our weights under their names. Raises KeyError for a weight that ours does not have, or that is left over."""
    left = dict(ours)
    for their_name, parameter in theirs.named_parameters():
        name = their_name
        for old, new in _OUR_NAMES.items():
            name = name.replace(old, new)
        halves = [half for half in ("gate_proj", "up_proj") if f".{half}." in name]
        if halves:
            whole = name.replace(halves[0], "gate_up")
            parameter.copy_(ours[whole].chunk(2)[halves[0] == "up_proj"])
            left.pop(whole, None)
        else:
            parameter.copy_(left.pop(name))
    if left:
        raise KeyError(f"{type(theirs).__name__} has no place for {', '.join(left)}")

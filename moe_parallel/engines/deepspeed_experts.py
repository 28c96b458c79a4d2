"""How DeepSpeed learns which parameters are experts, and who else has the same ones.

DeepSpeed knows two kinds of expert layers, its own two. Only the newer one (AutoEP) may be trained with ZeRO 3 and
has checkpoints that another number of ranks can read, so our layer becomes one of those: a subclass of it, with the
names and marks that DeepSpeed looks for. What the layer computes stays ours.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.checkpoint import constants
from deepspeed.checkpoint.autoep_affine import (
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from moe_parallel.moe.experts import RoutedExperts
from moe_parallel.moe.layer import MoELayer

_OUR_NAMES = {".experts.w1": ".experts.gate_up", ".experts.w2": ".experts.down"}
_FILLER = ".experts.w3"


class RegisteredExperts(RoutedExperts):
    """Experts whose parameters have the names that DeepSpeed saves.

    It expects three matrices an expert, where ours are two: gate and up are one. The third is a number that nothing
    uses and that stays zero.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    @property
    def gate_up(self) -> nn.Parameter:  # type: ignore[override]
        return self.w1

    @property
    def down(self) -> nn.Parameter:  # type: ignore[override]
        return self.w2

    @property
    def local_shape(self) -> torch.Size:
        return getattr(self.w1, "ds_shape", self.w1.shape)  # in stage 3 the parameter itself is empty at times


class RegisteredLayer(MoELayer, AutoEPMoELayer):
    """Our layer as DeepSpeed sees it. The second base is a mark for its engine; nothing of it runs."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False, **_: Any) -> None:
        """What DeepSpeed calls to have groups made: `make_groups` has made them."""


def make_groups(ep: int) -> str:
    """Make DeepSpeed's groups of ranks that share experts, and of those that have the same; returns their name."""
    name = f"ep_size_{ep}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep, use_data_before_expert_parallel_=False)
    return name


def register(layer: MoELayer, ep: int, ep_rank: int, group_name: str) -> None:
    """Turn a layer that is built on the meta device into one that DeepSpeed knows, with this rank's experts only."""
    whole, num_local = layer.config.num_experts, layer.config.num_experts // ep
    placement = legacy_uniform_autoep_placement_descriptor(whole, num_local, ep)
    experts = layer.experts
    with torch.device("meta"):
        parts = {"w1": torch.empty(num_local, *experts.gate_up.shape[1:])}
        parts |= {"w2": torch.empty(num_local, *experts.down.shape[1:]), "w3": torch.empty(num_local, 1, 1)}
    del experts.gate_up, experts.down
    experts.__class__ = RegisteredExperts
    first = ep_rank * num_local
    for name, part in parts.items():
        parameter: Any = nn.Parameter(part)
        parameter.allreduce, parameter.group_name = False, group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = group_name
        parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(group_name)
        shape = [whole, *part.shape[1:]]
        meta = {
            constants.AUTOEP_EXPERT_PLACEMENT: placement,
            constants.AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            constants.AUTOEP_PARAM_EP_RANK: ep_rank,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS: list(range(first, first + num_local)),
        }
        setattr(parameter, constants.DS_AUTOEP_UC_META, meta)
        experts.register_parameter(name, parameter)
    layer.__class__ = RegisteredLayer
    marks: Any = layer
    marks.num_experts, marks.num_local_experts = whole, num_local
    marks.ep_size, marks.ep_rank, marks.ep_group_name = ep, ep_rank, group_name
    marks.expert_placement_descriptor = placement


def our_name(name: str) -> str | None:
    """The name in a whole `Transformer` of a parameter of a registered model; None if that has no such parameter."""
    if name.endswith(_FILLER):
        return None
    for theirs, ours in _OUR_NAMES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name

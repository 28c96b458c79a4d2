"""The engine that the options ask for. Packages of other engines are imported only when they are chosen."""

from __future__ import annotations

import os

import torch

from moe_parallel.engines.config import EngineConfig, EngineSetting
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.engines.engine import Engine
from moe_parallel.engines.megatron_config import MegatronConfig
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelMesh


def build_engine(
    config: EngineConfig, setting: EngineSetting, device: torch.device, dtype: torch.dtype, seed: int
) -> Engine:
    """Model and optimizer on this rank, without values. Every rank must call it.

    Args:
        dtype: what is computed in.
        seed: of random routing.
    """
    mesh = ParallelMesh(setting.layout, device.type)
    if isinstance(config, DeepSpeedConfig):
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it warns where there is no GPU
        from moe_parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, setting, mesh, device, dtype, seed)
    if isinstance(config, MegatronConfig):
        from moe_parallel.engines.megatron import MegatronEngine

        return MegatronEngine(config, setting, mesh, device, dtype, seed)
    return NativeEngine(
        setting.architecture,
        mesh,
        setting.parallel,
        setting.optim,
        device,
        dtype,
        dispatch=setting.dispatch,
        seed=seed,
    )

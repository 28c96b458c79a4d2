"""Options of the DeepSpeed engine, and what DeepSpeed cannot train. Knows nothing of the package itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from enum import Enum
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from moe_parallel.engines.config import EngineConfig, EngineSetting, expert_form_problems, learning_options_problems
from moe_parallel.engines.stages import schedule_problems
from moe_parallel.mesh import Compile

PACKAGE = "deepspeed==0.19.8"
"""Parts of its interface that this engine needs are not public: other versions are refused."""


class Offload(str, Enum):
    none = "none"
    """On the device that computes."""
    cpu = "cpu"
    """In the memory of the host; its processor takes the optimizer's steps."""
    nvme = "nvme"
    """In files below engine.nvme_path, read and written asynchronously."""


@dataclass(kw_only=True)
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO (arXiv 1910.02054) with our experts, routers and dispatchers."""

    stage: int = 2
    """What is split over the ranks: 1 the optimizer's state and the float32 weights, 2 gradients as well, 3 the weights
    that compute as well. Those of experts are split over the ranks that have the same ones."""
    offload_optimizer: Offload = Offload.none
    """Where moments and float32 weights are kept; nvme needs stage 3."""
    offload_parameters: Offload = Offload.none
    """Where this rank's part of the weights is kept while they do not compute; needs stage 3."""
    nvme_path: str | None = None
    """Folder on a fast local disk for what is offloaded to nvme; each host has its own."""
    reduce_bucket_elements: int = 50_000_000
    """Gradients that are reduced at once."""
    gather_bucket_elements: int = 50_000_000
    """Weights that are gathered at once: after a step (stages 1 and 2), or ahead of the layers that need them (3)."""
    keep_elements: int = 100_000
    """Stage 3: weights smaller than this stay whole on every rank."""
    overlap_communication: bool = False
    """Reduce gradients of one layer while those of the next are computed, on a stream and in buffers of their own."""

    def __post_init__(self) -> None:
        if self.stage == 0:
            raise ValueError(
                "engine.stage=0 clips gradients of experts by a wrong norm (each rank takes its own for all, "
                "deepspeedai/DeepSpeed issue 8475) and splits nothing; use engine=native with parallel.shard=1, or "
                "engine.stage=1, 2 or 3"
            )
        if self.stage not in (1, 2, 3):
            raise ValueError(f"engine.stage={self.stage} is no stage of ZeRO; legal values: [1, 2, 3]")
        for name in ("reduce_bucket_elements", "gather_bucket_elements"):
            if (value := getattr(self, name)) < 2 or value % 2:
                raise ValueError(f"engine.{name}={value} must be an even number of at least 2")
        if self.keep_elements < 0:
            raise ValueError(f"engine.keep_elements={self.keep_elements} must not be negative")
        self._check_offload()

    def _check_offload(self) -> None:
        parameters, optimizer = self.offload_parameters, self.offload_optimizer
        if self.stage < 3:
            for name, where in (("offload_parameters", parameters), ("offload_optimizer", optimizer)):
                if where is Offload.nvme or (name == "offload_parameters" and where is not Offload.none):
                    raise ValueError(
                        f"engine.{name}={where.value} needs engine.stage=3, not {self.stage}: DeepSpeed moves nothing "
                        f"but the optimizer's state to the host in stages 1 and 2"
                    )
        if parameters is not Offload.none and optimizer is Offload.none:
            raise ValueError(
                f"engine.offload_parameters={parameters.value} needs engine.offload_optimizer=cpu or nvme: DeepSpeed "
                "steps on the host what is kept there"
            )
        uses_nvme = Offload.nvme in (parameters, optimizer)
        if uses_nvme and self.nvme_path is None:
            raise ValueError("offloading to nvme needs engine.nvme_path: a folder on a local disk")
        if not uses_nvme and self.nvme_path is not None:
            raise ValueError(
                f"engine.nvme_path={self.nvme_path} is not used: nothing is offloaded to nvme; leave it out"
            )

    @property
    def uses_nvme(self) -> bool:
        """Something is kept in files."""
        return Offload.nvme in (self.offload_optimizer, self.offload_parameters)

    def problems(self, setting: EngineSetting) -> list[str]:
        layout, parallel = setting.layout, setting.parallel
        problems = schedule_problems(parallel, "deepspeed") + learning_options_problems(setting.optim, "deepspeed")
        problems += expert_form_problems(setting.architecture, "deepspeed")
        for name, degree in (("pp", layout.pp), ("tp", layout.tp), ("cp", layout.cp)):
            if degree > 1:
                problems.append(
                    f"parallel.{name}={degree}: engine=deepspeed has data and expert parallelism only; set "
                    f"parallel.{name}=1, or engine=native"
                )
        if setting.architecture.num_moe_layers and setting.architecture.moe.adjugate_groups > 0:
            problems.append(
                f"moe.adjugate_groups={setting.architecture.moe.adjugate_groups}: DeepSpeed's checkpoints know one "
                "bank of experts for each layer; set moe.adjugate_groups=0, or engine=native"
            )
        if parallel.shard is not None:
            problems.append(
                f"parallel.shard={parallel.shard} is of engine=native: ZeRO splits over all ranks that have the same "
                "weights; set parallel.shard=null, and engine.stage for what is split"
            )
        if not parallel.reshard_after_forward:
            problems.append(
                "parallel.reshard_after_forward=false is of engine=native; engine.stage=2 keeps weights whole"
            )
        if parallel.compile is not Compile.none:
            problems.append(
                f"parallel.compile={parallel.compile.value} is not possible with engine=deepspeed, whose hooks would be"
                " compiled along; set parallel.compile=none, or engine=native"
            )
        if setting.dtype is torch.bfloat16 and self.stage == 1 and self.offload_optimizer is Offload.none:
            problems.append(
                "engine.stage=1 with train.dtype=bfloat16 makes DeepSpeed take another optimizer, with its own norm, "
                "which is not proven here; set engine.stage=2, or train.dtype=float32"
            )
        return problems + self._missing(setting.device_type)

    def _missing(self, device_type: str | None) -> list[str]:
        """What is not installed here; a plan for elsewhere (no device) needs nothing."""
        if device_type is None:
            return []
        if importlib.util.find_spec("deepspeed") is None:
            return [
                f"engine=deepspeed needs the package: DS_BUILD_OPS=0 pip install {PACKAGE}, or choose engine=native"
            ]
        if (version := importlib.metadata.version("deepspeed")) != PACKAGE.partition("==")[2]:
            return [f"engine=deepspeed is made for {PACKAGE}, not {version}: DS_BUILD_OPS=0 pip install {PACKAGE}"]
        if self.uses_nvme and not _has_libaio():
            return [
                "offloading to nvme needs the library libaio with its headers, and a compiler: apt-get install "
                "libaio-dev g++, or offload to cpu"
            ]
        return []


def _has_libaio() -> bool:
    """DeepSpeed compiles its asynchronous reader at the first use."""
    include = [Path(folder) for folder in os.environ.get("CPATH", "").split(":") if folder]
    header = any(
        (folder / "libaio.h").is_file() for folder in [*include, Path("/usr/include"), Path("/usr/local/include")]
    )
    return header and shutil.which(os.environ.get("CXX", "c++")) is not None

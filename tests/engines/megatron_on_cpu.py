"""Lets Megatron-Core, which names its device `cuda` in many places, run on a CPU. For tests alone.

Importing it changes torch for the rest of the process: do it in a process of its own, before any import of
megatron.core. Streams and events do nothing, `cuda` as a device means `cpu`, generators of the GPU are the CPU's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_HERE = torch.device("cpu")


class _Nothing:
    """A stream or an event: whatever is called on it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def query(self) -> bool:
        return True


def _ignore(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _OnCpu(TorchFunctionMode):
    """Rewrites devices in arguments of torch's functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {key: _HERE if _names_cuda(value) else value for key, value in (kwargs or {}).items()}
        return func(*(_HERE if _names_cuda(value) else value for value in args), **named)


def _patch_torch() -> None:
    nothing, cuda = _Nothing(), torch.cuda
    values: dict[str, Any] = {
        "Stream": _Nothing,
        "Event": _Nothing,
        "current_device": lambda: _HERE,
        "device_count": lambda: 1,
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "current_stream": lambda *_, **__: nothing,
        "default_stream": lambda *_, **__: nothing,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    }
    values |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), _zero)
    for name, value in values.items():
        setattr(cuda, name, value)
    for name in ("synchronize", "empty_cache", "set_device", "manual_seed_all"):  # each an object of its own
        setattr(cuda, name, lambda *_, **__: None)
    stay: Any = lambda self, *_, **__: self  # noqa: E731
    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]
    torch.Tensor.record_stream = _ignore  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_with_cuda(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Optimizers ask whether a tensor's type is "torch.cuda.FloatTensor"."""
        if dtype is None:
            name = plain_type(self)
            return name if ".cuda." in name else name.replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype.replace(".cuda", "") if isinstance(dtype, str) else dtype, *args, **kwargs)

    torch.Tensor.type = type_with_cuda  # type: ignore[method-assign, assignment]


def _patch_megatron() -> None:
    import megatron.core.tensor_parallel.random as random_state
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return tensor.numpy() if as_numpy else tensor

    dispatcher.maybe_move_tensor_to_cpu = moved
    random_state._get_cuda_rng_state = torch.cuda.get_rng_state
    random_state._set_cuda_rng_state = torch.cuda.set_rng_state
    if not hasattr(random_state, "get_cuda_rng_state"):
        random_state.get_cuda_rng_state = torch.cuda.get_rng_state
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # undefined in 0.16 without TransformerEngine, on a GPU as well


def _as_with_transformer_engine() -> None:
    """Megatron as it is beside a FusedAdam of another package: an engine that takes that one would fail here."""
    import megatron.core.optimizer as optimizers

    optimizers.USING_PYTORCH_OPTIMIZER, optimizers.Adam = False, None


_patch_torch()
_MODE = _OnCpu()
_MODE.__enter__()
_patch_megatron()
_as_with_transformer_engine()

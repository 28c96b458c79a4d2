"""A router from outside of this package: one file with its options and its class (docs/routers.md)."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import threading
import traceback
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.router import BatchShape, Router, RouterConfig

_LOADING = threading.RLock()


@dataclass(kw_only=True)
class PluginConfig(RouterConfig):
    plugin: str = ""
    """Where the options class of the router is: path/to/file.py:ClassConfig, or package.module:ClassConfig."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its options, by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner  # noqa: B018  raises what is wrong with it

    @cached_property
    def inner(self) -> RouterConfig:
        """The router's own options."""
        kind = _load(self.plugin)
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(RouterConfig)}
        names = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
        for name in self.options:
            if name in shared:
                raise ValueError(f"router.options.{name} is an option of every router; set router.{name}")
            if name not in names:
                raise ValueError(
                    f"router.options.{name} is not an option of router.plugin={self.plugin}; it has: "
                    f"{', '.join(names) or 'none'}"
                )
        try:
            return kind(**shared, **self.options)
        except ValidationError as error:
            raise ValueError("; ".join(_text(problem) for problem in error.errors())) from None

    def build(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return self.inner.build(dim, num_experts, with_bias)

    def build_first(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return self.inner.build_first(dim, num_experts, with_bias)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return self.inner.num_weights(dim, num_experts)

    def num_products(self, dim: int, num_experts: int) -> int:
        return self.inner.num_products(dim, num_experts)

    def carry_width(self, num_experts: int) -> int:
        return self.inner.carry_width(num_experts)

    def carry_weights(self, num_experts: int) -> int:
        return self.inner.carry_weights(num_experts)

    def check_experts(self, num_experts: int) -> None:
        self.inner.check_experts(num_experts)

    def check_balance(self, balance: BalanceConfig) -> None:
        self.inner.check_balance(balance)

    def check_capacity(self, factor: float) -> None:
        self.inner.check_capacity(factor)

    def check_rounding(self, gains: bool) -> None:
        self.inner.check_rounding(gains)

    def check_learning(self) -> None:
        self.inner.check_learning()

    def check_device(self, device_type: str, dtype: torch.dtype) -> None:
        self.inner.check_device(device_type, dtype)

    def check_batch(self, shape: BatchShape, num_experts: int) -> None:
        self.inner.check_batch(shape, num_experts)


def _text(problem: Any) -> str:
    """What pydantic found wrong with an option, with its name and value."""
    original = problem.get("ctx", {}).get("error")
    if original is not None:  # raised by the __post_init__ of the plug-in, which names the option itself
        return str(original)
    name = ".".join(["router.options", *map(str, problem["loc"])])
    return (
        f"{name}: {problem['msg']}"
        if problem["type"] == "missing"
        else f"{name}={problem['input']!r}: {problem['msg']}"
    )


def _load(plugin: str) -> type[RouterConfig]:
    place, colon, name = plugin.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"router.plugin={plugin!r} must be path/to/file.py:ClassConfig or package.module:ClassConfig")
    with _LOADING:  # a second thread must not see a module that is half executed
        module = _module(place, plugin)
    kind = getattr(module, name, None)
    if kind is None:
        found = [
            key for key, value in vars(module).items() if _is_options(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"router.plugin={plugin}: {place} has no {name}; it has: {', '.join(found) or 'no options class'}"
        )
    if not _is_options(kind):
        raise ValueError(
            f"router.plugin={plugin}: {name} must be a class derived from RouterConfig and decorated with "
            "pydantic.dataclasses.dataclass(kw_only=True); docs/routers.md has an example"
        )
    return kind


def _is_options(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, RouterConfig) and is_pydantic_dataclass(value)


def _module(place: str, plugin: str) -> ModuleType:
    """The module, loaded once: the same class however often the configuration is read."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except Exception as error:
            raise ValueError(f"router.plugin={plugin} cannot be imported: {_what_and_where(error)}") from error
    path = Path(place).expanduser().resolve()
    key = f"moe_parallel_plugin:{path}"
    if key not in sys.modules:
        if not path.is_file():
            raise ValueError(f"router.plugin={plugin}: there is no file {path}; paths start at the working folder")
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses look their module up while they are made
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[key]
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"router.plugin={plugin} cannot be imported: {_what_and_where(error)}") from error
    return sys.modules[key]


def _what_and_where(error: Exception) -> str:
    """An exception while a file was executed, in one line."""
    if isinstance(error, SyntaxError):  # its text has the place already
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"

"""A router from outside of this package: one file with its options and its class (docs/routers.md)."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.routers.router import BatchShape, Router, RouterConfig


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
        unknown = sorted(set(self.options) - set(names))
        if unknown:
            raise ValueError(
                f"router.options.{unknown[0]} is not an option of router.plugin={self.plugin}; it has: {names}"
            )
        try:
            return kind(**shared, **self.options)
        except ValidationError as error:
            first = error.errors()[0]
            original = first.get("ctx", {}).get("error")
            where = ".".join(map(str, first["loc"]))
            raise ValueError(str(original) if original else f"router.options.{where}: {first['msg']}") from None

    def build(self, dim: int, num_experts: int, with_bias: bool) -> Router:
        return self.inner.build(dim, num_experts, with_bias)

    def num_weights(self, dim: int, num_experts: int) -> int:
        return self.inner.num_weights(dim, num_experts)

    def check_experts(self, num_experts: int) -> None:
        self.inner.check_experts(num_experts)

    def check_balance(self, balance: BalanceConfig) -> None:
        self.inner.check_balance(balance)

    def check_capacity(self, factor: float) -> None:
        self.inner.check_capacity(factor)

    def check_batch(self, shape: BatchShape, num_experts: int) -> None:
        self.inner.check_batch(shape, num_experts)


def _load(plugin: str) -> type[RouterConfig]:
    place, colon, name = plugin.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"router.plugin={plugin!r} must be path/to/file.py:ClassConfig or package.module:ClassConfig")
    kind = getattr(_module(place, plugin), name, None)
    if not (isinstance(kind, type) and issubclass(kind, RouterConfig)):
        raise ValueError(f"router.plugin={plugin}: {name} is not a dataclass derived from RouterConfig in {place}")
    return kind


def _module(place: str, plugin: str) -> ModuleType:
    """The module, loaded once: the same class however often the configuration is read."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"router.plugin={plugin} cannot be imported: {error}") from None
    path = Path(place).resolve()
    key = f"moe_parallel_plugin:{path}"
    if key not in sys.modules:
        if not path.is_file():
            raise ValueError(f"router.plugin={plugin}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses look their module up while they are made
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]

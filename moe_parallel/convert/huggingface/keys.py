"""A config.json as it is read: keys with the defaults of their class, and refusals of what has no counterpart here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Keys:
    """The keys of one config.json.

    Args:
        defaults: what the class in transformers takes where a key is left out.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, defaults

    def __call__(self, name: str) -> Any:
        """The value of a key. Raises ValueError if neither the file nor the class has one."""
        if name in self.config:
            return self.config[name]
        if name in self.defaults:
            return self.defaults[name]
        raise ValueError(f"config.json has no {name}, which a model_type={self.config.get('model_type')} needs")

    def get(self, name: str, default: Any = None) -> Any:
        """The same, with a default of the caller's."""
        return self.config.get(name, self.defaults.get(name, default))

    def only(self, name: str, *values: Any) -> None:
        """Refuse a key that is there and has another value than these."""
        if name in self.config and self.config[name] not in values:
            legal = " or ".join(shown(value) for value in values)
            refuse(name, self.config[name], f"only {legal} has a counterpart here")

    def need(self, name: str) -> int:
        """The value of a key that must be a whole number."""
        value = self(name)
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(name, value, "a whole number is needed")
        return int(value)

    def several(self, name: str, kind: type[list] | type[dict] = list) -> Any:
        """The value of a key that must be a list, or another collection; an empty one if it is null or left out."""
        value = self.get(name)
        if value is not None and not isinstance(value, kind):
            refuse(name, value, "a list is needed" if kind is list else "an object is needed")
        return value or kind()


def refuse(name: str, value: Any, why: str) -> None:
    """Raise the ValueError of a key that cannot be expressed."""
    raise ValueError(f"{name}={shown(value)} of config.json: {why}")


def shown(value: Any) -> str:
    """A value as JSON writes it."""
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else str(value)
    )

"""The YAML files that ship: each becomes options, and the default is the one without a choice."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moe_data.loader import DataConfig
from moe_data.sources import SourceConfig, SourceKind
from moe_data.tokenizers import TokenizerConfig, TokenizerKind

ROOT = Path(__file__).parents[2] / "configs"


def load(group: str, name: str, schema: type) -> object:
    node = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(ROOT / group / f"{name}.yaml"))
    return OmegaConf.to_object(node)


@pytest.mark.parametrize("kind", [kind.value for kind in SourceKind])
def test_each_kind_of_source_has_a_file(kind: str) -> None:
    """A key that no longer exists, a value of the wrong type, or a kind that cannot be chosen."""
    config = load("data", kind, DataConfig)
    assert isinstance(config, DataConfig)
    assert all(isinstance(source, SourceConfig) and source.kind == kind for source in config.sources)


@pytest.mark.parametrize("kind", [kind.value for kind in TokenizerKind])
def test_each_tokenizer_has_a_file(kind: str) -> None:
    """As above."""
    config = load("tokenizer", kind, TokenizerConfig)
    assert isinstance(config, TokenizerConfig)
    assert config.kind == kind


def test_the_embedded_file_is_the_default() -> None:
    """Two defaults that drift apart: the run without a choice and data=embedded."""
    assert load("data", "embedded", DataConfig) == DataConfig()


@pytest.mark.parametrize("schema", [DataConfig, SourceConfig, TokenizerConfig])
def test_every_option_has_its_text(schema: type) -> None:
    """An option that the reference page cannot explain."""
    module = __import__(schema.__module__, fromlist=["x"])
    source = Path(module.__file__).read_text()
    body = source[source.index(f"class {schema.__name__}:") :]
    for field in fields(schema):
        after = body[body.index(f"    {field.name}:") :].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name

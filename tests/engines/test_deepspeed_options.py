"""What DeepSpeed cannot do is refused before any process starts, with the reason and what to set instead."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from moe_parallel import options
from moe_parallel.engines import deepspeed_config
from moe_parallel.engines.deepspeed_config import DeepSpeedConfig
from moe_parallel.relations import check

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str) -> options.Config:
    return options.composed(["engine=deepspeed", "model=tiny", *overrides], CONFIGS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stage": 0}, r"engine.stage=0 clips gradients of experts by a wrong norm .*8475.*engine=native"),
        ({"stage": 4}, r"engine.stage=4 is no stage of ZeRO; legal values: \[1, 2, 3\]"),
        ({"stage": 2, "offload_parameters": "cpu"}, r"offload_parameters=cpu needs engine.stage=3, not 2"),
        ({"stage": 1, "offload_optimizer": "nvme", "nvme_path": "x"}, r"offload_optimizer=nvme needs engine.stage=3"),
        ({"stage": 3, "offload_parameters": "cpu"}, r"needs engine.offload_optimizer=cpu or nvme"),
        ({"stage": 3, "offload_optimizer": "nvme"}, r"needs engine.nvme_path"),
        ({"nvme_path": "/fast"}, r"engine.nvme_path=/fast is not used"),
        ({"reduce_bucket_elements": 1001}, r"engine.reduce_bucket_elements=1001 must be an even number"),
        ({"gather_bucket_elements": 0}, r"engine.gather_bucket_elements=0 must be an even number"),
        ({"keep_elements": -1}, r"engine.keep_elements=-1 must not be negative"),
    ],
)
def test_refuses_options(given, words):
    """A setting that DeepSpeed would ignore, fail at after minutes, or train wrongly with."""
    with pytest.raises(ValueError, match=words):
        DeepSpeedConfig(**given)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=2"], r"parallel.tp=2: engine=deepspeed has data and expert parallelism only"),
        (["parallel.cp=2"], r"parallel.cp=2: engine=deepspeed"),
        (["parallel.shard=1"], r"parallel.shard=1 is of engine=native"),
        (["parallel.reshard_after_forward=false"], r"parallel.reshard_after_forward=false is of engine=native"),
        (["parallel.compile=blocks"], r"parallel.compile=blocks is not possible with engine=deepspeed"),
        (
            ["moe.expert_form=delta", "moe.delta_rank=2"],
            r"moe.expert_form=delta .*moe.expert_form=full, or engine=native",
        ),
        (["engine.stage=1", "train.dtype=bfloat16"], r"engine.stage=1 with train.dtype=bfloat16 .*engine.stage=2"),
    ],
)
def test_refuses_what_is_of_another_engine(overrides, words):
    """An option of the native engine that would have no effect; all are told before any rank starts."""
    with pytest.raises(options.ConfigError, match=words):
        check(config(*overrides), 2, "cpu")


def test_says_how_to_install(monkeypatch):
    """A traceback of an import, or of a version whose inside is another, instead of the command that helps."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(options.ConfigError, match=r"pip install deepspeed==0.19.8"):
        check(config(), 2, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(options.ConfigError, match=r"made for deepspeed==0.19.8, not 0.20.0"):
        check(config(), 2, "cpu")
    check(config(), 2)  # a plan for elsewhere


def test_needs_libaio_for_nvme(monkeypatch):
    """A compiler's error from the first step instead of the name of the library."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.8")
    monkeypatch.setattr(deepspeed_config, "_has_libaio", lambda: False)
    nvme = config("engine.stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/fast")
    with pytest.raises(options.ConfigError, match=r"libaio-dev"):
        check(nvme, 2, "cpu")


def test_saved_config_keeps_its_engine(tmp_path):
    """A run that resumes under another engine than it was configured with, and one of before there was a choice."""
    path = tmp_path / "config.yaml"
    path.write_text(options.config_yaml(config("engine.stage=3")))
    assert options.load_config(path).engine == DeepSpeedConfig(stage=3)
    text = path.read_text()
    start = text.index("engine:")
    end = text.index("\ntrain:", start)
    path.write_text(text[:start].rstrip("\n") + text[end:])
    assert type(options.load_config(path).engine).__name__ == "NativeEngineConfig"

"""Models of transformers here, and back: the same logits, the same bits, the same config.json.

Logits are compared in float32, since transformers rounds norms and routers to it whatever the weights are. They are of
the order of 5, and the largest difference found is 7e-6, some tens of roundings. The smallest wrong detail that was
tried in these models (three times the norms' epsilon) moves them by 2e-4; a wrong scale, name or layout by more than 1.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.huggingface.families import architecture_of_config, config_of_architecture
from moe_parallel.convert.huggingface.files import SafetensorsFolder
from moe_parallel.convert.huggingface.folder import open_model
from moe_parallel.convert.huggingface.weights import config_of_weights, export_weights, import_weights
from moe_parallel.convert.lazy import Cast, Given, Lazy, whole
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig
from moe_parallel.model.mtp import embed_known
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.convert.huggingface_models import NAMES, VOCABULARY, in_memory, make, make_grove, stored
from tests.convert.models import pretrained, with_experts

TOLERANCE = 2e-5
BATCH = make_batch([[40], [40]], 40, VOCABULARY)


def our_logits(architecture: Architecture, weights: dict[str, Lazy]) -> Tensor:
    with torch.no_grad():
        return build_model(architecture, weights).eval()(BATCH, ForwardContext(training=False))[0]


def their_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(BATCH.token_BS).logits


def write(folder: Path, config: dict[str, Any], weights: dict[str, Lazy]) -> None:
    """A model's folder, all in memory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: whole(lazy).clone() for name, lazy in weights.items()}, folder / "model.safetensors")


def assert_same_bits(found: dict[str, Lazy], wanted: dict[str, Lazy]) -> None:
    assert found.keys() == wanted.keys()
    for name, lazy in wanted.items():
        assert torch.equal(whole(found[name]), whole(lazy)), name


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """There: a wrong name, order of gate and up, rotation, norm or rule of routing. Back: a tensor that is lost,
    renamed or rounded, or a key of config.json that comes back with another meaning: transformers must load the export
    and compute the very same bits."""
    model = make(name)
    config, theirs = stored(model, tmp_path / "theirs")
    architecture, ours = architecture_of_config(config), import_weights(config, theirs)
    expected = their_logits(model)
    torch.testing.assert_close(our_logits(architecture, ours), expected, atol=TOLERANCE, rtol=TOLERANCE)

    written = config_of_architecture(architecture, config["model_type"])
    back = export_weights(architecture, written, ours)
    assert_same_bits(back, theirs)
    write(tmp_path / "ours", written, back)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(loaded) is type(model)
    assert torch.equal(their_logits(loaded.eval()), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "moe" in name or name in ("mixtral", "deepseek_v3")])
def test_stacked_experts_are_read_as_well(name: str, tmp_path: Path) -> None:
    """Files with the names and the stacked experts that transformers 5 has in memory, which some tools write."""
    model = make(name)
    config, theirs = stored(model, tmp_path / "theirs")
    stacked = in_memory(model)
    assert any(key.endswith("experts.gate_up_proj") for key in stacked)
    assert not any(key.endswith("experts.gate_up_proj") for key in theirs)
    assert_same_bits(import_weights(config, stacked), import_weights(config, theirs))


def test_grove() -> None:
    """Adjugates of the wrong experts, or without their factor: against the block written out. Its class is not in
    transformers, so an export must ask for it by name."""
    model = make_grove()
    config = {**model.config.to_dict(), "model_type": "grove_moe", "architectures": ["GroveMoeForCausalLM"]}
    theirs = in_memory(model)
    assert "model.layers.1.mlp.chunk_experts.3.down_proj.weight" in theirs
    architecture, ours = architecture_of_config(config), import_weights(config, theirs)
    torch.testing.assert_close(our_logits(architecture, ours), their_logits(model), atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM, but moe\.adjugate_groups=4, there 0"):
        config_of_architecture(architecture)
    written = config_of_architecture(architecture, "grove_moe")
    back = export_weights(architecture, written, ours)
    assert theirs.keys() - back.keys() == {
        f"model.layers.1.mlp.{name}" for name in ("expert_bias", "experts.gate_up_proj", "experts.down_proj")
    }
    assert_same_bits(import_weights(written, back), ours)


def further_model() -> tuple[Architecture, dict[str, Lazy], dict[str, Any]]:
    """A model with one module of multi-token prediction."""
    config = {**make("deepseek_v3").config.to_dict(), "num_nextn_predict_layers": 1}
    architecture = architecture_of_config(config)
    assert architecture.model.mtp_layers == 1
    return architecture, dict(pretrained(architecture).weights), config_of_architecture(architecture)


def test_multi_token_prediction_is_that_of_transformers(tmp_path: Path) -> None:
    """The halves of the projection exchanged, a norm in another's place, or the module under another layer's name: our
    module's output against that of transformers' module, loaded from our export, for the same tokens."""
    architecture, ours, config = further_model()
    write(tmp_path / "ours", config, export_weights(architecture, config, ours))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]  # where they look for it; it knows 61 only
    module = MtpModel.from_pretrained(theirs).eval()
    model = build_model(architecture, ours).eval()
    context, plan = ForwardContext(training=False), model.blocks[0].attention.plan(BATCH)
    length = BATCH.token_BS.shape[1]
    with torch.no_grad():
        hidden = theirs.model(BATCH.token_BS).last_hidden_state
        next_BSD = embed_known(model.embedding, BATCH.target_BS)
        mine, _ = model.mtp[0](torch.cat([hidden, next_BSD], dim=-1), BATCH, plan, context)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        position = torch.arange(length)[None]
        rotation = theirs.model.rotary_emb(next_BSD, position)
        expected = module.layers[0](next_BSD, hidden, rotation, mask, position, None)
    torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert_same_bits(import_weights(config, SafetensorsFolder(tmp_path / "ours").weights()), ours)


def test_multi_token_prediction_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    """transformers saves the announcement of such layers and not the layers; nothing may be drawn in silence, and
    layers that config.json does not announce must not stand in the way."""
    architecture, ours, config = further_model()
    files = export_weights(architecture, config, ours)
    kept = {name: lazy for name, lazy in files.items() if ".layers.2." not in name}
    with pytest.raises(ValueError, match=r"the files have no model\.layers\.2\..* and \d+ more"):
        import_weights(config, kept)
    with caplog.at_level(logging.WARNING):
        settled = config_of_weights(config, kept)
    assert "num_nextn_predict_layers=1" in caplog.text
    assert architecture_of_config(settled).model.mtp_layers == 0
    assert not [name for name in import_weights(settled, kept) if name.startswith("mtp")]
    assert config_of_weights(config, files) == config
    caplog.clear()
    assert_same_bits(import_weights(settled, files), import_weights(settled, kept))
    assert "left out" in caplog.text


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A tensor that is passed over changes the function in silence: one that is missing, one that nothing asks for,
    one of another shape. What says nothing new may be there."""
    config, theirs = stored(make("llama"), tmp_path / "theirs")
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.o_proj.bias"
    with pytest.raises(ValueError, match=rf"the files have no {norm}, which"):
        import_weights(config, {name: lazy for name, lazy in theirs.items() if name != norm})
    with pytest.raises(ValueError, match=rf"what {bias} of the files"):
        import_weights(config, {**theirs, bias: Given(torch.zeros(64), bias)})
    with pytest.raises(ValueError, match=r"shape \(63,\), by their config\.json \(64,\)"):
        import_weights(config, {**theirs, norm: Given(torch.zeros(63), norm)})
    with pytest.raises(ValueError, match=rf"{norm} of the files are torch\.int8, which is no type of weights"):
        import_weights(config, {**theirs, norm: Given(torch.zeros(64, dtype=torch.int8), norm)})
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert_same_bits(
        import_weights(config, {**theirs, frequencies: Given(torch.zeros(8), frequencies)}),
        import_weights(config, theirs),
    )


def test_a_head_beside_tied_embeddings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A head that is left out in silence, where transformers 5 takes it; a copy of the embedding that is taken for
    one."""
    model = make("llama")
    _, theirs = stored(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = type(model).from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, whole(theirs["lm_head.weight"]))
    source = open_model(tmp_path)
    assert "another lm_head.weight: set to false" in caplog.text
    assert not source.architecture.model.tie_embeddings
    assert torch.equal(whole(source.weights["head.weight"]), whole(theirs["lm_head.weight"]))
    caplog.clear()
    copy = {"lm_head.weight": theirs["model.embed_tokens.weight"]}
    assert config_of_weights(config, {**theirs, **copy}) == config
    assert not caplog.text


def test_weights_are_float32_whatever_the_files_have(tmp_path: Path) -> None:
    """Weights that stay in bfloat16 would be trained without a master copy, or be refused by the engine."""
    config, theirs = stored(make("deepseek_v3"), tmp_path / "theirs")
    halved = {name: Cast(lazy, torch.bfloat16) for name, lazy in theirs.items()}
    for name, lazy in import_weights(config, halved).items():
        assert lazy.dtype is torch.float32, name
        assert whole(lazy).dtype is torch.float32, name


def test_a_bias_that_a_class_always_has_is_zeros() -> None:
    """Sigmoid routing without a selection bias: DeepSeek-V3's class has one, which must not change the choice."""
    config = make("deepseek_v3").config.to_dict()
    biased = architecture_of_config(config)
    assert biased.balance.bias_rate > 0
    architecture = Architecture(**{**vars(biased), "balance": type(biased.balance)()})
    source = pretrained(architecture)
    back = export_weights(architecture, config_of_architecture(architecture), source.weights)
    assert not whole(back["model.layers.1.mlp.gate.e_score_correction_bias"]).any()


@pytest.mark.parametrize("shared", [0, 2])
def test_a_model_of_ours_in_a_public_class(shared: int, tmp_path: Path) -> None:
    """A model that was never theirs: the class is found by what it computes. Shared experts of DeepSeekMoE have no
    gate; the class that takes them has one, which must have no effect."""
    architecture = with_experts(4, 16, 2, first_dense_layers=1, num_shared_experts=shared)
    if shared:
        architecture = replace(architecture, attention=GroupedQueryConfig(num_heads=4))
    source = pretrained(architecture)
    config = config_of_architecture(architecture)
    assert config["architectures"] == ["Qwen2MoeForCausalLM" if shared else "Qwen3MoeForCausalLM"]
    write(tmp_path / "ours", config, export_weights(architecture, config, source.weights))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    batch = make_batch([[24]], 24, architecture.vocab_size)
    with torch.no_grad():
        mine = build_model(architecture, source.weights).eval()(batch, ForwardContext(training=False))[0]
        torch.testing.assert_close(mine, loaded.eval()(batch.token_BS).logits, atol=TOLERANCE, rtol=TOLERANCE)

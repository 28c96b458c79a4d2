"""What config.json says, what it must not say, and which class expresses a model of ours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers

from moe_parallel.convert.function import differences, function_of
from moe_parallel.convert.huggingface.classes import FAMILIES
from moe_parallel.convert.huggingface.families import architecture_of_config, config_of_architecture
from moe_parallel.convert.huggingface.weights import FLOAT32, export_weights, import_weights
from moe_parallel.convert.lazy import Constant
from moe_parallel.convert.pretrained import shapes_of
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.rope import RopeConfig, RopeScaling
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.capacity import DropOrder
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.routers.token_choice import GroupScore, Score, TokenChoiceConfig
from moe_parallel.options import ROUTERS
from tests.convert.huggingface_models import make
from tests.convert.models import DENSE, with_experts
from tests.model.examples import LATENT
from tests.model.test_presets import preset

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
# As published on huggingface.co, without what says nothing of the function.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
        "seq_aux": True, "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu",
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "ep_size": 1, "num_nextn_predict_layers": 1,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "olmoe_1b_7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "rope_theta": 10000.0,
        "rope_scaling": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "attention_bias": False,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "hidden_act": "silu",
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1000000.0, "rope_scaling": None,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "max_window_layers": 48, "sliding_window": None,
        "use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu",
    },
    "mixtral_8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
        "sliding_window": None, "attention_dropout": 0.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "router_aux_loss_coef": 0.02, "output_router_logits": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name: str) -> None:
    """A preset that differs in one number from the model that it is named after; and the reverse, an export of it in
    another class."""
    config = PUBLISHED[name]
    ours, theirs = preset(name), architecture_of_config(config)
    if name == "deepseek_v3":  # the preset leaves its multi-token prediction out
        assert theirs.model.mtp_layers == 1
        theirs = replace(theirs, model=replace(theirs.model, mtp_layers=0))
    assert differences(ours, theirs) == {}
    assert ours.model.max_sequence_tokens == theirs.model.max_sequence_tokens
    back = config_of_architecture(ours)
    assert back["model_type"] == config["model_type"]
    for key in back.keys() & config.keys() - {"rope_scaling", "num_nextn_predict_layers", "intermediate_size"}:
        assert back[key] == config[key], key


def test_the_whole_of_deepseek_v3() -> None:
    """A tensor that is left out or counted twice at full size, multi-token prediction included, or work that grows with
    the square of 46,000 names. The Hub counts 3,918,786,560 elements in bfloat16 and 680,571,043,840 in 8 bits; biases
    and scales are in float32."""
    config = PUBLISHED["deepseek_v3"]
    architecture = architecture_of_config(config)
    shapes = shapes_of(architecture)
    files = export_weights(architecture, config, {name: Constant(shape) for name, shape in shapes.items()})
    sizes = {name: math.prod(lazy.shape) for name, lazy in files.items() if not FLOAT32.search(name)}
    assert sum(sizes.values()) == 3_918_786_560 + 680_571_043_840
    assert {name: lazy.shape for name, lazy in import_weights(config, files).items()} == shapes


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.public])
def test_defaults_are_those_of_the_class(kind: str) -> None:
    """A key that a config.json leaves out, taken as something else than transformers takes it."""
    family = FAMILIES[kind]
    config = getattr(transformers, family.class_name.removesuffix("ForCausalLM") + "Config")()
    assert config.model_type == kind
    assert config.rms_norm_eps == family.defaults.get("rms_norm_eps", 1e-6)
    assert config.tie_word_embeddings is False
    assert config.rope_parameters["rope_theta"] == family.defaults.get("rope_theta", 10000.0)
    for key, value in family.defaults.items():
        assert key == "rope_theta" or getattr(config, key) == value, key
    for key, values in family.only.items():
        assert getattr(config, key, values[0]) in values, key


REFUSED = [
    # model, keys to change, what the error says
    ("llama", {"attention_bias": True}, r"attention_bias=true of config\.json: only false"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
    ("llama", {"transformers_weights": "other.safetensors"}, r"transformers_weights=other\.safetensors"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quant_method=gptq"),
    ("llama", {"quantization_config": "gptq"}, "quantization_config=gptq .* an object is needed"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "it needs low_freq_factor"),
    ("llama", {"rope_parameters": [1e4]}, "rope_parameters=.* an object is needed"),
    ("llama", {"vocab_size": "96"}, "vocab_size=96 .* a whole number is needed"),
    ("llama", {"model_type": ["llama"]}, "model_type=.* is not known here"),
    ("qwen3", {"layer_types": 2}, "layer_types=2 .* a list is needed"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers=1 .* a list is needed"),
    ("llama", {"num_key_value_heads": 3}, r"that cannot be made: attention\.num_kv_heads=3 must be a divisor"),
    ("llama", {"max_position_embeddings": "96"}, "max_position_embeddings=96 .* a whole number is needed"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps=small .* a number is needed"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings=no .* true or false is needed"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor=2 .* a number is needed"),
    ("deepseek_v3", {"first_k_dense_replace": "1"}, "first_k_dense_replace=1 .* a whole number is needed"),
    ("qwen2_moe", {"moe_intermediate_size": 0}, "a multiple of moe_intermediate_size=0"),
    ("deepseek_v3", {"n_group": True}, "n_group=true .* a whole number is needed"),
    ("mistral", {"sliding_window": 1024}, r"sliding_window=1024 .* set max_position_embeddings=1024"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("qwen2", {"use_sliding_window": True, "layer_types": None, "sliding_window": 64}, "sliding_window=64"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, "sliding_window=64"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true"),
    ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv=8\.0 .* only null"),
    ("olmoe", {"head_dim": 32}, "head_dim=32"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 60}, r"shared_expert_intermediate_size=60 .* moe_intermediate_"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("deepseek_v2, groups", {"norm_topk_prob": True}, "norm_topk_prob=true"),
    ("deepseek_v2, groups", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc"),
    ("deepseek_v2, groups", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ("deepseek_v2, groups", {"n_shared_experts": None}, "n_shared_experts=null"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=false"),
    ("deepseek_v3", {"num_experts_per_tok": 2}, r"num_experts_per_tok=2 .* must be 2 \* topk_group=4"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_has_no_counterpart_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    """A key that is ignored makes another function of the same weights, in silence."""
    config = make(name).config.to_dict()
    architecture_of_config(config)
    with pytest.raises(ValueError, match=said):
        architecture_of_config({**config, **changes})


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type=gpt2 is not known here; known are llama, mistral"):
        architecture_of_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match=r"config\.json has no hidden_size"):
        architecture_of_config(
            {"model_type": "llama", "num_attention_heads": 4, "vocab_size": 9, "num_hidden_layers": 1}
        )


def test_windows_that_leave_nothing_out_are_read() -> None:
    """Mistral 7B for sequences within its window is a plain model; a window that is switched off is none."""
    config = make("mistral").config.to_dict()
    short = {**config, "sliding_window": 4096, "max_position_embeddings": 4096}
    assert differences(architecture_of_config(short), architecture_of_config(config)) == {}
    qwen = make("qwen2").config.to_dict()
    unused = {**qwen, "use_sliding_window": False, "sliding_window": 64}
    assert architecture_of_config(unused) == architecture_of_config(qwen)


@pytest.mark.parametrize("name", ["llama", "llama, linear, tied", "qwen2", "deepseek_v2, groups", "deepseek_v3"])
def test_positions_of_transformers_4(name: str) -> None:
    """rope_theta and rope_scaling, where transformers 5 has rope_parameters; old files say type for rope_type."""
    config = make(name).config.to_dict()
    assert "rope_theta" not in config
    scaling = dict(config.pop("rope_parameters"))
    old = {**config, "rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    wanted = architecture_of_config(make(name).config.to_dict())
    assert wanted.attention.rope.scaling is not RopeScaling.none
    assert architecture_of_config(old) == wanted
    scaling["type"] = scaling.pop("rope_type")
    assert architecture_of_config(old) == wanted


OLMOE = with_experts(8, 16, 2, first_dense_layers=0, router_normalize=False)
OLMOE = replace(OLMOE, attention=GroupedQueryConfig(num_heads=4, qk_norm=QKNorm.full))
V3_ROUTER = TokenChoiceConfig(top_k=4, score=Score.sigmoid, normalize=True, num_groups=4, top_groups=2)
V3 = replace(LATENT, moe=replace(LATENT.moe, num_shared_experts=1), router=V3_ROUTER)

EXPRESSED = {
    "llama": replace(DENSE, attention=GroupedQueryConfig(num_heads=4, head_dim=24)),
    "qwen2": replace(DENSE, attention=GroupedQueryConfig(num_heads=4, qkv_bias=True)),
    "qwen3": DENSE,
    "mixtral": replace(with_experts(8, 16, 2, first_dense_layers=0), attention=GroupedQueryConfig(num_heads=4)),
    "olmoe": OLMOE,
    "qwen2_moe": replace(
        with_experts(8, 16, 2, num_shared_experts=2, shared_expert_gate=True), attention=GroupedQueryConfig(num_heads=4)
    ),
    "qwen3_moe": with_experts(8, 16, 2, router_normalize=False),
    "deepseek_v2": replace(V3, router=TokenChoiceConfig(top_k=3, route_scale=2.0), balance=BalanceConfig()),
    "deepseek_v3": V3,
}


@pytest.mark.parametrize("kind", EXPRESSED)
def test_the_class_is_found_by_the_function(kind: str) -> None:
    """A class that computes something else, or none where there is one. What it says is read back as the same."""
    config = config_of_architecture(EXPRESSED[kind])
    assert config["model_type"] == kind
    assert differences(EXPRESSED[kind], architecture_of_config(config)) == {}


def _changed(architecture: Architecture, section: str, **options: Any) -> Architecture:
    return replace(architecture, **{section: replace(getattr(architecture, section), **options)})


IN_THE_WAY = [
    # model of ours, what the error says
    (_changed(OLMOE, "router", route_scale=2.0), r"OlmoeForCausalLM, but router\.route_scale=2\.0, there 1\.0"),
    (_changed(OLMOE, "moe", num_shared_experts=1), r"moe\.num_shared_experts=1, there 0"),
    (_changed(OLMOE, "moe", chain=ChainConfig(iterations=2)), r"moe\.chain\.iterations=2, there 1"),
    (_changed(OLMOE, "model", mtp_layers=1), r"model\.mtp_layers=1, there 0"),
    (_changed(OLMOE, "router", forced_balance=True), r"router\.forced_balance=true, there false"),
    (_changed(OLMOE, "balance", bias_rate=0.1), r"balance\.bias_rate=true, there false"),
    (replace(OLMOE, router=ROUTERS["expert_choice"](top_k=2)), "its router is of TokenChoiceConfig, not of ExpertCho"),
    (_changed(DENSE, "attention", qk_norm=QKNorm.full), r"attention\.qk_norm=full, there (none|head)"),
    (
        _changed(DENSE, "attention", rope=RopeConfig(scaling=RopeScaling.ntk, factor=2.0)),
        r"attention\.rope\.scaling=ntk is in no config\.json; it is none, linear, yarn, llama3",
    ),
    (_changed(V3, "router", group_score=GroupScore.max), r"router\.group_score=max"),
    (_changed(V3, "router", top_groups=4), r"router\.top_k=4 with router\.top_groups=4"),
    (_changed(V3, "model", norm_epsilon=1e-5), r"model\.norm_epsilon=1e-05"),
    (_changed(V3, "moe", num_shared_experts=0), r"moe\.num_shared_experts=0"),
    (_changed(V3, "balance", bias_rate=0.0).__class__(**{**vars(V3), "router": TokenChoiceConfig(top_k=2)}), "bias"),
]


@pytest.mark.parametrize(("architecture", "said"), IN_THE_WAY)
def test_options_in_the_way_are_named(architecture: Architecture, said: str) -> None:
    """An export that loses what makes a model another one."""
    with pytest.raises(ValueError, match=said):
        config_of_architecture(architecture)


@pytest.mark.parametrize("name", ["deepseekmoe_2b", "deepseekmoe_16b", "small_cpu", "tiny"])
def test_deepseekmoe_is_a_qwen2_moe(name: str) -> None:
    """Plain attention beside shared experts without a gate: the one class that has room for it."""
    assert config_of_architecture(preset(name))["architectures"] == ["Qwen2MoeForCausalLM"]


def test_a_class_that_is_asked_for_must_fit() -> None:
    """A wrong class by request: Mistral can be, Llama's attention cannot be DeepSeek's."""
    plain = EXPRESSED["llama"]
    assert config_of_architecture(plain, "mistral")["architectures"] == ["MistralForCausalLM"]
    with pytest.raises(
        ValueError, match="DeepseekV3ForCausalLM does not express this model: its attention is of Latent"
    ):
        config_of_architecture(plain, "deepseek_v3")
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM does not express this model: attention\.qkv_bias=false"):
        config_of_architecture(plain, "qwen2")
    with pytest.raises(ValueError, match="model_type=bert is not known"):
        config_of_architecture(plain, "bert")


def test_options_of_training_alone_are_in_no_way() -> None:
    """An export that is refused because of how the model was trained."""
    trained = _changed(OLMOE, "moe", capacity_factor=1.5, drop_order=DropOrder.weight)
    trained = _changed(trained, "router", input_jitter=0.1)
    trained = replace(trained, balance=BalanceConfig(global_coefficient=0.01, z_coefficient=1e-3))
    assert config_of_architecture(trained) == config_of_architecture(OLMOE)


def test_every_other_option_counts() -> None:
    """An option that is new and left out of the comparison would be lost in an export: all that are not named as
    options of training are compared."""
    compared = function_of(V3)
    for section in ("model", "attention", "moe", "router"):
        for name in vars(getattr(V3, section)):
            if not name.startswith("_") and name not in ("rope", "chain"):
                known = f"{section}.{name}" in compared or f"{section}.{name}" in TRAINING | {"model.ffn_dim"}
                assert known, f"{section}.{name}"


TRAINING = {
    "model.vocab_size", "model.max_sequence_tokens", "model.mtp_coefficient", "attention.core", "moe.capacity_factor",
    "moe.drop_order", "moe.renormalize_after_drop", "moe.token_rounding", "moe.token_rounding_tile",
    "moe.expert_kernel", "moe.kernel_table", "router.input_jitter", "router.random_second", "router.kernel",
}  # fmt: skip
"""Options that change nothing of a trained model: written down a second time, so that adding one is a decision."""

"""Exports with remote code: any model of ours as a class of transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_kernels.choice import ExpertKernel
from moe_parallel.convert.fill import build_model
from moe_parallel.convert.huggingface.write_files import write_folder
from moe_parallel.convert.lazy import whole
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.core import AttentionCore
from moe_parallel.model.generate import generate, logits_of
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.expert_forms import ExpertForm
from moe_parallel.moe.routers.bi_level import BiLevelConfig
from moe_parallel.moe.routers.domain import DomainConfig
from moe_parallel.moe.routers.expert_choice import ExpertChoiceConfig
from moe_parallel.moe.routers.hash import HashConfig
from moe_parallel.moe.routers.plugin import PluginConfig
from moe_parallel.moe.routers.random import RandomConfig
from moe_parallel.moe.routers.token_choice import RouterKernel
from moe_parallel.moe.routing import ForwardContext
from moe_parallel.options import ConfigError
from moe_parallel.remote_code import CODE, CODE_FILE, contents_with_code, open_remote
from moe_parallel.start import open_pretrained, tokenizer_of
from tests.batches import make_batch
from tests.convert.models import DENSE, VOCABULARY, pretrained, relative, with_experts
from tests.model.examples import LATENT

EXPERTS = with_experts(4, 24, 2)
SHAPES: dict[str, Architecture] = {
    "dense, tied": replace(DENSE, model=replace(DENSE.model, tie_embeddings=True)),
    "chain": with_experts(4, 24, 2, chain=ChainConfig(iterations=2)),
    "scaled, shared, latent": replace(
        with_experts(4, 24, 2, num_shared_experts=1, router_route_scale=2.0), attention=LATENT.attention
    ),
    "adjugates": with_experts(4, 24, 2, adjugate_groups=2, adjugate_dim=8),
    "ternary": with_experts(4, 24, 2, expert_form=ExpertForm.ternary),
    "expert choice": replace(EXPERTS, router=ExpertChoiceConfig(top_k=2)),
    "bi-level": replace(EXPERTS, router=BiLevelConfig(top_k=1)),
    "domain": replace(EXPERTS, router=DomainConfig(top_k=2)),
    "delta": with_experts(4, 24, 2, expert_form=ExpertForm.delta, delta_rank=4),
    "hash": replace(EXPERTS, router=HashConfig(top_k=2)),
    "residual logits": with_experts(4, 24, 2, router_logit_residual=True),
}
BATCH = make_batch([[20], [20]], 20, VOCABULARY)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code that it runs: into this test's folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def write(folder: Path, shape: Architecture, dtype: torch.dtype = torch.float32) -> Path:
    config, weights = contents_with_code(shape, pretrained(shape).weights, dtype)
    write_folder(folder, config, weights, lambda partial: None)
    (folder / CODE_FILE).write_text(CODE)
    return folder


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_model(tmp_path: Path, name: str) -> None:
    """Would catch: an option that config.json loses, a weight that transformers draws anew, a tie that it breaks, and
    what is read back with other bits. The code is
    the same, and where weights lie in memory moves products by a rounding: 1e-6 seen, of logits of the order of 5."""
    shape, folder = SHAPES[name], write(tmp_path / "out", SHAPES[name])
    source, theirs = pretrained(shape), load(folder)
    ours = build_model(shape, source.weights).eval()
    with torch.no_grad():
        wanted = ours(BATCH, ForwardContext(training=False))[0]
        torch.testing.assert_close(theirs(BATCH.token_BS).logits, wanted, rtol=0, atol=1e-5)
    if shape.model.tie_embeddings:
        assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    back = open_pretrained("init.weights", str(folder))
    assert back.architecture == shape
    assert back.weights.keys() == source.weights.keys()
    for weight, lazy in source.weights.items():
        assert torch.equal(whole(back.weights[weight]), whole(lazy)), weight


def test_padding_on_either_side(tmp_path: Path) -> None:
    """Would catch: padding that takes part in attention, positions that count it, logits that come back in its place.
    A sequence alone has other sums of products: 1e-5 of logits of the order of 1."""
    theirs = load(write(tmp_path / "out", EXPERTS))
    short, long = BATCH.token_BS[0, :7], BATCH.token_BS[1, :12]
    with torch.no_grad():
        wanted = [theirs(ids[None]).logits[0] for ids in (short, long)]
        for left in (False, True):
            token_BS, mask_BS = torch.full((2, 12), 3), torch.zeros(2, 12, dtype=torch.int64)
            for row, ids in enumerate((short, long)):
                place = slice(12 - len(ids), 12) if left else slice(0, len(ids))
                token_BS[row, place], mask_BS[row, place] = ids, 1
            found = theirs(token_BS, attention_mask=mask_BS, labels=token_BS.masked_fill(mask_BS == 0, -100))
            for row, logits in enumerate(wanted):
                torch.testing.assert_close(found.logits[row][mask_BS[row] == 1], logits, rtol=0, atol=1e-5)
            each = [
                torch.nn.functional.cross_entropy(w[:-1], ids[1:], reduction="sum")
                for w, ids in zip(wanted, (short, long))
            ]
            if not left:  # there, padding before the first token has a target
                torch.testing.assert_close(found.loss, sum(each) / (6 + 11), rtol=1e-5, atol=0)


def test_arguments_of_others(tmp_path: Path) -> None:
    """Would catch: masks that number the sequences of a batch, sums of losses that the Trainer takes for means,
    positions that are given and not used."""
    theirs, token_BS = load(write(tmp_path / "out", EXPERTS)), BATCH.token_BS
    plain = theirs(token_BS, labels=token_BS)
    assert torch.equal(theirs(token_BS, attention_mask=torch.full_like(token_BS, 2)).logits, plain.logits)
    parts = [theirs(row[None], labels=row[None], num_items_in_batch=2 * 19).loss for row in token_BS]
    torch.testing.assert_close(sum(parts), plain.loss, rtol=1e-5, atol=0)  # rows alone have other sums of products
    for name, value in (
        ("position_ids", torch.zeros_like(token_BS)),
        ("past_key_values", ()),
        ("attention_mask", torch.ones(2, 1, 20, 20)),
    ):
        with pytest.raises(ValueError, match=name):
            theirs(token_BS, **{name: value})


def test_another_machine(tmp_path: Path) -> None:
    """Would catch: kernels of a GPU, or a file of measured shapes, that whoever loads the model does not have."""
    table = tmp_path / "table.json"
    table.write_text('{"entries": []}')
    shape = replace(
        EXPERTS,
        attention=replace(EXPERTS.attention, core=AttentionCore.flex),
        moe=replace(EXPERTS.moe, expert_kernel=ExpertKernel.triton, kernel_table=str(table)),
        router=replace(EXPERTS.router, kernel=RouterKernel.triton),
    )
    folder = write(tmp_path / "out", shape)
    table.unlink()
    assert open_pretrained("init.weights", str(folder)).architecture == EXPERTS
    assert torch.equal(load(folder)(BATCH.token_BS).logits, load(write(tmp_path / "b", EXPERTS))(BATCH.token_BS).logits)


def test_a_row_does_not_depend_on_its_place(tmp_path: Path) -> None:
    """Would catch: a choice by lot that is another one in another row of a batch, or when a longer text is generated.
    1e-5 as above."""
    theirs = load(write(tmp_path / "out", replace(EXPERTS, router=RandomConfig(top_k=2))))
    with torch.no_grad():
        wanted = theirs(BATCH.token_BS).logits[1]
        for found in (theirs(BATCH.token_BS[1:]).logits[0], theirs(BATCH.token_BS[:, :10]).logits[1]):
            torch.testing.assert_close(found, wanted[: len(found)], rtol=0, atol=1e-5)


def test_generation(tmp_path: Path) -> None:
    """Would catch: a generation that feeds one token at a time to a model without a cache. Greedy: the same ids."""
    folder = write(tmp_path / "out", EXPERTS)
    ours = build_model(EXPERTS, pretrained(EXPERTS).weights)
    prompt = BATCH.token_BS[0, :5]
    wanted = generate(logits_of(ours), prompt.tolist(), 8, temperature=0)
    found = load(folder).generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert found[0, 5:].tolist() == wanted


def test_a_new_one(tmp_path: Path) -> None:
    """Would catch: memory as it was found, where a model is made of a config alone."""
    config = load(write(tmp_path / "out", EXPERTS)).config
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    weights = {name: weight.detach() for name, weight in new.named_parameters()}
    assert (weights["transformer.norm.weight"] == 1).all()
    assert weights["transformer.layers.1.ffn.experts.down"].std().item() == pytest.approx(0.02, rel=0.1)


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    """Would catch: memory as it was found, in the place of a weight of which transformers says that it is new."""
    folder = write(tmp_path / "out", EXPERTS)
    stored = load_file(folder / "model.safetensors")
    del stored["transformer.layers.1.ffn.experts.down"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    weights = dict(load(folder).named_parameters())
    assert weights["transformer.layers.1.ffn.experts.down"].std().item() == pytest.approx(0.02, rel=0.1)
    for name, value in stored.items():
        assert name.endswith(".bias") or torch.equal(weights[name], value), name


def test_bfloat16(tmp_path: Path) -> None:
    """Would catch: routers that are rounded, which choose other experts. 3e-2: some layers of roundings of 4e-3."""
    theirs = load(write(tmp_path / "out", EXPERTS, torch.bfloat16))
    types = {name: weight.dtype for name, weight in theirs.named_parameters()}
    assert types["transformer.layers.1.ffn.router.weight"] is torch.float32
    assert types["transformer.layers.1.ffn.experts.down"] is torch.bfloat16
    wide = load(write(tmp_path / "wide", EXPERTS))
    with torch.no_grad():
        assert relative(theirs(BATCH.token_BS).logits.float(), wide(BATCH.token_BS).logits) < 3e-2


def test_refused(tmp_path: Path) -> None:
    """Would catch: code that runs without being asked for; a folder that is taken for another model."""
    folder = write(tmp_path / "out", EXPERTS)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert not (tmp_path / "modules").exists()
    config = json.loads((folder / "config.json").read_text())
    for options, said in (
        (None, "has no options of a model"),
        (config["options"] | {"model": config["options"]["model"] | {"num_layers": 2}}, "layers.2.* in one of them"),
        (config["options"] | {"router": {"strange": 1}}, "no kind of router has the options"),
        (config["options"] | {"router": 3}, "router=3 is no section"),
        (
            {name: value for name, value in config["options"].items() if name != "vocab_size"},
            "has no options of a model",
        ),
        (config["options"] | {"vocab_size": 51}, r"embedding.weight is \(50, 32\), not \(51, 32\)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"options": options}))
        with pytest.raises((ValueError, ConfigError), match=said):
            open_remote(folder)
    ran, file = tmp_path / "ran", folder / "its.py"
    file.write_text(f"open({str(ran)!r}, 'w')")
    options = config["options"] | {"router": {"plugin": f"{file}:Config"}}
    (folder / "config.json").write_text(json.dumps(config | {"options": options}))
    for read in (lambda: open_pretrained("init.weights", str(folder)), lambda: load(folder)):
        with pytest.raises(ValueError, match=r"router\.plugin=.* would run a file"):
            read()
    (folder / "config.yaml").write_text(json.dumps({"router": options["router"]}))
    with pytest.raises(ValueError, match="has no tokenizer"):
        tokenizer_of(folder)
    assert not ran.exists()
    plugin = PluginConfig(top_k=2, plugin="moe_parallel.moe.routers.hash:HashConfig")
    with pytest.raises(ValueError, match=r"router\.plugin=.* lies in a file of yours"):
        contents_with_code(replace(EXPERTS, router=plugin), {}, torch.float32)

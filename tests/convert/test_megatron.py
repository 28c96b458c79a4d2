"""Files of Megatron-Core: its own code writes and reads them here, and is the oracle of ours.

It runs in a process of its own, on the CPU (see `tests.engines.megatron_on_cpu`).
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_data.shards import Shard, ShardWriter
from moe_parallel.checkpoint.folder import UnusableCheckpointError
from moe_parallel.convert.megatron import (
    Layers,
    from_megatron,
    megatron_names,
    read_megatron,
    to_megatron,
    write_megatron,
)
from moe_parallel.convert.megatron_weights import Cut, MegatronWeights
from moe_parallel.model.architecture import Architecture
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.chain import ChainConfig
from moe_parallel.moe.routing import ForwardContext
from tests.batches import make_batch
from tests.engines.megatron_cases import MegatronCase
from tests.ranks import run_ranks
from tests.runs import ROOT, Runner

TOKENS = 12
DOCUMENTS = [[5, 7, 9], [], [1], list(range(40))]


def shape(first_dense_layers: int, moe: dict[str, Any] | None = None, **options: Any) -> Architecture:
    attention, moe = {"qk_norm": "head", "qkv_bias": True}, {"num_shared_experts": 2, **(moe or {})}
    case = MegatronCase("x", 1, attention=attention, moe=moe, first_dense_layers=first_dense_layers, **options)
    return case.architecture()


def megatron_model(first_dense_layers: int) -> Any:
    """Megatron's own model with its own mixture-of-experts layers, of the same architecture, random in all weights."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    dense = first_dense_layers
    config = TransformerConfig(
        num_layers=3, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24,
        num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=16,
        moe_layer_freq=[0] * dense + [1] * (3 - dense) if dense else 1, moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none", moe_router_dtype="fp32",
        qk_layernorm=True, normalization="RMSNorm", layernorm_epsilon=1e-6, add_bias_linear=False, add_qkv_bias=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, bias_dropout_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    if dense:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=4, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
        )
    model = GPTModel(
        config, spec, vocab_size=38, max_sequence_length=64, position_embedding_type="rope", rotary_base=10000
    )
    torch.manual_seed(0)
    for parameter in model.parameters():  # norms too, or a mistake in them would not show
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return model.eval()


def run_megatron(folder: Path) -> dict[str, Any]:
    """What Megatron's code makes of its own files and of ours, for both forms of keys."""
    import tests.engines.megatron_on_cpu  # noqa: F401, I001 - before anything of Megatron
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    warnings.simplefilter("ignore")
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # saving starts a process
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    token_BS = torch.randint(0, 38, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    position_BS = torch.arange(TOKENS).expand(2, -1)
    hidden_BHSS = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    found: dict[str, Any] = {"tokens": token_BS}
    for dense in (0, 1):  # without dense layers all layers are one tensor each
        theirs, architecture = megatron_model(dense), shape(dense)
        (folder / f"{dense}/iter_0000007").mkdir(parents=True)
        (folder / f"{dense}/latest_checkpointed_iteration.txt").write_text("7")
        dist_checkpointing.save(theirs.sharded_state_dict(), str(folder / f"{dense}/iter_0000007"))
        with torch.no_grad():
            found[f"logits {dense}"] = theirs(token_BS, position_BS, hidden_BHSS)
        ours = changed(from_megatron(architecture, read_megatron(folder / str(dense), architecture)))
        path = write_megatron(folder / f"{dense}/back", to_megatron(architecture, ours), dense, Layers.local)
        wanted = theirs.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        theirs.load_state_dict(dist_checkpointing.load(wanted, str(path)), strict=False)
        with torch.no_grad():
            found[f"changed logits {dense}"] = theirs(token_BS, position_BS, hidden_BHSS)
    return found | run_datasets(folder)


def run_datasets(folder: Path) -> dict[str, Any]:
    """Megatron's writer of tokens, and its reader of what ours has written."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    found: dict[str, Any] = {}
    for dtype in (np.uint16, np.int32):
        name = np.dtype(dtype).name
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
        for document in DOCUMENTS:
            builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
        builder.finalize(str(folder / f"{name}.idx"))
        with ShardWriter(folder / f"our_{name}", 300 if dtype is np.uint16 else 70_000) as writer:
            for document in DOCUMENTS:
                writer.add(np.array(document, dtype=np.int64))
        read = IndexedDataset(str(folder / f"our_{name}"))
        found[name] = [read[i].tolist() for i in range(len(read))]
    return found


def changed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Others, so that what is read back cannot be what was there before."""
    return {name: value * 1.25 for name, value in weights.items()}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron")
    return folder, run_ranks(run_megatron, 1, folder)[0]


@pytest.mark.parametrize("dense", [0, 1])
def test_both_ways(megatron, dense: int) -> None:
    """Heads that are packed in another order, gate and up exchanged, experts or layers mixed up, a norm under the name
    of another, and a file that only we can read. Float32 logits of 4 after a dozen products: 6e-6 is seen, 1e-4
    allowed; a wrong weight changes them by 0.1."""
    folder, found = megatron
    architecture = shape(dense)
    weights = from_megatron(architecture, read_megatron(folder / str(dense), architecture))
    batch = replace(make_batch([[TOKENS], [TOKENS]], TOKENS, 38), token_BS=found["tokens"])
    for name, values in (("logits", weights), ("changed logits", changed(weights))):
        model = Transformer(architecture)
        model.load_state_dict(values)
        with torch.no_grad():
            logits, _ = model.eval()(batch, ForwardContext(training=False))
        torch.testing.assert_close(logits, found[f"{name} {dense}"], rtol=1e-4, atol=1e-4)
    back = read_megatron(folder / f"{dense}/back", architecture)
    again = from_megatron(architecture, back)
    assert all(torch.equal(again[name], value) for name, value in changed(weights).items())


def test_tokens_are_byte_for_byte_megatrons(megatron) -> None:
    """A field of another width, an index that counts otherwise, a dtype that its reader takes for another."""
    folder, found = megatron
    for name in ("uint16", "int32"):
        for end in (".bin", ".idx"):
            assert (folder / f"our_{name}{end}").read_bytes() == (folder / f"{name}{end}").read_bytes()
        assert found[name] == DOCUMENTS
        shard = Shard(folder / name)
        tokens, begins = shard.read(0, shard.num_tokens)
        assert tokens.tolist() == [token for document in DOCUMENTS for token in document]
        assert begins.tolist() == [0, 3, 4]  # an empty document begins where the next one does


@pytest.mark.parametrize("tie", [False, True])
def test_a_cut_model_is_the_whole_one(tie: bool) -> None:
    """Ranges of a rank that overlap another's, or leave elements out, would be wrong in no logits of one rank."""
    architecture = shape(1, tied=tie, balance={"bias_rate": 0.1}, moe={"shared_expert_gate": True})
    names = list(megatron_names(architecture))
    seen: dict[str, torch.Tensor] = {}
    for tp_rank in range(2):
        for ep_rank in range(2):
            weights = MegatronWeights(architecture, Cut(2, tp_rank, 2, ep_rank))
            for segment in (segment for name in names for segment in weights.segments(name)):
                count = seen.setdefault(segment.name, torch.zeros(segment.shape))
                offsets, sizes = segment.box
                box = count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
                flat = torch.zeros(box.numel())
                flat[segment.start : segment.start + segment.count] = 1
                box += flat.view(box.shape)
    whole = Transformer(architecture).state_dict()
    assert seen.keys() == whole.keys() - ({"head.weight"} if tie else set())
    for name, count in seen.items():
        assert count.shape == whole[name].shape
        copies = count.unique()
        # Both ranks of an axis that does not cut a weight have it; a tied one is both embedding and head.
        assert len(copies) == 1, name
        assert int(copies[0]) in (2, 4), name


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    """Weights that are dropped without a word, and files of another format that are taken for these."""
    chain = shape(1)
    chain = replace(chain, moe=replace(chain.moe, chain=ChainConfig(iterations=2)))
    with pytest.raises(ValueError, match=r"no place for layers.1.ffn.later_routers"):
        to_megatron(chain, Transformer(chain).state_dict())
    ternary = replace(shape(1), moe=replace(shape(1).moe, expert_form="ternary"))
    with pytest.raises(ValueError, match=r"moe.expert_form=full only"):
        to_megatron(ternary, Transformer(ternary).state_dict())
    with pytest.raises(ValueError, match="attention=gqa"):
        to_megatron(MegatronCase("latent", 1, latent_attention=True).architecture(), {})
    with pytest.raises(UnusableCheckpointError, match=r"no metadata.json"):
        read_megatron(tmp_path, shape(1))
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UnusableCheckpointError, match=r"'zarr'.*ckpt-convert-format"):
        read_megatron(tmp_path, shape(1))


def test_other_shapes_are_refused(megatron) -> None:
    """A model of other options that is filled with numbers that fit by chance, or half."""
    folder, _ = megatron
    with pytest.raises(UnusableCheckpointError, match=r"has no weight decoder.layers.3.input_layernorm"):
        read_megatron(folder / "1", replace(shape(1), model=replace(shape(1).model, num_layers=4)))
    wide = replace(shape(1), model=replace(shape(1).model, ffn_dim=32))
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \(48, 16\).*but \(64, 16\)"):
        from_megatron(wide, read_megatron(folder / "1", wide))


def test_script_there_and_back(runner: Runner, tmp_path: Path) -> None:
    """A command that names options wrongly, or writes a checkpoint that no run can start from."""
    run = runner.run("trained", "train.steps=2").folder

    def convert(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "scripts/convert_megatron.py"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert convert("export", str(run), str(tmp_path / "out")).endswith("release")
    path = convert("import", str(tmp_path / "out"), str(tmp_path / "in"), "model=tiny")
    first = runner.run("converted", f"init.weights={path}", "train.steps=1", "optim.learning_rate=1e-12")
    second = runner.run(
        "native", f"init.weights={run / 'checkpoints/step_00000002'}", "train.steps=1", "optim.learning_rate=1e-12"
    )
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[0] for folder in (first.folder, second.folder)]
    losses = [json.loads(line)["loss/cross_entropy_nats"] for line in lines]
    assert losses[0] == losses[1]

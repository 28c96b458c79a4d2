"""Safetensors folders, read by boxes and written tensor by tensor, against the library's own reader and writer."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_parallel.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from moe_parallel.checkpoint.pieces import Box
from moe_parallel.checkpoint.state import TorchState
from moe_parallel.convert import lazy_state, raw
from moe_parallel.convert.checkpoint_source import weights_of_checkpoint
from moe_parallel.convert.huggingface.files import INDEX, SINGLE, Dequantized, SafetensorsFolder
from moe_parallel.convert.huggingface.write_files import plan_shards, write_folder
from moe_parallel.convert.lazy import Constant, Given, Lazy, whole
from tests.convert.models import pretrained

PART = "part.safetensors"
OPENED: list[str] = []
"""Files that this process has opened since it was last emptied; the hook below cannot be removed."""
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


def tensors() -> dict[str, Tensor]:
    """All that models are made of, with sizes that no block divides."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "matrix": normal(37, 23).bfloat16(),
        "experts": normal(5, 7, 30),
        "odd": normal(3).half(),
        "scalar": normal()[None][0],
        "empty": normal(0, 4),
        "eight_bits": normal(9, 11).to(torch.float8_e4m3fn),
        "count": torch.arange(11),
    }


def given(values: dict[str, Tensor]) -> dict[str, Lazy]:
    return {name: Given(value, name) for name, value in values.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """To the last bit, in types that have no comparison too."""
    a, b = (value.contiguous().view(-1).view(torch.uint8) for value in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(a, b)


def random_box(shape: tuple[int, ...], generator: torch.Generator) -> Box:
    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    offsets = tuple(below(size) for size in shape)
    return offsets, tuple(below(size - offset + 1) for size, offset in zip(shape, offsets))


@pytest.mark.parametrize(("row_bytes", "block_bytes"), [(1 << 16, 1 << 22), (1 << 16, 100), (50, 100)])
def test_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_bytes: int, block_bytes: int) -> None:
    """Would catch: wrong offsets in files of the library, in any of the three ways to read a box (consecutive bytes,
    blocks of whole rows, row by row), and boxes of several files of an index."""
    monkeypatch.setattr(raw, "_ROW_BYTES", row_bytes)
    monkeypatch.setattr(raw, "_BLOCK_BYTES", block_bytes)
    values = tensors()
    names = list(values)
    stored = values | {"eight_bits_scale_inv": torch.ones(1, 1)}
    listed = {name: f"part{int(name not in names[:3])}.safetensors" for name in stored}
    for file in set(listed.values()):
        save_file({name: value for name, value in stored.items() if listed[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    found = SafetensorsFolder(tmp_path).weights()
    assert found.keys() == values.keys()
    values["eight_bits"] = values["eight_bits"].float()
    generator = torch.Generator().manual_seed(1)
    for name, value in values.items():
        assert same(whole(found[name]), value), name
        for _ in range(100 if value.numel() and value.ndim else 0):
            offsets, sizes = box = random_box(tuple(value.shape), generator)
            wanted = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
            assert same(found[name].read(box), wanted), (name, box)


def test_eight_bits() -> None:
    """Would catch: a scale that is taken from the neighboring block, rounding before the product. Exact: one product of
    two float32 numbers on both sides."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 260, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, generator=generator) + 0.5
    wanted = torch.empty(300, 260)
    for row in range(300):
        for column in range(260):
            wanted[row, column] = values[row, column].float() * scales[row // 128, column // 128]
    lazy = Dequantized(Given(values, "w"), Given(scales, "w_scale_inv"), (128, 128))
    assert torch.equal(whole(lazy), wanted)
    for _ in range(50):
        offsets, sizes = box = random_box((300, 260), generator)
        assert torch.equal(lazy.read(box), wanted[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]), box
    with pytest.raises(ValueError, match="no number for each block"):
        Dequantized(Given(values, "w"), Given(scales[:2], "w_scale_inv"), (128, 128))


@pytest.mark.parametrize(("shard_bytes", "jobs", "files"), [(10**9, 1, 1), (1000, 3, 3)])
def test_written(tmp_path: Path, shard_bytes: int, jobs: int, files: int) -> None:
    """Would catch: a file that the library refuses or reads otherwise, shards over the limit, tensors that are not
    aligned to their type, an index that does not say where things are."""
    values = tensors()
    write_folder(tmp_path / "out", {"a": 1}, given(values), lambda folder: None, shard_bytes, jobs)
    found: dict[str, Tensor] = {}
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) == files
    for file in written:
        content = load_file(file)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        size = sum(value.nbytes for value in content.values())
        assert size <= shard_bytes or len(content) == 1
        found |= content
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            about = json.loads(stream.read(length))
        for name, value in content.items():
            assert (8 + length + about[name]["data_offsets"][0]) % value.element_size() == 0, name
        if files > 1:
            index = json.loads((tmp_path / "out" / INDEX).read_text())
            assert {n for n, where in index["weight_map"].items() if where == file.name} == content.keys()
    assert found.keys() == values.keys()
    assert all(same(found[name], value) for name, value in values.items())
    if files > 1:
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="exists already"):
        write_folder(tmp_path / "out", {}, given(values), lambda folder: None)


class _Broken(Constant):
    def read(self, box: Box) -> Tensor:
        raise ValueError("the source is gone")


@pytest.mark.parametrize("jobs", [1, 3])
def test_nothing_is_left_of_a_failure(tmp_path: Path, jobs: int) -> None:
    """Would catch: half a folder under the final name, leftovers, a disk that is filled before it is found small."""
    weights: dict[str, Lazy] = {"a": Constant((64, 64)), "b": _Broken((64, 64)), "c": Constant((64, 64))}
    with pytest.raises(ValueError, match="the source is gone"):
        write_folder(tmp_path / "out", {}, weights, lambda folder: None, jobs=jobs)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"needs 40000000\.000 GB"):
        write_folder(tmp_path / "out", {}, {"a": Constant((10**8, 10**8))}, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_shards_keep_the_order() -> None:
    """Would catch: a limit that is passed by one tensor, or a file for every tensor."""
    weights: dict[str, Lazy] = {str(n): Constant((100,)) for n in range(10)}
    assert [list(shard.start) for shard in plan_shards(weights, 1200)] == [
        ["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"], ["9"]
    ]  # fmt: skip


class _Evil:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("evil_was_here",)


def _listed(folder: Path, text: str) -> None:
    """In the place of the only file, which would come first."""
    (folder / SINGLE).rename(folder / PART)
    (folder / INDEX).write_text(text)


def _index(folder: Path, file: str) -> None:
    _listed(folder, json.dumps({"weight_map": {"a": file}}))


def _scaleless(folder: Path) -> None:
    save_file({"a": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, folder / SINGLE)


def _cut(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)


def _beyond(folder: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 10**6]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def _quantized(folder: Path, how: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": how}))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / SINGLE).unlink(), "as pickles only .pytorch_model.bin.*take a revision"),
        (lambda folder: _index(folder, "absent.safetensors"), "incomplete: absent.safetensors of 1 files missing"),
        (lambda folder: _index(folder, "../model.safetensors"), "refused: '../model.safetensors' is no safetensors"),
        (lambda folder: _index(folder, "/etc/passwd"), "refused: '/etc/passwd' is no safetensors file"),
        (lambda folder: _index(folder, "pytorch_model.bin"), "refused: 'pytorch_model.bin' is no safetensors"),
        (lambda folder: _listed(folder, json.dumps({"weight_map": {"b": PART}})), "says that b is in"),
        (lambda folder: _listed(folder, "{}"), "has no weight_map"),
        (lambda folder: _listed(folder, "{"), "cannot be read"),
        (_cut, "damaged or no safetensors file"),
        (_beyond, "damaged or no safetensors file"),
        (_scaleless, "a is torch.float8_e4m3fn and has no a_scale_inv"),
        (lambda folder: _quantized(folder, {"quant_method": "gptq", "bits": 4}), "quant_method='gptq'"),
        (lambda folder: _quantized(folder, {"quant_method": "fp8", "weight_block_size": [128, "a"]}), "is not read"),
        (lambda folder: _quantized(folder, "gptq"), "quant_method='gptq'"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], text: str) -> None:
    """Would catch: a folder that fails later, or half way; a pickle that is opened; a file outside that is read."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(4, 4)}, folder / SINGLE)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    SafetensorsFolder(folder).weights()
    damage(folder)
    OPENED.clear()
    with pytest.raises(ValueError, match=text):
        SafetensorsFolder(folder).weights()
    assert not [name for name in OPENED if name.endswith((".bin", "passwd"))]
    assert not (tmp_path / "evil_was_here").exists()


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    """Would catch: weights of an older save that is still there, where transformers reads the newer ones."""
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    save_file({"a": torch.zeros(2)}, tmp_path / PART)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": PART}}))
    assert whole(SafetensorsFolder(tmp_path).weights()["a"]).tolist() == [1, 1]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """Would catch: a process that the system ends (SIGBUS), or zeros that nobody wrote."""
    save_file({"a": torch.zeros(1000, 1000)}, tmp_path / SINGLE)
    found = SafetensorsFolder(tmp_path).weights()
    os.truncate(tmp_path / SINGLE, 10**6)
    with pytest.raises(ValueError, match="truncated"):
        whole(found["a"])


def test_checkpoints_are_read_by_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a part of a checkpoint at a wrong place of its file, parts joined in a wrong order, weights that
    were transposed when they were saved. The checkpoint is written of lazy tensors, in small parts."""
    monkeypatch.setattr(lazy_state, "PART_BYTES", 4000)
    weights = dict(pretrained().weights) | {"scalar": Given(torch.tensor(3.0), "scalar")}
    saver = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False))
    found = weights_of_checkpoint(saver.save(0, lazy_state.LazyState(weights), {}, {}))
    assert found.keys() == weights.keys()
    model = torch.nn.Module()
    model.transposed = torch.nn.Parameter(torch.randn(20, 30).T)
    found |= weights_of_checkpoint(saver.save(1, TorchState(model, None), {}, {}))
    weights["transposed"] = Given(model.transposed.detach(), "transposed")
    generator = torch.Generator().manual_seed(1)
    for name, lazy in weights.items():
        assert same(whole(found[name]), whole(lazy)), name
        for _ in range(20 if lazy.shape else 0):
            box = random_box(lazy.shape, generator)
            assert same(found[name].read(box), lazy.read(box)), (name, box)

"""Weights of a Hugging Face folder: safetensors files, alone or with an index, read box by box.

Nothing in such a folder is run. A safetensors file is a header and numbers; `config.json` and the index are JSON; files
that could run something (pickles: `.bin`, `.pt`, `.pth`; Python) are never opened.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_parallel.checkpoint.pieces import Box
from moe_parallel.convert.lazy import Constant, Lazy
from moe_parallel.convert.raw import read_box

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Names of types in a safetensors header."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SCALE = "_scale_inv"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class StoredTensor(Lazy):
    """A tensor of a safetensors file.

    Args:
        start: where its elements begin in the file, in bytes.
    """

    def __init__(self, name: str, file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.file, self.start, self.shape, self.dtype = name, file, start, shape, dtype

    def read(self, box: Box) -> Tensor:
        return read_box(self.file, self.start, self.shape, self.dtype, box)

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return self.name


class Dequantized(Lazy):
    """A matrix in 8 bits with a scale for each block of it, as DeepSeek-V3's files have them, in float32.

    Args:
        values: (rows, columns), float8.
        scales: one number for each block, by which its elements are multiplied; (rows, columns) / block, rounded up.
        block: rows and columns of a block.
    Raises:
        ValueError: there are not as many scales as blocks.
    """

    dtype = torch.float32

    def __init__(self, values: Lazy, scales: Lazy, block: tuple[int, int]) -> None:
        wanted = tuple(math.ceil(size / width) for size, width in zip(values.shape, block))
        if len(values.shape) != 2 or scales.shape != wanted:
            raise ValueError(
                f"{scales} of shape {scales.shape} has no number for each block of {block} of {values} of shape "
                f"{values.shape}"
            )
        self.values, self.scales, self.block, self.shape = values, scales, block, values.shape

    def read(self, box: Box) -> Tensor:
        offsets, sizes = box
        first = tuple(offset // width for offset, width in zip(offsets, self.block))
        last = tuple(math.ceil((o + s) / width) for o, s, width in zip(offsets, sizes, self.block))
        scale = self.scales.read((first, tuple(max(0, b - a) for a, b in zip(first, last)))).float()
        for dim, width in enumerate(self.block):
            scale = scale.repeat_interleave(width, dim).narrow(dim, offsets[dim] - first[dim] * width, sizes[dim])
        return self.values.read(box).float() * scale

    def moment(self, order: int) -> Lazy:
        return Constant(self.shape)

    def __str__(self) -> str:
        return str(self.values)


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError if it is not there or is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found


class SafetensorsFolder:
    """The weights of a model's folder. All headers are read and checked here, so later reads find what they want.

    Raises:
        ValueError: no safetensors files; a file that is absent, truncated or outside of the folder; an index that
            names what its files do not have; weights in a quantization other than 8 bits with scales of blocks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / SINGLE).is_file():  # it comes first in transformers too, where both are there
            self._stored = _header(path / SINGLE)
        elif (path / INDEX).is_file():
            self._stored = self._indexed()
        else:
            self._refuse()
        self._block = self._scaled_blocks()

    def weights(self) -> dict[str, Lazy]:
        """Tensors by their names on the disk; what is stored in 8 bits as the float32 that it stands for."""
        found: dict[str, Lazy] = {}
        for name, stored in self._stored.items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._stored:
                continue
            scales = self._stored.get(f"{name}{_SCALE}")
            if stored.dtype in _EIGHT_BITS and scales is None:
                raise ValueError(
                    f"{self.path}: {name} is {stored.dtype} and has no {name}{_SCALE}; take the model's files in "
                    "bfloat16"
                )
            found[name] = stored if scales is None else Dequantized(stored, scales, self._block)
        return found

    def _indexed(self) -> dict[str, StoredTensor]:
        named = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"{self.path / INDEX} has no weight_map: names of tensors with the file of each")
        files = sorted({str(file) for file in named.values()})
        outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
        if outside:
            raise ValueError(f"{self.path / INDEX} is refused: {outside[0]!r} is no safetensors file of this folder")
        absent = [file for file in files if not (self.path / file).is_file()]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise ValueError(f"{self.path} is incomplete: {absent[0]}{more} of {len(files)} files missing; fetch again")
        headers = {file: _header(self.path / file) for file in files}
        for name, file in named.items():
            if name not in headers[file]:
                raise ValueError(f"{self.path / INDEX} says that {name} is in {file}, which does not have it")
        return {name: headers[file][name] for name, file in named.items()}

    def _refuse(self) -> None:
        others = sorted(file.name for file in self.path.glob("*") if file.suffix in _PICKLES)
        if others:
            raise ValueError(
                f"{self.path} has its weights as pickles only ({others[0]}), which may run anything when they are "
                "opened; take a revision with safetensors files, or convert it where you trust it: "
                "transformers' from_pretrained and save_pretrained"
            )
        raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}: no folder of a Hugging Face model")

    def _scaled_blocks(self) -> tuple[int, int]:
        config = read_json(self.path / CONFIG) if (self.path / CONFIG).is_file() else {}
        how = config.get("quantization_config") or {}
        if not how:
            return 128, 128
        method, block = (
            (how.get("quant_method"), how.get("weight_block_size")) if isinstance(how, dict) else (how, None)
        )
        sizes = [size for size in block if type(size) is int and size > 0] if isinstance(block, list) else []
        if method != "fp8" or len(sizes) != 2 or sizes != block:
            raise ValueError(
                f"{self.path}: quantization_config.quant_method={method!r} with weight_block_size="
                f"{block} is not read, only fp8 with blocks; take the model's files in bfloat16"
            )
        return sizes[0], sizes[1]


def _header(file: Path) -> dict[str, StoredTensor]:
    """What a file says of itself. The library checks that ranges are within the file, of the right sizes, and meet."""
    try:
        with safe_open(file, framework="numpy") as opened:  # for torch it would map the file into memory
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}; fetch it again") from None
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    found = {}
    for name in names:
        about = header[name]
        if about["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} has the type {about['dtype']}, which is not read")
        start = 8 + length + about["data_offsets"][0]
        found[name] = StoredTensor(name, file, start, tuple(about["shape"]), DTYPES[about["dtype"]])
    return found

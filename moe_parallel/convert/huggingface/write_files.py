"""Writes the folder of a Hugging Face model, tensor by tensor: nothing of it has to be in memory as a whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_parallel.checkpoint.folder import sync
from moe_parallel.convert.huggingface.files import CONFIG, DTYPES, INDEX, SINGLE
from moe_parallel.convert.lazy import Lazy, row_boxes, size_bytes

GB = 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK_BYTES = 1 << 24
"""Of a tensor in memory at a time, for each job."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header and where each tensor begins."""

    file: str
    header: bytes
    start: dict[str, int]
    """Byte of the file by name, in the order of the file."""
    size: int


def plan_shards(weights: Mapping[str, Lazy], shard_bytes: int) -> list[Shard]:
    """Divide tensors among files, in their order, so that none is larger than this but for a single tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, lazy in weights.items():
        if groups[-1] and filled + size_bytes(lazy) > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size_bytes(lazy)
    files = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    return [_shard(file, {name: weights[name] for name in group}) for file, group in zip(files, groups)]


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Lazy],
    add_files: Callable[[Path], None],
    shard_bytes: int = 5 * GB,
    jobs: int = 1,
) -> None:
    """Write config and weights, under a hidden name that becomes the folder's when all is there.

    Args:
        config: what config.json is to say.
        weights: by their names on the disk, in the types that they are to have there.
        add_files: puts what else belongs to the model into a folder: its tokenizer.
        jobs: threads that read and write.
    Raises:
        ValueError: the folder exists, or the disk is too small. Nothing was written.
        OSError: the disk could not be written; what was is removed.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(weights, shard_bytes)
    needed, free = sum(shard.size for shard in shards), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ValueError(
            f"{folder} needs {needed / GB:.3f} GB, {folder.parent} has {free / GB:.3f} GB free; free some space, or "
            "choose a smaller type. Nothing was written"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir()
    try:
        add_files(partial)
        _write_json(partial / CONFIG, config)
        if len(shards) > 1:
            _write_json(partial / INDEX, _index(shards, weights))
        with ThreadPoolExecutor(jobs) as pool:
            for shard in shards:
                _write_shard(partial / shard.file, shard, weights, pool)
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder.parent)


def _shard(file: str, weights: Mapping[str, Lazy]) -> Shard:
    """Wide types first, so that every tensor is aligned to its type; then in the order given."""
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        lazy = weights[name]
        described[name] = {
            "dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [at, at + size_bytes(lazy)]
        }  # fmt: skip
        at += size_bytes(lazy)
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(file, header, {n: len(header) + described[n]["data_offsets"][0] for n in names}, len(header) + at)


def _index(shards: list[Shard], weights: Mapping[str, Lazy]) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": sum(math.prod(lazy.shape) for lazy in weights.values()),
            "total_size": sum(map(size_bytes, weights.values())),
        },
        "weight_map": {name: shard.file for shard in shards for name in shard.start},
    }


def _write_shard(file: Path, shard: Shard, weights: Mapping[str, Lazy], pool: ThreadPoolExecutor) -> None:
    """Header, then all tensors at their places, each by one of the pool's threads; durable when it returns."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write_at(descriptor, 0, shard.header)
        jobs = [pool.submit(_write_tensor, descriptor, shard.start[name], weights[name]) for name in shard.start]
        ended = wait(jobs, return_when=FIRST_EXCEPTION).done
        for job in jobs:
            job.cancel()
        wait(jobs)  # those that run would write into whatever file gets the descriptor next
        for job in ended:
            job.result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, start: int, lazy: Lazy) -> None:
    if size_bytes(lazy) == 0:
        return
    for box in row_boxes(lazy.shape, lazy.dtype, _CHUNK_BYTES):
        part = lazy.read(box).contiguous()
        assert part.dtype == lazy.dtype, str(lazy)
        data = part.view(-1).view(torch.uint8).numpy()
        _write_at(descriptor, start, data)
        start += data.nbytes


def _write_at(descriptor: int, start: int, data: Any) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(descriptor, left, start)
        left, start = left[count:], start + count


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""Lazy tensors as something that a checkpoint can be written of, without a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_parallel.convert.lazy import Lazy, row_boxes

PART_BYTES = 1 << 24
"""Of a part of a tensor as it is stored: what is in memory at a time. From 32 MiB on every part would be new memory."""


class LazyState:
    """Weights of a whole model, for `Checkpointer.save`, synchronous and in one process; each part is read when it
    is written.

    Args:
        weights: all parameters and buffers by name.
    """

    prefixes = ("model.",)

    def __init__(self, weights: Mapping[str, Lazy]) -> None:
        self._weights = weights

    def tensors(self) -> dict[str, Any]:
        return {f"model.{name}": _Entry(lazy) for name, lazy in self._weights.items()}

    def empty(self, metadata: Metadata) -> dict[str, Any]:
        raise NotImplementedError("it is there to be saved")

    def load(self, tensors: dict[str, Any]) -> None:
        raise NotImplementedError("it is there to be saved")


class _Entry:
    """torch's protocol for tensors that are held in parts (torch.distributed._checkpointable)."""

    def __init__(self, lazy: Lazy) -> None:
        self._lazy = lazy
        self._boxes = {
            torch.Size(offsets): (offsets, sizes) for offsets, sizes in row_boxes(lazy.shape, lazy.dtype, PART_BYTES)
        }

    def size(self) -> torch.Size:
        """Shape of the whole tensor, under the name that torch's planners ask for."""
        return torch.Size(self._lazy.shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self._lazy.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, torch.Size(sizes)) for offsets, (_, sizes) in self._boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._lazy.read(self._boxes[index.offset]).contiguous()

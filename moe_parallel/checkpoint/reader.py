"""Reads tensors of a checkpoint without running anything that is written in it.

torch.distributed.checkpoint stores its index, `.metadata`, as a pickle and loads it with pickle.load, so a
checkpoint from elsewhere could run any program. Here the index may only name the classes that describe
tensors; the tensors themselves go through torch.load(weights_only=True).
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata

from moe_parallel.checkpoint.folder import UnusableCheckpointError

_ALLOWED: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where the checkpoint once lay; Python 3.13 has moved the class.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnusableCheckpointError(f"its index names {module}.{name}, which no index of tensors contains")


class SafeReader(FileSystemReader):
    """FileSystemReader that refuses an index with anything but descriptions of tensors.

    Args:
        path: folder of the checkpoint.
        files: names that meta.json lists; the index may refer to no other file.
    """

    def __init__(self, path: Path, files: set[str]) -> None:
        super().__init__(path)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Raises:
            UnusableCheckpointError: the index contains something else than tensors, or is damaged.
        """
        where = self._get_metadata_path(kwargs.get("rank"))
        with open(where, "rb") as file:
            index = self._unpickle(file)
        outside = {info.relative_path for info in index.storage_data.values()} - self._files
        if outside:
            raise UnusableCheckpointError(
                f"{self.path} is refused: its index refers to {sorted(outside)}, not a part of it"
            )
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index

    def _unpickle(self, file: IO[bytes]) -> Metadata:
        try:
            index = _IndexUnpickler(file).load()
        except UnusableCheckpointError as error:
            raise UnusableCheckpointError(f"{self.path} is refused: {error}") from None
        except Exception as error:
            raise UnusableCheckpointError(f"{self.path} has a damaged index: {error!r}") from None
        if type(index) is not Metadata or not isinstance(index.storage_data, dict):
            raise UnusableCheckpointError(f"{self.path} is refused: its index is no index of tensors")
        return index

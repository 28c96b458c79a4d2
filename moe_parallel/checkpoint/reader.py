"""Reads tensors of a checkpoint without running anything that is written in it.

torch.distributed.checkpoint stores its index, `.metadata`, as a pickle and loads it with pickle.load, so a
checkpoint from elsewhere could run any program. Here the index may only name the classes that describe
tensors; the tensors themselves go through torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import find_tensor_shard

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


class IndexUnpickler(pickle.Unpickler):
    """Makes nothing but descriptions of tensors."""

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

    unpickler: type[pickle.Unpickler] = IndexUnpickler

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

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        """Each stored part once and in the order of the file, whatever number of pieces are wanted of it.

        torch reads a whole stored part again for each of them.
        """
        wanted: dict[str, dict[MetadataIndex, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            wanted[self.storage_data[item.storage_index].relative_path][item.storage_index].append(item)
        for name, parts in sorted(wanted.items()):
            with (Path(self.path) / name).open("rb") as file:
                for index in sorted(parts, key=lambda index: self.storage_data[index].offset):
                    stored = self.storage_data[index]
                    file.seek(stored.offset)
                    content = io.BytesIO(file.read(stored.length))
                    part = torch.load(content, map_location="cpu", weights_only=True)
                    for item in parts[index]:
                        box = zip(item.storage_offsets, item.lengths, strict=True)
                        source = part[tuple(slice(offset, offset + length) for offset, length in box)]
                        target = planner.resolve_tensor(item).detach()
                        if source.shape != target.shape:
                            raise UnusableCheckpointError(f"{name} has a part of {index.fqn} of another shape")
                        target.copy_(source)
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(None)
        return done

    def _unpickle(self, file: IO[bytes]) -> Metadata:
        try:
            index = self.unpickler(file).load()
        except UnusableCheckpointError as error:
            raise UnusableCheckpointError(f"{self.path} is refused: {error}") from None
        except Exception as error:
            raise UnusableCheckpointError(f"{self.path} has a damaged index: {error!r}") from None
        if type(index) is not Metadata or not isinstance(index.storage_data, dict):
            raise UnusableCheckpointError(f"{self.path} is refused: its index is no index of tensors")
        return index


class ReadPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, for entries that are no tensors but parts of one (`Pieces`)."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The base class would drop what is no tensor, while it looks for tensors without memory; here are none.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return find_tensor_shard(self.state_dict[index.fqn], index)

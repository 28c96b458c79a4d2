"""How tensors go into files: who writes what, and a checksum of each file from the rank that writes it."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import find_tensor_shard

from moe_parallel.checkpoint.folder import CheckpointError
from moe_parallel.checkpoint.pieces import Pieces

GIB = 2**30
# A part of a tensor is a zip archive of its own (1.2 KiB) with an entry of some 200 bytes in the index.
_OVERHEAD_BYTES = 2048


class WritePlanner(dcp.DefaultSavePlanner):
    """Decides on rank 0 which rank writes what several of them hold, and whether there is room for all of it.

    Args:
        folder: of all checkpoints of the run.
        keep_last: the option, for the message.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.folder, self.keep_last = folder, keep_last

    def create_local_plan(self) -> dcp.SavePlan:
        plan = super().create_local_plan()
        nothing = {name for name, entry in self.state_dict.items() if isinstance(entry, Pieces)}
        return replace(plan, planner_data=nothing - {item.index.fqn for item in plan.items})

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], Metadata]:
        plans, index = super().create_global_plan(share_out(all_plans))
        expected = set(index.state_dict_metadata).union(*(plan.planner_data for plan in all_plans))
        for name in sorted(expected):
            _check_whole(name, index)
        items = [item for plan in plans for item in plan.items]
        self._check_space(sum(map(size_bytes, items)) + _OVERHEAD_BYTES * (len(items) + len(plans) + 8))
        return plans, index

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"not enough disk space for a checkpoint in {self.folder}: needed {needed / GIB:.3f} GiB, "
                f"free {free / GIB:.3f} GiB; free some space, or lower checkpoint.keep_last={self.keep_last} and "
                "remove the oldest checkpoint by hand. Nothing was written"
            )

    def lookup_object(self, index: MetadataIndex) -> Any:
        return find_tensor_shard(self.state_dict[index.fqn], index)


def share_out(plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
    """Each part of a tensor in one plan only, so that all ranks write about equally many bytes.

    torch's own rule counts a rank's part of a tensor as the whole tensor and gives parts that several ranks hold away
    before it knows what the later ranks have to write anyway.
    """
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    part: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders[item.index].append(rank)
            part[item.index] = item
    bytes_of = [0] * len(plans)
    writer: dict[MetadataIndex, int] = {}
    # What only one rank has comes first, then the largest of the rest: the small ones even out what is left.
    for index in sorted(part, key=lambda index: (len(holders[index]) > 1, -size_bytes(part[index]))):
        writer[index] = min(holders[index], key=bytes_of.__getitem__)
        bytes_of[writer[index]] += size_bytes(part[index])
    return [
        replace(plan, items=[item for item in plan.items if writer[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]


def size_bytes(item: WriteItem) -> int:
    """Bytes of one part of a tensor."""
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _check_whole(name: str, index: Metadata) -> None:
    """torch compares volumes too, but not in a single process, and not of what no rank has any part of."""
    entry = index.state_dict_metadata.get(name)
    if entry is None:
        raise CheckpointError(f"no rank holds any part of {name}; it would be missing from the checkpoint")
    assert isinstance(entry, TensorStorageMetadata)
    held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if held != entry.size.numel():
        raise CheckpointError(f"ranks hold {held} of the {entry.size.numel()} elements of {name}")


class _HashedFile(io.BufferedWriter):
    """A file that is written from its beginning to its end, with a checksum of what went in."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.checksum = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.checksum.update(data)
        return super().write(data)


class _HashedFiles(FileSystem):
    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        assert mode == "wb"
        with _HashedFile(Path(path)) as file:
            yield file
        self.checksums[Path(path).name] = file.checksum.hexdigest()


class Writer(dcp.FileSystemWriter):
    """torch's writer of one file for each rank, with checksums, part by part.

    torch's own loop keeps what it has written until the file is closed: host memory for all that a rank holds. It also
    hides the operating system's error ("no space left").
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = files = _HashedFiles()
        self.checksums = files.checksums
        """Of the files that this rank has written, by name."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        done: torch.futures.Future = torch.futures.Future()
        try:
            # No empty file of a rank that has nothing to write.
            done.set_result(self._write_items(plan, planner) if plan.items else [])
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None
        return done

    def _write_items(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with self.fs.create_stream(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), item.index
                tensor = tensor.detach().cpu()
                if tensor.untyped_storage().size() != tensor.nbytes:  # the archive would have all of its memory
                    tensor = tensor.clone()
                results.append(
                    filesystem._write_item(self.transforms, stream, tensor, item, name, self.serialization_format)
                )
            stream.flush()
            os.fsync(stream.fileno())
        return results


def explain(error: CheckpointException, final: Path, keep_last: int) -> str:
    """Why a checkpoint could not be written, and what to do.

    Args:
        final: the folder that it was to have.
        keep_last: the option.
    """
    rank, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, CheckpointError):
        return str(cause)
    full = [e for e, _ in error.failures.values() if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT)]
    if full:
        free = shutil.disk_usage(final.parent).free
        return (
            f"no space left while writing {final} ({free / GIB:.3f} GiB free now; a quota may be lower): free some "
            f"space, or lower checkpoint.keep_last={keep_last}. Earlier checkpoints are intact"
        )
    return f"{final} could not be written on rank {rank}: {cause!r}. Earlier checkpoints are intact"

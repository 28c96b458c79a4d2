"""Whether a checkpoint fits what the ranks of a run hold: compared over all of them, told to all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moe_parallel.checkpoint.folder import UnusableCheckpointError
from moe_parallel.checkpoint.state import Entries, listing


def check_fit(wanted: Entries, index: Metadata, prefixes: tuple[str, ...], group: dist.ProcessGroup | None) -> None:
    """Compare names, shapes and types with those of a checkpoint. Every rank of the group must call it.

    Args:
        wanted: entries of this rank. Others may want others: stages of a pipeline have layers of their own.
        prefixes: of the entries that a checkpoint may not have beyond those that some rank wants.
    Raises:
        UnusableCheckpointError: on all ranks alike; lists what is missing, unexpected or different on any.
    """
    stored = index.state_dict_metadata
    mine = (
        [name for name in wanted if name not in stored],
        [text for name in wanted.keys() & stored.keys() if (text := _difference(name, wanted[name], stored[name]))],
    )
    found = [mine]
    # One number a name, not the names themselves: there may be thousands of both names and ranks.
    names = sorted(name for name in stored if name.startswith(prefixes))
    has_owner = torch.tensor([name in wanted for name in names], dtype=torch.uint8)
    if group is not None:
        found = [mine] * dist.get_world_size(group)
        dist.all_gather_object(found, mine, group=group)
        dist.all_reduce(has_owner, dist.ReduceOp.MAX, group=group)
    missing, different = ({text for rank in found for text in rank[kind]} for kind in (0, 1))
    unknown = [name for name, owned in zip(names, has_owner.tolist(), strict=True) if not owned]
    problems = [
        f"{what}: {listing(sorted(texts))}"
        for what, texts in (
            ("missing from the checkpoint", missing),
            ("unknown to this run", unknown),
            ("different", different),
        )
        if texts
    ]
    if problems:
        raise UnusableCheckpointError("the checkpoint does not fit the model: " + "; ".join(problems))


def _difference(name: str, ours: Any, theirs: Any) -> str | None:
    if not isinstance(theirs, TensorStorageMetadata):
        return f"{name} is not a tensor in the checkpoint"
    if (tuple(theirs.size), theirs.properties.dtype) == (tuple(ours.shape), ours.dtype):
        return None
    return (
        f"{name} is {theirs.properties.dtype} {tuple(theirs.size)} in the checkpoint, "
        f"{ours.dtype} {tuple(ours.shape)} in this run"
    )

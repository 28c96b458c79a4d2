"""What ranks of a checkpoint decide together: one acts for all, or all act and share the first error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moe_parallel.checkpoint.folder import CheckpointError, UnusableCheckpointError

T = TypeVar("T")


class Agreement:
    """Every rank of the group calls the same methods in the same order. None is a single process.

    Without it the others would wait for a failed rank in their next collective.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)

    def first(self, action: Callable[[], T]) -> T:
        """Do it on rank 0 only; its result, or its error, on all ranks.

        Raises:
            CheckpointError: rank 0 could not do it.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:  # the others wait for an answer, whatever happened
                outcome[1] = _words(error)
        if self.group is not None:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
        return outcome[0]

    def together(self, action: Callable[[], T]) -> T:
        """Do it on every rank; the first error of any of them on all.

        Raises:
            CheckpointError: some rank could not do it; UnusableCheckpointError if it is for the checkpoint's sake.
        """
        value: list[T] = []
        failure: Exception | None = None
        try:
            value.append(action())
        except Exception as error:
            failure = error
        unusable = isinstance(failure, UnusableCheckpointError)
        for found in self.gather(None if failure is None else (unusable, _words(failure))):
            if found is not None:
                kind = UnusableCheckpointError if found[0] else CheckpointError
                raise kind(found[1]) from failure
        return value[0]

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order."""
        found = [mine] * self.ranks
        if self.group is not None:
            dist.all_gather_object(found, mine, group=self.group)
        return found


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else repr(error)

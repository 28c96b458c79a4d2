"""Results on disk that are complete or absent: built once for all processes, written beside, renamed last."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def build_once(final: Path, build: Callable[[Path], None]) -> None:
    """Make the folder `final` by `build(folder)`, in one process of those that ask, all or nothing.

    The lock is the operating system's and dies with its holder. Where a shared file system has no locks, two
    builders do the same work and the first rename wins.
    """
    from filelock import FileLock, Timeout

    if final.exists():
        return
    with explain_full_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("data: waiting for another process to build %s", final)
        lock.acquire()
    try:
        if final.exists():
            return
        mine = f".{final.name}.{socket.gethostname()}."
        for stale in final.parent.glob(f"{mine}*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = final.parent / f"{mine}{os.getpid()}.partial"
        try:
            with explain_full_disk(final):
                folder.mkdir()
                build(folder)
                rename_unless_there(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def rename_unless_there(folder: Path, final: Path) -> None:
    try:
        os.rename(folder, final)
    except OSError:
        if not final.exists():
            raise


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A path to write to, which becomes `final` if all goes well."""
    partial = final.parent / f".{final.name}.{os.getpid()}.partial"
    try:
        yield partial
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(place: str | Path) -> Iterator[None]:
    """Turns "no space left" into a message that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or "data.cache_dir" in str(error):
            raise
        raise OSError(
            error.errno,
            f"no space left while writing {place}: {os.strerror(error.errno)}; nothing half-written is "
            "kept. Free space, or set data.cache_dir to a larger disk",
        ) from error

"""The folder with the state of an unfinished training; it remains after a kill, and one process at a time locks it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dskd.training.run import STATE_FILE

_LOCK_FILE = "lock"
_PATIENCE = 0.5
"""Seconds to wait for the lock."""


@contextmanager
def training_folder(out: Path, *, restart: bool = False) -> Iterator[Path]:
    """`<out>.training`, locked by this process until the block ends; it holds the state to resume from.

    The folder is removed if the block ends without an error, or fails before any state was saved. `restart` discards
    an older state. Raises ValueError if another process trains into `out`.
    """
    folder = out.with_name(f"{out.name}.training")
    lock = _take_lock(folder, out)
    is_over = False
    try:
        if restart:
            (folder / STATE_FILE).unlink(missing_ok=True)
        yield folder
        is_over = True
    finally:
        is_over = is_over or not has_state(folder)
        if is_over:
            # Removed before the lock is released, so that no other process can take the lock in between.
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        if is_over and os.name == "nt":
            # Windows can remove the lock's file only now, and not at all if another process has opened it meanwhile.
            with suppress(OSError):
                (folder / _LOCK_FILE).unlink(missing_ok=True)
                folder.rmdir()


def has_state(folder: Path) -> bool:
    """Whether the folder holds the saved state of an interrupted training."""
    return (folder / STATE_FILE).is_file()


def _take_lock(folder: Path, out: Path) -> FileLock:
    """The acquired lock; the system releases it when the process dies."""
    lock = FileLock(folder / _LOCK_FILE)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # May need several attempts: the process that held the lock may be removing the folder with the lock file.
            lock.acquire(timeout=_PATIENCE)
        except FileNotFoundError:
            continue
        except Timeout:
            raise ValueError(f"another process is training into {out}; wait for it or choose another --out.") from None
        return lock

"""Temporary folders that do not pile up: those that a killed process left are removed by the next process."""

import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "dskd-temporary-"
"""What is called so is removed: nothing that a person may have named like that."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder below the system's own for temporary files, removed after the block."""
    _remove_left(tempfile.gettempdir())
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and its lock, which goes with this process however that ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):  # another process has taken it for one that was left
            lock = os.open(folder, os.O_RDONLY)
            if _is_taken(lock) and folder.exists():
                return folder, lock
            os.close(lock)


def _is_taken(lock: int) -> bool:
    """Take a folder's lock, unless another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody removes what is left there
        pass
    return True


@functools.cache
def _remove_left(parent: str) -> None:
    """Remove the folders that nobody holds; once in each process, as it takes a look at all."""
    for left in Path(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or gone
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)

"""The folder beside a detector in the making: it outlives a killed training, and belongs to one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dskd.training.run import STATE_FILE

_LOCK_FILE = "lock"


@contextmanager
def training_folder(out: Path, *, restart: bool = False) -> Iterator[Path]:
    """`<out>.training`, held by this process until the block ends; what it needs to go on is kept in there.

    The folder is removed when the block ends well, or fails before any state was saved. `restart` throws an
    older state away. Raises ValueError where another process trains into `out`.
    """
    folder = out.with_name(f"{out.name}.training")
    with _take_lock(folder, out):
        if restart:
            (folder / STATE_FILE).unlink(missing_ok=True)
        try:
            yield folder
        except BaseException:
            if not has_state(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def has_state(folder: Path) -> bool:
    """Whether a training was interrupted in there after it had saved its state."""
    return (folder / STATE_FILE).is_file()


def _take_lock(folder: Path, out: Path) -> IO[str]:
    """The open, locked file; the kernel lets go of it when the process dies, however it dies."""
    path = folder / _LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = path.open("w")
        except FileNotFoundError:  # the process that held it has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open_at(lock, path):
                return lock
        except BlockingIOError:
            lock.close()
            raise ValueError(f"another process is training into {out}; wait for it or choose another --out.") from None
        lock.close()


def _is_open_at(file: IO[str], path: Path) -> bool:
    """Whether `path` still names the open file, and not none or a newer one."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

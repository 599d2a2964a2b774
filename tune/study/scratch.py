"""A folder for what Ray Tune writes and nobody needs; one that a killed process left is removed by the next."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "dskd-tune-", "in-use.lock"
_YOUNG_SECONDS = 60.0
"""A folder that was just made may not be locked yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the system's own for temporary files, removed afterwards.

    First removes those that killed processes left behind: the system gave their locks back.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    made = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with made as folder, FileLock(Path(folder) / _LOCK):
        yield Path(folder)


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError, Timeout):  # another user's, or in use
        if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
            return
        with FileLock(folder / _LOCK, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)

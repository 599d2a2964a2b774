"""A disk cache of arrays: each is computed once per machine, and all its processes share it through the page cache.

An entry is one `.npy` file, opened with mmap. Its name is a hash of the content that it was computed from. It gets
this name only when it is complete, so a process killed at any moment leaves no incomplete entry.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no EDQUOT
_ZEROS = bytes(1 << 20)


class NoRoomError(OSError):
    """The disk of a cache is full; the message says what to do."""


class ArrayCache:
    """Arrays in `folder`, each under a key; above `max_bytes` the least recently used ones are removed.

    On a full disk `when_full` is called with the reason, and the array is computed in memory and not kept;
    without `when_full` NoRoomError is raised. Safe for any number of processes of one machine: a lock per key lets one
    process compute while the others wait, and the system releases the lock when that process dies. On POSIX an entry
    can be removed while a process uses it, without harm; on Windows it cannot be removed then, and it stays.
    """

    def __init__(self, folder: Path, max_bytes: int, when_full: Callable[[str], object] | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._when_full = when_full
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the cache folder {folder} cannot be made ({error.strerror}); choose another with --cache-dir, or "
                "keep nothing with --cache-gb 0."
            ) from None

    def get(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        fill: Callable[[npt.NDArray[Any]], object],
    ) -> npt.NDArray[Any]:
        """The read-only array of `key`; if it is not in the cache yet, `fill` writes it into an array of zeros.

        An error in `fill` leaves no entry. An array larger than the whole cache is computed in
        memory and not kept. Raises NoRoomError if the disk has no space for the array.
        """
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if num_bytes > self._max_bytes:
            return _in_memory(shape, dtype, fill)
        name = hashlib.sha256(f"{key}|{shape}|{np.dtype(dtype).str}".encode()).hexdigest()[:32]
        path = self._folder / f"{name}.npy"
        if (hit := self._open(path)) is not None:
            return hit
        with FileLock(self._folder / f"{name}.lock"):
            if (hit := self._open(path)) is not None:
                return hit
            self._make_room(name, num_bytes)
            try:
                self._write(path, shape, dtype, fill)
            except NoRoomError as error:
                if self._when_full is None:
                    raise
                self._when_full(str(error))
                return _in_memory(shape, dtype, fill)
            written = self._open(path)
        assert written is not None, "only another process's eviction in this very moment could remove it"
        return written

    def _open(self, path: Path) -> npt.NDArray[Any] | None:
        try:
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):  # incomplete, for example after a power failure during writing
            _removed(path)
            return None
        return array

    def _write(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        fill: Callable[[npt.NDArray[Any]], object],
    ) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=f"{path.stem}-", suffix=".partial")
        os.close(handle)
        try:
            with self._room_or_reason(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize):
                array = np.lib.format.open_memmap(temporary, mode="w+", shape=shape, dtype=dtype)
                # The file is sparse: if its blocks were not reserved, a disk that fills up later would cause a SIGBUS.
                _reserve_blocks(Path(temporary), array.offset)
            fill(array)
            array.flush()
            del array  # Windows cannot rename a mapped file
            os.replace(temporary, path)
        finally:
            _removed(Path(temporary))

    @contextmanager
    def _room_or_reason(self, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise NoRoomError(
                f"no room for {num_bytes / 1e9:.3g} GB in the cache folder {self._folder} ({error.strerror}); free "
                "some, choose a folder on another disk (--cache-dir), or keep less or nothing (--cache-gb, 0: off)."
            ) from None

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Remove partial files of killed processes, then the least recently used entries until `num_bytes` more fit.

        The caller holds the lock of `name`, so no living process is writing the partial files of that name.
        """
        for leftover in self._folder.glob("*.partial"):
            if leftover.name.startswith(f"{name}-") or not _is_being_written(leftover):
                _removed(leftover)
        entries = sorted(_entries(self._folder))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total + num_bytes <= self._max_bytes:
                break
            if _removed(path):
                total -= size


def _in_memory(
    shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Callable[[npt.NDArray[Any]], object]
) -> npt.NDArray[Any]:
    array = np.zeros(shape, dtype)
    fill(array)
    return array


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of every entry; entries that another process removes meanwhile are skipped."""
    for path in folder.glob("*.npy"):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _is_being_written(partial: Path) -> bool:
    try:
        with FileLock(partial.with_name(f"{partial.name.split('-')[0]}.lock"), blocking=False):
            return False
    except Timeout:
        return True


def _removed(path: Path) -> bool:
    """Remove a file; False if Windows refuses because a process has it open."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _reserve_blocks(path: Path, start: int) -> None:
    """Reserve the disk space of a file that is zero from byte `start` on. Raises OSError if the disk is full."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        # macOS and Windows: only writing reserves space for certain.
        file.seek(start)
        for position in range(start, size, len(_ZEROS)):
            file.write(_ZEROS[: size - position])


def default_folder() -> Path:
    """The default cache folder: `dskd` in the user's cache folder (XDG on Linux)."""
    return user_cache_path("dskd", appauthor=False)

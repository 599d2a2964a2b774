"""Data sets at an s3:// address: copied once to each node that trains on them, listed without a copy.

A copy holds one category: its folder, and files that belong to no category, such as VisA's table of splits. Its
name depends on the address and on names, sizes and times of its files, so changed data get a new copy. It
appears verified and complete, or not at all, and all processes of the node share it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from dskd.atomic import folder_in_making
from dskd.config import LayoutName
from dskd.data.cache import default_folder
from dskd.data.datasets import find_categories
from tune.storage.files import Storage, StorageError, StoredFile
from tune.storage.temporary import temporary_folder
from tune.storage.uris import absolute, is_address

_CONNECTIONS = 16
_copies_in_use: dict[Path, IO[str]] = {}
"""Locks on the copies that this process reads; they prevent removal until the process ends."""


@contextmanager
def outline(data: str) -> Iterator[Path]:
    """A folder with the file names of `data`: the folder itself, or for an address a tree of empty files.

    Layouts are recognised by names and by small tables, which are downloaded. A ValueError raised in the block
    names the address instead of the tree. Raises StorageError if the address cannot be listed.
    """
    if not is_address(data):
        yield Path(data)
        return
    storage = Storage(data, "--data")
    files = _listed(storage)
    with _empty_tree(files, _name(storage)) as root:
        _fetch(storage, [file for file in files if PurePosixPath(file.name).suffix.lower() == ".csv"], root)
        try:
            yield root
        except ValueError as error:
            raise ValueError(str(error).replace(str(root), storage.uri)) from None


def content(data: str, root: Path, file: Path) -> bytes:
    """Bytes of `file`, a path below the `root` that `outline` returned."""
    if not is_address(data):
        return file.read_bytes()
    with temporary_folder() as temporary:
        fetched = temporary / file.name
        Storage(data, "--data").fetch(file.relative_to(root).as_posix(), fetched)
        return fetched.read_bytes()


def local_copy(data: str, category: str, cache_gb: float, layout: LayoutName = "auto") -> Path:
    """The folder on this node from which to read `category` of `data`: `data` itself, or its copy.

    The first process makes the copy, the others wait for it. Unused copies are removed to make room, least
    recently used first. Raises ValueError if `cache_gb` is too small for the category and the copies in use,
    StorageError if it cannot be downloaded.
    """
    if not is_address(data):
        return Path(data)
    storage = Storage(data, "--data")
    files = _of_category(storage, category, layout)
    copies = default_folder() / "data"
    copies.mkdir(parents=True, exist_ok=True)
    # Class folders are one copy, since each class is tested with all others.
    folder = copies / f"{'classes' if layout == 'classes' else category}-{_key(storage, files)[:16]}"
    while not _lock_copy(folder):
        # One copy at a time on a node, or two processes would count the same room as free.
        with (copies / "copying.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _make_room(copies, sum(file.num_bytes for file in files), int(cache_gb * 1e9), data)
                with folder_in_making(folder) as temporary:
                    for file in files:
                        (temporary / _name(storage) / file.name).parent.mkdir(parents=True, exist_ok=True)
                    _fetch(storage, files, temporary / _name(storage))
    os.utime(folder)
    return folder / _name(storage)


def files_of(data: str, category: str, layout: LayoutName = "auto") -> list[StoredFile]:
    """The files at the address `data` that a trial of the category reads."""
    return _of_category(Storage(data, "--data"), category, layout)


def listing_key(data: str, category: str, layout: LayoutName = "auto") -> str:
    """Digest of names, sizes and times of the category's files; no file is read."""
    storage = Storage(absolute(data), "--data")
    return _key(storage, _of_category(storage, category, layout))


def _key(storage: Storage, files: Sequence[StoredFile]) -> str:
    return hashlib.sha256(json.dumps([storage.uri, files]).encode()).hexdigest()


def _name(storage: Storage) -> str:
    """Name of the folder at the address; it is the category's name if the address is one category."""
    return PurePosixPath(storage.uri).name


def _listed(storage: Storage) -> list[StoredFile]:
    files = [file for file in storage.files("") if not PurePosixPath(file.name).name.startswith(".")]
    if not files:
        raise ValueError(f"--data {storage.uri} holds no file; it takes a folder of categories.")
    return files


@contextmanager
def _empty_tree(files: Sequence[StoredFile], name: str) -> Iterator[Path]:
    """A temporary folder called `name` with an empty file for each of `files`."""
    with temporary_folder() as temporary:
        root = temporary.resolve() / name
        for file in files:
            (root / file.name).parent.mkdir(parents=True, exist_ok=True)
            (root / file.name).touch()
        yield root


def _of_category(storage: Storage, category: str, layout: LayoutName) -> list[StoredFile]:
    """The files of one category and those that belong to none.

    Raises ValueError if there is no such category.
    """
    files = _listed(storage)
    with _empty_tree(files, _name(storage)) as root:
        found = find_categories(root, layout)
        folders = {name: folder.relative_to(root).as_posix() for name, folder in found.items()}
    if category not in folders:
        raise ValueError(f"no category {category!r} in {storage.uri}; it holds: {', '.join(folders)}.")
    if layout == "classes":
        return files
    others = tuple(f"{folder}/" for name, folder in folders.items() if name != category)
    return [file for file in files if not file.name.startswith(others)]


def _fetch(storage: Storage, files: Sequence[StoredFile], root: Path) -> None:
    def fetch(file: StoredFile) -> None:
        storage.fetch(file.name, root / file.name)
        if (found := (root / file.name).stat().st_size) != file.num_bytes:
            raise StorageError(
                f"{storage.uri}/{file.name} gave {found} bytes, its listing says {file.num_bytes}; it was changed "
                "while it was copied: start again."
            )

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        try:
            for _ in pool.map(fetch, files):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _lock_copy(folder: Path) -> bool:
    """Lock the copy for as long as this process runs; False if it does not exist."""
    if folder in _copies_in_use:
        return True
    lock = _lock_file(folder)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not folder.exists():
        lock.close()
        return False
    if _copies_in_use.setdefault(folder, lock) is not lock:  # another thread was faster
        lock.close()
    return True


def _lock_file(folder: Path) -> IO[str]:
    return folder.with_name(f"{folder.name}.lock").open("a")


def _make_room(copies: Path, num_bytes: int, max_bytes: int, data: str) -> None:
    """Remove leftovers of killed processes, then unused copies, until `num_bytes` more fit."""
    for leftover in copies.glob(".*"):
        shutil.rmtree(leftover)
    oldest_first = sorted((path for path in copies.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in oldest_first}
    total = sum(sizes.values())
    for path in oldest_first:
        if total + num_bytes <= max_bytes:
            break
        with _lock_file(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # in use by another process
                continue
            removed = path.with_name(f".{path.name}")
            path.rename(removed)
            shutil.rmtree(removed)
            total -= sizes[path]
    if total + num_bytes > max_bytes:
        in_use = f" beside {total / 1e9:.3g} GB in use" if total else ""
        raise ValueError(
            f"a copy of {data} takes {num_bytes / 1e9:.3g} GB{in_use} in {copies}, --cache-gb allows "
            f"{max_bytes / 1e9:g}; raise it."
        )

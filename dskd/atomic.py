"""Atomic writes: a file or folder appears complete or not at all, also when the process is killed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_can_be_made(path: Path, flag: str) -> None:
    """Raise ValueError, naming `flag`, when `path` lies where this user cannot write."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"{path} cannot be made: {above} is no folder that you may write to; choose another {flag}.")


@contextmanager
def file_in_making(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it when the block ends, and is removed when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_in_making(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` when the block ends, and is removed when the block fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield temporary
        move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, replacing an older one."""
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            _flush(file)
    temporary.chmod(0o755)
    if folder.exists():
        replaced = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
        os.rename(folder, replaced / folder.name)
        os.rename(temporary, folder)
        shutil.rmtree(replaced)
    else:
        os.rename(temporary, folder)


def _flush(file: Path) -> None:
    with file.open("r+b" if os.name == "nt" else "rb") as written:  # Windows syncs only what may be written
        os.fsync(written.fileno())

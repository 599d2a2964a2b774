"""The common walk over folders of images: which files are read, and how many of each kind are not."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".j2k"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_SERVICE_NAMES = frozenset(
    {"__macosx", "__pycache__", "thumbs", "thumbnails", "thumbs.db", "ehthumbs.db", "desktop.ini", "#recycle"}
    | {"$recycle.bin", "lost+found", "system volume information"}
)
_RESULTS = (
    {"predictions.jsonl", "overlays"},
    {"detector.json", "model.safetensors"},
    {"summary.json", "verdicts"},
)
"""A folder with all names of one set was written by one of our commands: its pictures are no images of parts."""


REGION_FILES = ("region.png", "region.txt")
"""In a category's folder: its region of interest, as a mask or as the text of `DataSpec.region`."""


class UnreadableImageError(ValueError):
    """An image file that cannot be read; the message is one line with the file's name and the reason."""


class Walk(NamedTuple):
    """The content of a folder and of all folders below it."""

    images: tuple[Path, ...]
    """Files with an image's suffix, in path order; unreadable ones too, so that reading them reports the error."""
    others: Mapping[str, int]
    """Number of other files per suffix, in lower case; "" for no suffix."""
    left_out: Mapping[str, int]
    """Number of hidden and service files, and of files in hidden, service and output folders, per such name."""
    closed: tuple[Path, ...]
    """Folders that this user may not list."""

    @property
    def num_unread(self) -> int:
        return sum(self.others.values()) + sum(self.left_out.values())

    def describe(self) -> str:
        """A few words on the files that are not read; empty if there are none."""
        parts = []
        if self.others:
            parts.append(f"{sum(self.others.values())} files that are no images ({_most(self.others)})")
        if self.left_out:
            parts.append(f"{sum(self.left_out.values())} hidden or service files ({_most(self.left_out)})")
        if self.closed:
            parts.append(f"{len(self.closed)} folders that cannot be listed ({', '.join(map(str, self.closed[:3]))})")
        return ", ".join(parts)


def _most(counts: Mapping[str, int], limit: int = 6) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name or 'without suffix'}" for name, count in ordered[:limit]]
    return ", ".join(shown + (["…"] if len(ordered) > limit else []))


def is_image_name(name: PurePath) -> bool:
    return name.suffix.lower() in IMAGE_SUFFIXES


def is_service_name(name: str) -> bool:
    """Whether a file or folder with that name is hidden or belongs to the system or a tool: never an image or class.

    These are hidden names (also AppleDouble files), names that start with `@` (network storage), thumbnails, trash.
    """
    return name.startswith((".", "@")) or name.lower() in _SERVICE_NAMES


def is_left_out(name: PurePath) -> bool:
    """Whether any part of a relative path is a service name."""
    return any(is_service_name(part) for part in name.parts)


def walk(folder: Path, *, is_deep: bool = True) -> Walk:
    """All files below `folder`, sorted; with `is_deep` false only those directly inside.

    Links to folders are followed, and each folder is entered only once, so that circular links end. The name of
    `folder` itself is not checked: a hidden folder that the user names is read. A folder that does not exist is empty.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    closed: list[Path] = []
    entered: set[tuple[int, int]] = set()

    def enter(place: Path, is_root: bool) -> None:
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            closed.append(place)
            return
        names = {entry.name for entry in entries}
        if not is_root and any(result <= names for result in _RESULTS):
            left_out["an output folder"] += _num_files(place)
            return
        folders = []
        for entry in entries:
            path = place / entry.name
            if _is_folder(entry):
                if is_service_name(entry.name):
                    left_out[_kind(entry.name)] += _num_files(path)
                elif is_deep:
                    folders.append(path)
            elif is_service_name(entry.name):
                left_out[_kind(entry.name)] += 1
            elif is_image_name(path):
                images.append(path)
            elif entry.name not in REGION_FILES:
                others[path.suffix.lower()] += 1
        # Real folders first: if a link points to one of them, its files are listed under its own path.
        for path in sorted(folders, key=lambda path: path.is_symlink()):
            enter(path, False)

    enter(folder, True)
    return Walk(tuple(sorted(images)), dict(others), dict(left_out), tuple(closed))


def list_images(folder: Path, *, is_deep: bool = True) -> list[Path]:
    """Image files of a folder and, with `is_deep`, of the folders below it, in path order; see `walk`."""
    return list(walk(folder, is_deep=is_deep).images)


def class_folders(folder: Path) -> list[Path]:
    """The folders directly inside `folder` that may be a class of images, in order, without service names."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    return [folder / entry.name for entry in entries if _is_folder(entry) and not is_service_name(entry.name)]


def check_regular(path: Path) -> None:
    """Raise UnreadableImageError if `path` is no plain file: reading a pipe or a device may never end.

    Links are followed. Nothing is opened.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UnreadableImageError(f"image {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"{path} is not a readable image ({error}); replace or remove it.") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise UnreadableImageError(
            f"{path} is not a readable image (it is a {kinds.get(stat.S_IFMT(mode), 'socket')}); replace or remove it."
        )


def count_unread(walks: Iterable[Walk]) -> Walk:
    """The walks of several folders, merged into one."""
    every = list(walks)
    return Walk(
        tuple(path for each in every for path in each.images),
        dict(sum((Counter(each.others) for each in every), Counter[str]())),
        dict(sum((Counter(each.left_out) for each in every), Counter[str]())),
        tuple(path for each in every for path in each.closed),
    )


def _kind(name: str) -> str:
    return "._*" if name.startswith("._") else name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _num_files(folder: Path) -> int:
    return sum(1 for _ in _files(folder))


def _files(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from names

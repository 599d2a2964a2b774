"""The best detector of each category: evaluated once, kept in the storage, delivered verified."""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dskd.atomic import move_into_place
from dskd.checkpoint import (
    PREVIEW_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    BrokenDetectorError,
    DetectorRecord,
    read_detector,
    read_record,
    rewrite_record,
)
from tune.storage.files import Storage, StorageError
from tune.storage.uris import DETECTOR_FOLDER, FIGURES_FOLDER

_FOLDER = "champions"
_SO_FAR = "best-so-far"
_FOLDERS = (f"{_FOLDER}/", "tune/", "workers/")
"""Where detectors lie below a search's address."""
_LARGEST_SIDE_FILE = 64 * 2**20
"""Bytes; a record names some hundred thousand validation files in less."""

Fetch = Callable[[str, Path], None]
"""Copies a detector's file of that name, going on with what lies there of it already."""


class Champion(NamedTuple):
    """What the storage knows of a category's champion, or of its best trial so far."""

    category: str
    trial_id: str
    folder: str
    """Name of the detector folder below the search's address."""
    metrics: Mapping[str, float]
    run_id: str
    """Its MLflow run, empty where the tracking server never learnt of it."""
    selection: str = "val"
    """What chose it: "oracle" means the test images themselves."""

    @property
    def is_final(self) -> bool:
        """Whether its search has ended and evaluated it on the test images."""
        return self.folder.startswith(f"{_FOLDER}/")


def save_champion(
    storage: Storage,
    category: str,
    trial_id: str,
    detector_uri: str,
    test_metrics: Mapping[str, float],
    local: Path,
) -> tuple[Champion, DetectorRecord]:
    """Keep a trial's detector as the category's champion, with its test figures, also in folder `local`.

    The record that names it is written last: what it names is complete.
    """
    root, _, name = detector_uri.rpartition("/")
    Storage(root).download(name, local)
    record = read_record(local).with_metrics(test_metrics)
    rewrite_record(local, record)
    folder = f"{_FOLDER}/{category}/{trial_id}"
    storage.upload(local, folder)
    champion = Champion(category, trial_id, folder, dict(record.metrics), "", record.selection)
    _write(storage, _FOLDER, champion)
    return champion, record


def note_run(storage: Storage, champion: Champion) -> None:
    """Replace a champion's record, now that its MLflow run is known."""
    _write(storage, _FOLDER, champion)


def note_best(storage: Storage, category: str, trial_id: str, objective: float, detector_uri: str) -> bool:
    """Remember a finished trial where none so far was better: a search that is killed leaves it to be pulled.

    Nothing is copied: Ray keeps a trial's last checkpoint where it is. Whether it is the best.
    """
    known = _read(storage, _SO_FAR, category)
    if known is not None and known.metrics["val/objective"] >= objective:
        return False
    folder = detector_uri.removeprefix(f"{storage.uri}/")
    _write(storage, _SO_FAR, Champion(category, trial_id, folder, {"val/objective": objective}, ""))
    return True


def fetch_figures(detector_uri: str, folder: Path) -> Path | None:
    """Download the pictures of a trial's validation to `folder`; None where an earlier version left none."""
    storage = Storage(detector_uri.removesuffix(f"/{DETECTOR_FOLDER}"))
    if not storage.names(FIGURES_FOLDER):
        return None
    storage.download(FIGURES_FOLDER, folder)
    return folder


def find_champion(storage: Storage, category: str) -> Champion | None:
    """The champion of a category, None where the search has none."""
    return _read(storage, _FOLDER, category)


def find_best(storage: Storage, category: str) -> Champion | None:
    """The champion, or a trial that finished since and is better; None where no trial has finished."""
    champion, so_far = find_champion(storage, category), _read(storage, _SO_FAR, category)
    if champion is None or so_far is None:
        return champion or so_far
    return so_far if so_far.metrics["val/objective"] > champion.metrics["val/objective"] else champion


def champion_categories(storage: Storage) -> tuple[str, ...]:
    """Categories that have a champion or a best trial so far, in alphabetical order."""
    names = {*storage.names(_FOLDER), *storage.names(_SO_FAR)}
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def _write(storage: Storage, kind: str, champion: Champion) -> None:
    storage.write_json(f"{kind}/{champion.category}.json", {"schema": 1, **champion._asdict()})


def _read(storage: Storage, kind: str, category: str) -> Champion | None:
    _check_folder_name(category)
    document: dict[str, Any] | None = storage.read_json(f"{kind}/{category}.json")
    if document is None:
        return None
    try:
        document = {**Champion._field_defaults, **document}  # what is newer than the record
        champion = Champion(**{name: document[name] for name in Champion._fields})
    except KeyError as error:
        raise StorageError(f"{storage.uri}/{kind}/{category}.json lacks {error}; search again.") from None
    if not champion.folder.startswith(_FOLDERS) or ".." in champion.folder:
        raise StorageError(f"{storage.uri}/{kind}/{category}.json names the unsafe folder {champion.folder!r}.")
    return champion


def _check_folder_name(category: str) -> None:
    if category in ("", ".", "..") or "/" in category or "\0" in category:
        raise ValueError(f"{category!r} is no name of a category: it would lead out of the folder.")


def download_detector(storage: Storage, champion: Champion, folder: Path) -> DetectorRecord:
    """Download a champion as a detector folder; it appears verified and complete, or not at all.

    What a broken download left behind is gone on with. Raises BrokenDetectorError where what the storage holds is
    damaged, StorageError where it cannot be had, ValueError where `folder` is something else than a detector.
    """

    def fetch(name: str, path: Path) -> None:
        storage.resume(f"{champion.folder}/{name}", path, None if name == WEIGHTS_FILE else _LARGEST_SIDE_FILE)

    there = storage.names(champion.folder)
    if not there:
        raise StorageError(f"{storage.uri}/{champion.folder} is empty.")
    return download_detector_files(fetch, there, folder)


def download_detector_files(fetch: Fetch, there: Collection[str], folder: Path) -> DetectorRecord:
    """`download_detector` from anywhere: of the files that are `there`, only those that make a detector are fetched."""
    _check_folder_name(folder.name)
    if folder.exists():
        read_record(folder)
    if missing := [name for name in (RECORD_FILE, WEIGHTS_FILE) if name not in there]:
        raise BrokenDetectorError(f"the detector for {folder} has no {missing[0]} where it is stored.")
    with _resumable_folder(folder) as partial:
        for path in partial.iterdir():
            if path.is_symlink() or path.name != WEIGHTS_FILE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in (RECORD_FILE, PREVIEW_FILE):
            if name in there:
                fetch(name, partial / name)
        is_continued = (partial / WEIGHTS_FILE).exists()
        fetch(WEIGHTS_FILE, partial / WEIGHTS_FILE)
        try:
            record, _ = read_detector(partial)
        except BrokenDetectorError:
            if not is_continued:
                raise
            # The part that was there may be of other weights.
            (partial / WEIGHTS_FILE).unlink()
            fetch(WEIGHTS_FILE, partial / WEIGHTS_FILE)
            record, _ = read_detector(partial)
        move_into_place(partial, folder)
    return record


@contextmanager
def _resumable_folder(folder: Path) -> Iterator[Path]:
    """A sibling for what is fetched, of one process alone, kept after a failure where it can be gone on with.

    Raises OSError where another process fetches to the same folder.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_symlink():
        raise OSError(f"{partial} is a symbolic link; remove it.")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield partial
        except BaseException as error:
            weights = partial / WEIGHTS_FILE
            if isinstance(error, BrokenDetectorError) or not (weights.is_file() and weights.stat().st_size):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    except BlockingIOError:
        raise OSError(f"another process is fetching to {folder}; wait for it.") from None
    finally:
        os.close(handle)

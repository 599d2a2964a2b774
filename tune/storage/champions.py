"""The best detector of each category: stored with its test figures, downloaded with verification."""

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
    carry_feedback,
    read_detector,
    read_record,
    rewrite_record,
)
from dskd.report.document import Inspected, read_inspected, to_json
from tune.storage.files import Storage, StorageError, unlocking
from tune.storage.lease import LeaseLostError, lease_generation
from tune.storage.uris import DETECTOR_FOLDER, FIGURES_FOLDER

_FOLDER = "champions"
_SO_FAR = "best-so-far"
_INSPECTED = "inspected"
_FOLDERS = (f"{_FOLDER}/", "tune/", "workers/")
"""Folders below a search's address that may hold detectors."""
_MAX_SIDE_FILE = 64 * 2**20
"""In bytes; a record that lists some hundred thousand validation files is smaller."""

Fetch = Callable[[str, Path], None]
"""Copies the detector's file of that name to a path and resumes a partial copy there."""


class Champion(NamedTuple):
    """The stored record of a category's champion, or of its best trial so far."""

    category: str
    trial_id: str
    folder: str
    """Name of the detector folder below the search's address."""
    metrics: Mapping[str, float]
    run_id: str
    """Its MLflow run; empty if it was never tracked."""
    selection: str = "val"
    """What it was selected by: "val", or "oracle" for the test images themselves."""
    decision: str = ""
    """Why it was chosen, in one sentence; empty in older records."""
    beats: float | None = None
    """Highest validation objective among the trials that it was chosen from; None: its own."""
    generation: int = 0
    """Of the lease under which it was written; 0: without a lease."""

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
    *,
    change: Callable[[DetectorRecord], DetectorRecord] = lambda record: record,
    decision: str = "",
    beats: float | None = None,
    generation: int = 0,
) -> tuple[Champion, DetectorRecord]:
    """Store a trial's detector as the category's champion, with its test figures; also write it to folder `local`.

    `change` gives the record that is delivered; `generation` is that of the lease under which it is stored.

    The champion's record is written last, so the detector that it names is complete. Raises LeaseLostError if a search
    that has taken the lease since then has written one.
    """
    root, _, name = detector_uri.rpartition("/")
    Storage(root).download(name, local)
    return store_champion(
        storage,
        category,
        trial_id,
        local,
        test_metrics,
        change=change,
        decision=decision,
        beats=beats,
        generation=generation,
    )


def store_champion(
    storage: Storage,
    category: str,
    trial_id: str,
    local: Path,
    test_metrics: Mapping[str, float],
    *,
    change: Callable[[DetectorRecord], DetectorRecord] = lambda record: record,
    decision: str = "",
    beats: float | None = None,
    generation: int = 0,
) -> tuple[Champion, DetectorRecord]:
    """`save_champion` of a detector in the folder `local`."""
    record = change(read_record(local)).with_metrics(test_metrics)
    rewrite_record(local, record)
    # A search that goes on writes to a folder of its own: an older driver may still be writing to the first.
    folder = f"{_FOLDER}/{category}/{trial_id}" + (f"-lease-{generation:06d}" if generation > 1 else "")
    storage.upload(local, folder)
    champion = Champion(
        category, trial_id, folder, dict(record.metrics), "", record.selection, decision, beats, generation
    )
    _write(storage, _FOLDER, champion)
    return champion, record


def note_run(storage: Storage, champion: Champion) -> None:
    """Rewrite a champion's record once its MLflow run is known."""
    _write(storage, _FOLDER, champion)


def note_best(
    storage: Storage, category: str, trial_id: str, objective: float, detector_uri: str, generation: int = 0
) -> bool:
    """Record a finished trial if it is the best so far, so that it can be pulled even if the search is killed.

    Nothing is copied: Ray keeps a trial's last checkpoint in place. Returns whether it was recorded. Raises
    LeaseLostError as `save_champion`.
    """
    known = _read(storage, _SO_FAR, category)
    folder = detector_uri.removeprefix(f"{storage.uri}/")
    if known is not None and _is_as_good(known, trial_id, objective, folder):
        return False
    metrics = {"val/objective": objective}
    _write(storage, _SO_FAR, Champion(category, trial_id, folder, metrics, "", generation=generation))
    return True


def _is_as_good(known: Champion, trial_id: str, objective: float, folder: str) -> bool:
    """Whether the best so far stays; a trial that was trained on under another lease has moved."""
    has_moved = known.trial_id == trial_id and known.folder != folder
    best = known.metrics.get("val/objective", 0.0)
    return best > objective or (best == objective and not has_moved)


def fetch_figures(detector_uri: str, folder: Path) -> Path | None:
    """Download the pictures of a trial's validation to `folder`; None if an earlier version wrote none."""
    storage = Storage(detector_uri.removesuffix(f"/{DETECTOR_FOLDER}"))
    if not storage.names(FIGURES_FOLDER):
        return None
    storage.download(FIGURES_FOLDER, folder)
    return folder


def find_champion(storage: Storage, category: str) -> Champion | None:
    """The champion of a category; None if the search has none."""
    return _read(storage, _FOLDER, category)


def write_inspected(storage: Storage, inspected: Inspected) -> None:
    """Keep what a champion said of its images."""
    _check_folder_name(inspected.category)
    storage.write(_inspected_name(inspected.category, inspected.trial_id), to_json(inspected))


def find_inspected(storage: Storage, champion: Champion) -> Inspected | None:
    """The scores and pictures of a champion's images; None if an earlier version evaluated it.

    Raises StorageError if they are damaged.
    """
    name = _inspected_name(champion.category, champion.trial_id)
    document = storage.read_json(name)
    try:
        return None if document is None else read_inspected(document)
    except ValueError as error:
        raise StorageError(f"{storage.uri}/{name} is damaged: {error}") from None


def _inspected_name(category: str, trial_id: str) -> str:
    return f"{_INSPECTED}/{category}/{trial_id}.json"


def find_best(storage: Storage, category: str) -> Champion | None:
    """The champion, or a better trial that finished after it; None if no trial has finished."""
    champion, so_far = find_champion(storage, category), _read(storage, _SO_FAR, category)
    if champion is None or so_far is None:
        return champion or so_far
    beaten = champion.metrics.get("val/objective", 0.0) if champion.beats is None else champion.beats
    return so_far if so_far.metrics.get("val/objective", 0.0) > beaten else champion


def champion_categories(storage: Storage) -> tuple[str, ...]:
    """Categories that have a champion or a best trial so far, in alphabetical order.

    By the names of files alone: some may hold no record, which `find_best` says.
    """
    names = {*storage.names(_FOLDER), *storage.names(_SO_FAR)}
    found = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return tuple(sorted(found - {"", ".", ".."}))


def replaced_champions(storage: Storage, category: str) -> list[str]:
    """Folders of detectors that were champions of the category before, or were never named by its record."""
    champion = find_champion(storage, category)
    folders = [f"{_FOLDER}/{category}/{name}" for name in sorted(storage.names(f"{_FOLDER}/{category}"))]
    return [] if champion is None else [folder for folder in folders if folder != champion.folder]


def _write(storage: Storage, kind: str, champion: Champion) -> None:
    """Write a record, but not over one of a search that has taken the lease meanwhile."""

    def replaced(known: dict[str, Any] | None) -> dict[str, Any]:
        theirs = (known or {}).get("generation")
        # The lease says whether there was such a search: it may have begun anew, in a folder that was restored in part.
        if isinstance(theirs, int) and champion.generation < theirs <= lease_generation(storage):
            raise LeaseLostError(f"another search has written the champion of {champion.category!r}; this one ends")
        return {"schema": 1, **champion._asdict()}

    storage.replace_json(f"{kind}/{champion.category}.json", replaced)


def _read(storage: Storage, kind: str, category: str) -> Champion | None:
    _check_folder_name(category)
    place = f"{storage.uri}/{kind}/{category}.json"
    document: Any = storage.read_json(f"{kind}/{category}.json")
    if document is None:
        return None
    if not isinstance(document, dict):
        raise StorageError(f"{place} is no record of a champion but a {type(document).__name__}.")
    try:
        document = {**Champion._field_defaults, **document}  # fields added after the record was written
        champion = Champion(**{name: document[name] for name in Champion._fields})
    except KeyError as error:
        raise StorageError(f"{place} lacks {error}; search again.") from None
    texts = (champion.category, champion.trial_id, champion.folder, champion.run_id, champion.selection)
    is_whole = all(isinstance(text, str) for text in texts) and isinstance(champion.generation, int)
    if not is_whole or not _are_figures(champion.metrics):
        raise StorageError(f"{place} is damaged: a field has a value of another kind; search again.")
    if champion.category != category:
        raise StorageError(f"{place} is the record of another category, {champion.category!r}.")
    if not champion.folder.startswith(_FOLDERS) or ".." in champion.folder:
        raise StorageError(f"{storage.uri}/{kind}/{category}.json names the unsafe folder {champion.folder!r}.")
    return champion


def _are_figures(metrics: object) -> bool:
    return isinstance(metrics, dict) and all(
        isinstance(name, str) and isinstance(value, int | float) for name, value in metrics.items()
    )


def _check_folder_name(category: str) -> None:
    if category in ("", ".", "..") or "/" in category or "\0" in category:
        raise ValueError(f"{category!r} is no name of a category: it would lead out of the folder.")


def download_detector(storage: Storage, champion: Champion, folder: Path) -> DetectorRecord:
    """Download a champion as a detector folder; it appears verified and complete, or not at all.

    Resumes a partial download. Raises BrokenDetectorError if the stored files are damaged, StorageError if they
    cannot be downloaded, ValueError if `folder` exists and is not a detector.
    """

    def fetch(name: str, path: Path) -> None:
        storage.resume(f"{champion.folder}/{name}", path, None if name == WEIGHTS_FILE else _MAX_SIDE_FILE)

    there = storage.names(champion.folder)
    if not there:
        raise StorageError(f"{storage.uri}/{champion.folder} is empty.")
    return download_detector_files(fetch, there, folder)


def download_detector_files(fetch: Fetch, there: Collection[str], folder: Path) -> DetectorRecord:
    """`download_detector` from any source: of the file names `there`, only those of a detector are fetched."""
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
            # The resumed part may belong to other weights.
            (partial / WEIGHTS_FILE).unlink()
            fetch(WEIGHTS_FILE, partial / WEIGHTS_FILE)
            record, _ = read_detector(partial)
        carry_feedback(folder, partial)
        move_into_place(partial, folder)
    return record


@contextmanager
def _resumable_folder(folder: Path) -> Iterator[Path]:
    """A sibling of `folder` for the download, locked by one process; kept after a failure if it can be resumed.

    Raises OSError if another process is fetching to the same folder.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_symlink():
        raise OSError(f"{partial} is a symbolic link; remove it.")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with unlocking(handle):
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

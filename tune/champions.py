"""The best detector of each category: evaluated once, kept in the storage, delivered verified."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import torch

from dskd.atomic import folder_in_making
from dskd.checkpoint import DetectorRecord, read_record, rewrite_record
from dskd.detector import Detector
from tune.staging import local_copy
from tune.storage import Storage, StorageError

_FOLDER = "champions"


class Champion(NamedTuple):
    """What the storage knows of a category's champion."""

    category: str
    trial_id: str
    folder: str
    """Name of the detector folder below the search's address."""
    metrics: Mapping[str, float]
    run_id: str
    """Its MLflow run, empty where the tracking server never learnt of it."""
    selection: str = "val"
    """What chose it: "oracle" means the test images themselves."""


@ray.remote(max_retries=3)
def evaluate_on_test(
    detector_uri: str, data: str, category: str, num_threads: int, cache_gb: float
) -> dict[str, float]:
    """`test/…` figures of a stored detector, computed on the cluster; empty without a usable test split."""
    torch.set_num_threads(num_threads)
    root, _, name = detector_uri.rpartition("/")
    with TemporaryDirectory(prefix="dskd-") as temporary:
        folder = Path(temporary) / "detector"
        Storage(root).download(name, folder)
        detector = Detector.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
        try:
            scores = detector.evaluate(local_copy(data, category, cache_gb), category)
        except ValueError as error:
            print(f"{category}: no test figures: {error}")  # noqa: T201 - Ray carries it to the driver
            return {}
    return {f"test/{name}": value for name, value in scores._asdict().items()}


def crown(
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
    _write(storage, champion)
    return champion, record


def note_run(storage: Storage, champion: Champion) -> None:
    """Replace a champion's record, now that its MLflow run is known."""
    _write(storage, champion)


def _write(storage: Storage, champion: Champion) -> None:
    storage.write_json(f"{_FOLDER}/{champion.category}.json", {"schema": 1, **champion._asdict()})


def find_champion(storage: Storage, category: str) -> Champion | None:
    """The champion of a category, None where the search has none."""
    document: dict[str, Any] | None = storage.read_json(f"{_FOLDER}/{category}.json")
    if document is None:
        return None
    try:
        document = {**Champion._field_defaults, **document}  # what is newer than the record
        champion = Champion(**{name: document[name] for name in Champion._fields})
    except KeyError as error:
        raise StorageError(f"{storage.uri}/{_FOLDER}/{category}.json lacks {error}; search again.") from None
    if not champion.folder.startswith(f"{_FOLDER}/") or ".." in champion.folder:
        raise StorageError(f"{storage.uri}/{_FOLDER}/{category}.json names the unsafe folder {champion.folder!r}.")
    return champion


def champion_categories(storage: Storage) -> tuple[str, ...]:
    """Categories that have a champion, in alphabetical order."""
    return tuple(sorted(name.removesuffix(".json") for name in storage.names(_FOLDER) if name.endswith(".json")))


def deliver(storage: Storage, champion: Champion, folder: Path) -> DetectorRecord:
    """Download a champion as a detector folder; it appears verified and complete, or not at all.

    Raises BrokenDetector where what the storage holds is damaged, StorageError where it cannot be
    had, ValueError where `folder` is something else than a detector.
    """
    if folder.exists():
        read_record(folder)
    with folder_in_making(folder) as temporary:
        storage.download(champion.folder, temporary)
        for extra in temporary.iterdir():
            if extra.is_dir():
                shutil.rmtree(extra)
        return read_record(temporary)

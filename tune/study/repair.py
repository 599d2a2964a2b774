"""A champion whose detector is damaged or gone: delivered again from what is left of its trial."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dskd.checkpoint import RECORD_FILE, WEIGHTS_FILE, BrokenDetectorError, DetectorRecord, read_detector
from tune.storage.champions import (
    Champion,
    download_detector,
    find_champion,
    note_run,
    save_champion,
    store_champion,
)
from tune.storage.files import Storage, StorageError
from tune.storage.temporary import temporary_folder
from tune.storage.uris import DETECTOR_FOLDER
from tune.tracking.client import download, first_line
from tune.trial.assignment import Training
from tune.trial.evaluation import save_evaluated_champion
from tune.trial.groups import Groups
from tune.trial.spec import CHECKPOINT, ERROR, TrialSpec

_TESTED = "test/"


class Trial(NamedTuple):
    """The trial whose detector is the champion's."""

    trial_id: str
    detector_uri: str
    spec: TrialSpec
    """With the trial's own configuration."""


def readable_champion(storage: Storage, category: str, say: Callable[[str], object]) -> Champion | None:
    """The record of the category's champion; None, and a line, if it cannot be read."""
    try:
        return find_champion(storage, category)
    except StorageError as error:
        say(f"{category}: {error}; it is written anew")
        return None


def find_fault(storage: Storage, champion: Champion) -> str:
    """Why the champion's stored detector cannot be used; empty if it is whole."""
    with temporary_folder() as temporary:
        try:
            download_detector(storage, champion, temporary / DETECTOR_FOLDER)
        except (BrokenDetectorError, StorageError, ValueError) as error:
            return first_line(error)
    return ""


def has_detector(detector_uri: str) -> bool:
    """Whether the files of a detector lie at the address."""
    return {RECORD_FILE, WEIGHTS_FILE} <= set(Storage(detector_uri).names(""))


def deliver_again(
    storage: Storage,
    trial: Trial,
    known: Champion,
    groups: Groups,
    tracking: str,
    *,
    change: Callable[[DetectorRecord], DetectorRecord] = lambda record: record,
) -> tuple[Champion, str]:
    """Store the champion's detector again; returns its record, and where it was taken from.

    Taken from the trial's last checkpoint, else from its run in MLflow, else trained again. The test figures are those
    that are known, unless it was trained again. `change` gives the record that is delivered.
    """
    figures = {name: value for name, value in known.metrics.items() if name.startswith(_TESTED)}
    category = trial.spec.category
    with temporary_folder() as temporary:
        local = temporary / DETECTOR_FOLDER
        if _is_whole(trial.detector_uri, temporary / "checked"):
            champion, _ = save_champion(
                storage, category, trial.trial_id, trial.detector_uri, figures, local, change=change
            )
            source = "its last checkpoint"
        elif (tracked := _from_mlflow(known.run_id, tracking, temporary / "tracked")) is not None:
            champion, _ = store_champion(storage, category, trial.trial_id, tracked, figures, change=change)
            source = "its run in MLflow"
        else:
            champion, _, _ = save_evaluated_champion(
                storage, trial.spec, trial.trial_id, train_again(trial, groups), local, groups, change=change
            )
            source = "a training from the beginning"
    champion = champion._replace(run_id=known.run_id, decision=known.decision, beats=known.beats)
    note_run(storage, champion)
    return champion, source


def _is_whole(detector_uri: str, folder: Path) -> bool:
    if not has_detector(detector_uri):
        return False
    root, _, name = detector_uri.rpartition("/")
    try:
        Storage(root).download(name, folder)
        read_detector(folder)
    except (BrokenDetectorError, StorageError, ValueError):
        return False
    return True


def train_again(trial: Trial, groups: Groups) -> str:
    """Train the trial again, whose checkpoint is gone; returns the address of its detector.

    Raises OSError if it fails this time.
    """
    assignment = Training(trial_id=trial.trial_id, spec=trial.spec)
    reports = list(groups.follow(assignment))
    groups.forget(assignment)
    last = reports[-1] if reports else {}
    if ERROR in last or CHECKPOINT not in last:
        raise OSError(f"training {trial.trial_id} again failed: {last.get(ERROR, 'it left no checkpoint')}")
    return f"{last[CHECKPOINT]}/{DETECTOR_FOLDER}"


def _from_mlflow(run_id: str, tracking: str, folder: Path) -> Path | None:
    """The whole detector in a run's artifacts, downloaded below `folder`; None if there is none."""
    if not run_id:
        return None
    try:
        download(f"runs:/{run_id}/model", tracking, folder)
        found = next(folder.rglob("detector.json")).parent
        read_detector(found)
    except (BrokenDetectorError, ValueError, OSError, StopIteration):
        return None
    return found

"""The only use of the test images: a finished trial's detector is evaluated and stored as champion."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from dskd.report.document import SCORES_FILE, read_scores
from tune.storage.champions import Champion, save_champion, write_inspected
from tune.storage.files import Storage, StorageError
from tune.storage.staging import local_copy
from tune.storage.temporary import temporary_folder
from tune.storage.uris import DETECTOR_FOLDER, FIGURES_FOLDER
from tune.trial.assignment import Evaluation
from tune.trial.spec import REMARK, TrialSpec

logger = logging.getLogger(__name__)

TABLE_RATE = 0.01
"""False-alarm rate of the threshold at which champions are counted and shown; the nearest that the images allow."""

if TYPE_CHECKING:
    import torch

    from dskd.detector import Detector
    from dskd.evaluate import Evaluation as TestEvaluation
    from tune.trial.groups import Groups


def save_evaluated_champion(
    storage: Storage,
    spec: TrialSpec,
    trial_id: str,
    detector_uri: str,
    local: Path,
    groups: "Groups",
    *,
    change: Callable[[DetectorRecord], DetectorRecord] = lambda record: record,
    decision: str = "",
    beats: float | None = None,
) -> tuple[Champion, DetectorRecord, str]:
    """Let a worker group evaluate a trial's detector on the test images, and store it with these figures.

    `change` gives the record that is delivered; `decision` and `beats` as in `Champion`. The detector is also written
    to the folder `local`. Returns the champion, its record, and a remark for the user, empty unless there are no test
    figures.
    """
    figures, remark = evaluated(spec, trial_id, detector_uri, groups, change, keep_at=storage.uri)
    champion, record = save_champion(
        storage, spec.category, trial_id, detector_uri, figures, local, change=change, decision=decision, beats=beats
    )
    return champion, record, remark


def evaluated(
    spec: TrialSpec,
    trial_id: str,
    detector_uri: str,
    groups: "Groups",
    change: Callable[[DetectorRecord], DetectorRecord] = lambda record: record,
    *,
    keep_at: str = "",
) -> tuple[dict[str, Any], str]:
    """`test/…` figures of a stored detector on the category's test images, by a worker group.

    Right and wrong verdicts are counted at the threshold of the record that `change` gives. And a remark, empty unless
    there are no figures. With the address `keep_at` of a search, the score of each image and pictures are kept there
    (`champions.find_inspected`).
    """
    document = Storage(detector_uri).read_json(RECORD_FILE)
    if document is None:
        raise StorageError(f"{detector_uri} has no {RECORD_FILE}: its trial must be trained again.")
    record = change(DetectorRecord.from_document(document))
    assignment = Evaluation(
        trial_id=trial_id,
        detector_uri=detector_uri,
        data=spec.data,
        category=spec.category,
        cache_gb=spec.cache_gb,
        cpus=spec.cpus_per_worker,
        threshold=record.threshold(TABLE_RATE).value,
        keep_at=keep_at,
        suspects=record.most_anomalous() if keep_at else (),
    )
    (found,) = groups.follow(assignment)
    groups.forget(assignment)
    figures = {name: value for name, value in found.items() if name != REMARK}
    return figures, str(found.get(REMARK, ""))


def evaluate_on_test(assignment: Evaluation, device: "torch.device") -> dict[str, Any]:
    """`test/…` figures of a stored detector; without a usable test split a remark that says so.

    Beside the metrics how many images there are, and how many verdicts are wrong at `Evaluation.threshold`.
    """
    from dskd.detector import Detector  # a slow import that the driver does not need

    root, _, name = assignment.detector_uri.rpartition("/")
    with temporary_folder() as temporary:
        folder = temporary / "detector"
        Storage(root).download(name, folder)
        detector = Detector.load(folder, str(device))
        layout = detector.record.config.data.layout
        data: Path | None = None
        found: TestEvaluation | None = None
        remark = ""
        try:
            data = local_copy(assignment.data, assignment.category, assignment.cache_gb, layout)
            found = detector.evaluation(data, assignment.category)
        except ValueError as error:
            remark = f"no test figures: {error}"
        if assignment.keep_at and data is not None:
            try:
                _keep(assignment, detector, data, found)
            except ValueError as error:  # its images cannot be found or read; the figures are there all the same
                logger.warning("%s: no pictures for the report: %s", assignment.category, error)
    if found is None:
        return {REMARK: remark}
    counts = found.confusion(assignment.threshold)
    return {f"test/{name}": value for name, value in (found.scores._asdict() | counts._asdict()).items()}


def _keep(assignment: Evaluation, detector: "Detector", data: Path, found: "TestEvaluation | None") -> None:
    """Write scores and pictures of the champion's images to the storage."""
    from dskd.report.inspected import inspect

    checkpoint = Storage(assignment.detector_uri.removesuffix(f"/{DETECTOR_FOLDER}"))
    kept = inspect(
        detector,
        data,
        assignment.category,
        found,
        trial_id=assignment.trial_id,
        threshold=assignment.threshold,
        suspects=assignment.suspects,
        validation=read_scores(checkpoint.read_json(f"{FIGURES_FOLDER}/{SCORES_FILE}")),
    )
    write_inspected(Storage(assignment.keep_at), kept)

"""One training on the cluster without a search: Ray Train's workers, an MLflow run, a detector at the end."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray

from dskd.atomic import check_can_be_made
from dskd.checkpoint import DetectorRecord, read_record, sha256_of
from dskd.data.datasets import find_categories, fingerprint, read_category
from dskd.data.defects import choose_textures
from dskd.detector import UNTRAINED_TEACHER
from dskd.model.teacher import build_teacher
from tune.preflight.reach import check_place, check_reach
from tune.runtime.cluster import cluster_nodes, connect, describe_shortage, resolve_gpus
from tune.settings.entry import say
from tune.settings.train import TrainingSettings
from tune.settings.workers import Workers
from tune.storage.champions import download_detector, find_champion, note_run
from tune.storage.files import Storage
from tune.storage.staging import listing_key, outline
from tune.storage.temporary import temporary_folder
from tune.storage.uris import DETECTOR_FOLDER, absolute
from tune.tracking.client import check_server, run_link
from tune.tracking.events import EpochDone, Remarked, TrialEnded, TrialStarted
from tune.tracking.outbox import TrackingRefusedError, TrackingUnavailableError
from tune.tracking.registry import check_category
from tune.tracking.runs import TrackedRun, code_revision, run_tags, tracked_run
from tune.tracking.tracker import Tracker
from tune.trial.assignment import Metrics, Training
from tune.trial.evaluation import TABLE_RATE, save_evaluated_champion
from tune.trial.follower import AssignmentFailedError
from tune.trial.groups import Groups, worker_groups
from tune.trial.spec import CHECKPOINT, EPOCH, ERROR, REMARK, TrialSpec, build_spec, tracked_figures

_TRACKING_PATIENCE = 600.0
"""Seconds to wait for an absent tracking server after the training has finished."""


class TrainingError(Exception):
    """The training ended without a detector; the same command would fail again."""


class Trained(NamedTuple):
    """A finished training."""

    key: str
    """Digest of everything that affects the result: configuration, data, teacher, selection and textures."""
    folder: Path
    record: DetectorRecord
    run_id: str
    """Empty if it could not be tracked."""

    def to_document(self) -> dict[str, Any]:
        return {
            "detector": str(self.folder),
            "training": self.key,
            "run": self.run_id,
            "category": self.record.category,
            "teacher": self.record.teacher,
            "step": self.record.step,
            "data_sha256": self.record.data_sha256,
            "metrics": dict(self.record.metrics),
            "thresholds": [threshold._asdict() for threshold in self.record.thresholds],
            **self.record.rates(TABLE_RATE),
        }


def train(settings: TrainingSettings) -> int:
    """Train, track and write the detector; returns the exit code: 0 success, 1 the training failed.

    Raises ValueError or OSError on bad input, in one line.
    """
    run = tracked_run(settings.addresses.tracking, settings.from_run) if settings.from_run else None
    if run is not None:
        settings = repeat(settings, run)
        for line in differences(settings, run, code_revision()):
            say(line)
    try:
        trained = _trained(settings, run)
    except TrainingError as error:
        say(f"train: failed: {error}")
        return 1
    finally:
        if ray.is_initialized():
            ray.shutdown()
    metrics = trained.record.metrics
    figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("test/"))
    say(f"wrote {trained.folder}: step {trained.record.step}, validation {metrics['val/objective']:.4f}")
    say(f"test images: {figures or 'no figures'}")
    say(f"MLflow: {run_link(settings.addresses.tracking, trained.run_id) or 'away'}")
    if settings.json:
        print(json.dumps(trained.to_document(), indent=2))  # noqa: T201
    return 0


def _trained(settings: TrainingSettings, repeated: TrackedRun | None) -> Trained:
    category, key = _checked(settings)
    name = f"{category}-{key}"
    addresses = settings.addresses
    check_place(addresses.storage)
    storage = Storage(f"{addresses.home}/{name}")
    storage.probe()
    check_server(addresses.tracking)
    if (known := find_champion(storage, category)) is not None and known.run_id:
        say(f"{name} is trained already; writing it again from {storage.uri}")
        return Trained(key, settings.out, download_detector(storage, known, settings.out), known.run_id)
    if settings.teacher.is_untrained:
        say(UNTRAINED_TEACHER)
    connect(settings.address)
    if settings.address is not None:
        weights = str(settings.teacher.absolute()) if settings.teacher.is_file else ""
        textures = absolute(str(settings.textures)) if settings.textures else ""
        inputs = {"--data": absolute(settings.data), "--textures": textures, "--teacher-weights": weights}
        check_reach(storage.uri, inputs, say=say)
    spec = build_spec(
        settings.config,
        data=settings.data,
        category=category,
        teacher=settings.teacher,
        textures=str(settings.textures or ""),
        selection=settings.selection or "val",
        cache_gb=settings.cache_gb,
        workers=_workers(settings),
        min_workers=None,
        workers_uri=f"{storage.uri}/workers",
        revision=code_revision(),
    )
    unsent = addresses.unsent_events(f"{settings.name}-{name}")
    tracker = Tracker(
        addresses.tracking,
        settings.name,
        artifact_location=addresses.artifacts,
        tags=run_tags("tune/train.py", settings.name, spec.selection, settings.teacher, spec.revision)
        | ({"dskd.repeats": repeated.run_id} if repeated else {}),
        unsent=unsent,
        has_parents=False,
    )
    try:
        with worker_groups(spec.workers, min_workers=None, home=storage.uri, max_trials=1, first=spec) as groups:
            return _conclude(settings, storage, key, spec, tracker, groups, repeated)
    finally:
        if num_unsent := tracker.close(_TRACKING_PATIENCE):
            say(f"MLflow {tracker.trouble}: {num_unsent} events are in {unsent}; the same command writes them")


def _conclude(
    settings: TrainingSettings,
    storage: Storage,
    key: str,
    spec: TrialSpec,
    tracker: Tracker,
    groups: Groups,
    repeated: TrackedRun | None,
) -> Trained:
    """Train unless done already, evaluate once on the test images, then store, track and write the detector."""
    category = spec.category
    tracker.put(TrialStarted(category, key, settings.config.flat() | spec.tracked_values()))
    champion = find_champion(storage, category)
    if champion is None:
        try:
            detector = _fit(settings, key, spec, tracker, groups)
        except TrainingError as error:
            tracker.put(TrialEnded(category, key, "failed", str(error)))
            raise
        say("evaluating once on the test images")
        with temporary_folder() as temporary:
            local = temporary / "detector"
            champion, _, remark = save_evaluated_champion(storage, spec, key, detector, local, groups)
        if remark:
            say(remark)
    tracker.put(TrialEnded(category, key, "finished", ""))
    record = download_detector(storage, champion, settings.out)
    if repeated is not None and repeated.data_sha256 not in ("", record.data_sha256):
        say(
            f"the data are not those of run {repeated.run_id}: sha256 {record.data_sha256[:12]}… here, "
            f"{repeated.data_sha256[:12]}… there; the figures cannot be compared"
        )
    try:
        tags = {"dskd.data_sha256": record.data_sha256}
        run_id = tracker.log_detector(category, key, settings.out, record.metrics, tags, _TRACKING_PATIENCE)
    except (TrackingUnavailableError, TrackingRefusedError) as error:
        say(f"{error}; the detector is in the storage, the same command tracks it")
        return Trained(key, settings.out, record, "")
    note_run(storage, champion._replace(run_id=run_id))
    return Trained(key, settings.out, record, run_id)


def _checked(settings: TrainingSettings) -> tuple[str, str]:
    """Check data, teacher and folders; returns the category and the digest of everything that affects the result.

    Raises ValueError or OSError with one line on what to change.
    """
    if settings.out.exists():
        read_record(settings.out)
    check_can_be_made(settings.out, "--out")
    if not settings.addresses.is_remote:
        Path(settings.addresses.storage).mkdir(parents=True, exist_ok=True)
    with outline(settings.data) as root:
        layout = settings.config.data.layout
        categories = list(find_categories(root, layout))
        if settings.category is None and len(categories) > 1:
            raise ValueError(
                f"{settings.data} holds several categories, choose one with --category: {', '.join(categories)}."
            )
        category = settings.category or categories[0]
        check_category(category)
        found = read_category(root, category, layout)
    num_normals = len(found.train)
    share = min(settings.config.train.batch_size, num_normals) // settings.workers
    if share == 0:
        raise ValueError(f"{category} has {num_normals} images to train on, too few for --workers {settings.workers}.")
    model, teacher = settings.config.model, settings.teacher
    build_teacher(model.backbone, model.levels, teacher.weights)
    decisive = {
        "config": settings.config.to_dict(),
        "data": listing_key(settings.data, category, layout),
        "teacher": sha256_of(Path(teacher.weights)) if teacher.is_file else teacher.name,
        "selection": settings.selection or "val",
        "textures": fingerprint(choose_textures(settings.textures)) if settings.textures else "drawn",
    }
    say(found.describe())
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return category, digest[:8]


def _workers(settings: TrainingSettings) -> Workers:
    """The workers that the training reserves.

    Raises ValueError if a cluster started for this training cannot hold them.
    """
    nodes = cluster_nodes()
    workers = Workers(settings.workers, settings.cpus_per_worker, resolve_gpus(settings.gpus_per_worker, nodes))
    for shortage in describe_shortage(nodes, workers):
        if settings.address is None:
            raise ValueError(f"{shortage}; lower --workers, --cpus-per-worker or --gpus-per-worker.")
        say(f"{shortage}: waiting for the cluster to grow")
    return workers


def _fit(settings: TrainingSettings, key: str, spec: TrialSpec, tracker: Tracker, groups: Groups) -> str:
    """Train to the last epoch, from the last checkpoint if there is one; returns the address of the detector's folder.

    Raises TrainingError if the training diverges or its workers keep failing.
    """
    track = _EpochTracking(settings, key, spec, tracker)
    assignment = Training(trial_id=key, spec=spec)
    last: Metrics = {}
    try:
        for last in groups.follow(assignment):
            track(last)
    except AssignmentFailedError as error:
        raise TrainingError(str(error)) from None
    groups.forget(assignment)
    if reason := last.get(ERROR):
        raise TrainingError(str(reason))
    return f"{last[CHECKPOINT]}/{DETECTOR_FOLDER}"


class _EpochTracking:
    """Prints and tracks the first worker's reports."""

    def __init__(self, settings: TrainingSettings, key: str, spec: TrialSpec, tracker: Tracker) -> None:
        self._epochs = settings.config.train.num_validations
        self._key, self._category, self._tracker = key, spec.category, tracker
        self._remarks: set[str] = set()

    def __call__(self, report: Metrics) -> None:
        say(_epoch_line(report, self._epochs))
        if (remark := str(report.get(REMARK, ""))) and remark not in self._remarks:
            self._remarks.add(remark)
            say(remark)
            self._tracker.put(Remarked(self._category, self._key, remark))
        now = int(time.time() * 1000)
        self._tracker.put(EpochDone(self._category, self._key, int(report[EPOCH]), tracked_figures(report), now))


def _epoch_line(report: Metrics, epochs: int) -> str:
    at = f"validation {report[EPOCH]:3d}/{epochs}"
    if ERROR in report:
        return f"{at}  {report[ERROR]}"
    if "train/loss" not in report:
        return f"{at}  already trained"
    return (
        f"{at}  step {report['train/steps']}  loss {report['train/loss']:.4f}  "
        f"{report['time/images_per_second']:5.1f} images/s  "
        f"val image AUROC {report['val/image_auroc']:.3f}  AUPRO {report['val/aupro']:.3f}"
    )


def repeat(settings: TrainingSettings, run: TrackedRun) -> TrainingSettings:
    """The settings, completed from the run that they repeat.

    Raises ValueError if that run's teacher or textures came from files, since a run does not record their paths.
    """
    if settings.textures is None and run.textures != "drawn":
        raise ValueError(
            f"run {run.run_id} fed its synthetic defects from the folder {run.textures}; name its path with --textures."
        )
    return dataclasses.replace(
        settings,
        category=settings.category or run.category,
        teacher_weights=settings.teacher_weights or _teacher_of(run),
        selection=settings.selection or run.selection,
    )


def _teacher_of(run: TrackedRun) -> str:
    if run.teacher_weights not in ("hub", "lite0", "random"):
        raise ValueError(
            f"run {run.run_id} had its teacher from the file {run.teacher_weights or '(not recorded)'}; "
            "name its path with --teacher-weights."
        )
    return run.teacher_weights


def differences(settings: TrainingSettings, run: TrackedRun, revision: str) -> list[str]:
    """One line for each known difference between a training and the run that it repeats."""
    lines = []
    theirs, ours = run.config.flat(), settings.config.flat()
    if changed := [f"{name} {ours[name]} (there {theirs[name]})" for name in ours if ours[name] != theirs[name]]:
        lines.append(f"changed from run {run.run_id}: {', '.join(changed)}")
    if unknown := [name for name in run.unknown_fields if ours[name] == theirs[name]]:
        lines.append(f"run {run.run_id} does not record these fields, their defaults are used: {', '.join(unknown)}")
    if settings.teacher.name != run.teacher_weights:
        lines.append(f"another teacher than run {run.run_id}'s {run.teacher_weights}: {settings.teacher}")
    textures = settings.textures.name if settings.textures else "drawn"
    if textures != run.textures:
        lines.append(f"other textures than run {run.run_id}'s {run.textures}: {textures}")
    if settings.selection != run.selection:
        lines.append(f"another selection than run {run.run_id}'s {run.selection}: {settings.selection}")
    if run.revision and revision and run.revision != revision:
        lines.append(f"run {run.run_id} was trained by revision {run.revision[:12]}, this is {revision[:12]}")
    return lines

"""One training on the cluster, without a search: Ray Train's workers, MLflow's run, the detector at the end."""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow.fs
import ray
import ray.train
from ray.util.queue import Empty, Queue

from dskd.atomic import check_can_be_made
from dskd.checkpoint import DetectorRecord, read_record, sha256_of
from dskd.config import RunConfig
from dskd.data.datasets import find_categories, read_category
from dskd.model.teacher import build_teacher
from tune.runtime.cluster import connect
from tune.settings.train import TrainingSettings
from tune.storage.champions import download_detector, find_champion, note_run, save_champion
from tune.storage.files import Storage
from tune.storage.staging import listing_key, outline
from tune.storage.uris import DETECTOR_FOLDER, absolute, unsent_events
from tune.tracking.client import check_server, run_link
from tune.tracking.events import EpochDone, Remarked, TrialEnded, TrialStarted
from tune.tracking.runs import TrackedRun, code_revision
from tune.tracking.tracker import Tracker, TrackingRefusedError, TrackingUnavailableError
from tune.trial.groups import ray_train_job
from tune.trial.spec import REMARK, TrialSpec
from tune.trial.trainable import MAX_FAILURES
from tune.trial.worker import evaluate_on_test

_TRACKING_PATIENCE = 600.0
"""Seconds that a finished training waits for a tracking server that is away."""


class TrainingError(Exception):
    """The training ended without a detector, for a reason that the same command meets again."""


class Trained(NamedTuple):
    """A finished training."""

    key: str
    """Digest of all that decides what the training gives: its configuration, data and teacher."""
    folder: Path
    record: DetectorRecord
    run_id: str
    """Empty where the tracking server never learnt of it."""

    def to_document(self) -> dict[str, Any]:
        return {
            "detector": str(self.folder),
            "training": self.key,
            "run": self.run_id,
            "category": self.record.category,
            "teacher": self.record.teacher,
            "epoch": self.record.epoch,
            "data_sha256": self.record.data_sha256,
            "metrics": dict(self.record.metrics),
            "thresholds": [threshold._asdict() for threshold in self.record.thresholds],
        }


def launch_training(settings: TrainingSettings, *, as_json: bool) -> int:
    """Train, track and download_detector; the exit code: 0 done, 1 the training failed, 2 bad input."""
    try:
        trained = _trained(settings)
    except TrainingError as error:
        _say(f"train: failed: {error}")
        return 1
    except (ValueError, OSError) as error:
        _say(f"train: error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("train: interrupted; the same command continues it")
        return 130
    finally:
        if ray.is_initialized():
            ray.shutdown()
    metrics = trained.record.metrics
    figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("test/"))
    _say(f"wrote {trained.folder}: epoch {trained.record.epoch + 1}, validation {metrics['val/objective']:.4f}")
    _say(f"test images: {figures or 'no figures'}")
    _say(f"MLflow: {run_link(settings.tracking, trained.run_id) or 'away'}")
    if as_json:
        print(json.dumps(trained.to_document(), indent=2))  # noqa: T201
    return 0


def _trained(settings: TrainingSettings) -> Trained:
    category, key = _checked(settings)
    name = f"{category}-{key}"
    storage = Storage(f"{settings.storage_uri}/{settings.name}/{name}")
    storage.probe()
    check_server(settings.tracking)
    if (known := find_champion(storage, category)) is not None and known.run_id:
        _say(f"{name} is trained already; delivering it again from {storage.uri}")
        return Trained(key, settings.to, download_detector(storage, known, settings.to), known.run_id)
    if settings.teacher_weights == "random":
        _say("UNTRAINED TEACHER: fit to see the machinery, not for inspection")
    connect(settings.address)
    spec = _assignment(settings, category, storage.uri)
    unsent = unsent_events(settings.storage, f"{settings.name}-{name}")
    tracker = Tracker(
        settings.tracking,
        settings.name,
        artifact_location=settings.artifact_location,
        tags={
            "dskd.search": settings.name,
            "dskd.selection": "val",
            "dskd.teacher": "random (untrained)" if settings.teacher_weights == "random" else "pretrained",
            "mlflow.source.name": "tune/train.py",
            "mlflow.source.git.commit": spec.revision,
        }
        | ({"dskd.repeats": settings.repeats} if settings.repeats else {}),
        unsent=unsent,
        has_parents=False,
    )
    try:
        return _conclude(settings, storage, key, spec, tracker)
    finally:
        if num_unsent := tracker.close(_TRACKING_PATIENCE):
            _say(f"MLflow is away: {num_unsent} events are in {unsent}; the same command writes them")


def _conclude(settings: TrainingSettings, storage: Storage, key: str, spec: TrialSpec, tracker: Tracker) -> Trained:
    """Train unless that is done, evaluate once on the test images, keep, track and download_detector the detector."""
    category = spec.category
    weights = spec.teacher_weights
    params = settings.config.flat() | {
        "teacher_weights": weights if weights in ("hub", "random") else Path(weights).name,
        "num_workers": spec.num_workers,
    }
    tracker.put(TrialStarted(category, key, params))
    champion = find_champion(storage, category)
    if champion is None:
        try:
            detector = _fit(settings, key, spec, tracker)
        except TrainingError as error:
            tracker.put(TrialEnded(category, key, "failed", str(error)))
            raise
        _say("evaluating once on the test images")
        resources = {"num_cpus": spec.cpus_per_worker, "num_gpus": spec.gpus_per_worker}
        threads = max(1, int(spec.cpus_per_worker))
        evaluation = evaluate_on_test.options(**resources)
        tested = ray.get(evaluation.remote(detector, spec.data, category, threads, spec.cache_gb))
        with TemporaryDirectory(prefix="dskd-") as temporary:
            champion, _ = save_champion(storage, category, key, detector, tested, Path(temporary) / "detector")
    tracker.put(TrialEnded(category, key, "finished", ""))
    record = download_detector(storage, champion, settings.to)
    if settings.expected_data_sha256 not in ("", record.data_sha256):
        _say(
            f"the data are not those of run {settings.repeats}: sha256 {record.data_sha256[:12]}… here, "
            f"{settings.expected_data_sha256[:12]}… there; the figures cannot be compared"
        )
    try:
        tags = {"dskd.data_sha256": record.data_sha256}
        run_id = tracker.log_detector(category, key, settings.to, record.metrics, tags, _TRACKING_PATIENCE)
    except (TrackingUnavailableError, TrackingRefusedError) as error:
        _say(f"{error}; the detector is in the storage, the same command tracks it")
        return Trained(key, settings.to, record, "")
    note_run(storage, champion._replace(run_id=run_id))
    return Trained(key, settings.to, record, run_id)


def _checked(settings: TrainingSettings) -> tuple[str, str]:
    """The category and the digest of all that decides the result; data, teacher and folders are usable.

    Raises ValueError or OSError with one line that says what to change.
    """
    if settings.to.exists():
        read_record(settings.to)
    check_can_be_made(settings.to, "--out")
    if "://" not in settings.storage:
        Path(settings.storage_uri).mkdir(parents=True, exist_ok=True)
    with outline(settings.data) as root:
        categories = list(find_categories(root))
        if settings.category is None and len(categories) > 1:
            raise ValueError(
                f"{settings.data} holds several categories, choose one with --category: {', '.join(categories)}."
            )
        category = settings.category or categories[0]
        num_normals = len(read_category(root, category).train)
    share = min(settings.config.train.batch_size, num_normals) // settings.workers
    if share == 0:
        raise ValueError(f"{category} has {num_normals} images to train on, too few for --workers {settings.workers}.")
    model = settings.config.model
    build_teacher(model.backbone, model.levels, settings.teacher_weights)
    weights = settings.teacher_weights
    decisive = {
        "config": settings.config.to_dict(),
        "data": listing_key(settings.data, category),
        "teacher": weights if weights in ("hub", "random") else sha256_of(Path(weights)),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return category, digest[:8]


def _assignment(settings: TrainingSettings, category: str, storage_uri: str) -> TrialSpec:
    """What the workers are told.

    Raises ValueError where a cluster that was started for this training cannot hold them.
    """
    have: dict[str, float] = ray.cluster_resources()
    gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(have.get("GPU", 0) >= 1)
    for name, each in (("CPU", settings.cpus_per_worker), ("GPU", gpus)):
        need = each * settings.workers
        if need <= have.get(name, 0):
            continue
        lacks = f"{settings.workers} workers ask for {need:g} {name}s, the cluster has {have.get(name, 0):g}"
        if settings.address is None:
            raise ValueError(f"{lacks}; lower --workers or --{name.lower()}s-per-worker.")
        _say(f"{lacks}: waiting until it has grown")
    weights = settings.teacher_weights
    return TrialSpec(
        config=settings.config.to_dict(),
        data=absolute(settings.data),
        category=category,
        teacher_weights=weights if weights in ("hub", "random") else str(Path(weights).absolute()),
        cache_gb=settings.cache_gb,
        num_workers=settings.workers,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=gpus,
        workers_uri=storage_uri,
        revision=code_revision(),
    )


def _fit(settings: TrainingSettings, key: str, spec: TrialSpec, tracker: Tracker) -> str:
    """Train to the last epoch, from the last checkpoint where there is one; the address of the detector's folder.

    Raises TrainingError where it diverges or its workers fail again and again.
    """
    with _reported_epochs(settings, key, spec, tracker) as events:
        job = ray_train_job(
            spec,
            ray.train.RunConfig(
                name="workers",
                storage_path=spec.workers_uri,
                callbacks=[_Relay(events)],  # type: ignore[list-item]
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            result = job.fit()
        except ray.train.WorkerGroupError as error:
            reasons = [str(failure).strip().splitlines()[-1] for failure in error.worker_failures.values()]
            raise TrainingError(reasons[0] if reasons else str(error).strip().splitlines()[-1]) from None
        except ray.train.TrainingFailedError as error:
            raise TrainingError(str(error).strip().splitlines()[-1]) from None
    if reason := (result.metrics or {}).get("error"):
        raise TrainingError(str(reason))
    assert result.checkpoint is not None, "the last report of the first worker carries the detector"
    scheme = "s3://" if isinstance(result.checkpoint.filesystem, pyarrow.fs.S3FileSystem) else ""
    return f"{scheme}{result.checkpoint.path}/{DETECTOR_FOLDER}"


class _Relay(ray.train.UserCallback):
    """Sends the first worker's figures from the process that controls the workers to the driver."""

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._events.put(metrics[0])


@contextmanager
def _reported_epochs(settings: TrainingSettings, key: str, spec: TrialSpec, tracker: Tracker) -> Iterator[Queue]:
    """A queue for the workers' reports, each of which is printed and tracked."""
    events = Queue(actor_options={"num_cpus": 0})
    is_done = threading.Event()
    remarks: set[str] = set()

    def relay() -> None:
        while True:
            try:
                report = events.get(timeout=1)
            except Empty:
                if is_done.is_set():
                    return
                continue
            _say(_epoch_line(report, settings.config.train.epochs))
            if (remark := str(report.get(REMARK, ""))) and remark not in remarks:
                remarks.add(remark)
                _say(remark)
                tracker.put(Remarked(spec.category, key, remark))
            figures = {
                name: float(value)
                for name, value in report.items()
                if isinstance(value, int | float) and name != "epoch"
            }
            now = int(time.time() * 1000)
            tracker.put(EpochDone(spec.category, key, int(report["epoch"]), figures, now))

    relaying = threading.Thread(target=relay, name="epochs")
    relaying.start()
    try:
        yield events
    finally:
        is_done.set()
        relaying.join()


def _epoch_line(report: dict[str, Any], epochs: int) -> str:
    if "error" in report:
        return f"epoch {report['epoch']:3d}/{epochs}  {report['error']}"
    if "loss" not in report:
        return f"epoch {report['epoch']:3d}/{epochs}  was reached before"
    return (
        f"epoch {report['epoch']:3d}/{epochs}  loss {report['loss']:.4f}  {report['images_per_second']:5.1f} images/s  "
        f"val image AUROC {report['val/image_auroc']:.3f}  AUPRO {report['val/aupro']:.3f}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def teacher_weights_of(given: str | None, repeated: TrackedRun | None) -> str:
    """The teacher that is asked for, or the repeated run's.

    Raises ValueError where that run's came from a file, whose path no run knows.
    """
    if given is not None or repeated is None:
        return given or "hub"
    if repeated.teacher_weights not in ("hub", "random"):
        raise ValueError(
            f"run {repeated.run_id} had its teacher from the file {repeated.teacher_weights or '(not recorded)'}; "
            "name its path with --teacher-weights."
        )
    return repeated.teacher_weights


def differences(repeated: TrackedRun, config: RunConfig, teacher_weights: str, revision: str) -> list[str]:
    """A line for all in which this training is known to differ from the run that it repeats."""
    lines = []
    theirs, ours = repeated.config.flat(), config.flat()
    if changed := [f"{name} {ours[name]} (there {theirs[name]})" for name in ours if ours[name] != theirs[name]]:
        lines.append(f"changed from run {repeated.run_id}: {', '.join(changed)}")
    if unknown := [name for name in repeated.unknown_fields if ours[name] == theirs[name]]:
        lines.append(f"run {repeated.run_id} is older than these fields, their defaults stand: {', '.join(unknown)}")
    if Path(teacher_weights).name != repeated.teacher_weights:
        lines.append(f"another teacher than run {repeated.run_id}'s {repeated.teacher_weights}: {teacher_weights}")
    if repeated.revision and revision and repeated.revision != revision:
        lines.append(f"run {repeated.run_id} was trained by revision {repeated.revision[:12]}, this is {revision[:12]}")
    return lines

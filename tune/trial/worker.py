"""What runs in the processes that compute: one trial's training, alone or as one of several DDP workers."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
import ray.util
import torch

from dskd.checkpoint import RECORD_FILE, DetectorRecord, read_record, write_detector
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.detector import Detector
from dskd.device import WorkerRank, computing_device
from dskd.show.overlays import preview_of
from dskd.show.validation import write_figures
from dskd.training.inputs import TrainingData, prepare
from dskd.training.loop import NonFiniteLossError
from dskd.training.run import EpochResult, TrainingRun
from tune.storage.files import Storage, with_retries
from tune.storage.staging import local_copy
from tune.storage.uris import DETECTOR_FOLDER, FIGURES_FOLDER
from tune.trial.asha import rungs
from tune.trial.failures import OUT_OF_MEMORY
from tune.trial.spec import (
    CATEGORY,
    DATA_SHA256,
    PLACEMENT_GROUP,
    PREFIX,
    REMARK,
    RUNG,
    Report,
    TrialSpec,
    UnrecoverableTrialError,
)

CHECKPOINT_SECONDS = float(os.environ.get("DSKD_CHECKPOINT_SECONDS", "60"))
"""A killed trial loses at most this much training, or one epoch where that takes longer."""


def run_worker(values: Mapping[str, Any]) -> None:
    """One DDP worker of a trial; Ray Train calls it with `TrialSpec`'s fields on every worker."""
    spec = TrialSpec(**values)
    context = ray.train.get_context()
    worker = WorkerRank(context.get_world_rank(), context.get_world_size())
    resumed = ray.train.get_checkpoint()
    reserved = ray.util.get_current_placement_group()
    where = {PLACEMENT_GROUP: reserved.id.hex() if reserved else ""}
    storage = context.get_storage()

    def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        # Ray gives up after seconds; a trial started again for it would lose minutes.
        persist = functools.partial(storage.persist_current_checkpoint, checkpoint, name)
        kept: ray.train.Checkpoint = with_retries(persist, f"keeping {name}")
        return kept

    def is_leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    for report in train(spec, worker, ray.train.torch.get_device(), resumed, is_leaving):
        kept = ray.train.Checkpoint.from_directory(report.checkpoint) if report.checkpoint else None
        ray.train.report(report.metrics | where, checkpoint=kept, checkpoint_upload_fn=upload)


def _stays() -> bool:
    return False


def train(
    spec: TrialSpec,
    worker: WorkerRank,
    device: torch.device,
    resumed: "ray.train.Checkpoint | None",
    is_leaving: Callable[[], bool] = _stays,
) -> Iterator[Report]:
    """Train to the last epoch, from `resumed` where given, reporting every epoch.

    The first worker's last report carries the finished detector in `detector/`, its earlier ones
    now and then the state to resume from: so too at the end of every epoch once `is_leaving`, which all
    workers ask then, says that a node will go. What would fail again on every attempt, a diverged training or one
    that does not fit in memory, ends with an objective of 0 and the reason under `error`; what one of
    several workers meets alone is raised as UnrecoverableTrialError.
    """
    last = 0
    try:
        for report in _train(spec, worker, device, resumed, is_leaving):
            last = int(report.metrics["epoch"])
            yield report
    except NonFiniteLossError as error:  # on every worker alike
        yield Report({"epoch": last + 1, "objective": 0.0, "error": str(error)}, None)
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = _unrecoverable_reason(error)
        if reason is None:
            raise
        if worker.world_size > 1:
            raise UnrecoverableTrialError(reason) from error
        yield Report({"epoch": last + 1, "objective": 0.0, "error": reason}, None)


def _unrecoverable_reason(error: Exception) -> str | None:
    """Why trying again cannot help; None where it may."""
    line = (str(error).strip().splitlines() or [""])[0]
    # torch has a class for the memory of a GPU only.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return f"{OUT_OF_MEMORY}{line}"
    return line if isinstance(error, ValueError) else None


def _train(
    spec: TrialSpec,
    worker: WorkerRank,
    device: torch.device,
    resumed: "ray.train.Checkpoint | None",
    is_leaving: Callable[[], bool],
) -> Iterator[Report]:
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    device = computing_device(str(device))
    config = RunConfig.from_dict(spec.config)
    data = DataSpec(
        data=local_copy(spec.data, spec.category, spec.cache_gb),
        category=spec.category,
        teacher=TeacherSource(spec.teacher_weights),
        textures=Path(spec.textures) if spec.textures else None,
        selection=spec.selection,
    )
    inputs, remark = shared_inputs(config.for_inputs(), data, spec.cache_gb, device)
    run = TrainingRun.begin(config, inputs, device, worker.world_size)
    if resumed is not None:
        with contextlib.ExitStack() as downloaded:
            folder = with_retries(lambda: downloaded.enter_context(resumed.as_directory()), "reading a checkpoint")
            if (Path(folder) / DETECTOR_FOLDER / RECORD_FILE).is_file():
                yield _finished(Path(folder) / DETECTOR_FOLDER, config.train.epochs)
                return
            run.restore(Path(folder))
    trained = ray.train.torch.prepare_model(run.students) if worker.world_size > 1 else run.students
    saved = time.monotonic()
    machine_usage(device, default_folder())  # the next one tells what happens from here on
    for progress, seconds in _timed(run.epochs(trained, worker)):
        metrics = {
            "epoch": progress.epoch.number + 1,
            "objective": progress.best_objective,
            "val/objective": progress.objective,
            **{f"val/{name}": value for name, value in progress.scores._asdict().items()},
            **{name: value for name, value in progress.epoch._asdict().items() if name != "number"},
            **{f"{RUNG}{rung}": run.history[rung - 1].best_objective for rung in _passed(run)},
            "validation_seconds": seconds - progress.epoch.seconds,
            **machine_usage(device, default_folder()),
            CATEGORY: inputs.category,
            DATA_SHA256: inputs.data_sha256,
            **({REMARK: remark} if remark else {}),
        }
        is_last = run.next_epoch == config.train.epochs
        is_due = is_leaving() or is_last or time.monotonic() - saved >= CHECKPOINT_SECONDS
        if worker.rank != 0 or not is_due:
            yield Report(metrics, None)
            continue
        with TemporaryDirectory(prefix="dskd-") as temporary:
            write = functools.partial(run.save, Path(temporary))
            if is_last:
                record, weights = run.detector(spec.revision)
                # The detector as delivered: its score parameters may be better than those trained with.
                metrics |= {"objective": record.metrics["val/objective"], **record.metrics}
                write = functools.partial(_write_result, Path(temporary), run, record, weights)
            # What fills a disk may go: another trial's checkpoint on its way to the storage.
            with_retries(write, f"writing a checkpoint to {temporary}")
            yield Report(metrics, Path(temporary))
        saved = time.monotonic()


def _write_result(folder: Path, run: TrainingRun, record: DetectorRecord, weights: Mapping[str, torch.Tensor]) -> None:
    write_detector(folder / DETECTOR_FOLDER, record, weights, preview_of(run, record))
    write_figures(folder / FIGURES_FOLDER, run, record)


def _passed(run: TrainingRun) -> list[int]:
    """The epochs at which the run was compared with others."""
    return [rung for rung in rungs(run.config.train.epochs) if rung <= run.next_epoch]


def _timed(epochs: Iterator[EpochResult]) -> Iterator[tuple[EpochResult, float]]:
    """Each epoch with the seconds that it and its validation took, and not what the caller does in between."""
    while True:
        started = time.perf_counter()
        progress = next(epochs, None)
        if progress is None:
            return
        yield progress, time.perf_counter() - started


def _finished(detector: Path, epochs: int) -> Report:
    """The last report once more: the trial was killed between its last checkpoint and its end."""
    record = read_record(detector)
    return Report({"epoch": epochs, "objective": record.metrics["val/objective"], **record.metrics}, detector.parent)


@functools.lru_cache(maxsize=2)
def shared_inputs(config: RunConfig, spec: DataSpec, cache_gb: float, device: torch.device) -> tuple[TrainingData, str]:
    """What the trial trains with, and what a person should know of it, mostly nothing.

    Kept from trial to trial in a process that serves several: they differ in the students alone, and in
    whether their teacher is amplified. Two are kept, so that trials with and without stage I may take turns;
    images and features of both are files of the cache, mapped and not copied.
    """
    remarks: list[str] = []
    cache = ArrayCache(default_folder(), int(cache_gb * 1e9), remarks.append) if cache_gb > 0 else None
    inputs = prepare(config, spec, device=device, cache=cache)
    reason = remarks[0].partition(";")[0] if remarks else ""
    return inputs, f"images and features of this trial are in memory alone: {reason}" if reason else ""


def machine_usage(device: torch.device, folder: Path) -> dict[str, float]:
    """Use of CPUs (mean since the last call in this process), memory, the disk of `folder`, and of `device` if a GPU.

    All of the machine, whoever uses it. A GPU's load is left out where its driver does not tell it.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(_existing(folder))
    usage = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if device.type == "cuda":
        usage |= _gpu_usage(device)
    return {PREFIX + name: float(value) for name, value in usage.items()}


def _existing(folder: Path) -> str:
    return str(next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place)))


def _gpu_usage(device: torch.device) -> dict[str, float]:
    name = f"gpu_{device.index if device.index is not None else torch.cuda.current_device()}"
    free, total = torch.cuda.mem_get_info(device)
    usage = {
        f"{name}_memory_usage_megabytes": (total - free) / 1e6,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        usage[f"{name}_utilization_percentage"] = torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError):  # no NVML in this container or partition
        return usage
    return usage


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

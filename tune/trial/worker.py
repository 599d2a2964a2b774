"""The training of one trial in a worker process, alone or as one of several DDP workers."""

import functools
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import psutil
import ray.train.torch
import torch

from dskd.checkpoint import RECORD_FILE, DetectorRecord, read_record, write_detector
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.device import WorkerRank, computing_device
from dskd.show.overlays import preview_of
from dskd.show.validation import write_figures
from dskd.training.inputs import TrainingData, prepare
from dskd.training.loop import NonFiniteLossError
from dskd.training.run import IntervalResult, TrainingRun
from tune.storage.files import with_retries
from tune.storage.staging import local_copy
from tune.storage.temporary import temporary_folder
from tune.storage.uris import DETECTOR_FOLDER, EVIDENCE_FILE, FIGURES_FOLDER
from tune.trial.asha import rungs
from tune.trial.failures import OUT_OF_MEMORY
from tune.trial.spec import (
    CATEGORY,
    DATA_SHA256,
    EPOCH,
    ERROR,
    OBJECTIVE,
    REMARK,
    RUNG,
    SYSTEM,
    TEACHER_SHA256,
    TEXTURES_SHA256,
    Report,
    TrialSpec,
    UnrecoverableTrialError,
)

CHECKPOINT_SECONDS = float(os.environ.get("DSKD_CHECKPOINT_SECONDS", "60"))
"""Seconds between checkpoints: a killed trial loses at most this much, or the steps between two validations."""


_PREPARING = threading.Lock()
_DRAWING = threading.Lock()
"""matplotlib takes one thread at a time."""


def _never_leaves() -> bool:
    return False


def train(
    spec: TrialSpec,
    worker: WorkerRank,
    device: torch.device,
    resumed: Path | None,
    is_leaving: Callable[[], bool] = _never_leaves,
) -> Generator[Report, None, None]:
    """Train to the end, from the checkpoint in the folder `resumed` if given; yields a report after every validation.

    The first worker's last report has the finished detector in `detector/`; earlier ones have a checkpoint every
    `CHECKPOINT_SECONDS`, or every one once `is_leaving` returns True because a node will go. All workers call it
    after every validation. A failure that would occur on every attempt, such as a diverged training or too little
    memory, ends the trial with objective 0 and the reason under `error`. If only one of several workers meets it, it
    is raised as UnrecoverableTrialError. Where trials share a process, too little memory is raised, as it may suffice
    beside others.
    """
    last = 0
    try:
        for report in _train(spec, worker, device, resumed, is_leaving):
            last = int(report.metrics[EPOCH])
            yield report
    except NonFiniteLossError as error:  # on all workers at once
        yield Report({EPOCH: last + 1, OBJECTIVE: 0.0, ERROR: str(error)}, None)
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = _unrecoverable_reason(error)
        if reason is None or (spec.trials_per_gpu > 1 and reason.startswith(OUT_OF_MEMORY)):
            raise
        if worker.world_size > 1:
            raise UnrecoverableTrialError(reason) from error
        yield Report({EPOCH: last + 1, OBJECTIVE: 0.0, ERROR: reason}, None)


def _unrecoverable_reason(error: Exception) -> str | None:
    """Why a retry cannot help; None if it may."""
    line = (str(error).strip().splitlines() or [""])[0]
    # torch has an exception class only for the memory of a GPU.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return f"{OUT_OF_MEMORY}{line}"
    return line if isinstance(error, ValueError) else None


def _train(
    spec: TrialSpec,
    worker: WorkerRank,
    device: torch.device,
    resumed: Path | None,
    is_leaving: Callable[[], bool],
) -> Iterator[Report]:
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    device = computing_device(str(device))
    config = RunConfig.from_dict(spec.config)
    if resumed is not None and (resumed / DETECTOR_FOLDER / RECORD_FILE).is_file():
        yield _finished(resumed / DETECTOR_FOLDER, config.train.num_validations)
        return
    inputs, remark = inputs_of(spec, device)
    run = TrainingRun.begin(config, inputs, device, worker.world_size)
    if resumed is not None:
        run.restore(resumed)
    trained = ray.train.torch.prepare_model(run.students) if worker.world_size > 1 else run.students
    saved = time.monotonic()
    machine_usage(device, default_folder())  # starts the measuring period of the next call
    for result, seconds in _timed(run.intervals(trained, worker)):
        epoch = result.interval
        metrics = {
            # One that ends early, by its patience, is complete all the same.
            EPOCH: config.train.num_validations if run.is_finished else epoch.number + 1,
            OBJECTIVE: result.best_objective,
            "val/objective": result.objective,
            **{f"val/{name}": value for name, value in result.scores._asdict().items()},
            "train/steps": epoch.step,
            "train/loss": epoch.loss,
            "train/encoder_loss": epoch.encoder_loss,
            "train/decoder_loss": epoch.decoder_loss,
            "train/hkd_loss": epoch.hard_loss,
            "time/train_seconds": epoch.seconds,
            "time/validation_seconds": seconds - epoch.seconds,
            "time/images_per_second": epoch.images_per_second,
            **{f"{RUNG}{rung}": run.history[:rung][-1].best_objective for rung in _passed(run)},
            **machine_usage(device, default_folder()),
            CATEGORY: inputs.category,
            DATA_SHA256: inputs.data_sha256,
            TEACHER_SHA256: inputs.teacher_sha256,
            TEXTURES_SHA256: inputs.textures_sha256,
            **({REMARK: remark} if remark else {}),
        }
        is_last = run.is_finished
        is_due = is_leaving() or is_last or time.monotonic() - saved >= CHECKPOINT_SECONDS
        if worker.rank != 0 or not is_due:
            yield Report(metrics, None, run.save if worker.rank == 0 else None)
            continue
        with temporary_folder() as temporary:
            write = functools.partial(run.save, temporary)
            if is_last:
                record, weights = run.detector(spec.revision)
                # Metrics of the final detector, whose score parameters may be better than those used in training.
                metrics |= {OBJECTIVE: record.metrics["val/objective"], **record.metrics}
                write = functools.partial(_write_result, temporary, run, record, weights)
            # A full disk may have room again soon, for example after the upload of another trial's checkpoint.
            with_retries(write, f"writing a checkpoint to {temporary}")
            yield Report(metrics, temporary)
        saved = time.monotonic()


def _write_result(folder: Path, run: TrainingRun, record: DetectorRecord, weights: Mapping[str, torch.Tensor]) -> None:
    write_detector(folder / DETECTOR_FOLDER, record, weights, preview_of(run, record))
    if record.config.data.fold > 0:  # of a finalist, which nobody looks at
        (folder / EVIDENCE_FILE).write_text(run.evidence(record).to_json())
    else:
        with _DRAWING:
            write_figures(folder / FIGURES_FOLDER, run, record)


def _passed(run: TrainingRun) -> list[int]:
    """The rungs that the run has passed."""
    return [rung for rung in rungs(run.config.train.num_validations) if run.is_finished or rung <= run.next_interval]


def _timed(intervals: Iterator[IntervalResult]) -> Iterator[tuple[IntervalResult, float]]:
    """Each interval with the seconds of its training and validation; the caller's time in between is not counted."""
    while True:
        started = time.perf_counter()
        result = next(intervals, None)
        if result is None:
            return
        yield result, time.perf_counter() - started


def _finished(detector: Path, num_reports: int) -> Report:
    """Repeat the last report: the trial was killed between its last checkpoint and its end."""
    record = read_record(detector)
    return Report({EPOCH: num_reports, OBJECTIVE: record.metrics["val/objective"], **record.metrics}, detector.parent)


def data_of(spec: TrialSpec) -> DataSpec:
    """What the trial reads, with the images on this node."""
    layout = RunConfig.from_dict(spec.config).data.layout
    return DataSpec(
        data=local_copy(spec.data, spec.category, spec.cache_gb, layout),
        category=spec.category,
        teacher=TeacherSource(spec.teacher_weights),
        textures=Path(spec.textures) if spec.textures else None,
        exclude=spec.exclude,
        selection=spec.selection,
    )


def inputs_of(spec: TrialSpec, device: torch.device) -> tuple[TrainingData, str]:
    """What `shared_inputs` gives for a trial; of several threads one prepares it, and the others wait."""
    with _PREPARING:
        return shared_inputs(RunConfig.from_dict(spec.config).for_inputs(), data_of(spec), spec.cache_gb, device)


@functools.lru_cache(maxsize=2)
def shared_inputs(config: RunConfig, spec: DataSpec, cache_gb: float, device: torch.device) -> tuple[TrainingData, str]:
    """Training data of the trial, and a remark for the user, usually empty.

    Cached between the trials of a process, which differ only in the students and in whether the teacher is
    amplified. Two are cached, so that trials with and without stage I may alternate; images and features of both
    are memory-mapped files of the cache.
    """
    remarks: list[str] = []
    cache = ArrayCache(default_folder(), int(cache_gb * 1e9), remarks.append) if cache_gb > 0 else None
    inputs = prepare(config, spec, device=device, cache=cache)
    reason = remarks[0].partition(";")[0] if remarks else ""
    return inputs, f"images and features of this trial are kept only in memory: {reason}" if reason else ""


def machine_usage(device: torch.device, folder: Path) -> dict[str, float]:
    """Use of CPUs (mean since the last call in this process), memory, the disk of `folder`, and `device` if a GPU.

    Measured over the whole machine, all processes included. A GPU's load is left out if its driver does not report it.
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
    return {SYSTEM + name: float(value) for name, value in usage.items()}


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
    except (ModuleNotFoundError, RuntimeError):  # NVML is missing in this container or GPU partition
        return usage
    return usage

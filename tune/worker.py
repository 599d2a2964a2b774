"""What runs in the processes that compute: one trial's training, alone or as one of several DDP workers."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import ray.util
import torch

from dskd.checkpoint import RECORD_FILE, DetectorRecord, read_record, write_detector
from dskd.config import AmplificationConfig, DataConfig, RunConfig, Selection
from dskd.data.cache import ArrayCache, default_folder
from dskd.device import computing_device
from dskd.distillation import Distillation, Progress
from dskd.materials import Materials, prepare
from dskd.show.overlays import preview_of
from dskd.show.validation import write_figures
from dskd.train import NonFiniteLoss, Shard
from tune.failures import OUT_OF_MEMORY
from tune.machine import machine_usage
from tune.pruning import RUNG, rungs
from tune.staging import local_copy
from tune.storage import insistently

DETECTOR_FOLDER = "detector"
FIGURES_FOLDER = "figures"
"""Beside the detector: pictures of its validation."""
CATEGORY = "category"
"""Under this name every epoch reports what it trained on."""
DATA_SHA256 = "data_sha256"
"""Under this name every epoch reports the fingerprint of the images that it trained and was validated on."""
REMARK = "remark"
"""Under this name every epoch of a trial that something hinders reports what a person should know."""
PLACEMENT_GROUP = "placement_group"
"""Under this name DDP workers report, as hex, the reservation that they run in."""
CHECKPOINT_SECONDS = float(os.environ.get("DSKD_CHECKPOINT_SECONDS", "60"))
"""A killed trial loses at most this much training, or one epoch where that takes longer."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a trial's processes are told: plain values, since Ray carries them between machines."""

    config: Mapping[str, Any]
    """`RunConfig.to_dict()`."""
    data: str
    category: str
    teacher_weights: str
    cache_gb: float
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    workers_uri: str
    """Folder under which DDP trials keep their checkpoints."""
    revision: str
    textures: str = ""
    """Folder of images that feed the synthetic defects; empty: textures are drawn."""
    selection: Selection = "val"
    min_workers: int | None = None
    """Fewest DDP workers that the trial may run with; None: always `num_workers`."""


class HopelessTrial(RuntimeError):
    """A trial's values or data make it fail wherever it runs; the message says why. Raised on one of several
    workers, which must end together."""


class Report(NamedTuple):
    """One epoch's figures, and a folder to keep where it is time for a checkpoint."""

    metrics: dict[str, Any]
    checkpoint: Path | None


def ray_train_job(assignment: Assignment, run_config: ray.train.RunConfig) -> ray.train.torch.TorchTrainer:
    """The DDP training of `assignment.num_workers` workers, or of as few as `assignment.min_workers`.

    Two of Ray Train's defaults are replaced, wherever the environment does not set them.
    """
    # A cluster may have to grow or to finish other work first; Ray's default takes a minute of that for a failure.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "86400")
    # One report of each worker is taken per look at them, and the next one waits: Ray's default of 2 s would be
    # the least that an epoch takes.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    resources = {"CPU": assignment.cpus_per_worker}
    if assignment.gpus_per_worker > 0:
        resources["GPU"] = assignment.gpus_per_worker
    num_workers: int | tuple[int, int] = assignment.num_workers
    if assignment.min_workers is not None:
        num_workers = (assignment.min_workers, assignment.num_workers)
    return ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config=dataclasses.asdict(assignment),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]
            use_gpu=assignment.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=run_config,
    )


def run_worker(values: Mapping[str, Any]) -> None:
    """One DDP worker of a trial; Ray Train calls it with `Assignment`'s fields on every worker."""
    assignment = Assignment(**values)
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size())
    resumed = ray.train.get_checkpoint()
    reserved = ray.util.get_current_placement_group()
    where = {PLACEMENT_GROUP: reserved.id.hex() if reserved else ""}
    storage = context.get_storage()

    def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        # Ray gives up after seconds; a trial started again for it would lose minutes.
        persist = functools.partial(storage.persist_current_checkpoint, checkpoint, name)
        kept: ray.train.Checkpoint = insistently(persist, f"keeping {name}")
        return kept

    def is_leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    for report in train(assignment, shard, ray.train.torch.get_device(), resumed, is_leaving):
        kept = ray.train.Checkpoint.from_directory(report.checkpoint) if report.checkpoint else None
        ray.train.report(report.metrics | where, checkpoint=kept, checkpoint_upload_fn=upload)


def node_is_leaving() -> bool:
    """Whether this process's node has been announced to go: a spot instance reclaimed, a cluster that shrinks."""
    # Ray has no public door to this outside of Ray Train, which asks here too.
    return ray.get_runtime_context().get_node_id() in ray._private.state.state.get_draining_nodes()


def _stays() -> bool:
    return False


def train(
    assignment: Assignment,
    shard: Shard,
    device: torch.device,
    resumed: "ray.train.Checkpoint | None",
    is_leaving: Callable[[], bool] = _stays,
) -> Iterator[Report]:
    """Train to the last epoch, from `resumed` where given, reporting every epoch.

    The first worker's last report carries the finished detector in `detector/`, its earlier ones
    now and then the state to resume from: so too at the end of every epoch once `is_leaving`, which all
    workers ask then, says that a node will go. What would fail again on every attempt, a diverged training or one
    that does not fit in memory, ends with an objective of 0 and the reason under `error`; what one of
    several workers meets alone is raised as HopelessTrial.
    """
    last = 0
    try:
        for report in _train(assignment, shard, device, resumed, is_leaving):
            last = int(report.metrics["epoch"])
            yield report
    except NonFiniteLoss as error:  # on every worker alike
        yield Report({"epoch": last + 1, "objective": 0.0, "error": str(error)}, None)
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = _hopeless(error)
        if reason is None:
            raise
        if shard.world_size > 1:
            raise HopelessTrial(reason) from error
        yield Report({"epoch": last + 1, "objective": 0.0, "error": reason}, None)


def _hopeless(error: Exception) -> str | None:
    """Why trying again cannot help; None where it may."""
    line = (str(error).strip().splitlines() or [""])[0]
    # torch has a class for the memory of a GPU only.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return f"{OUT_OF_MEMORY}{line}"
    return line if isinstance(error, ValueError) else None


def _train(
    assignment: Assignment,
    shard: Shard,
    device: torch.device,
    resumed: "ray.train.Checkpoint | None",
    is_leaving: Callable[[], bool],
) -> Iterator[Report]:
    torch.set_num_threads(max(1, int(assignment.cpus_per_worker)))
    device = computing_device(str(device))
    config = RunConfig.from_dict(assignment.config)
    materials, remark = _materials(
        config.data,
        config.model.backbone,
        config.model.levels,
        assignment.data,
        assignment.category,
        assignment.teacher_weights,
        assignment.cache_gb,
        str(device),
        config.amplification,
        assignment.textures,
        assignment.selection,
    )
    run = Distillation.begin(config, materials, device, shard.world_size)
    if resumed is not None:
        with contextlib.ExitStack() as downloaded:
            folder = insistently(lambda: downloaded.enter_context(resumed.as_directory()), "reading a checkpoint")
            if (Path(folder) / DETECTOR_FOLDER / RECORD_FILE).is_file():
                yield _finished(Path(folder) / DETECTOR_FOLDER, config.train.epochs)
                return
            run.restore(Path(folder))
    trained = ray.train.torch.prepare_model(run.students) if shard.world_size > 1 else run.students
    saved = time.monotonic()
    machine_usage(device, default_folder())  # the next one tells what happens from here on
    for progress, seconds in _timed(run.epochs(trained, shard)):
        metrics = {
            "epoch": progress.epoch.number + 1,
            "objective": progress.best_objective,
            "val/objective": progress.objective,
            **{f"val/{name}": value for name, value in progress.scores._asdict().items()},
            **{name: value for name, value in progress.epoch._asdict().items() if name != "number"},
            **{f"{RUNG}{rung}": run.history[rung - 1].best_objective for rung in _passed(run)},
            "validation_seconds": seconds - progress.epoch.seconds,
            **machine_usage(device, default_folder()),
            CATEGORY: materials.category,
            DATA_SHA256: materials.data_sha256,
            **({REMARK: remark} if remark else {}),
        }
        is_last = run.next_epoch == config.train.epochs
        is_due = is_leaving() or is_last or time.monotonic() - saved >= CHECKPOINT_SECONDS
        if shard.rank != 0 or not is_due:
            yield Report(metrics, None)
            continue
        with TemporaryDirectory(prefix="dskd-") as temporary:
            write = functools.partial(run.save, Path(temporary))
            if is_last:
                record, weights = run.detector(assignment.revision)
                # The detector as delivered: its score parameters may be better than those trained with.
                metrics |= {"objective": record.metrics["val/objective"], **record.metrics}
                write = functools.partial(_write_result, Path(temporary), run, record, weights)
            # What fills a disk may go: another trial's checkpoint on its way to the storage.
            insistently(write, f"writing a checkpoint to {temporary}")
            yield Report(metrics, Path(temporary))
        saved = time.monotonic()


def _write_result(folder: Path, run: Distillation, record: DetectorRecord, weights: Mapping[str, torch.Tensor]) -> None:
    write_detector(folder / DETECTOR_FOLDER, record, weights, preview_of(run, record))
    write_figures(folder / FIGURES_FOLDER, run, record)


def _passed(run: Distillation) -> list[int]:
    """The epochs at which the run was compared with others."""
    return [rung for rung in rungs(run.config.train.epochs) if rung <= run.next_epoch]


def _timed(epochs: Iterator[Progress]) -> Iterator[tuple[Progress, float]]:
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
def _materials(
    config: DataConfig,
    backbone: str,
    levels: tuple[int, ...],
    data: str,
    category: str,
    teacher_weights: str,
    cache_gb: float,
    device: str,
    amplification: AmplificationConfig,
    textures: str,
    selection: Selection,
) -> tuple[Materials, str]:
    """What the trial trains with, and what a person should know of it, mostly nothing.

    Kept from trial to trial in a process that serves several: they differ in the students alone, and in
    whether their teacher is amplified. Two are kept, so that trials with and without stage I may take turns;
    images and features of both are files of the cache, mapped and not copied.
    """
    remarks: list[str] = []
    cache = ArrayCache(default_folder(), int(cache_gb * 1e9), remarks.append) if cache_gb > 0 else None
    materials = prepare(
        config,
        backbone,
        levels,
        data=local_copy(data, category, cache_gb),
        category=category,
        teacher_weights=teacher_weights,
        device=torch.device(device),
        cache=cache,
        textures=Path(textures) if textures else None,
        amplification=amplification,
        selection=selection,
    )
    reason = remarks[0].partition(";")[0] if remarks else ""
    return materials, f"images and features of this trial are in memory alone: {reason}" if reason else ""

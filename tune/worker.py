"""What runs in the processes that compute: one trial's training, alone or as one of several DDP workers."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import ray.util
import torch

from dskd.checkpoint import RECORD_FILE, read_record, write_detector
from dskd.config import AmplificationConfig, DataConfig, RunConfig
from dskd.data.cache import ArrayCache, default_folder
from dskd.device import computing_device
from dskd.distillation import Distillation
from dskd.materials import Materials, prepare
from dskd.show.overlays import preview_of
from dskd.show.validation import write_figures
from dskd.train import NonFiniteLoss, Shard
from tune.machine import machine_usage

DETECTOR_FOLDER = "detector"
FIGURES_FOLDER = "figures"
"""Beside the detector: pictures of its validation."""
DATA_SHA256 = "data_sha256"
"""Under this name every epoch reports the fingerprint of the images that it trained and was validated on."""
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


class Report(NamedTuple):
    """One epoch's figures, and a folder to keep where it is time for a checkpoint."""

    metrics: dict[str, Any]
    checkpoint: Path | None


def run_worker(values: Mapping[str, Any]) -> None:
    """One DDP worker of a trial; Ray Train calls it with `Assignment`'s fields on every worker."""
    assignment = Assignment(**values)
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size())
    resumed = ray.train.get_checkpoint()
    reserved = ray.util.get_current_placement_group()
    where = {PLACEMENT_GROUP: reserved.id.hex() if reserved else ""}
    for report in train(assignment, shard, ray.train.torch.get_device(), resumed):
        kept = ray.train.Checkpoint.from_directory(report.checkpoint) if report.checkpoint else None
        ray.train.report(report.metrics | where, checkpoint=kept)


def train(
    assignment: Assignment, shard: Shard, device: torch.device, resumed: "ray.train.Checkpoint | None"
) -> Iterator[Report]:
    """Train to the last epoch, from `resumed` where given, reporting every epoch.

    The first worker's last report carries the finished detector in `detector/`, its earlier ones
    now and then the state to resume from. A diverged training ends with an objective of 0 and the
    reason under `error`: trying it again would diverge again.
    """
    torch.set_num_threads(max(1, int(assignment.cpus_per_worker)))
    device = computing_device(str(device))
    config = RunConfig.from_dict(assignment.config)
    try:
        materials = _materials(
            config.data,
            config.model.backbone,
            config.model.levels,
            assignment.data,
            assignment.category,
            assignment.teacher_weights,
            assignment.cache_gb,
            str(device),
            config.amplification,
        )
    except NonFiniteLoss as error:  # stage I
        yield Report({"epoch": 1, "objective": 0.0, "error": str(error)}, None)
        return
    run = Distillation.begin(config, materials, device, shard.world_size)
    if resumed is not None:
        with resumed.as_directory() as folder:
            if (Path(folder) / DETECTOR_FOLDER / RECORD_FILE).is_file():
                yield _finished(Path(folder) / DETECTOR_FOLDER, config.train.epochs)
                return
            run.restore(Path(folder))
    trained = ray.train.torch.prepare_model(run.students) if shard.world_size > 1 else run.students
    saved = time.monotonic()
    try:
        for progress in run.epochs(trained, shard):
            metrics = {
                "epoch": progress.epoch.number + 1,
                "objective": progress.best_objective,
                "val/objective": progress.objective,
                **{f"val/{name}": value for name, value in progress.scores._asdict().items()},
                **{name: value for name, value in progress.epoch._asdict().items() if name != "number"},
                **machine_usage(device, default_folder()),
                DATA_SHA256: materials.data_sha256,
            }
            is_last = run.next_epoch == config.train.epochs
            if shard.rank != 0 or not (is_last or time.monotonic() - saved >= CHECKPOINT_SECONDS):
                yield Report(metrics, None)
                continue
            with TemporaryDirectory(prefix="dskd-") as temporary:
                if is_last:
                    record, weights = run.detector(assignment.revision)
                    # The detector as delivered: its score parameters may be better than those trained with.
                    metrics |= {"objective": record.metrics["val/objective"], **record.metrics}
                    write_detector(Path(temporary) / DETECTOR_FOLDER, record, weights, preview_of(run, record))
                    write_figures(Path(temporary) / FIGURES_FOLDER, run, record)
                else:
                    run.save(Path(temporary))
                yield Report(metrics, Path(temporary))
            saved = time.monotonic()
    except NonFiniteLoss as error:
        yield Report({"epoch": run.next_epoch + 1, "objective": 0.0, "error": str(error)}, None)


def _finished(detector: Path, epochs: int) -> Report:
    """The last report once more: the trial was killed between its last checkpoint and its end."""
    record = read_record(detector)
    return Report({"epoch": epochs, "objective": record.metrics["val/objective"], **record.metrics}, detector.parent)


@functools.lru_cache(maxsize=1)
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
) -> Materials:
    """Kept from trial to trial in a process that serves several: they differ in the students alone."""
    return prepare(
        config,
        backbone,
        levels,
        data=Path(data),
        category=category,
        teacher_weights=teacher_weights,
        device=torch.device(device),
        cache=ArrayCache(default_folder(), int(cache_gb * 1e9)) if cache_gb > 0 else None,
        amplification=amplification,
    )

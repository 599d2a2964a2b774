"""One trial of a search: what Ray Tune starts, and how it gets its workers."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from dskd.train import Shard
from tune.space import Space
from tune.worker import Assignment, run_worker, train

MAX_FAILURES = 3
"""Times that a trial starts again from its last checkpoint after its process or node was lost."""
_DRIVER_MEMORY = 512 * 2**20


def run_trial(suggested: Mapping[str, Any], assignment: Assignment, space: Space) -> None:
    """Tune's trainable: train with the suggested values, reporting every epoch.

    A trial of one worker runs in this process. Several workers are a Ray Train job of their own,
    named after the trial, so that a trial started again finds its checkpoints.
    """
    mine = dataclasses.replace(assignment, config=space.configuration(suggested).to_dict())
    if mine.num_workers > 1:
        _train_with_workers(mine, ray.tune.get_context().get_trial_id())
        return
    device = torch.device("cuda" if mine.gpus_per_worker > 0 else "cpu")
    for report in train(mine, Shard(), device, ray.tune.get_checkpoint()):
        kept = ray.tune.Checkpoint.from_directory(str(report.checkpoint)) if report.checkpoint else None
        ray.tune.report(report.metrics, checkpoint=kept)


def _train_with_workers(assignment: Assignment, trial_id: str) -> None:
    # On a full cluster the workers wait for their turn; Ray's default takes a minute of that for a failure.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "86400")
    resources = {"CPU": assignment.cpus_per_worker}
    if assignment.gpus_per_worker > 0:
        resources["GPU"] = assignment.gpus_per_worker
    num_workers: int | tuple[int, int] = assignment.num_workers
    if assignment.min_workers is not None:
        num_workers = (assignment.min_workers, assignment.num_workers)
    trainer = ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config=dataclasses.asdict(assignment),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]
            use_gpu=assignment.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=trial_id,
            storage_path=assignment.workers_uri,
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    trainer.fit()


def trial_resources(assignment: Assignment) -> ray.tune.PlacementGroupFactory:
    """What Tune reserves for a trial; the workers of a nested Ray Train job reserve their own."""
    if assignment.num_workers > 1:
        # No CPU: the workers may need every one. Ray refuses an empty reservation, so take the memory
        # that this waiting process really uses.
        return ray.tune.PlacementGroupFactory([{"memory": _DRIVER_MEMORY}])
    bundle = {"CPU": assignment.cpus_per_worker}
    if assignment.gpus_per_worker > 0:
        bundle["GPU"] = assignment.gpus_per_worker
    return ray.tune.PlacementGroupFactory([bundle])

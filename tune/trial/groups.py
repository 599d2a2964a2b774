"""Groups of DDP workers: the Ray Train job of one trial."""

import dataclasses
import os

import ray.train
import ray.train.torch
import ray.util

from tune.trial.spec import TrialSpec
from tune.trial.worker import run_worker


def ray_train_job(spec: TrialSpec, run_config: ray.train.RunConfig) -> ray.train.torch.TorchTrainer:
    """DDP training with `spec.num_workers` workers, or with down to `spec.min_workers` if that is given.

    Replaces two of Ray Train's defaults unless the environment sets them.
    """
    # A cluster may have to grow or to finish other work first; by default Ray fails after one minute of waiting.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "86400")
    # Ray Train takes one report per worker and health check, and the next report waits: with Ray's default of 2 s
    # no epoch could take less.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    resources = {"CPU": spec.cpus_per_worker}
    if spec.gpus_per_worker > 0:
        resources["GPU"] = spec.gpus_per_worker
    num_workers: int | tuple[int, int] = spec.num_workers
    if spec.min_workers is not None:
        num_workers = (spec.min_workers, spec.num_workers)
    return ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config=dataclasses.asdict(spec),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]
            use_gpu=spec.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=run_config,
    )

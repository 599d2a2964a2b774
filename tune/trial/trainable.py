"""One trial of a search: the function that Ray Tune calls, and the resources of its workers."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from dskd.device import WorkerRank
from tune.runtime.ray_internals import Reservation, causes_of, node_is_leaving
from tune.settings.space import Space
from tune.storage.files import with_retries
from tune.trial.groups import ray_train_job
from tune.trial.spec import EPOCH, ERROR, OBJECTIVE, TrialSpec, UnrecoverableTrialError
from tune.trial.worker import train

MAX_FAILURES = 3
"""Maximum number of restarts of a Ray Train job's workers."""
DRIVER_RESOURCE = "dskd_driver"
"""Custom resource of permanent nodes; processes that only wait request some of it, to stay off spot nodes."""
_DRIVER_MEMORY = 512 * 2**20


def trainable(spec: TrialSpec, space: Space) -> Any:
    """The function that Tune calls for every trial of a category, under a unique name.

    Tune passes trainables to its processes by name, in one table for the whole job: if two categories used the same
    name, the trials of one would train on the data of the other (seen with Ray 2.60).
    """
    made: Any = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, spec=spec, space=space), trial_resources(spec)
    )
    made.__name__ = f"run_trial_{hashlib.sha256(spec.workers_uri.encode()).hexdigest()[:16]}"
    return made


def run_trial(suggested: Mapping[str, Any], spec: TrialSpec, space: Space) -> None:
    """Tune's trainable: train with the suggested values and report every epoch.

    A trial of one worker runs in this process. Several workers run as a Ray Train job named after the trial, so
    that a restarted trial finds its checkpoints.
    """
    mine = spec.with_config(space.configuration(suggested))
    if mine.num_workers > 1:
        try:
            _train_with_workers(mine, ray.tune.get_context().get_trial_id())
        except ray.train.WorkerGroupError as error:
            causes = causes_of(error.worker_failures.values())
            reasons = [str(cause) for cause in causes if isinstance(cause, UnrecoverableTrialError)]
            if not reasons:
                raise
            ray.tune.report({EPOCH: 1, OBJECTIVE: 0.0, ERROR: reasons[0]})
        return
    device = torch.device("cuda" if mine.gpus_per_worker > 0 else "cpu")
    for report in train(mine, WorkerRank(), device, ray.tune.get_checkpoint(), node_is_leaving):
        kept = ray.tune.Checkpoint.from_directory(str(report.checkpoint)) if report.checkpoint else None
        # Ray gives up after seconds; restarting the trial would lose minutes.
        with_retries(functools.partial(ray.tune.report, report.metrics, checkpoint=kept), "keeping a checkpoint")


def _train_with_workers(spec: TrialSpec, trial_id: str) -> None:
    job = ray_train_job(
        spec,
        ray.train.RunConfig(
            name=trial_id,
            storage_path=spec.workers_uri,
            callbacks=[TuneReportCallback(), Reservation()],  # type: ignore[list-item]
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            # Failures are handled by Tune; study.hooks resets their count at every new epoch.
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                # Ray Train counts workers that die before training separately and by default restarts them forever.
                controller_failure_limit=MAX_FAILURES,  # type: ignore[call-arg]
            ),
        ),
    )
    job.fit()


def trial_resources(spec: TrialSpec) -> ray.tune.PlacementGroupFactory:
    """Resources that Tune reserves for a trial; the workers of a nested Ray Train job reserve their own."""
    if spec.num_workers > 1:
        # No CPU: the workers may need all of them. Ray refuses an empty reservation, so reserve the memory that
        # this waiting process really uses.
        return ray.tune.PlacementGroupFactory([{"memory": _DRIVER_MEMORY, **driver_resources()}])
    bundle = {"CPU": spec.cpus_per_worker}
    if spec.gpus_per_worker > 0:
        bundle["GPU"] = spec.gpus_per_worker
    return ray.tune.PlacementGroupFactory([bundle])


def driver_resources() -> dict[str, float]:
    """Resources of a process that only waits for others: 0.001 of `dskd_driver`, if the cluster has any.

    Ray Train's controller runs on the node of the process that started it, so it also stays off spot nodes.
    """
    return {DRIVER_RESOURCE: 0.001} if DRIVER_RESOURCE in ray.cluster_resources() else {}

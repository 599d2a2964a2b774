"""One trial of a search: what Ray Tune starts, and how it gets its workers."""

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
"""Times that the workers of one Ray Train job start again."""
DRIVER_RESOURCE = "dskd_driver"
"""Custom resource of nodes that stay: whatever waits for others asks for a bit of it, so that no spot node holds it."""
_DRIVER_MEMORY = 512 * 2**20


def trainable(spec: TrialSpec, space: Space) -> Any:
    """What Tune runs for every trial of a category, under a name of its own.

    Tune hands trainables to its processes through one table of the whole job, by name: were those of two
    categories called alike, the trials of one would train on the data of the other (seen with Ray 2.60).
    """
    made: Any = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, spec=spec, space=space), trial_resources(spec)
    )
    made.__name__ = f"run_trial_{hashlib.sha256(spec.workers_uri.encode()).hexdigest()[:16]}"
    return made


def run_trial(suggested: Mapping[str, Any], spec: TrialSpec, space: Space) -> None:
    """Tune's trainable: train with the suggested values, reporting every epoch.

    A trial of one worker runs in this process. Several workers are a Ray Train job of their own,
    named after the trial, so that a trial started again finds its checkpoints.
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
        # Ray gives up after seconds; a trial started again for it would lose minutes.
        with_retries(functools.partial(ray.tune.report, report.metrics, checkpoint=kept), "keeping a checkpoint")


def _train_with_workers(spec: TrialSpec, trial_id: str) -> None:
    job = ray_train_job(
        spec,
        ray.train.RunConfig(
            name=trial_id,
            storage_path=spec.workers_uri,
            callbacks=[TuneReportCallback(), Reservation()],  # type: ignore[list-item]
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            # Tune weighs the failures, and forgives those before an epoch that was news.
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                # Workers that die before they train are another matter to Ray Train, which would start them for ever.
                controller_failure_limit=MAX_FAILURES,  # type: ignore[call-arg]
            ),
        ),
    )
    job.fit()


def trial_resources(spec: TrialSpec) -> ray.tune.PlacementGroupFactory:
    """What Tune reserves for a trial; the workers of a nested Ray Train job reserve their own."""
    if spec.num_workers > 1:
        # No CPU: the workers may need every one. Ray refuses an empty reservation, so take the memory
        # that this waiting process really uses.
        return ray.tune.PlacementGroupFactory([{"memory": _DRIVER_MEMORY, **driver_resources()}])
    bundle = {"CPU": spec.cpus_per_worker}
    if spec.gpus_per_worker > 0:
        bundle["GPU"] = spec.gpus_per_worker
    return ray.tune.PlacementGroupFactory([bundle])


def driver_resources() -> dict[str, float]:
    """What a process that only waits for others asks for: a thousandth of `dskd_driver`, where a node offers any.

    Ray Train's controller runs on the node of the process that started it, so it stays off spot nodes too.
    """
    return {DRIVER_RESOURCE: 0.001} if DRIVER_RESOURCE in ray.cluster_resources() else {}

"""One trial of a search as Ray Tune sees it: a relay between Tune and the worker group that trains it.

Nothing here imports torch: the relay computes nothing, and starts within a second.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import ray
import ray.tune

from tune.settings.space import Space
from tune.trial.assignment import Training
from tune.trial.follower import AssignmentFailedError, follow
from tune.trial.spec import EPOCH, ERROR, LOST, OBJECTIVE, TrialSpec

DRIVER_RESOURCE = "dskd_driver"
"""Custom resource of permanent nodes; processes that only wait request some of it, to stay off spot nodes."""
_RELAY_MEMORY = 256 * 2**20


def trainable(spec: TrialSpec, space: Space, dispatcher: str) -> Any:
    """The function that Tune calls for every trial of a category, under a unique name.

    Tune passes trainables to its processes by name, in one table for the whole job: if two categories used the same
    name, the trials of one would train on the data of the other (seen with Ray 2.60).
    """
    made: Any = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, spec=spec, space=space, dispatcher=dispatcher), relay_resources()
    )
    made.__name__ = f"run_trial_{hashlib.sha256(spec.workers_uri.encode()).hexdigest()[:16]}"
    return made


def run_trial(suggested: Mapping[str, Any], spec: TrialSpec, space: Space, dispatcher: str) -> None:
    """Tune's trainable: hand the suggested values to a worker group and report what it reports.

    The trial's checkpoints are found by its id, so Tune has none to pass on.
    """
    mine = spec.with_config(space.configuration(suggested))
    assignment = Training(trial_id=ray.tune.get_context().get_trial_id(), spec=mine)
    try:
        for metrics in follow(dispatcher, assignment):
            ray.tune.report(dict(metrics))
    except AssignmentFailedError as error:
        last = {EPOCH: error.epoch + 1, OBJECTIVE: 0.0, ERROR: error.failure.reason}
        ray.tune.report(last if error.failure.is_own else last | {LOST: True})


def relay_resources() -> ray.tune.PlacementGroupFactory:
    """Resources that Tune reserves for a relay; Ray refuses an empty reservation, so it is the memory in use."""
    return ray.tune.PlacementGroupFactory([{"memory": _RELAY_MEMORY, **driver_resources()}])


def driver_resources() -> dict[str, float]:
    """Resources of a process that only waits for others: 0.001 of `dskd_driver`, if the cluster has any.

    Ray Train's controller runs on the node of the process that started it, so it also stays off spot nodes.
    """
    return {DRIVER_RESOURCE: 0.001} if DRIVER_RESOURCE in ray.cluster_resources() else {}

"""Every private door of Ray that this project uses, tried with Ray 2.60, each with the symptom behind it.

`ray` is pinned to that minor version in pyproject.toml; a newer one needs a look at each of these first.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray
import ray.util
from ray import PlacementGroupID
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.tune.execution import class_cache
from ray.util.placement_group import PlacementGroup

if TYPE_CHECKING:  # seconds of imports that the processes of trials can do without
    import optuna
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

_AWS_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def free(placement_group: str) -> None:
    """Take back a reservation, known by its id in hex, which also ends what still computes in it."""
    ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group))))


def free_abandoned() -> list[str]:
    """Take back what dead actors of this job had reserved; the ids, in hex, of what was taken.

    Ray itself keeps a placement group until both the actor that made it and the whole job are gone. Ray Train's own
    cleaner frees those of a dead controller where it had been told of them, which a controller killed while its
    workers start never does, and where the dashboard answers (ray issue 54305). Who made a group is in no public
    table of Ray's.
    """
    job = ray.get_runtime_context().get_job_id()
    rows = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
    abandoned = [
        row.placement_group_id.hex()
        for row in rows
        if row.creator_job_id.hex() == job
        and row.state != PlacementGroupTableData.REMOVED
        and not row.is_detached
        and row.creator_actor_dead
        and not ray.ActorID(row.creator_actor_id).is_nil()  # made by a task or the driver
    ]
    for each in abandoned:
        free(each)
    return abandoned


class Reservation(WorkerGroupCallback, ControllerCallback):
    """Takes back what workers had reserved that died between their process group's making and their first step.

    Ray Train forgets it then (2.60: `WorkerGroup._start` takes them for started), and all that comes after waits for
    ever for their places. Runs in the controller of the Ray Train job.
    """

    def __init__(self) -> None:
        self._reserved: PlacementGroup | None = None

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._reserved = ray.get(workers[0].execute_async(ray.util.get_current_placement_group))
        return {}

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._take_back()

    async def before_controller_shutdown(self) -> None:
        self._take_back()

    def _take_back(self) -> None:
        if self._reserved is not None:
            ray.util.remove_placement_group(self._reserved)  # twice changes nothing
            self._reserved = None


def node_is_leaving() -> bool:
    """Whether this process's node has been announced to go: a spot instance reclaimed, a cluster that shrinks."""
    # Ray has no public door to this outside of Ray Train, which asks here too.
    return ray.get_runtime_context().get_node_id() in ray._private.state.state.get_draining_nodes()


def cpus_of_this_machine() -> float:
    """As Ray would count them, a container's limit included."""
    from ray._private.utils import get_num_cpus

    return float(get_num_cpus(override_docker_cpu_warning=True))


def keep_aws_keys_out_of_runtime_environments() -> None:
    """Stop Tune from handing the driver's AWS keys to its trials.

    They went into the trials' runtime environments, which every node logs and the dashboard shows. Nodes have
    keys or roles of their own.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS_KEYS)


def num_open_suggestions(searcher: "OptunaSearch") -> int:
    """Trials that Tune was given and that have not ended: `suggest` is asked without saying how many run."""
    return len(searcher._ot_trials.keys() - searcher._completed_trials)


def study_and_known_trials(searcher: "OptunaSearch") -> "tuple[optuna.Study, set[int]]":
    """Optuna's study behind a restored searcher, and the numbers of the trials that Tune's snapshot knows.

    The study may hold more: a driver killed between two snapshots asked for trials that nobody runs.
    """
    assert searcher._ot_study is not None
    return searcher._ot_study, {trial.number for trial in searcher._ot_trials.values()}


def fill_rungs(scheduler: "ASHAScheduler", trial: "Trial", reported: Mapping[int, float]) -> None:
    """Enter into ASHA's rungs what a trial reported at these epochs: no snapshot of Tune holds the rungs."""
    assert scheduler._metric_op is not None  # 1 or -1, by the study's mode
    for milestone, recorded in scheduler._trial_info[trial.trial_id]._rungs:
        if milestone in reported:
            recorded[trial.trial_id] = scheduler._metric_op * reported[milestone]


def causes_of(failures: Iterable[Exception]) -> list[BaseException]:
    """What the workers of a Ray Train job raised: Ray wraps it, and gives no public name to the original."""
    return [getattr(failure, "_base_exc", failure) for failure in failures]

"""Every private interface of Ray that this project uses, tested with Ray 2.60, each with the problem that it solves.

`ray` is pinned to that minor version in pyproject.toml; check each function here before moving to a newer one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.util
from ray import PlacementGroupID
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.tune.execution import class_cache
from ray.util.placement_group import PlacementGroup

if TYPE_CHECKING:  # slow imports that the processes of trials do not need
    import optuna
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

_AWS_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def free_abandoned() -> list[str]:
    """Remove the placement groups of this job whose creator actors are dead; returns their hex ids.

    Ray keeps a placement group until both its creator actor and the whole job have ended. Ray Train's own cleaner
    frees those of a dead controller only if they were registered with it, which a controller killed while its
    workers start never does, and only if the dashboard answers (ray issue 54305). No public table of Ray shows the
    creator of a group. Called when a controller was lost, which is rare.
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
        and not ray.ActorID(row.creator_actor_id).is_nil()  # created by a task or the driver
    ]
    for each in abandoned:
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(each))))
    return abandoned


class Reservation(WorkerGroupCallback, ControllerCallback):
    """Removes the placement group of workers that died between creating their process group and their first step.

    Ray Train forgets it then (2.60: `WorkerGroup._start` treats the workers as started), and the next workers wait
    forever for its resources. Runs in the controller of the Ray Train job.
    """

    def __init__(self) -> None:
        self._reserved: PlacementGroup | None = None

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._reserved = ray.get(workers[0].execute_async(ray.util.get_current_placement_group))
        return {}

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._free()

    async def before_controller_shutdown(self) -> None:
        self._free()

    def _free(self) -> None:
        if self._reserved is not None:
            ray.util.remove_placement_group(self._reserved)  # safe to repeat
            self._reserved = None


def node_is_leaving() -> bool:
    """Whether the node of this process is draining: a reclaimed spot instance, or a cluster that shrinks."""
    # Ray has no public function for this outside of Ray Train, which calls this one too.
    return ray.get_runtime_context().get_node_id() in ray._private.state.state.get_draining_nodes()


def autoscaler_can_help() -> bool | None:
    """Whether Ray's autoscaler brings nodes for all that waits now; None if it says nothing (the first one never does).

    Ray has no public function for it. Demands beyond the limits of all node groups are what it calls infeasible.
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    worker: Any = ray._private.worker.global_worker
    if not getattr(worker, "connected", False):  # not through ray://
        return None
    try:
        found = GetClusterStatusReply.FromString(worker.gcs_client.get_cluster_status(timeout_s=10)).autoscaling_state
    except (RuntimeError, ray.exceptions.RayError):  # no answer now
        return None
    if found.autoscaler_state_version == 0:
        return None
    return bool(found.pending_instances or found.pending_instance_requests) or not (
        found.infeasible_resource_requests or found.infeasible_gang_resource_requests
    )


def cpus_of_this_machine() -> float:
    """CPUs of this machine as counted by Ray, which respects a container's limit."""
    from ray._private.utils import get_num_cpus

    return float(get_num_cpus(override_docker_cpu_warning=True))


def keep_aws_keys_out_of_runtime_environments() -> None:
    """Stop Tune from passing the driver's AWS keys to its trials.

    Tune puts them into the trials' runtime environments, which every node logs and the dashboard shows. The nodes
    have their own keys or roles.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS_KEYS)


def num_open_suggestions(searcher: "OptunaSearch") -> int:
    """Number of suggested trials that have not ended; Ray does not pass it to `suggest`."""
    return len(searcher._ot_trials.keys() - searcher._completed_trials)


def study_of(searcher: "OptunaSearch") -> "optuna.Study":
    """Optuna's study of a searcher."""
    assert searcher._ot_study is not None
    return searcher._ot_study


def suggestion_of(searcher: "OptunaSearch", trial_id: str) -> "optuna.trial.FrozenTrial":
    """What the study has suggested to the trial of that id."""
    return _numbered(searcher, searcher._ot_trials[trial_id].number)


def resume_suggestion(searcher: "OptunaSearch", trial_id: str, number: int) -> None:
    """Let the study's trial of that number go on as the trial of that id."""
    from optuna.trial import Trial as Suggestion

    searcher._ot_trials[trial_id] = Suggestion(study_of(searcher), _numbered(searcher, number)._trial_id)


def _numbered(searcher: "OptunaSearch", number: int) -> "optuna.trial.FrozenTrial":
    (found,) = (trial for trial in study_of(searcher).get_trials(deepcopy=False) if trial.number == number)
    return found


@contextmanager
def next_trial_id(trial_id: str) -> Iterator[None]:
    """While the block runs, the trials that Tune makes have this id; Tune draws ids and lets nobody choose them."""
    from ray.tune.experiment import Trial

    drawing = Trial.__dict__["generate_id"]
    Trial.generate_id = classmethod(lambda cls: trial_id)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Trial.generate_id = drawing  # type: ignore[method-assign]


@contextmanager
def lost_relays_replaced() -> Iterator[None]:
    """While the block runs, Tune starts a trial again whose relay was lost before the trial had begun.

    Tune (2.60) uses the process of an ended trial for the next one. If that process turns out to be dead, it handles
    the loss twice, once for the process and once for the task that should have begun the trial: the first puts the
    trial back into the queue, and the second, which finds it waiting, ends it as failed. Its note that the trial is
    about to begin would stay as well, and nothing would begin it.
    """
    from ray.tune.execution.tune_controller import TuneController

    handle = TuneController._trial_task_failure

    def once(self: Any, trial: Any, exception: Exception) -> None:
        is_beginning = trial in self._resetting_trials and isinstance(exception, ray.exceptions.RayActorError)
        if is_beginning and trial.status != trial.RUNNING:
            self._resetting_trials.discard(trial)
        else:
            handle(self, trial, exception)

    TuneController._trial_task_failure = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        TuneController._trial_task_failure = handle  # type: ignore[method-assign]


def fill_rungs(scheduler: "ASHAScheduler", reported: Mapping[str, Mapping[int, float]]) -> None:
    """Fill ASHA's rungs with the objectives of earlier trials, by trial id and epoch."""
    assert scheduler._metric_op is not None  # 1 or -1, by the study's mode
    for milestone, recorded in scheduler._brackets[0]._rungs:
        for trial_id, objectives in reported.items():
            if int(milestone) in objectives:
                recorded[trial_id] = scheduler._metric_op * objectives[int(milestone)]


def causes_of(failures: Iterable[Exception]) -> list[BaseException]:
    """The original exceptions of a Ray Train job's workers; Ray wraps them and has no public attribute for them."""
    return [getattr(failure, "_base_exc", failure) for failure in failures]

"""Every private door of Ray that this project uses, each with the version and the symptom that made it necessary."""

from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.util
from ray import PlacementGroupID
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup


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

"""Worker groups that stay warm: each is started once and takes one assignment after the other.

Two or more workers are a Ray Train job (DDP); one worker is an actor with the same loop, because a job costs seven
processes beside its workers. Trials that share a worker are threads of that actor. A group that fails is replaced when
an assignment waits for one.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions

from tune.runtime.cluster import cluster_nodes, count_trials
from tune.runtime.relay import this_node
from tune.settings.workers import Workers
from tune.storage.files import Storage, StorageError
from tune.trial.assignment import Assignment, Demand, Metrics
from tune.trial.dispatch import Dispatcher, groups_to_start, slots_of
from tune.trial.follower import follow
from tune.trial.spec import TrialSpec

_HANG_SECONDS = 90.0
"""Seconds without an answer after which the dispatcher is replaced; it answers within 10."""
_JOB_SECONDS = 30.0
"""Seconds that the driver waits at its end for groups of several workers."""
_LEAVE_SECONDS = 5.0
"""Seconds that the driver waits at its end for idle groups to leave by themselves."""


class DispatcherActor(Dispatcher):
    """The dispatcher as an actor, which Ray restarts where it was."""

    def __init__(self) -> None:
        super().__init__(is_restarted=ray.get_runtime_context().was_current_actor_reconstructed)


class LoneWorker:
    """A group of one worker."""

    def serve(self, dispatcher: str, slots: Sequence[str], first: TrialSpec | None, gpus: float) -> None:
        """Work until the dispatcher sends it home."""
        from tune.trial.member import serve_alone, serve_together  # torch, which only workers need

        device = "cuda" if gpus > 0 else "cpu"
        if len(slots) == 1:
            serve_alone(dispatcher, slots[0], first, device)
        else:
            serve_together(dispatcher, slots, first, device)


class Groups:
    """The groups of a driver, all of the same size, and the dispatcher that they take assignments from."""

    def __init__(
        self,
        workers: Workers,
        min_workers: int | None,
        home: str,
        limit: Callable[[], int],
        first: TrialSpec | None,
        on_loss: Callable[[str], object],
    ) -> None:
        """Start the dispatcher, and a first group, which prepares the images of the trial `first`.

        `limit`: how many groups there may be at once. `home`: folder or address where Ray Train keeps its notes.
        `on_loss` is called with the reason if the cluster is gone, from any thread and perhaps more than once.
        """
        self.on_loss = on_loss
        self._workers, self._min_workers, self._home, self._limit = workers, min_workers, home, limit
        self.dispatcher = f"dispatcher-{secrets.token_hex(4)}"
        """Name of the dispatcher's actor."""
        # Not a decorator: a decorated class would be pickled by value.
        self._post: Any = (
            ray.remote(DispatcherActor)
            .options(
                name=self.dispatcher,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=10_000,
                scheduling_strategy=this_node(),
            )
            .remote()
        )
        self._lock = threading.Lock()
        self._number = 0
        self._running: dict[str, threading.Thread] = {}
        self._actors: dict[str, Any] = {}
        self._is_closing = False
        self._start(first)
        self._supplying = threading.Thread(target=self._supply, name="groups", daemon=True)
        self._supplying.start()

    def follow(self, assignment: Assignment) -> Iterator[Metrics]:
        """The reports of an assignment; raises AssignmentFailedError if it failed too often.

        Raises OSError if no group can start.
        """
        return follow(self.dispatcher, assignment, must_start=True)

    def fault(self) -> "ray.ObjectRef[str]":
        """A result that comes only if groups cannot start at all: the reason."""
        found: ray.ObjectRef[str] = self._post.fault.remote()
        return found

    def forget(self, assignment: Assignment) -> None:
        """Drop an assignment, finished or not."""
        ray.get(self._post.drop.remote(assignment.key))

    def end_if_lost(self) -> None:
        """Call `on_loss` if the dispatcher is gone for good: Ray restarts it as long as the cluster lives."""
        if not self._is_closing:
            self._ask(lambda: self._post.demand.remote(-1))

    def _ask(self, call: Callable[[], Any], seconds: float | None = None) -> Any:
        """The dispatcher's answer; None, after `on_loss`, if it is gone.

        Raises GetTimeoutError if it does not answer within so many seconds.
        """
        try:
            return ray.get(call(), timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise
        except ray.exceptions.RayError:
            if not self._is_closing:
                self.on_loss("the Ray cluster is gone")
            return None

    def send_home(self) -> None:
        """Let idle groups leave and start no other: no assignment will follow."""
        self._is_closing = True
        with suppress(ray.exceptions.RayError):
            ray.get(self._post.close.remote())

    def stop(self, seconds: float) -> int:
        """Let every group store its work and end, and start no other; returns how many have not within `seconds`."""
        self._is_closing = True
        unsaved: int = ray.get(self._post.stop.remote(seconds), timeout=seconds + 1)
        return unsaved

    def close(self) -> None:
        """End every group; what does not leave within seconds is killed."""
        self.send_home()
        # Ray Train's jobs cannot be killed from here, and must not find Ray shut down.
        deadline = time.monotonic() + (_LEAVE_SECONDS if self._workers.number == 1 else _JOB_SECONDS)
        for thread in list(self._running.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            actors = list(self._actors.values())
        for actor in actors:
            ray.kill(actor)
        for thread in list(self._running.values()):
            thread.join(_LEAVE_SECONDS)
        self._supplying.join(_LEAVE_SECONDS)
        if self._workers.number > 1:
            with suppress(StorageError):
                Storage(self._home).remove("groups")

    def _supply(self) -> None:
        """Start a group whenever an assignment waits for one."""
        version = -1
        while not self._is_closing:
            try:
                demand: Demand | None = self._ask(lambda: self._post.demand.remote(version), _HANG_SECONDS)  # noqa: B023
            except ray.exceptions.GetTimeoutError:
                # It stands still, or was asked to end (SIGTERM) and waits for questions that it no longer answers.
                ray.kill(self._post, no_restart=False)
                continue
            if demand is None:
                return
            version = demand.version
            for _ in range(groups_to_start(demand, list(self._running), self._limit(), self._workers.trials)):
                if not self._is_closing:
                    self._start(None)

    def _start(self, first: TrialSpec | None) -> None:
        with self._lock:
            self._number += 1
            group = f"group-{self._number}"
            thread = threading.Thread(target=self._run, args=(group, first), name=group, daemon=True)
            self._running[group] = thread
        thread.start()

    def _run(self, group: str, first: TrialSpec | None) -> None:
        slots = slots_of(group, self._workers.trials)
        try:
            (self._run_lone if self._workers.number == 1 else self._run_job)(group, first)
        except Exception as error:  # whatever ends a group, its assignments go on in others
            if not self._is_closing:
                reason = str(error)
                self._ask(lambda: self._post.lost.remote(slots, reason))
        finally:
            with self._lock:
                self._running.pop(group, None)
                self._actors.pop(group, None)
            if not self._is_closing:
                for slot in slots:
                    self._ask(lambda: self._post.gone.remote(slot))  # noqa: B023

    def _run_lone(self, group: str, first: TrialSpec | None) -> None:
        made: Any = ray.remote(LoneWorker)
        actor = made.options(num_cpus=self._workers.cpus, num_gpus=self._workers.gpus).remote()
        with self._lock:
            self._actors[group] = actor
        try:
            slots = slots_of(group, self._workers.trials)
            ray.get(actor.serve.remote(self.dispatcher, slots, first, self._workers.gpus))
        finally:
            ray.kill(actor)  # it may live on although its node does not answer

    def _run_job(self, slot: str, first: TrialSpec | None) -> None:
        from tune.trial.job import run_job  # torch, which a driver of lone workers does not need

        run_job(self.dispatcher, slot, first, self._workers, self._min_workers, f"{self._home}/groups")


@contextmanager
def worker_groups(
    workers: Workers,
    *,
    min_workers: int | None,
    home: str,
    max_trials: int | None,
    first: TrialSpec | None,
    on_loss: Callable[[str], object] = lambda reason: None,
) -> Iterator[Groups]:
    """Groups as long as the block runs: for `max_trials` at once, or as many as the cluster can hold at that time.

    `on_loss` is called with the reason if the cluster is gone.
    """

    def limit() -> int:
        return -(-(max_trials or count_trials(cluster_nodes(), workers)) // workers.trials)

    groups = Groups(workers, min_workers, home, limit, first, on_loss)
    try:
        yield groups
    finally:
        groups.close()

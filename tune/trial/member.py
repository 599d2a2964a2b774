"""A member of a worker group: takes one assignment after the other until the group is sent home.

Rank 0 speaks with the dispatcher and tells the other ranks, so that all of them do the same.
"""

import contextlib
import datetime
import functools
import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed

from dskd.config import RunConfig
from dskd.device import WorkerRank, computing_device
from dskd.model.seeding import reseed
from tune.runtime.ray_internals import node_is_leaving
from tune.storage.temporary import temporary_folder
from tune.trial.assignment import Assignment, Evaluation, Order, Training
from tune.trial.checkpoints import keep_checkpoint, newest_checkpoint, opened
from tune.trial.dispatch import LIFE_SECONDS
from tune.trial.evaluation import evaluate_on_test
from tune.trial.spec import CHECKPOINT, EPOCH, ERROR, Report, TrialSpec
from tune.trial.worker import inputs_of, train

_PAUSE_SECONDS = 0.2
"""Pause in seconds between two signs of life, which the dispatcher answers late."""
_MAX_ASSIGNMENTS = 500
"""Number of assignments after which a group makes room for a fresh one."""
_MAX_GROWTH = 2 * 2**30
"""Growth of a member's own memory, in bytes, after which its group makes room for a fresh one."""
_CONTROL_PATIENCE = datetime.timedelta(days=7)
"""Time-out of messages between ranks: they wait while rank 0 evaluates or the storage is away."""

SPARE_SECONDS = 3.0
"""Length of an interval in seconds from which its state is also written to this machine's disk."""

_T = TypeVar("_T")


def serve_alone(dispatcher: str, slot: str, first: TrialSpec | None, device: str) -> None:
    """The life of a group of one worker; `first`: a trial whose images are prepared before the first assignment."""
    member = _Member(dispatcher, slot, WorkerRank(), None, node_is_leaving)
    member.serve(torch.device(device), first)


def serve_together(dispatcher: str, slots: Sequence[str], first: TrialSpec | None, device: str) -> None:
    """The life of a worker that trials share: a thread for each slot, on a GPU with a stream of its own.

    Returns once all of them are told to leave, or should make room for a fresh process.
    """
    company = _Company(len(slots))
    threads = [
        threading.Thread(
            target=_serve_in_company,
            args=(company, _Member(dispatcher, slot, WorkerRank(), None, node_is_leaving, company), device),
            kwargs={"first": first if number == 0 else None},
            name=slot,
        )
        for number, slot in enumerate(slots)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve_in_company(company: "_Company", member: "_Member", device: str, first: TrialSpec | None) -> None:
    """A failure ends what this member works on; the others finish what they have begun."""
    place = torch.device(device)
    own_stream = torch.cuda.stream(torch.cuda.Stream(place)) if place.type == "cuda" else contextlib.nullcontext()
    try:
        with own_stream:
            member.serve(place, first)
    except Exception:
        company.make_room()
        with contextlib.suppress(ray.exceptions.RayError):
            member.tell_failure(traceback.format_exc())
    finally:
        company.leave()
    with contextlib.suppress(ray.exceptions.RayError):
        while not company.have_left():
            member.retire()


def serve_with_others(dispatcher: str, slot: str, first: TrialSpec | None) -> None:
    """The life of one of several DDP workers that Ray Train has started as a group."""
    context = ray.train.get_context()
    # gloo also beside NCCL, which would spin while a group is idle
    control = torch.distributed.new_group(backend="gloo", timeout=_CONTROL_PATIENCE)
    member = _Member(
        dispatcher,
        slot,
        WorkerRank(context.get_world_rank(), context.get_world_size()),
        control,
        lambda: ray.train.get_preemption_info() is not None,
    )
    member.serve(ray.train.torch.get_device(), first)


class _Member:
    """One worker of a group."""

    def __init__(
        self,
        dispatcher: str,
        slot: str,
        worker: WorkerRank,
        control: Any,
        is_leaving: Callable[[], bool],
        company: "_Company | None" = None,
    ) -> None:
        self._post: Any = ray.get_actor(dispatcher)
        self._slot, self._worker, self._control, self._is_leaving = slot, worker, control, is_leaving
        self._company = company or _Company(1)
        self._generation = 0.0
        if worker.rank == 0:
            now: ray.ObjectRef[float] = self._post.now.remote()
            self._generation = ray.get(now)
        self._current: Assignment | None = None
        self._is_stopping = False
        self._work = _Work()

    def serve(self, device: torch.device, first: TrialSpec | None) -> None:
        """Take assignments until the dispatcher sends the group home, or until it should make room."""
        device = computing_device(str(device))
        initial = _ProcessState()
        with self._signs_of_life():
            if first is not None:
                _prepare(first, device)
            while not self._shared(self._company.is_full):
                order = self._shared(self._ask)
                if order.must_leave and self._shared(self._company.may_leave):
                    return
                if order.assignment is None:
                    continue
                with self._company.working():
                    initial.restore(_cpus(order.assignment), device)
                    self._current = order.assignment
                    self._perform(order.assignment, device)
                    self._current = None
                if self._is_leaving():  # on every rank: they agree on it
                    self._company.make_room()

    def tell_failure(self, text: str) -> None:
        """Charge what this member works on with a failure."""
        ray.get(self._post.failed.remote(self._slot, text))

    def retire(self) -> None:
        """Take nothing more, as this dispatcher and one that replaces it must know."""
        ray.get(self._post.retire.remote(self._slot))
        self._company.wait_a_while()

    def _ask(self) -> Order:
        order: Order = ray.get(self._post.ask.remote(self._slot, self._generation))
        return order

    def _shared(self, act: Callable[[], _T]) -> _T:
        """The result of `act` on rank 0, on every rank."""
        if self._control is None:
            return act()
        box = [act() if self._worker.rank == 0 else None]
        torch.distributed.broadcast_object_list(box, src=0, group=self._control)
        return box[0]  # type: ignore[return-value]

    def _perform(self, assignment: Assignment, device: torch.device) -> None:
        if isinstance(assignment, Evaluation):
            self._shared(lambda: self._tell(assignment, evaluate_on_test(assignment, device), is_over=True))
            return
        spec = assignment.spec
        newest = self._shared(lambda: newest_checkpoint(spec.workers_uri, assignment.trial_id))
        self._work.begin()
        last = RunConfig.from_dict(spec.config).train.num_validations
        with (
            opened(newest) as resumed,
            contextlib.closing(train(spec, self._worker, device, resumed, self._must_save)) as reports,
        ):
            for report in reports:
                metrics = dict(report.metrics)
                if self._worker.rank == 0:
                    epoch, keep = int(metrics[EPOCH]), functools.partial(self._keep, assignment, resumed, newest)
                    self._work.report(epoch, report, keep)
                    if report.checkpoint is not None:
                        metrics[CHECKPOINT] = self._work.store(report.checkpoint)
                is_over = ERROR in metrics or metrics[EPOCH] >= last
                if not self._shared(lambda: self._tell(assignment, metrics, is_over=is_over)):  # noqa: B023
                    # Asked anew: a short interval ends before the sign of life has its answer.
                    if self._worker.rank == 0 and (self._is_stopping or ray.get(self._post.is_stopping.remote())):
                        self._work.save()
                    return
                self._work.spare()

    def _must_save(self) -> bool:
        """Whether this group will soon end what it works on."""
        return self._is_leaving() or self._is_stopping

    def _keep(self, assignment: Training, resumed: Path | None, newest: str, epoch: int, folder: Path) -> str:
        """Store a checkpoint, unless it is the one that the trial was resumed from; returns its address."""
        if folder == resumed:
            return newest
        spec = assignment.spec
        return keep_checkpoint(spec.workers_uri, assignment.trial_id, epoch, folder, spec.generation)

    def _tell(self, assignment: Assignment, metrics: Mapping[str, Any], *, is_over: bool) -> bool:
        told: bool = ray.get(
            self._post.report.remote(self._slot, self._generation, assignment, metrics, is_over=is_over)
        )
        return told

    @contextlib.contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Rank 0 tells the dispatcher every few seconds what the group works on, and hears whether it must end."""
        has_ended = threading.Event()

        def tell() -> None:
            while not has_ended.wait(_PAUSE_SECONDS) and not self._is_stopping:
                with contextlib.suppress(ray.exceptions.RayError):
                    alive = self._post.alive.remote(self._slot, self._generation, self._current)
                    self._is_stopping = bool(ray.get(alive))
            if self._is_stopping and self._work.save_spare():  # else the end of this interval does
                ray.get(self._post.saved.remote(self._slot))

        if self._worker.rank == 0:
            threading.Thread(target=tell, name="sign of life", daemon=True).start()
        try:
            yield
        finally:
            has_ended.set()


class _Company:
    """The members of one process, of which each may work on something else: when all of them leave.

    A process that one member wants to make room for a fresh one takes nothing more.
    """

    def __init__(self, size: int) -> None:
        self._size, self._changed = size, threading.Condition()
        self._num_working = self._num_told = self._num_left = self._num_done = 0
        self._makes_room = False
        self._own_memory = 0

    def is_full(self) -> bool:
        """Whether the process is to take nothing more."""
        return self._makes_room

    def make_room(self) -> None:
        """Take nothing more."""
        with self._changed:
            self._makes_room = True
            self._changed.notify_all()

    def may_leave(self) -> bool:
        """Whether a member that is told to leave does so: as soon as all are told; False once one works."""
        with self._changed:
            self._num_told += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_working or self._num_told + self._num_left >= self._size)
            if not self._num_working:
                return True
            self._num_told -= 1
            self._changed.wait_for(lambda: self._makes_room or not self._num_working, _PAUSE_SECONDS)
            return False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around an assignment; a failure in it is not caught."""
        with self._changed:
            self._num_working += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_working -= 1
                self._num_done += 1
                self._own_memory = self._own_memory or _own_memory()
                grown = _own_memory() - self._own_memory
                is_old = self._num_done >= self._size * _MAX_ASSIGNMENTS or grown > self._size * _MAX_GROWTH
                self._makes_room = self._makes_room or is_old
                self._changed.notify_all()

    def leave(self) -> None:
        """Of a member that takes nothing more."""
        with self._changed:
            self._num_left += 1
            self._changed.notify_all()

    def have_left(self) -> bool:
        """Whether all have."""
        return self._num_left >= self._size

    def wait_a_while(self) -> None:
        """Until all have left, at most some seconds."""
        with self._changed:
            self._changed.wait_for(self.have_left, LIFE_SECONDS)


class _Work:
    """What a group has reported of its assignment, and how much of that is stored.

    The stop of a search must not wait for the end of a long interval. So after each of those the state is also written
    to a local folder, which is stored then. After short ones it is not, as their end is worth waiting for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._spare: Path | None = None
        self._keeping_spare = contextlib.ExitStack()
        self.begin()

    def begin(self) -> None:
        """Forget the assignment before."""
        with self._lock:
            self._drop_spare()
            self._report: Report | None = None
            self._keep: Callable[[int, Path], str] | None = None
            self._epoch = self._stored = 0
            self._began, self._seconds = time.monotonic(), 0.0

    def report(self, epoch: int, report: Report, keep: Callable[[int, Path], str]) -> None:
        """A new report; `keep` stores a checkpoint folder of an epoch and returns its address."""
        with self._lock:
            self._drop_spare()
            self._epoch, self._report, self._keep = epoch, report, keep
            self._seconds = time.monotonic() - self._began

    def store(self, folder: Path) -> str:
        """Store the checkpoint of the last report; returns its address."""
        with self._lock:
            assert self._keep is not None
            address = self._keep(self._epoch, folder)
            self._stored = self._epoch
            return address

    def save(self) -> None:
        """Store the state of the last report, unless it is; only before the training goes on."""
        with self._lock:
            if self._stored < self._epoch and self._report is not None and self._report.save is not None:
                with temporary_folder() as temporary:
                    self._report.save(temporary)
                    self.store(temporary)

    def spare(self) -> None:
        """Write the state of the last report beside the training, if its interval was long."""
        with self._lock:
            if self._stored < self._epoch and self._seconds >= SPARE_SECONDS and self._report and self._report.save:
                self._spare = self._keeping_spare.enter_context(temporary_folder())
                try:
                    self._report.save(self._spare)
                except OSError:  # a full disk: the last checkpoint has to do
                    self._drop_spare()
            self._began = time.monotonic()

    def save_spare(self) -> bool:
        """Whether all that was reported is stored, at the latest now from the spare state."""
        with self._lock:
            if self._stored < self._epoch and self._spare is not None:
                self.store(self._spare)
                self._drop_spare()
            return self._stored == self._epoch

    def _drop_spare(self) -> None:
        self._spare = None
        self._keeping_spare.close()


class _ProcessState:
    """What a trial may change in its process, as it was before the first one."""

    def __init__(self) -> None:
        self._cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "enabled")}
        self._dtype = torch.get_default_dtype()
        self._is_deterministic = torch.are_deterministic_algorithms_enabled()

    def restore(self, cpus: float, device: torch.device) -> None:
        """Make the next trial independent of those before it."""
        gc.collect()
        torch.set_num_threads(max(1, int(cpus)))
        reseed(0)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(self._dtype)
        torch.use_deterministic_algorithms(self._is_deterministic)
        torch.clear_autocast_cache()
        for name, value in self._cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _prepare(spec: TrialSpec, device: torch.device) -> None:
    """Read the images of a trial that is likely to come, while the search still begins."""
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    with contextlib.suppress(Exception):  # the trial itself reports it
        inputs_of(spec, device)


def _cpus(assignment: Assignment) -> float:
    return assignment.spec.cpus_per_worker if isinstance(assignment, Training) else assignment.cpus


def _own_memory() -> int:
    """Memory of this process in bytes without what it shares, such as the mapped files of the cache."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))

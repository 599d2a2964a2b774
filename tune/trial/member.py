"""A member of a worker group: takes one assignment after the other until the group is sent home.

Rank 0 speaks with the dispatcher and tells the other ranks, so that all of them do the same.
"""

import contextlib
import datetime
import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from tune.runtime.ray_internals import node_is_leaving
from tune.storage.temporary import temporary_folder
from tune.trial.assignment import Assignment, Evaluation, Order, Training
from tune.trial.checkpoints import keep_checkpoint, newest_checkpoint, opened
from tune.trial.evaluation import evaluate_on_test
from tune.trial.spec import CHECKPOINT, EPOCH, ERROR, Report, TrialSpec
from tune.trial.worker import data_of, shared_inputs, train

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
        self, dispatcher: str, slot: str, worker: WorkerRank, control: Any, is_leaving: Callable[[], bool]
    ) -> None:
        self._post: Any = ray.get_actor(dispatcher)
        self._slot, self._worker, self._control, self._is_leaving = slot, worker, control, is_leaving
        self._generation = time.time()
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
            own_memory, num_done = 0, 0
            while not (order := self._shared(self._ask)).must_leave:
                if order.assignment is None:
                    continue
                initial.restore(_cpus(order.assignment), device)
                self._current = order.assignment
                self._perform(order.assignment, device)
                self._current = None
                num_done += 1
                own_memory = own_memory or _own_memory()
                grown = _own_memory() - own_memory
                is_leaving = self._is_leaving()  # on every rank: they agree on it
                if self._shared(lambda: is_leaving or num_done >= _MAX_ASSIGNMENTS or grown > _MAX_GROWTH):  # noqa: B023
                    return

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
        torch.manual_seed(0)
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
        shared_inputs(RunConfig.from_dict(spec.config).for_inputs(), data_of(spec), spec.cache_gb, device)


def _cpus(assignment: Assignment) -> float:
    return assignment.spec.cpus_per_worker if isinstance(assignment, Training) else assignment.cpus


def _own_memory() -> int:
    """Memory of this process in bytes without what it shares, such as the mapped files of the cache."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))

"""Hands assignments to worker groups and their reports to whoever follows them; no Ray in here.

A search has one dispatcher. Its state is soft: a new one learns what is running from the groups' signs of life and
from followers, who submit again what it does not know. So it may be killed at any time.

A group is known by its slot; a group that Ray restarts keeps its slot and asks with a later generation, which voids
what the earlier one left open. A group whose process several trials share has a slot for each of them.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from tune.trial.assignment import Assignment, Demand, Evaluation, Failure, Metrics, News, Order
from tune.trial.failures import MAX_RETRY_COST, last_line, out_of_memory_reason, retry_cost
from tune.trial.spec import EPOCH

VERDICT_SECONDS = 5.0
"""Seconds that a group waits to hear whether it goes on; then it does."""
POLL_SECONDS = 10.0
"""Longest time in seconds until a question is answered."""
IDLE_SECONDS = 60.0
"""Seconds without an assignment after which a group leaves."""
ABANDONED_SECONDS = 300.0
"""Seconds after which an assignment that nobody follows is dropped."""
LONGEST_PAUSE = 60.0
"""Longest pause in seconds before another group is started after some that ended at once."""
SETTLE_SECONDS = 5.0
"""Seconds in which a restarted dispatcher only listens; longer than two signs of life."""
LIFE_SECONDS = 2.0
"""Seconds between two signs of life of a group."""


@dataclass(slots=True)
class _Job:
    """An assignment and its account."""

    assignment: Assignment
    followed: float
    """When somebody last asked about it."""
    slot: str | None = None
    """The group that works on it; None while it waits."""
    reports: dict[int, Metrics] = field(default_factory=dict)
    """By epoch: those that the follower has not acknowledged, and always the last one."""
    read: int = -1
    """Last epoch that the follower has acknowledged."""
    epoch: int = -1
    cost: int = 0
    """Retry costs of the failures since the last new epoch."""
    is_over: bool = False
    is_dropped: bool = False
    failure: Failure | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: "asyncio.Future[bool] | None" = None


@dataclass(slots=True)
class _Slot:
    """A group as the dispatcher sees it."""

    generation: float = -math.inf
    """Start time of the group's loop; reports of an earlier one are void."""
    key: str | None = None
    """The assignment that it works on."""
    asks: "asyncio.Future[Order] | None" = None
    """Its open question."""
    has_asked: bool = False
    """Whether it has asked for anything since it last failed."""
    is_retired: bool = False
    """Whether it takes nothing more, although its process still works for other slots."""
    idle_since: float = 0.0
    category: str = ""
    """Category of its last assignment, whose images it holds in memory."""
    fold: int | None = None
    """The fold that its last assignment left out."""


class Dispatcher:
    """Queue, leases, verdicts, and the account of each assignment's failures."""

    def __init__(self, *, is_restarted: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._queue: list[str] = []
        self._slots: dict[str, _Slot] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self._start_cost = 0
        """Retry costs of groups that ended before they asked for anything, since one last did."""
        self._num_false_starts = 0
        self._next_start = -math.inf
        """When the next group may be started."""
        self._fault = ""
        self._found_fault = asyncio.Event()
        self._is_closing = False
        self._stopping = asyncio.Event()
        """Set once nothing is to begin or to go on."""
        self._unsaved: set[str] = set()
        """Groups that have not said yet, after `stop`, that their work is stored."""
        self._settled = clock() + (SETTLE_SECONDS if is_restarted else 0.0)

    # Followers: the relays of trials, and the driver.

    async def submit(self, assignment: Assignment) -> None:
        """Queue an assignment, unless it is known already: then whoever submits it again joins it."""
        job = self._jobs.get(assignment.key)
        if job is not None:
            job.is_dropped = False
            job.followed = self._clock()
            return
        self._jobs[assignment.key] = _Job(assignment, self._clock())
        self._queue.append(assignment.key)
        self._match()

    async def follow(self, key: str, after: int) -> News:
        """News of an assignment, as soon as there is any, at the latest after `POLL_SECONDS`.

        `after`: the last epoch that the follower has processed, which lets the group go on; −1 if it has just begun
        to follow.
        """
        job = self._jobs.get(key)
        if job is None:
            return News(is_known=False)
        job.followed = self._clock()
        if after > job.read:
            job.read = after
            job.reports = {
                epoch: report for epoch, report in job.reports.items() if epoch > after or epoch == job.epoch
            }
        if after >= job.epoch and job.verdict is not None and not job.verdict.done():
            job.verdict.set_result(True)
        if not _has_news(job):
            job.changed.clear()
            await _within(POLL_SECONDS, job.changed)
            job.followed = self._clock()
            if self._jobs.get(key) is not job:
                return News(is_known=False)
        is_end = job.is_over  # told again to a follower that was lost as it heard it
        unread = [epoch for epoch in sorted(job.reports) if epoch > job.read or (is_end and epoch == job.epoch)]
        return News(True, tuple(job.reports[epoch] for epoch in unread), job.is_over, job.failure, self._fault)

    async def drop(self, key: str) -> None:
        """Forget an assignment that nobody needs any more; a group that works on it is told after its epoch."""
        job = self._jobs.get(key)
        if job is None:
            return
        if job.slot is None:
            self._forget(key)
            return
        job.is_dropped = True
        if job.verdict is not None and not job.verdict.done():
            job.verdict.set_result(False)

    async def keep_only(self, category: str, keys: Collection[str]) -> None:
        """Drop the other assignments of a category, whose search has begun anew."""
        for key in [key for key, job in self._jobs.items() if job.assignment.category == category]:
            if key not in keys:
                await self.drop(key)

    async def fault(self) -> str:
        """Wait until groups turn out to be unable to start at all; returns the reason in one line.

        Empty if the driver ends first.
        """
        await self._found_fault.wait()
        return self._fault

    # Groups: rank 0 of each.

    async def now(self) -> float:
        """Seconds since 1970 on the driver's node: times that are compared are of this clock, as those of nodes differ.

        A group takes its generation from it when it starts.
        """
        return time.time()

    async def ask(self, slot: str, generation: float) -> Order:
        """The next assignment of a group, at the latest after `POLL_SECONDS` an order without one.

        A group that asks again although it has an unfinished assignment gets the same one.
        """
        known = self._slots.setdefault(slot, _Slot())
        if generation < known.generation:
            return Order(must_leave=True)
        if generation > known.generation:
            self._void(known)
            known.generation = generation
        known.has_asked = True
        self._start_cost = self._num_false_starts = 0
        if known.key is not None and not self._stopping.is_set():
            return Order(self._jobs[known.key].assignment)
        if self._is_closing:
            self._note_saved(slot)
            return Order(must_leave=True)
        mine: asyncio.Future[Order] = asyncio.get_running_loop().create_future()
        known.asks = mine
        self._match()
        await asyncio.wait([mine], timeout=self._patience())
        if mine.done():
            return mine.result()
        if known.asks is mine:
            known.asks = None
        return Order(must_leave=self._clock() - known.idle_since >= IDLE_SECONDS)

    async def report(
        self, slot: str, generation: float, assignment: Assignment, metrics: Metrics, *, is_over: bool
    ) -> bool:
        """Take a report; returns whether the group goes on with the assignment.

        Waits for the follower's verdict, at most `VERDICT_SECONDS`.
        """
        job = self._leased(slot, generation, assignment)
        if job is None:
            return False
        known, key = self._slots[slot], assignment.key
        epoch = int(metrics.get(EPOCH, 0))
        if epoch > job.epoch:
            job.epoch, job.cost = epoch, 0
        job.reports[epoch] = metrics
        job.is_over = is_over
        job.changed.set()
        if self._stopping.is_set():
            self._release(known)  # it is neither dropped nor given to another group
            return False
        if not (is_over or job.is_dropped or self._is_abandoned(job)):
            verdict = job.verdict = asyncio.get_running_loop().create_future()
            await asyncio.wait([verdict], timeout=VERDICT_SECONDS)
            if job.verdict is verdict:
                job.verdict = None
            if known.key != key or generation != known.generation:  # it failed meanwhile
                return False
            if self._stopping.is_set():
                self._release(known)
                return False
            if not verdict.done() or verdict.result():
                return True
        self._release(known)
        if not is_over or job.is_dropped:
            self._forget(key)
        return False

    async def alive(self, slot: str, generation: float, assignment: Assignment | None) -> bool:
        """A group's sign of life; tells a restarted dispatcher what the group works on.

        Returns whether the group must store its work and end: as soon as that is so, else after `LIFE_SECONDS`.
        """
        if assignment is not None and self._clock() < self._settled:  # later it may be about what has just ended
            self._leased(slot, generation, assignment)
        await _within(LIFE_SECONDS, self._stopping)
        return self._stopping.is_set()

    async def is_stopping(self) -> bool:
        """Whether a group that may not go on must store what it reported, since the search is being stopped."""
        return self._stopping.is_set()

    async def saved(self, slot: str) -> None:
        """After `stop`: all that this group has reported is stored."""
        self._note_saved(slot)

    # The driver, which starts groups and sees them fail.

    async def failed(self, slot: str, text: str, reason: str = "") -> None:
        """Charge a group's failure to its assignment and queue it again, or end it.

        `text` is Ray's on the failure; `reason`, if given, says why the assignment would fail again anywhere.
        """
        if self._charge(slot, text, reason):
            self._charge_start(text)
        self._match()

    async def lost(self, slots: Sequence[str], text: str) -> None:
        """Charge the failure of a process to the assignments of all its slots.

        None of them can be blamed for the memory that they have used together.
        """
        busy = [slot for slot in slots if (known := self._slots.get(slot)) is not None and known.key is not None]
        shared = ""
        if len(busy) > 1:
            shared = f"; {len(busy)} trials shared the process: lower --trials-per-gpu if memory was too small"
        if all([self._charge(slot, text, shared=shared) for slot in slots]):
            self._charge_start(text)
        self._match()

    def _charge(self, slot: str, text: str, reason: str = "", shared: str = "") -> bool:
        """Void what a group works on; whether it ended before it had asked for anything.

        `shared`: what to add to the reason where others were in its process.
        """
        known = self._slots.setdefault(slot, _Slot())
        key, has_asked, known.has_asked = known.key, known.has_asked, False
        self._close(known, Order(must_leave=True))
        self._release(known)
        known.generation = math.nextafter(known.generation, math.inf)  # what the lost group still says is void
        job = self._jobs.get(key) if key is not None else None
        if job is None or key is None:
            return not has_asked
        if job.is_dropped:
            self._forget(key)
            return False
        job.cost += retry_cost(text)
        if reason:
            job.failure = Failure(reason, is_own=True)
        elif job.cost > MAX_RETRY_COST:
            memory = out_of_memory_reason(text)
            job.failure = Failure((memory or last_line(text)) + shared, is_own=bool(memory) and not shared)
        else:
            self._queue.insert(0, key)
        job.changed.set()
        return False

    async def retire(self, slot: str) -> None:
        """Give a slot nothing more, and do not count on it, although its process has not ended."""
        known = self._slots.setdefault(slot, _Slot())
        known.is_retired = True
        self._close(known, Order(must_leave=True))
        self._match()

    async def gone(self, slot: str) -> None:
        """Forget a group that has ended."""
        known = self._slots.pop(slot, None)
        self._note_saved(slot)
        if known is not None:
            self._close(known, Order(must_leave=True))
            self._void(known)
        self._match()

    async def demand(self, version: int) -> Demand:
        """The demand for groups, as soon as it differs from that `version`, at the latest after `POLL_SECONDS`."""
        if version == self._version and not self._is_closing:
            self._changed.clear()
            await _within(POLL_SECONDS, self._changed)
        idle = frozenset(slot for slot, known in self._slots.items() if known.key is None and not known.is_retired)
        is_ending = bool(self._fault) or self._stopping.is_set()
        num_waiting = 0 if is_ending or self._clock() < self._next_start else len(self._queue)
        return Demand(self._version, num_waiting, frozenset(self._slots), idle)

    async def close(self) -> None:
        """Send every group home as soon as it has nothing to do, and answer whoever waits."""
        self._is_closing = True
        self._found_fault.set()
        self._note_change()
        for known in self._slots.values():
            self._close(known, Order(must_leave=True))

    async def stop(self, seconds: float) -> int:
        """Let nothing begin or go on. Returns once every group's work is stored, at the latest after `seconds`.

        Returns how many groups have not said so. Assignments stay as they are: the same search continues them.
        """
        self._unsaved = {slot for slot, known in self._slots.items() if known.key is not None}
        self._stopping.set()
        for job in self._jobs.values():
            if job.verdict is not None and not job.verdict.done():
                job.verdict.set_result(False)
        self._is_closing = True
        for known in self._slots.values():
            self._close(known, Order(must_leave=True))
        deadline = self._clock() + seconds
        while self._unsaved and (left := deadline - self._clock()) > 0:
            self._changed.clear()
            await _within(left, self._changed)
        return len(self._unsaved)

    # Inside.

    def _note_saved(self, slot: str) -> None:
        self._unsaved.discard(slot)
        self._note_change()

    def _close(self, known: _Slot, answer: Order) -> None:
        """Answer a group's open question, if it has one."""
        if known.asks is not None and not known.asks.done():
            known.asks.set_result(answer)
        known.asks = None

    def _leased(self, slot: str, generation: float, assignment: Assignment) -> _Job | None:
        """The job that this group works on; None if it has lost it. A dispatcher that knows neither believes it."""
        known = self._slots.setdefault(slot, _Slot())
        if generation < known.generation:
            return None
        if generation > known.generation:
            self._void(known)
            known.generation = generation
        key = assignment.key
        job = self._jobs.get(key)
        if known.key == key:
            return job
        if known.key is not None or (job is not None and (job.slot is not None or job.is_over or job.failure)):
            return None
        if job is None:
            job = self._jobs[key] = _Job(assignment, self._clock())
        self._lease(known, slot, job)
        return job

    def _lease(self, known: _Slot, slot: str, job: _Job) -> None:
        key = job.assignment.key
        if key in self._queue:
            self._queue.remove(key)
        known.key, known.category, known.fold, job.slot = key, job.assignment.category, job.assignment.fold, slot
        self._note_change()

    def _release(self, known: _Slot) -> None:
        if known.key is not None and (job := self._jobs.get(known.key)) is not None:
            job.slot = None
            if job.verdict is not None and not job.verdict.done():
                job.verdict.set_result(False)
        known.key, known.idle_since = None, self._clock()
        self._note_change()

    def _void(self, known: _Slot) -> None:
        """Queue what a group has left open, without a charge: it was resized, or another took its place."""
        key = known.key
        self._release(known)
        if key is None or (job := self._jobs.get(key)) is None:
            return
        if job.is_dropped:
            self._forget(key)
        elif not job.is_over:
            self._queue.insert(0, key)

    def _forget(self, key: str) -> None:
        job = self._jobs.pop(key, None)
        if job is not None:
            job.changed.set()
        if key in self._queue:
            self._queue.remove(key)
            self._note_change()

    def _match(self) -> None:
        """Give idle groups what waits: evaluations first, then what is of the group's last category and fold, then by
        age.
        """
        self._note_change()
        if self._clock() < self._settled or self._stopping.is_set():
            return
        for key in [key for key in self._queue if self._is_abandoned(self._jobs[key])]:
            self._forget(key)
        while self._queue and (slot := self._free_slot()) is not None:
            known = self._slots[slot]
            job = self._jobs[self._next_for(known)]
            self._lease(known, slot, job)
            self._close(known, Order(job.assignment))

    def _free_slot(self) -> str | None:
        """A slot that waits for an assignment, in the process with the fewest."""
        busy = Counter(group_of(slot) for slot, known in self._slots.items() if known.key is not None)
        free = [slot for slot, known in self._slots.items() if known.asks is not None and not known.asks.done()]
        return min(free, key=lambda slot: busy[group_of(slot)], default=None)

    def _next_for(self, known: _Slot) -> str:
        def rank(key: str) -> tuple[bool, bool, bool]:
            assignment = self._jobs[key].assignment
            return (
                not isinstance(assignment, Evaluation),
                assignment.category != known.category,
                assignment.fold != known.fold,
            )

        return min(self._queue, key=rank)

    def _patience(self) -> float:
        """Seconds until a question is answered; less while a restarted dispatcher only listens."""
        left = self._settled - self._clock()
        return min(POLL_SECONDS, left) if left > 0 else POLL_SECONDS

    def _is_abandoned(self, job: _Job) -> bool:
        return self._clock() - job.followed > ABANDONED_SECONDS

    def _charge_start(self, text: str) -> None:
        """Count a group that ended before it asked for anything; where others work it is only its node's fault."""
        cost = retry_cost(text)
        self._start_cost += cost
        if cost > 1:  # not a lost node
            self._next_start = self._clock() + min(LONGEST_PAUSE, 2.0**self._num_false_starts)
            self._num_false_starts += 1
        if self._start_cost > MAX_RETRY_COST and not any(known.has_asked for known in self._slots.values()):
            self._fault = out_of_memory_reason(text) or last_line(text)
            self._found_fault.set()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.set()


def _has_news(job: _Job) -> bool:
    return bool(job.failure or job.is_over or any(epoch > job.read for epoch in job.reports))


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for an event, at most so many seconds."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting], timeout=seconds)
    waiting.cancel()


def slots_of(group: str, size: int) -> list[str]:
    """The slots of a group whose process is shared by `size` trials."""
    return [group] if size == 1 else [f"{group}.{number}" for number in range(1, size + 1)]


def group_of(slot: str) -> str:
    return slot.partition(".")[0]


def groups_to_start(demand: Demand, groups: Collection[str], limit: int, size: int = 1) -> int:
    """How many more groups to start: as many as assignments wait for one, all groups together at most `limit`.

    `groups` are all that have been started and have not ended; each takes `size` assignments at once.
    """
    mine = {slot for group in groups for slot in slots_of(group, size)}
    free = mine & demand.idle | mine - demand.seen  # idle, or still starting
    return max(0, min(math.ceil((demand.num_waiting - len(free)) / size), limit - len(groups)))

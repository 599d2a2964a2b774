"""State of one category's process, for the objects that Ray Tune pickles.

Tune pickles its callbacks and its searcher into its local folder. They get what must not be pickled, such as a
password or a handle, from here.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util.queue import Queue

from tune.settings.plan import SearchPlan
from tune.settings.space import Space
from tune.storage.files import Storage
from tune.storage.inputs import InputsChangedError, TrainedOn
from tune.storage.lease import LeaseLostError, is_held_by
from tune.study.budget import Share
from tune.study.records import TrialRecords
from tune.trial.spec import TrialSpec


@dataclass(kw_only=True, slots=True)
class StudyContext:
    """State of one category's search while it runs."""

    plan: SearchPlan
    """The plan of this category only."""
    spec: TrialSpec
    share: Share
    events: Queue
    """Queue of the trials' events to the driver."""
    deadline: float | None
    """On the clock of `time.monotonic`; None: no limit."""
    dispatcher: Any
    """Handle of the actor that gives the trials to worker groups."""
    records: TrialRecords
    trained_on: TrainedOn | None = None
    """What the category's trials have read; None: not compared."""
    fault: Exception | None = None
    """Why this study must end; Tune raises only its traceback."""
    waiting: list[str] = field(default_factory=list)
    """Ids of trials of an earlier process that are to go on."""
    running: set[str] = field(default_factory=set)
    """Ids of trials that have started and have not ended."""
    is_over: bool = False
    """Whether the deadline has passed."""
    looked: float = float("-inf")
    """When the lease was read last, on a clock of seconds."""

    def check_lease(self, within: float = 0.0) -> None:
        """Raise LeaseLostError if another search has the lease, immediately before the study is written to.

        A look of less than `within` seconds ago is enough.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if not self.plan.owner or now - self.looked < within:
            return
        self.looked = now
        if not is_held_by(Storage(self.plan.addresses.home), self.plan.owner):
            self.fault = LeaseLostError(f"another search has taken {self.plan.name!r} over; this one ends")
            raise self.fault

    def check_inputs(self, trial_id: str, told: Mapping[str, str]) -> None:
        """Raise InputsChangedError if a trial was trained on something else than the others; it then has no result."""
        try:
            if self.trained_on is not None:
                self.trained_on.check(told)
        except InputsChangedError as error:
            self.fault = error
            self.records.end(trial_id, "failed", {}, str(error), is_lost=True)
            raise

    @property
    def category(self) -> str:
        return self.spec.category

    @property
    def space(self) -> Space:
        return self.plan.spaces[self.category]


_contexts: list[StudyContext] = []


def enter_study(context: StudyContext) -> None:
    """Set the context of this process, which searches one category at a time."""
    _contexts[:] = [context]


def give_up(fault: Exception) -> Exception:
    """`fault`, which is now why the study of this process must end, if it runs one."""
    for context in _contexts:
        context.fault = context.fault or fault
    return fault


def study_context() -> StudyContext:
    """The context of this process."""
    assert _contexts, "search_category calls enter_study first"
    return _contexts[0]

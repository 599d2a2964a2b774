"""State of one category's process, for the objects that Ray Tune pickles and restores.

Tune pickles its callbacks and its searcher into the experiment's folder and restores them when a search is
continued. They get what must not be pickled, such as a password or a handle, from here.
"""

from dataclasses import dataclass, field
from typing import Any

from ray.util.queue import Queue

from tune.settings.plan import SearchPlan
from tune.settings.space import Space
from tune.storage.inputs import TrainedOn
from tune.study.budget import Share
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
    """Seconds since 1970; None: no limit."""
    dispatcher: Any
    """Handle of the actor that gives the trials to worker groups."""
    trained_on: TrainedOn | None = None
    """What the category's trials have read; None: not compared."""
    tune: Any = None
    """Tune's controller, as it shows itself to its scheduler; None before the first trial."""
    running: set[str] = field(default_factory=set)
    """Ids of trials that have started and have not ended."""
    interrupted: set[str] = field(default_factory=set)
    """Ids of trials that the deadline interrupted."""
    failure_reasons: dict[str, str] = field(default_factory=dict)
    """Reasons of finally failed trials, by trial id."""
    is_over: bool = False
    """Whether the deadline has passed."""

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


def study_context() -> StudyContext:
    """The context of this process."""
    assert _contexts, "search_category calls enter_study before Tune restores anything"
    return _contexts[0]

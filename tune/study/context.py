"""What the process of one category knows, for the objects that Ray Tune pickles and revives.

Tune pickles its callbacks and its searcher into the experiment's folder and revives them there when a search is
continued. What must not be pickled, a password or a handle, they find here again.
"""

from dataclasses import dataclass, field

from ray.util.queue import Queue

from tune.settings.plan import SearchPlan
from tune.settings.space import Space
from tune.study.budget import Share
from tune.trial.spec import TrialSpec


@dataclass(kw_only=True, slots=True)
class StudyContext:
    """One category's search while it runs."""

    plan: SearchPlan
    """Of this category alone."""
    spec: TrialSpec
    share: Share
    events: Queue
    """Takes what happens to the trials to the driver."""
    deadline: float | None
    """Seconds since 1970; None: no limit."""
    running: set[str] = field(default_factory=set)
    """Ids of trials that have started and not ended."""
    interrupted: set[str] = field(default_factory=set)
    """Ids of trials that the deadline ended."""
    out_of_memory: set[str] = field(default_factory=set)
    """Ids of trials whose last failure was want of memory."""
    failure_reasons: dict[str, str] = field(default_factory=dict)
    """By trial id, of trials that failed for good."""
    is_over: bool = False
    """The deadline has passed."""

    @property
    def category(self) -> str:
        return self.spec.category

    @property
    def space(self) -> Space:
        return self.plan.spaces[self.category]


_contexts: list[StudyContext] = []


def enter_study(context: StudyContext) -> None:
    """Make `context` the one of this process, which searches one category at a time."""
    _contexts[:] = [context]


def study_context() -> StudyContext:
    """The context of this process."""
    assert _contexts, "search_category enters it before Tune revives anything"
    return _contexts[0]

"""What a worker group is asked to do, and what is said about it: plain values that Ray sends between processes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from tune.trial.spec import TrialSpec

Metrics = Mapping[str, Any]
"""One report: the trial's metrics after an epoch, or the figures of an evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Train one trial to its last epoch, from its last checkpoint if it has one."""

    trial_id: str
    spec: TrialSpec

    @property
    def category(self) -> str:
        return self.spec.category

    @property
    def fold(self) -> int | None:
        """Which of the category's folds is left out; a worker keeps the images of the last ones at hand."""
        found: int = self.spec.config["data"]["fold"]
        return found

    @property
    def key(self) -> str:
        """Unique in a search; the same for every attempt."""
        return f"{self.category}/{self.trial_id}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Evaluate a stored detector once on the test images."""

    trial_id: str
    detector_uri: str
    data: str
    category: str
    cache_gb: float
    cpus: float
    threshold: float
    """Of the score, at which right and wrong verdicts are counted."""
    keep_at: str = ""
    """Address of the search, if the scores and pictures of its images are to be kept there for the report."""
    suspects: tuple[tuple[str, float], ...] = ()
    """Good images to draw then: names in the detector's record, and scores."""
    fold: int | None = None

    @property
    def key(self) -> str:
        """Unique in a search; the same for every attempt."""
        return f"{self.category}/{self.trial_id}/test"


Assignment = Training | Evaluation


class Failure(NamedTuple):
    """Why an assignment ended without its result."""

    reason: str
    """In one line."""
    is_own: bool
    """Whether the assignment's own values are to blame, not the machines."""


class News(NamedTuple):
    """What has happened to an assignment since its follower last asked."""

    is_known: bool = True
    """False: it must be submitted, or submitted again."""
    reports: tuple[Metrics, ...] = ()
    is_over: bool = False
    """Whether the last of the reports is the assignment's last one."""
    failure: Failure | None = None
    fault: str = ""
    """Why no worker group can start; empty as long as one may."""


class Order(NamedTuple):
    """Answer to a group that asks what to do next."""

    assignment: Assignment | None = None
    """None: nothing yet; ask again."""
    must_leave: bool = False
    """Whether the group must end and give its resources back."""


class Demand(NamedTuple):
    """How many groups are needed, as the dispatcher sees it."""

    version: int
    """Grows with every change."""
    num_waiting: int
    """Assignments that no group has taken."""
    seen: frozenset[str]
    """Slots that have asked for an assignment."""
    idle: frozenset[str]
    """Slots that wait for an assignment."""

"""Events of a search, sent from its studies to its driver: plain values that fit into a queue and a line of JSON."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from tune.storage.shown import shown

Status = Literal["finished", "pruned", "failed", "interrupted"]
"""interrupted: the time budget ended first; the same command continues the trial."""

Role = Literal["preset", "start-from", "trial", "finalist"]
"""What a run is there for: the untuned preset, an earlier search's champion, a trial, or a trial's configuration
trained without another fold. A category's champion has the role champion in MLflow."""


class SearchBegan(NamedTuple):
    """A search begins or goes on: what an earlier driver of it has left as running does not run any more."""

    category: str = ""
    """None: it is of all categories."""


class TrialStarted(NamedTuple):
    category: str
    trial_id: str
    params: Mapping[str, Any]
    number: int = 0
    """Its place among the trials of the category, from 1, the same whenever the search is continued; 0: unknown."""
    tried: str = ""
    """What it changes about its preset, for people; empty: unknown."""
    role: Role = "trial"


class DataUsed(NamedTuple):
    """Data of a trial for training and selection; sent with its first epoch."""

    category: str
    trial_id: str
    source: str
    """Folder or address of the category's images."""
    sha256: str
    """Fingerprint of the training and validation images."""


class EpochDone(NamedTuple):
    category: str
    trial_id: str
    epoch: int
    """Counted from 1."""
    metrics: Mapping[str, float]
    time_ms: int


class Remarked(NamedTuple):
    """A remark for the user about a trial that continues."""

    category: str
    trial_id: str
    remark: str


class TrialEnded(NamedTuple):
    category: str
    trial_id: str
    status: Status
    error: str
    objective: float = 0.0
    detector: str = ""
    """Address of the finished detector folder; empty if there is none."""


class CategoryEnded(NamedTuple):
    category: str
    status: Status
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


class CategoryContinued(NamedTuple):
    """An earlier command began this category; sent once, before its ended trials' events are repeated for MLflow."""

    category: str
    ended: Mapping[str, Status]
    """Status of each trial that had ended, by its id."""
    num_running: int
    """Trials that go on."""
    best: float | None
    """Best objective so far; None before the first validation."""


Event = SearchBegan | TrialStarted | DataUsed | EpochDone | Remarked | TrialEnded | CategoryEnded


def shown_event(event: Event) -> Event:
    """The event with its reasons, remarks and tags as they may be shown."""
    if isinstance(event, Remarked):
        return event._replace(remark=shown(event.remark))
    if isinstance(event, TrialEnded):
        return event._replace(error=shown(event.error))
    if isinstance(event, CategoryEnded):
        return event._replace(tags={name: shown(value) for name, value in event.tags.items()})
    return event


KINDS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (SearchBegan, TrialStarted, DataUsed, EpochDone, Remarked, TrialEnded, CategoryEnded)
}

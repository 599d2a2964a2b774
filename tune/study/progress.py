"""Progress of a search on stderr: a line per ended trial, and on a terminal a live table."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.storage.shown import printable, shown
from tune.tracking.events import CategoryEnded, EpochDone, Event, Remarked, TrialEnded, TrialStarted
from tune.trial.spec import OBJECTIVE


class TimeShare(NamedTuple):
    """Use of time in seconds, summed over the ended trials.

    A trial's time is measured from its start event to its end event.
    """

    training: float
    """Training epochs: batches, forward, backward, update."""
    validation: float
    """Maps and metrics of the validation images after each epoch, and storing the best weights."""
    total: float

    @property
    def sentence(self) -> str:
        rest = self.total - self.training - self.validation
        parts = [f"{part / self.total:.0%}" for part in (self.training, self.validation, rest)]
        return (
            f"{parts[0]} of the trials' time was training, {parts[1]} validation, {parts[2]} the rest "
            "(starting, preparing, reporting, saving)"
        )


@dataclass
class _Trial:
    started: float
    epoch: int = 0
    training: float = 0.0
    validation: float = 0.0


@dataclass
class _Category:
    running: dict[str, _Trial] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    """Number of trials by status."""
    durations: list[float] = field(default_factory=list)
    most_running: int = 1
    best: float | None = None
    is_over: bool = False

    @property
    def num_ended(self) -> int:
        return sum(self.ended.values())


class SearchProgress:
    """Counts the trials of each category and prints their ends; thread-safe."""

    def __init__(
        self,
        trials: int,
        epochs: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epochs`: of a complete trial, 0 if unknown; without a `console`, lines go to the current sys.stderr."""
        self._trials = trials
        self._epochs = epochs
        self._console = console
        self._clock = clock
        self._lock = threading.RLock()
        self._categories: dict[str, _Category] = {}
        self._epochs_of: dict[str, int] = {}
        self._spent = TimeShare(0.0, 0.0, 0.0)
        self._started = clock()
        self._live: Live | None = None

    @contextmanager
    def watching(self, categories: Sequence[str]) -> Iterator[None]:
        """While the block runs, show a table of the categories below all other output, if stderr is a terminal."""
        with self._lock:
            for category in categories:
                self._categories.setdefault(category, _Category())
        console = self._console or Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        before = sys.stderr
        # rich prints other output to sys.stdout and sys.stderr, such as warnings, above the table
        with Live(console=console, get_renderable=self.table, refresh_per_second=2) as live:
            handlers = [handler for handler in _stream_handlers() if handler.stream is before]
            for handler in handlers:
                handler.setStream(sys.stderr)
            self._live = live
            try:
                yield
            finally:
                self._live = None
                for handler in handlers:
                    handler.setStream(before)

    def say(self, line: str) -> None:
        """Print a line with the time since the start."""
        minutes, seconds = divmod(int(self._clock() - self._started), 60)
        text = f"[{minutes:3d}:{seconds:02d}] {shown(line)}"
        live = self._live
        if live is not None:
            live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._console.file if self._console else sys.stderr, flush=True)

    def show(self, event: Event) -> None:
        """Count an event; prints a line for remarks and for ended trials."""
        with self._lock:
            category = self._categories.setdefault(event.category, _Category())
            if isinstance(event, TrialStarted):
                category.running.setdefault(event.trial_id, _Trial(self._clock()))
                category.most_running = max(category.most_running, len(category.running))
            elif isinstance(event, EpochDone):
                self._count_epoch(category, event)
            elif isinstance(event, Remarked):
                self.say(f"{event.category}: trial {event.trial_id}: {event.remark}")
            elif isinstance(event, TrialEnded):
                self._count_end(category, event)
            elif isinstance(event, CategoryEnded):
                category.is_over = True
                category.running.clear()

    def _count_epoch(self, category: _Category, event: EpochDone) -> None:
        objective = event.metrics.get(OBJECTIVE, 0.0)
        category.best = max(objective, category.best or 0.0)
        self._epochs_of[event.trial_id] = event.epoch
        if trial := category.running.get(event.trial_id):
            trial.epoch = event.epoch
            trial.training += event.metrics.get("time/train_seconds", 0.0)
            trial.validation += event.metrics.get("time/validation_seconds", 0.0)

    def _count_end(self, category: _Category, event: TrialEnded) -> None:
        category.ended[event.status] = category.ended.get(event.status, 0) + 1
        if trial := category.running.pop(event.trial_id, None):
            duration = self._clock() - trial.started
            # The events of trials that ended before this search was continued are repeated, all at once.
            if trial.training + trial.validation <= duration:
                category.durations.append(duration)
                spent = self._spent
                self._spent = TimeShare(
                    spent.training + trial.training, spent.validation + trial.validation, spent.total + duration
                )
        reason = f": {event.error.strip().splitlines()[-1]}" if event.error.strip() else ""
        self.say(
            f"{event.category}: trial {category.num_ended}/{self._trials} {event.status} after "
            f"{self._epochs_of.get(event.trial_id, 0)} validations{reason}; "
            f"best validation objective so far {category.best or 0.0:.4f}"
        )

    def time_share(self) -> TimeShare | None:
        """Use of time by the trials that have ended; None before the first."""
        with self._lock:
            return self._spent if self._spent.total > 0 else None

    def table(self) -> RenderableType:
        """Table of all categories, with a line on the whole search below."""
        with self._lock:
            table = Table(expand=False)
            table.add_column("category", no_wrap=True, overflow="ellipsis")
            for name in ("done", "running", "pruned", "failed", "best", "left"):
                table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
            for name, category in self._categories.items():
                table.add_row(
                    # no markup: a folder may have any name
                    Text(printable(name)),
                    f"{category.num_ended}/{self._trials}",
                    str(len(category.running) or "–"),
                    str(category.ended.get("pruned", 0)),
                    Text(
                        str(category.ended.get("failed", 0)), style="bold red" if category.ended.get("failed") else ""
                    ),
                    "–" if category.best is None else f"{category.best:.4f}",
                    "done" if category.is_over else _clock_time(self._left(category)),
                )
            elapsed = _clock_time(self._clock() - self._started)
            return Group(table, Text(f"{elapsed} so far, about {_clock_time(self.seconds_left())} left"))

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the search; None before any epoch was measured."""
        with self._lock:
            open_ones = [category for category in self._categories.values() if not category.is_over]
            works = [self._work(category) for category in open_ones]
            if any(work is None for work in works):
                return None
            running = sum(len(category.running) for category in open_ones)
            lefts = [self._left(category) for category in open_ones]
            # Running categories share the cluster; a waiting one starts when another ends.
            total = sum(work for work in works if work is not None) / max(1, running)
            return max([total, *(left for left, each in zip(lefts, open_ones, strict=True) if left and each.running)])

    def _left(self, category: _Category) -> float | None:
        work = self._work(category)
        return None if work is None else work / min(category.most_running, max(1, self._trials - category.num_ended))

    def _work(self, category: _Category) -> float | None:
        """Remaining seconds of a category's trials, summed over the trials."""
        known = category.durations or [each for other in self._categories.values() for each in other.durations]
        now = self._clock()
        whole = [
            (now - trial.started) / trial.epoch * self._epochs
            for each in self._categories.values()
            for trial in each.running.values()
            if trial.epoch
        ]
        if not known and not whole:
            return None
        mean = sum(known) / len(known) if known else sum(whole) / len(whole)
        waiting = max(0, self._trials - category.num_ended - len(category.running))
        return waiting * mean + sum(self._rest(trial, mean) for trial in category.running.values())

    def _rest(self, trial: _Trial, mean: float) -> float:
        """Remaining seconds of a running trial: up to the mean duration, or beyond it up to its last epoch."""
        gone = self._clock() - trial.started
        if gone < mean or not trial.epoch:
            return max(0.0, mean - gone)
        return max(0.0, gone / trial.epoch * self._epochs - gone)


def _stream_handlers() -> Iterator["logging.StreamHandler[Any]"]:
    """All stream handlers of all loggers; each keeps the stream that it was created with."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):  # placeholders have none
            if isinstance(handler, logging.StreamHandler):
                yield handler


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"

"""Progress of a search on stderr: a line per ended trial, and on a terminal a live table.

Elsewhere, as in a job's log, a line says at least every half minute what is being done.
"""

import datetime
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dskd.show.lines import fitted, line_width
from tune.storage.shown import printable, shown
from tune.tracking.events import (
    CategoryContinued,
    CategoryEnded,
    EpochDone,
    Event,
    Remarked,
    SearchBegan,
    Status,
    TrialEnded,
    TrialStarted,
)
from tune.trial.spec import OBJECTIVE

QUIET_SECONDS = 25.0
"""Longest silence without a table; half a minute with what it takes to notice."""
_LOOK_SECONDS = 1.0
"""Pause between two looks at how long nothing was said."""
_TELL_SECONDS = 1.0
"""Least pause between two times that a watcher by figures is told: they are as many as there are categories."""
_AROUND_ROWS = 6
"""Lines of the table that are no rows: its frame, and what is said below it."""
_MOST_NAMED = 8
"""Categories whose state one line tells."""


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


class Counts(NamedTuple):
    """State of a search, for those who watch it by figures."""

    trials: Mapping[str, Mapping[str, int]]
    """Number of trials by category and state: running, finished, pruned, failed, interrupted."""
    seconds_left: float | None
    """Estimated; None before any epoch was measured."""


@dataclass
class _Trial:
    started: float
    number: int
    tried: str
    best: float | None = None
    epoch: int = 0
    training: float = 0.0
    validation: float = 0.0


@dataclass
class _Mean:
    total: float = 0.0
    number: int = 0

    def add(self, value: float) -> None:
        self.total, self.number = self.total + value, self.number + 1

    @property
    def value(self) -> float | None:
        """None of no values."""
        return self.total / self.number if self.number else None


@dataclass
class _Category:
    running: dict[str, _Trial] = field(default_factory=dict)
    ended: dict[str, Status] = field(default_factory=dict)
    """Status of each ended trial, by its id."""
    finalists: dict[str, bool] = field(default_factory=dict)
    """Trainings on other folds, and whether each has ended."""
    durations: _Mean = field(default_factory=_Mean)
    """Seconds of its ended trials."""
    most_running: int = 1
    best: float | None = None
    is_over: bool = False
    began: float | None = None
    """Clock at its first trial's start; None before."""
    over: float | None = None

    @property
    def num_ended(self) -> int:
        """Trials that will not go on; one that the time budget interrupted will."""
        return sum(status != "interrupted" for status in self.ended.values())

    @property
    def is_busy(self) -> bool:
        """Whether trials or trainings of finalists are running."""
        return bool(self.running) or not all(self.finalists.values())

    def count(self, status: Status) -> int:
        return list(self.ended.values()).count(status)


class SearchProgress:
    """Counts the trials of each category and prints their ends; thread-safe."""

    def __init__(
        self,
        trials: int,
        epochs: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        json_of: str = "",
        on_change: Callable[["Counts"], object] = lambda counts: None,
    ) -> None:
        """`epochs`: of a complete trial, 0 if unknown; without a `console`, lines go to the current sys.stderr.

        With `json_of`, the search's name, each line is a JSON object and there is no table. `on_change` is called with
        the state of the search after an event, and of events that come at once after the last one.
        """
        self._trials = trials
        self._epochs = epochs
        self._console = console
        self._clock = clock
        self._lock = threading.RLock()
        self._categories: dict[str, _Category] = {}
        self._phase = ""
        self._last_line = clock()
        self._beats: IO[str] | None = None
        self._spent = TimeShare(0.0, 0.0, 0.0)
        self._durations = _Mean()
        self._is_silent = False
        self._started = clock()
        self._live: Live | None = None
        self._json_of = json_of
        self._on_change = on_change
        self._told = float("-inf")
        self._is_untold = False
        """Whether something has changed since `on_change` was called, at the time `_told`."""

    @contextmanager
    def watching(self, categories: Sequence[str]) -> Iterator[None]:
        """While the block runs, show a table of the categories below all other output, if stderr is a terminal."""
        with self._lock:
            self._phase = ""
            for category in categories:
                self._categories.setdefault(category, _Category())
        console = self._console or Console(stderr=True)
        if self._json_of or not console.is_terminal:
            yield
            return
        before = sys.stderr

        # rich prints other output to sys.stdout and sys.stderr, such as warnings, above the table
        def drawn() -> RenderableType:
            return self.table(max(1, console.height - _AROUND_ROWS))

        with Live(console=console, get_renderable=drawn, refresh_per_second=2) as live:
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

    @contextmanager
    def beating(self) -> Iterator[None]:
        """While the block runs, say what is being done whenever nothing else was said for `QUIET_SECONDS`."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_LOOK_SECONDS):
                self.beat()

        # A copy of stderr: joining a cluster holds back what is written to the process's own meanwhile.
        with os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr:
            self._beats = stderr
            beats = threading.Thread(target=beat, name="heartbeat", daemon=True)
            beats.start()
            try:
                yield
            finally:
                stop.set()
                beats.join()
                self._beats = None
                self._tell(within=0.0)

    def begin(self, phase: str) -> None:
        """What is being done from now on, until categories are watched: told where nothing else is said for long.

        Not at once, so that bad input ends with one line.
        """
        self._phase = phase

    def beat(self) -> None:
        """Say what is being done if nothing was said for `QUIET_SECONDS`; a live table needs no such line.

        Whoever watches by figures is told what has changed.
        """
        self._tell(within=_TELL_SECONDS)
        if self._live is None and self._clock() - self._last_line >= QUIET_SECONDS:
            self._print(self.status(), self._beats)

    def status(self) -> str:
        """What is being done, in one line."""
        with self._lock:
            open_ones = {name: each for name, each in self._categories.items() if not each.is_over}
            if self._phase or not open_ones:
                return f"still {self._phase}" if self._phase else "still finishing"
            begun = {name: each for name, each in open_ones.items() if each.running or each.ended}
            named = sorted(begun, key=lambda name: not begun[name].is_busy)[:_MOST_NAMED]
            parts = [f"{name}: {self._status_of(begun[name])}" for name in named]
            if num_more := len(begun) - len(named):
                parts.append(f"{num_more} more {'category' if num_more == 1 else 'categories'} begun")
            if num_waiting := len(open_ones) - len(begun):
                parts.append(f"{num_waiting} {'category' if num_waiting == 1 else 'categories'} starting or waiting")
            left = self.seconds_left()
            return "; ".join(parts) + ("" if left is None else f"; about {_clock_time(left)} left")

    def _status_of(self, category: _Category) -> str:
        said = f"{category.num_ended} of {self._trials} trials ended"
        if category.running:
            epochs = [f"{trial.epoch} of {self._epochs}" for trial in category.running.values() if trial.epoch]
            num_preparing = len(category.running) - len(epochs)
            said += f", at validation {' and '.join(epochs)}" if epochs else ""
            said += f", {num_preparing} preparing" if num_preparing else ""
        elif not all(category.finalists.values()):
            done = sum(category.finalists.values())
            said += f", comparing finalists: {done} of {len(category.finalists)} trainings on other folds ended"
        elif category.num_ended >= self._trials:
            said += ", testing and storing the champion"
        else:
            said += ", starting the next"
        return said if category.best is None else f"{said}, best {category.best:.4f}"

    def say(self, line: str, category: str = "", trial: str = "") -> None:
        """Print a line, which may be on one category and one of its trials, with the time since the start."""
        self._print(line, None, category, trial)

    def say_last(self, *lines: str) -> None:
        """Take the table away and print these lines; nothing else is printed any more."""
        with self._lock:
            live, self._live = self._live, None
            self._is_silent = True
        if live is not None:
            live.stop()
        for line in lines:
            self._write(line)

    def running(self) -> dict[str, list[str]]:
        """The trials that run by category, finalists' trainings too, of categories that have begun and not ended."""
        with self._lock:
            return {
                name: [*each.running, *(run for run, has_ended in each.finalists.items() if not has_ended)]
                for name, each in self._categories.items()
                if not each.is_over and (each.running or each.ended or each.finalists)
            }

    def _print(self, line: str, stream: IO[str] | None = None, category: str = "", trial: str = "") -> None:
        if not self._is_silent:
            self._write(line, stream, category, trial)

    def _write(self, line: str, stream: IO[str] | None = None, category: str = "", trial: str = "") -> None:
        self._last_line = self._clock()
        line = shown(line)
        if self._json_of:
            told = {"category": category, "trial": trial}
            document = {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "search": self._json_of,
                **{name: value for name, value in told.items() if value},
                "message": line,
            }
            self._put(json.dumps(document, ensure_ascii=False), stream)
            return
        line = f"{shown(category)}: {line}" if category else line
        minutes, seconds = divmod(int(self._clock() - self._started), 60)
        stamp = f"[{minutes:3d}:{seconds:02d}] "
        live = self._live
        if live is not None:
            text = fitted(stamp + line, live.console.width, len(stamp))
            live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        self._put(stamp + line, stream, len(stamp))

    def _put(self, line: str, stream: IO[str] | None, indent: int | None = None) -> None:
        """Write a line, broken to the terminal's width with this `indent` if there is one."""
        usual: Any = self._console.file if self._console else sys.stderr
        place: IO[str] = stream or usual
        # as one string, so that lines of two threads do not mix
        place.write((line if indent is None else fitted(line, line_width(place), indent)) + "\n")
        place.flush()

    def show(self, event: Event | CategoryContinued) -> None:
        """Count an event; prints a line for remarks and for ended trials, none for trials that had ended before."""
        if not isinstance(event, SearchBegan):
            self._count(event)
        with self._lock:
            self._is_untold = True
        self._tell(within=_TELL_SECONDS)

    def _tell(self, within: float) -> None:
        """Call `on_change` if something has changed, but not again `within` so many seconds."""
        with self._lock:
            if not self._is_untold or self._clock() - self._told < within:
                return
            self._is_untold, self._told = False, self._clock()
        self._on_change(self.counts())

    def counts(self) -> "Counts":
        """How many trials are in each state, by category, and the seconds left."""
        with self._lock:
            trials = {
                name: {
                    "running": len(each.running),
                    **dict.fromkeys(get_args(Status), 0),
                    **Counter(each.ended.values()),
                }
                for name, each in self._categories.items()
            }
            return Counts(trials, self.seconds_left())

    def _count(self, event: Event | CategoryContinued) -> None:
        assert not isinstance(event, SearchBegan)
        with self._lock:
            category = self._categories.setdefault(event.category, _Category())
            if isinstance(event, TrialStarted) and event.role == "finalist":
                category.finalists[event.trial_id] = False
            elif isinstance(event, EpochDone | TrialEnded) and event.trial_id in category.finalists:
                if isinstance(event, TrialEnded):
                    self._count_finalist(category, event)
            elif isinstance(event, CategoryContinued):
                self._continue(category, event)
            elif isinstance(event, CategoryEnded):
                category.is_over, category.over = True, self._clock()
                category.running.clear()
            elif category.ended.get(event.trial_id, "interrupted") != "interrupted":
                return  # told once more, for MLflow
            elif isinstance(event, TrialStarted):
                self._count_start(category, event)
            elif isinstance(event, EpochDone):
                self._count_epoch(category, event)
            elif isinstance(event, Remarked):
                self.say(f"trial {event.trial_id}: {event.remark}", event.category, event.trial_id)
            elif isinstance(event, TrialEnded):
                self._count_end(category, event)

    def _continue(self, category: _Category, event: CategoryContinued) -> None:
        is_known = event.ended.items() <= category.ended.items() and bool(category.ended or category.running)
        category.ended.update(event.ended)
        if event.best is not None:
            category.best = max(event.best, category.best or 0.0)
        if not is_known:  # else only its process was lost, and not the search's
            best = "" if event.best is None else f", best {event.best:.4f}"
            going_on = f", {event.num_running} go on" if event.num_running else ""
            self.say(f"continues: {len(event.ended)} of {self._trials} ended{going_on}{best}", event.category)

    def _count_start(self, category: _Category, event: TrialStarted) -> None:
        category.ended.pop(event.trial_id, None)  # the time budget had interrupted it
        category.began = self._clock() if category.began is None else category.began
        number = event.number or len(category.ended) + len(category.running) + 1
        category.running.setdefault(event.trial_id, _Trial(self._clock(), number, event.tried))
        category.most_running = max(category.most_running, len(category.running))

    def _count_epoch(self, category: _Category, event: EpochDone) -> None:
        objective = event.metrics.get(OBJECTIVE, 0.0)
        if trial := category.running.get(event.trial_id):
            trial.epoch = event.epoch
            trial.best = max(objective, trial.best or 0.0)
            trial.training += event.metrics.get("time/train_seconds", 0.0)
            trial.validation += event.metrics.get("time/validation_seconds", 0.0)

    def _count_end(self, category: _Category, event: TrialEnded) -> None:
        category.ended[event.trial_id] = event.status
        trial = category.running.pop(event.trial_id, None)
        if trial is not None:
            duration = self._clock() - trial.started
            # The events of trials that ended before this search was continued are repeated, all at once.
            if trial.training + trial.validation <= duration:
                category.durations.add(duration)
                self._durations.add(duration)
                spent = self._spent
                self._spent = TimeShare(
                    spent.training + trial.training, spent.validation + trial.validation, spent.total + duration
                )
        trial = trial or _Trial(self._clock(), len(category.ended), "")
        self.say(self._end_line(category, trial, event), event.category, event.trial_id)
        if trial.best is not None:
            category.best = max(trial.best, category.best or 0.0)

    def _count_finalist(self, category: _Category, event: TrialEnded) -> None:
        category.finalists[event.trial_id] = True
        ended = f"{sum(category.finalists.values())} of {len(category.finalists)} trainings on other folds ended"
        reason = f": {event.error.strip().splitlines()[-1]}" if event.error.strip() else f" at {event.objective:.4f}"
        self.say(f"{event.trial_id} {event.status}{reason}; {ended}", event.category, event.trial_id)

    def _end_line(self, category: _Category, trial: _Trial, event: TrialEnded) -> str:
        """How a trial ended: its value, how that compares with the best of those that ended before, what it tried."""
        said = f"trial {trial.number} of {self._trials} ({event.trial_id}) {event.status}"
        if event.status != "finished":
            said += f" after {trial.epoch} of {self._epochs or '?'} validations"
        if event.error.strip():
            return f"{said}: {event.error.strip().splitlines()[-1]}" + (f"; {trial.tried}" if trial.tried else "")
        if trial.best is not None:
            said += f" at {trial.best:.4f}"
            if category.best is None:
                said += ", the first to end"
            elif trial.best > category.best:
                said += f", the best so far (before: {category.best:.4f})"
            else:
                said += f", best so far {category.best:.4f}"
        if event.status == "interrupted":
            said += ", by the time budget; the same command continues it"
        return f"{said}; {trial.tried}" if trial.tried else said

    def seconds_of(self, category: str) -> float:
        """Seconds from a category's first trial to its end; 0 if none started."""
        with self._lock:
            known = self._categories.get(category, _Category())
            return 0.0 if known.began is None else (known.over or self._clock()) - known.began

    def time_share(self) -> TimeShare | None:
        """Use of time by the trials that have ended; None before the first."""
        with self._lock:
            return self._spent if self._spent.total > 0 else None

    def table(self, room: int | None = None) -> RenderableType:
        """Table of the categories, with a line on the whole search below.

        With `room` at most so many rows: those that are running first, then those that wait.
        """
        with self._lock:
            usual = self._usual_seconds()
            rows = list(self._categories.items())
            if room is not None and len(rows) > room:
                ranked = sorted(rows, key=lambda row: (row[1].is_over, not row[1].is_busy))[:room]
                kept = {name for name, _ in ranked}
                rows = [(name, category) for name, category in rows if name in kept]
            table = Table(expand=False)
            table.add_column("category", no_wrap=True, overflow="ellipsis")
            for name in ("ended", "running", "pruned", "failed", "best", "left"):
                table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
            for name, category in rows:
                table.add_row(
                    # no markup: a folder may have any name
                    Text(printable(name)),
                    f"{category.num_ended}/{self._trials}",
                    str(len(category.running) or "–"),
                    str(category.count("pruned")),
                    Text(str(category.count("failed")), style="bold red" if category.count("failed") else ""),
                    "–" if (best := _best_of(category)) is None else f"{best:.4f}",
                    self._end_of(category) if category.is_over else _clock_time(self._left(category, usual)),
                )
            elapsed = _clock_time(self._clock() - self._started)
            below = [Text(f"{elapsed} so far, about {_clock_time(self.seconds_left())} left")]
            if hidden := len(self._categories) - len(rows):
                num_over = sum(category.is_over for category in self._categories.values())
                whole = len(self._categories)
                below.insert(0, Text(f"{hidden} more of {whole} categories, {num_over} of all are over"))
            return Group(table, *below)

    def _end_of(self, category: _Category) -> str:
        return "done" if category.num_ended >= self._trials else "stopped"

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the search; None before any epoch was measured."""
        with self._lock:
            usual = self._usual_seconds()
            open_ones = [category for category in self._categories.values() if not category.is_over]
            works = [self._work(category, usual) for category in open_ones]
            if any(work is None for work in works):
                return None
            running = sum(len(category.running) for category in open_ones)
            lefts = [self._left(category, usual) for category in open_ones]
            # Running categories share the cluster; a waiting one starts when another ends.
            total = sum(work for work in works if work is not None) / max(1, running)
            return max([total, *(left for left, each in zip(lefts, open_ones, strict=True) if left and each.running)])

    def _left(self, category: _Category, usual: float | None) -> float | None:
        work = self._work(category, usual)
        return None if work is None else work / min(category.most_running, max(1, self._trials - category.num_ended))

    def _usual_seconds(self) -> float | None:
        """Duration of a whole trial over all categories: of those that ended, or else as those that run promise.

        None before any epoch. Asked for once where many categories are looked at.
        """
        if (known := self._durations.value) is not None:
            return known
        now, promised = self._clock(), _Mean()
        for each in self._categories.values():
            for trial in each.running.values():
                if trial.epoch:
                    promised.add((now - trial.started) / trial.epoch * self._epochs)
        return promised.value

    def _work(self, category: _Category, usual: float | None) -> float | None:
        """Remaining seconds of a category's trials, summed over the trials; None while it compares finalists.

        `usual`: `_usual_seconds`.
        """
        mean = category.durations.value
        mean = usual if mean is None else mean
        if mean is None or not all(category.finalists.values()):
            return None
        waiting = max(0, self._trials - category.num_ended - len(category.running))
        return waiting * mean + sum(self._rest(trial, mean) for trial in category.running.values())

    def _rest(self, trial: _Trial, mean: float) -> float:
        """Remaining seconds of a running trial: up to the mean duration, or beyond it up to its last epoch."""
        gone = self._clock() - trial.started
        if gone < mean or not trial.epoch:
            return max(0.0, mean - gone)
        return max(0.0, gone / trial.epoch * self._epochs - gone)


def _best_of(category: _Category) -> float | None:
    """The best objective of all trials, running ones included."""
    values = [category.best, *(trial.best for trial in category.running.values())]
    return max((value for value in values if value is not None), default=None)


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

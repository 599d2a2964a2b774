"""A queue of events to MLflow: one thread writes them in order and retries while the server is away.

Training never waits for the tracking server. During an outage the waiting events are also kept in a file. If the
search ends or is killed before the server is back, the next start writes them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tenacity
from mlflow.exceptions import MlflowException
from requests import RequestException

from tune.tracking.client import first_line
from tune.tracking.events import Event, shown_event
from tune.tracking.journal import Journal

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Insist = Callable[[Callable[[], Result]], Result]
"""Calls a function, retries during an outage, and returns its result."""

FIRST_PAUSE = 0.5
"""Seconds between the first and second attempt; each pause is twice the previous one."""
LONGEST_PAUSE = 15.0
_LOOK_SECONDS = 0.5
"""Seconds between two looks at whether MLflow refuses, while waiting for it."""
_WARNING_PAUSE = 2.0
"""Pause in seconds from which an outage is reported."""


class TrackingUnavailableError(ConnectionError):
    """The tracking server did not answer within the caller's time limit."""


class TrackingRefusedError(RuntimeError):
    """The tracking server refused the request; a retry would not help."""


class Outbox:
    """Passes events to `write`, one at a time and in order; first those that an earlier search left in `unsent`."""

    def __init__(
        self, unsent: Path, write: Callable[[Event], None], may_write: Callable[[], bool] = lambda: True
    ) -> None:
        """As long as `may_write` returns False, which is asked before each write, all waits as in an outage."""
        self._write, self._may_write = write, may_write
        self._journal = Journal(unsent)
        self._events: deque[Event] = deque(self._journal.read())
        """Events not yet written, including the current one."""
        self._is_journaled = bool(self._events)
        """Whether all waiting events are also in the journal: from the start of an outage until none is waiting."""
        self._is_closing = False
        self._changed = threading.Condition()
        """Guards the three attributes above."""
        self._refusal = ""
        """Why MLflow takes nothing, until somebody changes its rights or restores what was deleted."""
        self._has_warned = False
        """Whether the current outage has been reported."""
        self._writing = threading.Lock()
        self._give_up = threading.Event()
        self._writer = threading.Thread(target=self._deliver, name="mlflow writer", daemon=True)
        self._writer.start()

    def put(self, event: Event) -> None:
        """Add an event, without credentials that a text in it may repeat; returns at once.

        After `close` it is left out.
        """
        event = shown_event(event)
        with self._changed:
            if self._is_closing:
                return
            self._events.append(event)
            if self._is_journaled:
                self._journal.add([event])
            self._changed.notify()

    def close(self, patience: float, *, is_killed_soon: bool = False) -> int:
        """Write the remaining events for at most `patience` seconds; returns how many stay in the file.

        With `is_killed_soon` they are put into the file before anything else, and a request that hangs is left alone.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if is_killed_soon:
            self._keep_on_disk()
        deadline = time.monotonic() + patience
        while self._writer.is_alive() and not self._refusal and (left := deadline - time.monotonic()) > 0:
            self._writer.join(min(left, _LOOK_SECONDS))
        if self._writer.is_alive():
            self._give_up.set()
            self._writer.join(0 if is_killed_soon else 60)
            self._keep_on_disk()
        return len(self._events)

    def abandon(self) -> None:
        """Write nothing more, and keep nothing: another process writes these runs now."""
        with self._changed:
            self._is_closing = self._is_journaled = True
            self._events.clear()
            self._may_write = lambda: False
        self._give_up.set()

    def write_now(self, write: "Callable[[Insist[object]], Result]", patience: float) -> Result:
        """Call `write(insist)` between two events and return its result; `insist` retries a call during an outage.

        Raises TrackingUnavailableError if the server is away for `patience` seconds, TrackingRefusedError if it
        refuses.
        """
        deadline = time.monotonic() + patience
        while not self._writing.acquire(timeout=min(patience, _LOOK_SECONDS)):
            if self._refusal:
                raise TrackingRefusedError(f"MLflow refused: {self._refusal}")
            if time.monotonic() >= deadline:
                raise TrackingUnavailableError(f"MLflow did not answer for {patience:.0f} s")
        try:
            return write(lambda act: self._retried(act, max(0.0, deadline - time.monotonic())))
        except TrackingUnavailableError:
            raise
        except (
            MlflowException,
            RequestException,
            OSError,
        ) as error:  # OSError: a folder for artifacts that is none here
            raise TrackingRefusedError(f"MLflow refused: {first_line(error)}") from error
        finally:
            self._writing.release()

    def _deliver(self) -> None:
        while (event := self._next()) is not None:
            with self._writing:
                try:
                    self._retried(lambda event=event: self._write(event), None)  # type: ignore[misc]
                except TrackingUnavailableError:  # gave up; the event stays in the journal
                    return
                except Exception as error:  # a bug in one event must not stop the others
                    # One line: a traceback may repeat the server's address with a password in it.
                    what = f"{type(event).__name__} of {event.category}"
                    logger.error("could not track %s: %s: %s", what, type(error).__name__, first_line(error))
            self._refusal, self._has_warned = "", False
            with self._changed:
                if not self._events:  # abandoned meanwhile
                    return
                self._events.popleft()
                if self._is_journaled and not self._events:
                    self._journal.clear()
                    self._is_journaled = False

    def _next(self) -> Event | None:
        """Wait for the next event; None once the outbox is closing and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._is_closing)
            return self._events[0] if self._events else None

    def _retried(self, act: Callable[[], Result], patience: float | None) -> Result:
        """Call `act`, retried during an outage for `patience` seconds (None: until `close` gives up); its result."""
        stop = tenacity.stop_when_event_set(self._give_up)
        is_worth_it = _is_outage if patience is not None else lambda error: _is_outage(error) or _is_closed(error)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_it),
            wait=tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            stop=stop if patience is None else tenacity.stop_any(stop, tenacity.stop_before_delay(patience)),
            sleep=tenacity.sleep_using_event(self._give_up),
            after=lambda state: self._keep_on_disk(),
            before_sleep=self._warn,
        )
        try:
            return retrying(lambda: self._permitted(act))
        except tenacity.RetryError:
            raise TrackingUnavailableError("MLflow does not answer") from None

    def _permitted(self, act: Callable[[], Result]) -> Result:
        if not self._may_write():
            raise TimeoutError("this search cannot renew its lease")
        return act()

    def _keep_on_disk(self) -> None:
        with self._changed:
            if self._events and not self._is_journaled:
                self._journal.add(self._events)
                self._is_journaled = True

    @property
    def refusal(self) -> str:
        """Why MLflow takes no event, although it answers; empty if it does."""
        return self._refusal

    def _warn(self, state: tenacity.RetryCallState) -> None:
        """Report an outage or a refusal, once."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, Exception) or self._has_warned:
            return
        if _is_closed(error):
            self._refusal = first_line(error)
            logger.warning("MLflow takes no events, which are kept; trying again: %s", self._refusal)
            self._has_warned = True
        elif state.upcoming_sleep >= _WARNING_PAUSE:
            logger.warning("the MLflow server does not answer, trying again: %s", first_line(error))
            self._has_warned = True


def _is_closed(error: BaseException) -> bool:
    """Whether everything is refused until a person changes something: no right to write, a deleted experiment.

    Such events must be kept, unlike one that MLflow cannot take because of its content.
    """
    if not isinstance(error, MlflowException):
        return False
    text = str(error)
    is_deleted = "experiment" in text.partition("must be in the 'active' state")[0][-60:] and "'active' state" in text
    return error.get_http_status_code() in (401, 403) or is_deleted or "readonly database" in text


def _is_outage(error: BaseException) -> bool:
    """Whether a retry can help: no answer or a server error, but not a refused request.

    Covers the clients of artifact stores too.
    """
    from botocore.exceptions import BotoCoreError

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (429, *range(500, 600)) or "Max retries exceeded" in str(error)
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, BotoCoreError | ConnectionError | TimeoutError)

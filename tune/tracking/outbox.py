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
_WARNING_PAUSE = 2.0
"""Pause in seconds from which an outage is reported."""


class TrackingUnavailableError(ConnectionError):
    """The tracking server did not answer within the caller's time limit."""


class TrackingRefusedError(RuntimeError):
    """The tracking server refused the request; a retry would not help."""


class Outbox:
    """Passes events to `write`, one at a time and in order; first those that an earlier search left in `unsent`."""

    def __init__(self, unsent: Path, write: Callable[[Event], None]) -> None:
        self._write = write
        self._journal = Journal(unsent)
        self._events: deque[Event] = deque(self._journal.read())
        """Events not yet written, including the current one."""
        self._is_journaled = bool(self._events)
        """Whether all waiting events are also in the journal: from the start of an outage until none is waiting."""
        self._is_closing = False
        self._changed = threading.Condition()
        """Guards the three attributes above."""
        self._writing = threading.Lock()
        self._give_up = threading.Event()
        self._writer = threading.Thread(target=self._deliver, name="mlflow writer", daemon=True)
        self._writer.start()

    def put(self, event: Event) -> None:
        """Add an event, without credentials that a text in it may repeat; returns at once."""
        event = shown_event(event)
        with self._changed:
            self._events.append(event)
            if self._is_journaled:
                self._journal.add([event])
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Write the remaining events for at most `patience` seconds; returns how many stay in the file."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._writer.join(patience)
        if self._writer.is_alive():
            self._give_up.set()
            self._writer.join(60)
            self._keep_on_disk()
        return len(self._events)

    def write_now(self, write: "Callable[[Insist[object]], Result]", patience: float) -> Result:
        """Call `write(insist)` between two events and return its result; `insist` retries a call during an outage.

        Raises TrackingUnavailableError if the server is away for `patience` seconds, TrackingRefusedError if it
        refuses.
        """
        deadline = time.monotonic() + patience
        if not self._writing.acquire(timeout=patience):
            raise TrackingUnavailableError(f"MLflow did not answer for {patience:.0f} s")
        try:
            return write(lambda act: self._retried(act, max(0.0, deadline - time.monotonic())))
        except (MlflowException, RequestException) as error:
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
            with self._changed:
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
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_outage),
            wait=tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            stop=stop if patience is None else tenacity.stop_any(stop, tenacity.stop_before_delay(patience)),
            sleep=tenacity.sleep_using_event(self._give_up),
            after=lambda state: self._keep_on_disk(),
            before_sleep=_warn,
        )
        try:
            return retrying(act)
        except tenacity.RetryError:
            raise TrackingUnavailableError("MLflow does not answer") from None

    def _keep_on_disk(self) -> None:
        with self._changed:
            if self._events and not self._is_journaled:
                self._journal.add(self._events)
                self._is_journaled = True


def _warn(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if state.upcoming_sleep >= _WARNING_PAUSE and isinstance(error, Exception):
        logger.warning("the MLflow server does not answer, trying again: %s", first_line(error))


def _is_outage(error: BaseException) -> bool:
    """Whether a retry can help: no answer or a server error, but not a refused request.

    Covers the clients of artifact stores too.
    """
    from botocore.exceptions import BotoCoreError

    if isinstance(error, MlflowException):
        return error.get_http_status_code() >= 500 or "Max retries exceeded" in str(error)
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, BotoCoreError | ConnectionError | TimeoutError)

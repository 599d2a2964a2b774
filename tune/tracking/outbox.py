"""Events on their way to MLflow: delivered in order by one thread, which tries again while the server is away.

Training never waits for the tracking server. During an outage the waiting events are in a file too, and a search
that ends or is killed before the server is back delivers them when it is started again.
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
from tune.tracking.events import Event
from tune.tracking.journal import Journal

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Insist = Callable[[Callable[[], Result]], Result]
"""Calls a function until the server has taken it, and gives what it returned."""

FIRST_PAUSE = 0.5
"""Seconds between the first attempt and the second; each pause is twice the one before."""
LONGEST_PAUSE = 15.0
_WORTH_A_WARNING = 2.0
"""Seconds of a pause from which on an outage is reported."""


class TrackingUnavailableError(ConnectionError):
    """The tracking server did not answer for as long as the caller was willing to wait."""


class TrackingRefusedError(RuntimeError):
    """The tracking server answered with a refusal, which trying again does not change."""


class Outbox:
    """Hands events to `write`, one at a time and in their order; those in `unsent` of an earlier search first."""

    def __init__(self, unsent: Path, write: Callable[[Event], None]) -> None:
        self._write = write
        self._journal = Journal(unsent)
        self._events: deque[Event] = deque(self._journal.read())
        """Not taken by the server yet, the one that is being written included."""
        self._is_journaled = bool(self._events)
        """Every waiting event is in the journal too; so it is from an outage on, until none waits."""
        self._is_closing = False
        self._changed = threading.Condition()
        """Guards the three above."""
        self._writing = threading.Lock()
        self._give_up = threading.Event()
        self._writer = threading.Thread(target=self._deliver, name="mlflow writer", daemon=True)
        self._writer.start()

    def put(self, event: Event) -> None:
        """Hand over an event; returns at once."""
        with self._changed:
            self._events.append(event)
            if self._is_journaled:
                self._journal.add([event])
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Deliver what is left, for at most `patience` seconds; the number of events that stay in the file instead."""
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
        """What `write(insist)` returns, called between two events; `insist` tries again during an outage.

        Raises TrackingUnavailableError where the server is away for `patience` seconds, TrackingRefusedError where
        it refuses.
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
                except TrackingUnavailableError:  # given up: it stays in the journal
                    return
                except Exception as error:  # a fault of ours in one event must not stop the others
                    # One line: a traceback may repeat the server's address with a password in it.
                    what = f"{type(event).__name__} of {event.category}"
                    logger.error("could not track %s: %s: %s", what, type(error).__name__, first_line(error))
            with self._changed:
                self._events.popleft()
                if self._is_journaled and not self._events:
                    self._journal.clear()
                    self._is_journaled = False

    def _next(self) -> Event | None:
        """The event to deliver, once there is one; None where none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._is_closing)
            return self._events[0] if self._events else None

    def _retried(self, act: Callable[[], Result], patience: float | None) -> Result:
        """What `act` returns, tried again during an outage for `patience` seconds; None: until `close` gives up."""
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
    if state.upcoming_sleep >= _WORTH_A_WARNING and isinstance(error, Exception):
        logger.warning("the MLflow server does not answer, trying again: %s", first_line(error))


def _is_outage(error: BaseException) -> bool:
    """Whether trying again can help: no answer, or the server's own failure, but not a refused request.

    Artifacts go to other servers too, through other clients.
    """
    from botocore.exceptions import BotoCoreError

    if isinstance(error, MlflowException):
        return error.get_http_status_code() >= 500 or "Max retries exceeded" in str(error)
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, BotoCoreError | ConnectionError | TimeoutError)

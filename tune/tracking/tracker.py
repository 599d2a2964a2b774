"""MLflow, through one writer per search.

Training never waits for the tracking server: events go into a queue, one thread writes them, and
tries again for as long as the server is away. Meanwhile they are in a file too, and a search that
ends or is killed before the server is back writes them when it is started again.
"""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import RequestException

from tune.tracking.client import first_line, prepare_client
from tune.tracking.events import CategoryEnded, DataUsed, EpochDone, Event, Remarked, TrialStarted
from tune.tracking.outbox import Journal
from tune.tracking.registry import MODEL_FOLDER, Registration, pack, quoted, register

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
_DIGEST = 36
"""Characters that MLflow keeps of a data set's digest."""
_MAX_VALUE = 5000
"""Characters of a parameter or tag that every MLflow store takes."""

_RUN_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "cut": "KILLED"}


class TrackingUnavailableError(ConnectionError):
    """The tracking server did not answer for as long as one was willing to wait."""


class TrackingRefusedError(RuntimeError):
    """The tracking server answered with a refusal, which trying again does not change."""


class Tracker:
    """One search in MLflow: its experiment, a parent run per category, a child run per trial.

    Runs are found again by their tags, so that a search which is continued writes to the same ones.
    """

    def __init__(
        self,
        uri: str,
        search: str,
        *,
        artifact_location: str | None,
        tags: Mapping[str, str],
        unsent: Path,
        has_parents: bool = True,
    ) -> None:
        """Without parents each trial is a run of its own, as a single training is."""
        prepare_client()
        self._client = MlflowClient(tracking_uri=uri)
        self._registry = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._search = search
        self._artifact_location = artifact_location
        self._tags = dict(tags)
        self._has_parents = has_parents
        self._runs: dict[tuple[str, str], str] = {}
        self._experiment = ""
        self._journal = Journal(unsent)
        self._events: deque[Event] = deque(self._journal.read())
        """Not taken by the server yet, the one that is being written included."""
        self._is_journaled = bool(self._events)
        """Every waiting event is in the journal too; so it is from an outage on, until none waits."""
        self._is_closing = False
        self._changed = threading.Condition()
        """Guards the four above."""
        self._writing = threading.Lock()
        self._give_up = threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="mlflow writer", daemon=True)
        self._writer.start()

    def put(self, event: Event) -> None:
        """Hand over an event; returns at once."""
        with self._changed:
            self._events.append(event)
            if self._is_journaled:
                self._journal.add([event])
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Write what is left, for at most `patience` seconds; the number of events that stay in the file instead."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._writer.join(patience)
        if self._writer.is_alive():
            self._give_up.set()
            self._writer.join(60)
            self._keep_what_waits()
        return len(self._events)

    def _keep_what_waits(self) -> None:
        with self._changed:
            if self._events and not self._is_journaled:
                self._journal.add(self._events)
                self._is_journaled = True

    def register_champion(
        self,
        category: str,
        trial_id: str,
        detector: Path,
        metrics: Mapping[str, float],
        data_sha256: str,
        patience: float,
        *,
        figures: Path | None = None,
        promote: bool = True,
    ) -> Registration:
        """Log a detector, packed to be served, and its figures to the trial's run; register it as `dskd-<category>`.

        With `promote` it becomes `champion` (`oracle` where the search selects on the test set) unless the present
        one, chosen on the same images, has a higher validation objective. `figures` is a folder of pictures.
        Raises TrackingUnavailableError where the server is away for `patience` seconds, TrackingRefusedError where
        it refuses.
        """
        tags = {
            **self._tags,
            "dskd.objective": repr(metrics["val/objective"]),
            "dskd.data_sha256": data_sha256,
            "dskd.category": category,
            "dskd.trial": trial_id,
        }

        def write(insist: Any) -> Registration:
            run_id = insist(lambda: self._trial_run(category, trial_id))
            parent = insist(lambda: self._category_run(category))
            with TemporaryDirectory(prefix="dskd-") as temporary:
                packed = Path(temporary) / MODEL_FOLDER
                pack(detector, packed)
                insist(lambda: self._client.log_artifacts(run_id, str(packed), MODEL_FOLDER))
            if figures is not None:
                insist(lambda: self._client.log_artifacts(run_id, str(figures), "validation"))
            for run in (run_id, parent):
                insist(lambda run=run: self._client.log_batch(run, metrics=_metrics(metrics, 0)))
            insist(lambda: self._client.set_tag(parent, "dskd.champion_run", run_id))
            registration: Registration = insist(
                lambda: register(self._registry, category, run_id, tags, promote=promote)
            )
            return registration

        return self._while_writer_waits(write, patience)  # type: ignore[no-any-return]

    def add_study(self, category: str, pictures: Path, patience: float) -> None:
        """Log a folder of pictures to the category's run; errors as `register_champion`."""

        def write(insist: Any) -> None:
            parent = insist(lambda: self._category_run(category))
            insist(lambda: self._client.log_artifacts(parent, str(pictures), "study"))

        self._while_writer_waits(write, patience)

    def _while_writer_waits(self, write: Any, patience: float) -> Any:
        """`write(insist)`, where `insist` calls a function until the server has taken it or patience ends."""
        deadline = time.monotonic() + patience
        if not self._writing.acquire(timeout=patience):
            raise TrackingUnavailableError(f"MLflow did not answer for {patience:.0f} s")
        try:
            return write(lambda act: self._with_retries(act, deadline))
        except (MlflowException, RequestException) as error:
            raise TrackingRefusedError(f"MLflow refused: {first_line(error)}") from error
        finally:
            self._writing.release()

    def log_detector(
        self,
        category: str,
        trial_id: str,
        detector: Path,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        patience: float,
    ) -> str:
        """Log a detector folder, its figures and tags to the trial's run, and give its id; nothing is registered.

        Errors as `register_champion`.
        """
        named = [RunTag(name, value[:_MAX_VALUE]) for name, value in tags.items()]

        def write(insist: Any) -> str:
            run_id: str = insist(lambda: self._trial_run(category, trial_id))
            insist(lambda: self._client.log_artifacts(run_id, str(detector), "detector"))
            insist(lambda: self._client.log_batch(run_id, metrics=_metrics(metrics, 0), tags=named))
            return run_id

        return str(self._while_writer_waits(write, patience))

    def _write_all(self) -> None:
        while (event := self._next()) is not None:
            with self._writing:
                try:
                    self._with_retries(lambda event=event: self._write(event))
                except _GivenUpError:
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
        """The event to write, once there is one; None where none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._is_closing)
            return self._events[0] if self._events else None

    def _with_retries(self, write: Any, deadline: float = math.inf) -> Any:
        pause = _FIRST_PAUSE
        while True:
            try:
                return write()
            except Exception as error:  # artifacts go to other servers too, through other clients
                if not _is_outage(error):
                    raise
                self._keep_what_waits()
                if pause >= 2:
                    logger.warning("the MLflow server does not answer, trying again: %s", first_line(error))
            if time.monotonic() + pause > deadline:
                raise TrackingUnavailableError("MLflow does not answer")
            if self._give_up.wait(pause):
                raise _GivenUpError
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _write(self, event: Event) -> None:
        if isinstance(event, CategoryEnded):
            run = self._category_run(event.category)
            tags = [RunTag(name, value[:_MAX_VALUE]) for name, value in event.tags.items()]
            self._client.log_batch(run, metrics=_metrics(event.metrics, 0), tags=tags)
            self._end_lost_trials(run)
            self._client.set_terminated(run, _RUN_STATUS[event.status])
            return
        run = self._trial_run(event.category, event.trial_id)
        if isinstance(event, TrialStarted):
            params = [Param(name, str(value)[:_MAX_VALUE]) for name, value in event.params.items()]
            self._client.log_batch(run, params=params)
        elif isinstance(event, DataUsed):
            place = "s3" if event.source.startswith("s3://") else "local"
            used = Dataset(event.category, event.sha256[:_DIGEST], place, json.dumps({"uri": event.source}))
            inputs = [DatasetInput(used, [InputTag("mlflow.data.context", "training")])]
            for each in (run, self._category_run(event.category)):
                self._client.log_inputs(each, inputs)
            self._client.set_tag(run, "dskd.data_sha256", event.sha256)  # what tune/train.py --from-run compares
        elif isinstance(event, EpochDone):
            self._client.log_batch(run, metrics=_metrics(event.metrics, event.epoch, event.time_ms))
        elif isinstance(event, Remarked):
            self._client.set_tag(run, "dskd.remark", event.remark[:_MAX_VALUE])
        else:
            self._client.set_tag(run, "dskd.status", event.status)
            if event.error:
                self._client.set_tag(run, "dskd.error", event.error[:_MAX_VALUE])
            elif "dskd.error" in self._client.get_run(run).data.tags:  # of an end that a killed driver saw last
                self._client.delete_tag(run, "dskd.error")
            self._client.set_terminated(run, _RUN_STATUS[event.status])

    def _end_lost_trials(self, parent: str) -> None:
        """End the runs of trials that a killed search had started and no snapshot of Tune knew of.

        Others took their places; once a category has ended, none of its trials is running.
        """
        wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for lost in self._client.search_runs([self._experiment_id()], wanted):
            self._client.set_tag(lost.info.run_id, "dskd.status", "lost")
            self._client.set_terminated(lost.info.run_id, "KILLED")

    def _category_run(self, category: str) -> str:
        return self._run(category, "", category, {})

    def _trial_run(self, category: str, trial_id: str) -> str:
        parent = {"mlflow.parentRunId": self._category_run(category)} if self._has_parents else {}
        return self._run(category, trial_id, f"{category}-{trial_id}", parent)

    def _run(self, category: str, trial_id: str, name: str, more: dict[str, str]) -> str:
        if (category, trial_id) in self._runs:
            return self._runs[category, trial_id]
        experiment = self._experiment_id()
        wanted = f"tags.`dskd.category` = {quoted(category)} and tags.`dskd.trial` = '{trial_id or '-'}'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            tags = {
                "dskd.category": category,
                "dskd.trial": trial_id or "-",
                "mlflow.source.name": "tune/search.py",
            }
            run_id = self._client.create_run(experiment, tags=tags | self._tags | more, run_name=name).info.run_id
        self._runs[category, trial_id] = str(run_id)
        return self._runs[category, trial_id]

    def _experiment_id(self) -> str:
        if not self._experiment:
            known = self._client.get_experiment_by_name(self._search)
            self._experiment = (
                known.experiment_id
                if known
                else self._client.create_experiment(
                    self._search,
                    artifact_location=self._artifact_location,
                    # Else its page opens among traces and prompts.
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            )
        return self._experiment


class _GivenUpError(Exception):
    """The search ends and the tracking server is still away."""


def _is_outage(error: Exception) -> bool:
    """Whether trying again can help: no answer, or the server's own failure, but not a refused request."""
    from botocore.exceptions import BotoCoreError

    if isinstance(error, MlflowException):
        return error.get_http_status_code() >= 500 or "Max retries exceeded" in str(error)
    if isinstance(error, RequestException):
        return error.response is None or error.response.status_code >= 500
    return isinstance(error, BotoCoreError | ConnectionError | TimeoutError)


def _metrics(metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> list[Metric]:
    now = time_ms or int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]

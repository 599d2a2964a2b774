"""Writes a search or a training to MLflow: experiment, runs, parameters, metrics, artifacts and models."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from tune.settings.search import Promote
from tune.storage.temporary import temporary_folder
from tune.tracking.client import CUSTOM, EXPERIMENT_KIND, prepare_client
from tune.tracking.events import (
    CategoryEnded,
    DataUsed,
    EpochDone,
    Event,
    Remarked,
    Role,
    SearchBegan,
    TrialEnded,
    TrialStarted,
)
from tune.tracking.outbox import Outbox
from tune.tracking.registry import EVALUATION, MODEL_FOLDER, Registration, pack, quoted, register
from tune.tracking.runs_page import (
    CHAMPION_ROLE,
    CHANGES,
    ERROR,
    NOTE,
    ROLE,
    STAR,
    STATUS,
    VIEW_TAG,
    how_to_open,
    run_name,
    view_tag,
)

_DIGEST = 36
"""Maximum length of a data set's digest in MLflow, in characters."""
_MAX_VALUE = 5000
"""Maximum length of a parameter or tag that every MLflow store accepts, in characters."""

_DRIVER_LOST = "its driver was lost; the same command continues"
PLACE = "dskd.place"
"""Tag with the key of the search's name, storage and server: two searches of one name may share an experiment."""
# A pruned trial has done its duty: MLflow shows what was killed as it shows a failure.
_RUN_STATUS = {"finished": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_NAME = "mlflow.runName"


class Delivered(NamedTuple):
    """What the detector of a champion is, beside its metrics: not all of it is in its trial's parameters."""

    values: Mapping[str, Any]
    """Configuration of the detector, whose score may have been searched after the trial began."""
    changes: str
    """How it differs from its preset."""
    note: str
    """About the champion, in Markdown."""


class Tracker:
    """One search in MLflow: its experiment, a parent run per category, a child run per trial.

    Runs are found by their tags, so a continued search writes to the same runs.
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
        may_write: Callable[[], bool] = lambda: True,
        about: str = "",
    ) -> None:
        """Without `has_parents` a trial's run has no parent run; `about` describes the experiment, in Markdown.

        Nothing is written as long as `may_write` returns False.
        """
        prepare_client()
        self._uri = uri
        self._client = MlflowClient(tracking_uri=uri)
        self._registry = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._search = search
        self._artifact_location = artifact_location
        self._tags = dict(tags)
        self._has_parents = has_parents
        self._about = about
        self._runs: dict[tuple[str, str], str] = {}
        self._asked_for: set[tuple[str, str]] = set()
        """Runs that were asked for and have not been answered: there may be one all the same."""
        self._is_first = False
        """Whether this object has made the experiment, so that it holds no other runs."""
        self._roles: dict[str, Role] = {}
        self._crowned: set[str] = set()
        self._experiment = ""
        self._outbox = Outbox(unsent, self._write, may_write)

    def put(self, event: Event) -> None:
        """Add an event; returns at once."""
        self._outbox.put(event)

    def close(self, patience: float) -> int:
        """Write the remaining events for at most `patience` seconds; returns how many stay in the file."""
        return self._outbox.close(patience)

    def stop(self, running: Mapping[str, Collection[str]], reason: str, patience: float) -> int:
        """Close the runs of these trials, by category, with the reason; returns how many events stay in the file.

        For a process that may be killed meanwhile: what must be written is in the file first.
        """
        for category, trials in running.items():
            for trial_id in trials:
                self.put(TrialEnded(category, trial_id, "interrupted", reason))
            self.put(CategoryEnded(category, "interrupted", {}, {ERROR: reason}))
        return self._outbox.close(patience, is_killed_soon=True)

    def abandon(self) -> None:
        """Write nothing more: another process writes these runs now."""
        self._outbox.abandon()

    @property
    def trouble(self) -> str:
        """Why events stay in the file, to follow "MLflow"."""
        return f"refuses them ({self._outbox.refusal})" if self._outbox.refusal else "does not answer"

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
        promote: Promote = "auto",
        evaluation_sha256: str = "",
        detector_version: str = "",
        delivered: Delivered | None = None,
    ) -> Registration:
        """Log a detector, packed for serving, with its metrics to the trial's run; register it as `dskd-<category>`.

        `promote` and `evaluation_sha256` (`registry.evaluation_key`) decide on its alias, as in `registry.register`.
        `figures` is a folder of pictures; `detector_version` is what the detector's verdicts call it. Raises
        TrackingUnavailableError if the server is away for `patience` seconds, TrackingRefusedError if it refuses.
        """
        tags = {
            **self._tags,
            "dskd.objective": repr(metrics["val/objective"]),
            "dskd.data_sha256": data_sha256,
            "dskd.category": category,
            "dskd.trial": trial_id,
            **({EVALUATION: evaluation_sha256} if evaluation_sha256 else {}),
            "dskd.detector_version": detector_version,
        }

        def write(insist: Any) -> Registration:
            run_id = insist(lambda: self._trial_run(category, trial_id))
            parent = insist(lambda: self._category_run(category))
            with temporary_folder() as temporary:
                packed = temporary / MODEL_FOLDER
                pack(detector, packed)
                insist(lambda: self._client.log_artifacts(run_id, str(packed), MODEL_FOLDER))
            if figures is not None:
                insist(lambda: self._client.log_artifacts(run_id, str(figures), "validation"))
            insist(lambda: self._client.log_batch(run_id, metrics=_metrics(metrics, 0)))
            insist(lambda: self._crown(run_id, parent, delivered))
            insist(lambda: self._client.set_tag(parent, "dskd.champion_run", run_id))
            registration: Registration = insist(
                lambda: register(self._registry, category, run_id, tags, promote=promote)
            )
            return registration

        return self._outbox.write_now(write, patience)

    def _crown(self, run_id: str, parent: str, delivered: Delivered | None) -> None:
        """Mark a run as the champion's, and no other of its category; log what is delivered."""
        wanted = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{ROLE}` = '{CHAMPION_ROLE}'"
        for other in self._client.search_runs([self._experiment_id()], wanted):
            if other.info.run_id != run_id:
                name, role = (other.info.run_name or "").removesuffix(STAR), self._roles.get(other.info.run_id, "trial")
                self._client.log_batch(other.info.run_id, tags=[RunTag(ROLE, role), RunTag(_NAME, name)])
                self._crowned.discard(other.info.run_id)
        run = self._client.get_run(run_id)
        tags = [RunTag(ROLE, CHAMPION_ROLE), RunTag(_NAME, (run.info.run_name or "").removesuffix(STAR) + STAR)]
        params = []
        if delivered is not None:
            tags += [RunTag(CHANGES, delivered.changes[:_MAX_VALUE]), RunTag(NOTE, delivered.note[:_MAX_VALUE])]
            named = {f"delivered.{name}": str(value)[:_MAX_VALUE] for name, value in delivered.values.items()}
            params = [Param(name, value) for name, value in named.items() if name not in run.data.params]
        self._client.log_batch(run_id, params=params, tags=tags)
        self._crowned.add(run_id)

    def add_study(self, category: str, pictures: Path, patience: float) -> None:
        """Log a folder of pictures to the category's run; errors as `register_champion`."""

        def write(insist: Any) -> None:
            parent = insist(lambda: self._category_run(category))
            insist(lambda: self._client.log_artifacts(parent, str(pictures), "study"))

        self._outbox.write_now(write, patience)

    def add_report(self, categories: Sequence[str], page: Path, patience: float) -> None:
        """Log the page of the whole search to the run of each category; errors as `register_champion`."""

        def write(insist: Any) -> None:
            for category in categories:
                parent = insist(lambda category=category: self._category_run(category))
                insist(lambda parent=parent: self._client.log_artifact(parent, str(page), "report"))

        self._outbox.write_now(write, patience)

    def log_detector(
        self,
        category: str,
        trial_id: str,
        detector: Path,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        patience: float,
    ) -> str:
        """Log a detector folder, its metrics and tags to the trial's run and return its id; registers nothing.

        Errors as `register_champion`.
        """
        named = [RunTag(name, value[:_MAX_VALUE]) for name, value in tags.items()]

        def write(insist: Any) -> str:
            run_id: str = insist(lambda: self._trial_run(category, trial_id))
            insist(lambda: self._client.log_artifacts(run_id, str(detector), "detector"))
            insist(lambda: self._client.log_batch(run_id, metrics=_metrics(metrics, 0), tags=named))
            return run_id

        return self._outbox.write_now(write, patience)

    def _write(self, event: Event) -> None:
        if isinstance(event, SearchBegan):
            self._close_lost()
            return
        if isinstance(event, CategoryEnded):
            run = self._category_run(event.category)
            tags = [RunTag(name, value[:_MAX_VALUE]) for name, value in event.tags.items()]
            self._client.log_batch(run, metrics=_metrics(event.metrics, 0), tags=tags)
            if ERROR not in event.tags:
                self._forget_error(run)
            self._end_lost_trials(run)
            self._client.set_terminated(run, _RUN_STATUS[event.status])
            return
        run = self._trial_run(event.category, event.trial_id)
        if isinstance(event, TrialStarted):
            params = [Param(name, str(value)[:_MAX_VALUE]) for name, value in event.params.items()]
            name = run_name(event.category, event.trial_id, event.number, event.tried)
            self._roles[run] = event.role
            said = {ROLE: event.role, _NAME: name, **({CHANGES: event.tried} if event.tried else {})}
            if run in self._crowned:  # told again by a continued search, or late by a server that was away
                said = {_NAME: name + STAR}
            self._client.log_batch(run, params=params, tags=[RunTag(key, text) for key, text in said.items()])
        elif isinstance(event, DataUsed):
            place = "s3" if event.source.startswith("s3://") else "local"
            used = Dataset(event.category, event.sha256[:_DIGEST], place, json.dumps({"uri": event.source}))
            inputs = [DatasetInput(used, [InputTag("mlflow.data.context", "training")])]
            for each in (run, self._category_run(event.category)):
                self._client.log_inputs(each, inputs)
            self._client.set_tag(run, "dskd.data_sha256", event.sha256)  # compared by tune/train.py --from-run
        elif isinstance(event, EpochDone):
            self._client.log_batch(run, metrics=_metrics(event.metrics, event.epoch, event.time_ms))
        elif isinstance(event, Remarked):
            self._client.set_tag(run, "dskd.remark", event.remark[:_MAX_VALUE])
        else:
            self._client.set_tag(run, STATUS, event.status)
            if event.error:
                self._client.set_tag(run, ERROR, event.error[:_MAX_VALUE])
            else:
                self._forget_error(run)
            self._client.set_terminated(run, _RUN_STATUS[event.status])

    def _forget_error(self, run: str) -> None:
        """Remove the reason of an earlier end, which a continued search has made good."""
        if ERROR in self._client.get_run(run).data.tags:
            self._client.delete_tag(run, ERROR)

    def _close_lost(self) -> None:
        """Close the runs that a lost driver of this search has left as running; those that go on are opened again."""
        if PLACE not in self._tags:
            return
        wanted = f"tags.`{PLACE}` = '{self._tags[PLACE]}' and attributes.status = 'RUNNING'"
        while found := self._client.search_runs([self._experiment_id()], wanted):
            for lost in found:
                self._client.set_tag(lost.info.run_id, STATUS, "lost")
                self._client.set_tag(lost.info.run_id, ERROR, _DRIVER_LOST)
                self._client.set_terminated(lost.info.run_id, "KILLED")

    def _end_lost_trials(self, parent: str) -> None:
        """End the runs of trials that a killed search started but did not record.

        Other trials replaced them; once a category has ended, none of its trials is running.
        """
        wanted = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
        for lost in self._client.search_runs([self._experiment_id()], wanted):
            self._client.set_tag(lost.info.run_id, STATUS, "lost")
            self._client.set_terminated(lost.info.run_id, "KILLED")

    def _category_run(self, category: str) -> str:
        return self._run(category, "", category, {})

    def _trial_run(self, category: str, trial_id: str) -> str:
        parent = {"mlflow.parentRunId": self._category_run(category)} if self._has_parents else {}
        return self._run(category, trial_id, f"{category}-{trial_id}", parent)

    def _run(self, category: str, trial_id: str, name: str, more: dict[str, str]) -> str:
        key = (category, trial_id)
        if key in self._runs:
            return self._runs[key]
        experiment = self._experiment_id()
        found: list[Run] = []
        if not self._is_first or key in self._asked_for:  # MLflow looks at all runs: of 10,000 that takes 35 ms
            wanted = f"tags.`dskd.category` = {quoted(category)} and tags.`dskd.trial` = '{trial_id or '-'}'"
            # The oldest, should a request that seemed lost have made a second one.
            oldest = ["attributes.start_time ASC"]
            found = self._client.search_runs([experiment], wanted, max_results=1, order_by=oldest)
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            if found[0].data.tags.get(ROLE) == CHAMPION_ROLE:
                self._crowned.add(run_id)
        else:
            tags = {
                "dskd.category": category,
                "dskd.trial": trial_id or "-",
            }
            self._asked_for.add(key)
            run_id = self._client.create_run(experiment, tags=tags | self._tags | more, run_name=name).info.run_id
        self._asked_for.discard(key)
        self._runs[key] = str(run_id)
        return self._runs[key]

    def page(self, patience: float) -> str:
        """How to open the page of the search's runs; errors as `register_champion`."""

        def write(insist: Any) -> str:
            return str(insist(self._experiment_id))

        return how_to_open(self._uri, self._outbox.write_now(write, patience))

    def _experiment_id(self) -> str:
        if not self._experiment:
            known = self._client.get_experiment_by_name(self._search)
            about = {NOTE: self._about} if self._about else {}
            if known is None:
                self._experiment = self._client.create_experiment(
                    self._search,
                    artifact_location=self._artifact_location,
                    tags={EXPERIMENT_KIND: CUSTOM, VIEW_TAG: view_tag(), **about},
                )
                self._is_first = True
            else:  # of an earlier version it has no view; a description that somebody wrote stays
                for name, value in ({VIEW_TAG: view_tag()} | about).items():
                    if name not in known.tags:
                        self._client.set_experiment_tag(known.experiment_id, name, value)
                self._experiment = known.experiment_id
        return self._experiment


def _metrics(metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> list[Metric]:
    now = time_ms or int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]

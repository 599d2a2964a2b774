"""Writes a search or a training to MLflow: experiment, runs, parameters, metrics, artifacts and models."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from tune.settings.search import Promote
from tune.tracking.client import CUSTOM, EXPERIMENT_KIND, prepare_client
from tune.tracking.events import (
    CategoryEnded,
    DataUsed,
    EpochDone,
    Event,
    Remarked,
    SearchBegan,
    TrialEnded,
    TrialStarted,
)
from tune.tracking.outbox import Outbox
from tune.tracking.registry import EVALUATION, MODEL_FOLDER, Registration, pack, quoted, register

_DIGEST = 36
"""Maximum length of a data set's digest in MLflow, in characters."""
_MAX_VALUE = 5000
"""Maximum length of a parameter or tag that every MLflow store accepts, in characters."""

_ERROR = "dskd.error"
_DRIVER_LOST = "its driver was lost; the same command continues"
PLACE = "dskd.place"
"""Tag with the key of the search's name, storage and server: two searches of one name may share an experiment."""
_RUN_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "interrupted": "KILLED"}


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
    ) -> None:
        """Without `has_parents` a trial's run has no parent run, as for a single training.

        Nothing is written as long as `may_write` returns False.
        """
        prepare_client()
        self._client = MlflowClient(tracking_uri=uri)
        self._registry = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._search = search
        self._artifact_location = artifact_location
        self._tags = dict(tags)
        self._has_parents = has_parents
        self._runs: dict[tuple[str, str], str] = {}
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
            self.put(CategoryEnded(category, "interrupted", {}, {_ERROR: reason}))
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

        return self._outbox.write_now(write, patience)

    def add_study(self, category: str, pictures: Path, patience: float) -> None:
        """Log a folder of pictures to the category's run; errors as `register_champion`."""

        def write(insist: Any) -> None:
            parent = insist(lambda: self._category_run(category))
            insist(lambda: self._client.log_artifacts(parent, str(pictures), "study"))

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
            if _ERROR not in event.tags:
                self._forget_error(run)
            self._end_lost_trials(run)
            self._client.set_terminated(run, _RUN_STATUS[event.status])
            return
        run = self._trial_run(event.category, event.trial_id)
        if isinstance(event, TrialStarted):
            params = [Param(name, str(value)[:_MAX_VALUE]) for name, value in event.params.items()]
            self._client.log_batch(run, params=params, tags=[RunTag("dskd.role", event.role)])
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
            self._client.set_tag(run, "dskd.status", event.status)
            if event.error:
                self._client.set_tag(run, _ERROR, event.error[:_MAX_VALUE])
            else:
                self._forget_error(run)
            self._client.set_terminated(run, _RUN_STATUS[event.status])

    def _forget_error(self, run: str) -> None:
        """Remove the reason of an earlier end, which a continued search has made good."""
        if _ERROR in self._client.get_run(run).data.tags:
            self._client.delete_tag(run, _ERROR)

    def _close_lost(self) -> None:
        """Close the runs that a lost driver of this search has left as running; those that go on are opened again."""
        if PLACE not in self._tags:
            return
        wanted = f"tags.`{PLACE}` = '{self._tags[PLACE]}' and attributes.status = 'RUNNING'"
        while found := self._client.search_runs([self._experiment_id()], wanted):
            for lost in found:
                self._client.set_tag(lost.info.run_id, "dskd.status", "lost")
                self._client.set_tag(lost.info.run_id, _ERROR, _DRIVER_LOST)
                self._client.set_terminated(lost.info.run_id, "KILLED")

    def _end_lost_trials(self, parent: str) -> None:
        """End the runs of trials that a killed search started but did not record.

        Other trials replaced them; once a category has ended, none of its trials is running.
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
        # The oldest, should a request that seemed lost have made a second one.
        found = self._client.search_runs([experiment], wanted, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            tags = {
                "dskd.category": category,
                "dskd.trial": trial_id or "-",
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
                    tags={EXPERIMENT_KIND: CUSTOM},
                )
            )
        return self._experiment


def _metrics(metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> list[Metric]:
    now = time_ms or int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]

"""Objects that Ray Tune calls during the search of a category: searcher, scheduler, stopper and callbacks."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from tune.runtime.cluster import cluster_nodes, count_trials
from tune.runtime.ray_internals import (
    fill_rungs,
    next_trial_id,
    num_open_suggestions,
    resume_suggestion,
    study_of,
    suggestion_of,
)
from tune.settings.space import describe_changes
from tune.storage.uris import DETECTOR_FOLDER
from tune.study.context import study_context
from tune.study.records import TrialRecord
from tune.tracking.events import (
    CategoryContinued,
    DataUsed,
    EpochDone,
    Remarked,
    Status,
    TrialEnded,
    TrialStarted,
)
from tune.trial.failures import out_of_memory_reason, retry_cost
from tune.trial.spec import (
    CATEGORY,
    CHECKPOINT,
    DATA_SHA256,
    EPOCH,
    ERROR,
    LOST,
    REMARK,
    fingerprints,
    tracked_figures,
)

_LOOK_SECONDS = 1.0
"""Seconds for which a look at the lease is good enough for a report that is of no consequence."""
_MOST_CHANGES = 5
"""Changes of a trial that its line names; MLflow has all."""


def detector_uri(metrics: Mapping[str, Any]) -> str | None:
    """Address of a trial's detector, None without a checkpoint."""
    path = metrics.get(CHECKPOINT)
    return None if path is None else f"{study_context().records.address(path)}/{DETECTOR_FOLDER}"


class Searcher(OptunaSearch):
    """OptunaSearch for a cluster that grows and shrinks, and for a search that was killed, stopped or moved.

    Each suggestion depends on the study alone, not on what this process has drawn before: `sampler_of` gives the
    sampler for a trial by its number.
    """

    def __init__(self, space: Any, *, sampler_of: Callable[[int], optuna.samplers.BaseSampler], **more: Any) -> None:
        super().__init__(space, sampler=sampler_of(0), **more)
        self._sampler_of = sampler_of

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """None, which means "later", while the allowed number of trials is running."""
        context = study_context()
        limit = context.plan.max_concurrent
        slots = limit or count_trials(cluster_nodes(), context.spec.workers)
        if num_open_suggestions(self) >= context.share.of(slots, is_limit=limit is not None):
            return None
        context.check_lease()
        records, study = context.records, study_of(self)
        if trial_id in records:
            resume_suggestion(self, trial_id, records[trial_id].number)
            return dict(records[trial_id].suggested)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        study.sampler = self._sampler_of(len(states) - states.count(optuna.trial.TrialState.WAITING))
        suggested: dict[str, Any] | None = super().suggest(trial_id)
        records.put(TrialRecord.of(trial_id, len(records.all) + 1, suggestion_of(self, trial_id)))
        return suggested

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study that a trial failed if its machines did; one that its own values spoilt counts as bad.

        A pruned one is told as pruned: its objective after a few epochs is no result beside those of whole trials.
        """
        study_context().check_lease()
        is_lost = error or bool(result and result.get(LOST))
        # Without a result and without an error Ray tells the study that the trial was pruned.
        is_pruned = not is_lost and result is not None and _status_of(result) == "pruned"
        super().on_trial_complete(trial_id, None if is_lost or is_pruned else result, is_lost)


class Halving(ASHAScheduler):
    """ASHA that never stops the untuned presets, so that no search is worse than they are.

    Nor the points that other categories try too: those that all of them finish say together what none could alone.

    The presets still count in the rungs. In a continued search the rungs are filled from the trials' records. Otherwise
    new trials would be compared with nothing, and continued trials would enter rungs that they passed long ago with
    their present objective.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._is_filled = False

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if not self._is_filled:
            self._is_filled = True
            known = study_context().records.all
            fill_rungs(self, {each.trial_id: {int(rung): of for rung, of in each.rungs.items()} for each in known})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if LOST in result:
            return self.CONTINUE  # no objective of its own
        context = study_context()
        records, space = context.records, context.space
        record = records[trial.trial_id].with_rungs(result) if trial.trial_id in records else None
        is_written = record is not None and record != records[trial.trial_id]
        context.check_lease(within=0.0 if is_written else _LOOK_SECONDS)
        context.check_inputs(trial.trial_id, fingerprints(result, space.configuration(trial.config)))
        if record is not None:
            records.put(record)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if space.is_untuned(trial.config) or space.is_shared(trial.config) else decision

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Add the retry cost of a lost relay: of searcher and scheduler, only this one is called on every failure."""
        super().on_trial_error(tune_controller, trial)
        trial.run_metadata.num_failures += retry_cost(_failure_text(trial)) - 1  # Tune has counted 1 already


class Suggestions(SearchGenerator):
    """Begins with the trials that go on, each under the id that its checkpoints are found by."""

    def create_trial_if_possible(self, experiment_spec: dict[str, Any]) -> Trial | None:
        waiting = study_context().waiting
        if not waiting:
            return super().create_trial_if_possible(experiment_spec)
        with next_trial_id(waiting[0]):
            trial = super().create_trial_if_possible(experiment_spec)
        if trial is not None:
            waiting.pop(0)
        return trial


class Deadline(ray.tune.Stopper):
    """Interrupts the study at its deadline by SIGUSR1, as a user would who wants to continue it later.

    Stopping the trials would end them finally.
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        context = study_context()
        if context.deadline is not None and time.monotonic() >= context.deadline:
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "Tune handles it while it runs a study"
            signal.raise_signal(signal.SIGUSR1)
            context.is_over = True
        return False


class Observe(ray.tune.Callback):
    """Sends events of this category's trials to the search's driver."""

    def __init__(self) -> None:
        self._last_epochs: dict[str, int] = {}
        self._remarks: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        study_context().running.add(trial.trial_id)
        _announce(study_context().records[trial.trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        context = study_context()
        category, epoch = context.category, int(result[EPOCH])
        if (trained := result.get(CATEGORY, category)) != category:
            raise RuntimeError(f"a trial of {category} trained on {trained}: its results must not count.")
        if result.get("training_iteration") == 1 and DATA_SHA256 in result:
            source = f"{context.spec.data}/{category}"
            context.events.put(DataUsed(category, trial.trial_id, source, result[DATA_SHA256]))
        if (remark := result.get(REMARK)) and self._remarks.get(trial.trial_id) != remark:
            self._remarks[trial.trial_id] = remark
            context.events.put(Remarked(category, trial.trial_id, remark))
        if epoch > self._last_epochs.get(trial.trial_id, 0):
            # A new epoch resets the failure count, so that lost nodes never end a trial that makes progress.
            self._last_epochs[trial.trial_id] = epoch
            trial.run_metadata.num_failures = 0
        if LOST in result:
            return  # no epoch
        context.events.put(EpochDone(category, trial.trial_id, epoch, tracked_figures(result), _milliseconds(result)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        study_context().dispatcher.drop.remote(_key(trial.trial_id))
        _send_end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        study_context().dispatcher.drop.remote(_key(trial.trial_id))
        _send_end(trial, True)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        context = study_context()
        for trial in trials:
            if trial.trial_id in context.running:
                study_context().dispatcher.drop.remote(_key(trial.trial_id))
                if context.is_over:
                    context.events.put(TrialEnded(context.category, trial.trial_id, "interrupted", ""))


def repeat_ended() -> None:
    """Send the events of ended trials again, as a killed driver may have lost them; repeating is harmless.

    Groups work on nothing but what goes on.
    """
    context = study_context()
    records, category = context.records, context.category
    context.dispatcher.keep_only.remote(category, [_key(each.trial_id) for each in records.unfinished])
    if not records.all:
        return
    best = max((each.objective for each in records.ended if each.objective is not None), default=None)
    ended = {each.trial_id: each.status for each in records.ended if each.status is not None}
    context.events.put(CategoryContinued(category, ended, len(records.unfinished), best))
    for record in records.ended:
        _announce(record)
        if EPOCH in record.last and LOST not in record.last:
            figures, when = tracked_figures(record.last), _milliseconds(record.last)
            context.events.put(EpochDone(category, record.trial_id, int(record.last[EPOCH]), figures, when))
        _say_end(record)


def _milliseconds(result: Mapping[str, Any]) -> int:
    """A result's own time, so that a repeated event is the same to MLflow."""
    return int(result["timestamp"] * 1000)


def _announce(record: TrialRecord) -> None:
    context = study_context()
    config, preset = context.space.configuration(record.suggested), context.space.preset_of(record.suggested)
    params = config.flat() | context.spec.tracked_values() | {"preset": preset}
    tried = describe_changes(config, {preset: context.space.base_of(record.suggested)}, _MOST_CHANGES)
    role = context.space.role_of(record.suggested)
    context.events.put(TrialStarted(context.category, record.trial_id, params, record.order, tried, role))


def _say_end(record: TrialRecord) -> None:
    context = study_context()
    assert record.status is not None
    detector = (detector_uri(record.last) if record.status == "finished" else None) or ""
    objective = record.objective or 0.0
    context.events.put(TrialEnded(context.category, record.trial_id, record.status, record.error, objective, detector))


def _status_of(last: Mapping[str, Any]) -> Status:
    """How a trial ended whose last report this is."""
    if last.get(ERROR):
        return "failed"
    return "finished" if last.get(EPOCH, 0) >= study_context().plan.num_reports else "pruned"


def _send_end(trial: Trial, is_lost: bool) -> None:
    """Record and send the trial's end; `is_lost`: it failed too often, and Tune gave up."""
    context = study_context()
    context.running.discard(trial.trial_id)
    last = trial.last_result or {}
    error = str(last.get(ERROR) or "")
    if is_lost:
        failures = _failure_text(trial)
        error = out_of_memory_reason(failures) or failures
    status: Status = "failed" if error else _status_of(last)
    context.records.end(trial.trial_id, status, last, error, is_lost or bool(last.get(LOST)))
    _say_end(context.records[trial.trial_id])


def _failure_text(trial: Trial) -> str:
    """Tune's text on every failure of a trial."""
    here = Path(trial.error_file) if trial.error_file else None
    return here.read_text() if here and here.is_file() else str(trial.get_error() or "unknown error")


def _key(trial_id: str) -> str:
    """Key of the trial's assignment."""
    return f"{study_context().category}/{trial_id}"

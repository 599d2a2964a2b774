"""Objects that Ray Tune calls during the search of a category: searcher, scheduler, stopper and callbacks."""

import signal
import time
from collections.abc import Mapping, Set
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
from tune.runtime.ray_internals import fill_rungs, num_open_suggestions, study_and_known_trials, take_snapshot
from tune.settings.space import describe_changes
from tune.storage.uris import DETECTOR_FOLDER
from tune.study.context import study_context
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
    OBJECTIVE,
    REMARK,
    RUNG,
    fingerprints,
    tracked_figures,
)

_MOST_CHANGES = 5
"""Changes of a trial that its line names; MLflow has all."""


def close_abandoned(study: optuna.Study, known: Set[int]) -> None:
    """Mark as failed the running trials of the study that are in no snapshot of Tune, after a killed process.

    Enqueued points of such trials are enqueued again, for another trial.
    """
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        if trial.number not in known:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if enqueued := trial.system_attrs.get("fixed_params"):
                study.enqueue_trial(enqueued)


def detector_uri(metrics: Mapping[str, Any], checkpoint: ray.tune.Checkpoint | None) -> str | None:
    """Address of a trial's detector, None without a checkpoint.

    Earlier versions gave checkpoints to Tune, or named them without their scheme.
    """
    path = metrics.get(CHECKPOINT) or (checkpoint.path if checkpoint else None)
    if path is None:
        return None
    is_s3 = study_context().plan.addresses.home.startswith("s3://")
    return f"{'s3://' if is_s3 and '://' not in path else ''}{path}/{DETECTOR_FOLDER}"


class StudyStorage(optuna.storages.RDBStorage):
    """Optuna's storage, pickled without its URL, so that Tune's snapshots contain no password."""

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _restore_storage, ()


class Searcher(OptunaSearch):
    """OptunaSearch for a cluster that grows and shrinks, and for a search killed between two of Tune's snapshots.

    In such a snapshot a trial may still be running that the study has as finished: it repeats its last epochs, and
    the study ignores their results. Trials created after the snapshot are missing in it; others replace them.
    """

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """None, which means "later", while the allowed number of trials is running."""
        context = study_context()
        limit = context.plan.max_concurrent
        slots = limit or count_trials(cluster_nodes(), context.spec.workers)
        if num_open_suggestions(self) >= context.share.of(slots, is_limit=limit is not None):
            return None
        suggested: dict[str, Any] | None = super().suggest(trial_id)
        return suggested

    def restore(self, checkpoint_path: str) -> None:
        super().restore(checkpoint_path)
        close_abandoned(*study_and_known_trials(self))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study that a trial failed if its machines did; one that its own values spoilt counts as bad."""
        is_lost = error or bool(result and result.get(LOST))
        super().on_trial_complete(trial_id, None if is_lost else result, is_lost)


class Halving(ASHAScheduler):
    """ASHA that never stops the untuned presets, so that no search is worse than they are.

    Nor the points that other categories try too: those that all of them finish say together what none could alone.

    The presets still count in the rungs. Tune's snapshots do not contain the rungs, so in a continued search they
    are restored from the trials' last reports. Otherwise new trials would be compared with nothing, and continued
    trials would enter rungs that they passed long ago with their present objective.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        study_context().tune = tune_controller
        last = trial.last_result or {}
        reported = {int(name.removeprefix(RUNG)): value for name, value in last.items() if name.startswith(RUNG)}
        fill_rungs(self, trial, reported)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if LOST in result:
            return self.CONTINUE  # no objective of its own
        decision: str = super().on_trial_result(tune_controller, trial, result)
        space = study_context().space
        return self.CONTINUE if space.is_untuned(trial.config) or space.is_shared(trial.config) else decision

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Add the retry cost of a lost relay: of searcher and scheduler, only this one is called on every failure."""
        super().on_trial_error(tune_controller, trial)
        trial.run_metadata.num_failures += retry_cost(_failure_text(trial)) - 1  # Tune has counted 1 already


class Suggestions(SearchGenerator):
    """Lets a study be continued with another number of trials: with more it starts new ones, with fewer none."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"total_samples": study_context().plan.trials})


class Deadline(ray.tune.Stopper):
    """Interrupts the study at its deadline by SIGUSR1, as a user would who wants to continue it later.

    Tune then takes a last snapshot, in which the trials are still running; stopping them would end them finally.
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        context = study_context()
        if context.deadline is not None and time.time() >= context.deadline:
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "Tune handles it while it runs a study"
            signal.raise_signal(signal.SIGUSR1)
            context.is_over = True
        return False


def _restore_storage() -> StudyStorage:
    return StudyStorage(study_context().plan.studies)


class Observe(ray.tune.Callback):
    """Sends events of this category's trials to the search's driver."""

    def __init__(self) -> None:
        self._has_repeated_ends = False
        self._last_epochs: dict[str, int] = {}
        self._remarks: dict[str, str] = {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Repeat the events of ended trials once, as a killed driver may have lost them; repeating is harmless."""
        if self._has_repeated_ends:
            return
        self._has_repeated_ends = True
        study_context().dispatcher.keep_only.remote(study_context().category, [_key(trial) for trial in trials])
        if trials:
            study_context().events.put(_continued(trials))
        for number, trial in enumerate(trials, 1):
            if trial.is_finished():
                self._announce(trial, number)
                if trial.last_result:
                    self.on_trial_result(iteration, trials, trial, trial.last_result)
                _send_end(trial, trial.status == Trial.ERROR)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Put the trial into a snapshot first: a warm one may end before the next, and must not be replaced then."""
        take_snapshot(study_context().tune)
        self._announce(trial, trials.index(trial) + 1)

    def _announce(self, trial: Trial, number: int) -> None:
        context = study_context()
        config = context.space.configuration(trial.config)
        params = config.flat() | context.spec.tracked_values()
        preset = context.space.preset_of(trial.config)
        params |= {"preset": preset}
        context.running.add(trial.trial_id)
        tried = describe_changes(config, {preset: context.space.base_of(trial.config)}, _MOST_CHANGES)
        context.events.put(TrialStarted(context.category, trial.trial_id, params, number, tried))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        context = study_context()
        category, epoch = context.category, int(result[EPOCH])
        if (trained := result.get(CATEGORY, category)) != category:
            raise RuntimeError(f"a trial of {category} trained on {trained}: its results must not count.")
        if context.trained_on is not None:
            context.trained_on.check(fingerprints(result, context.space.configuration(trial.config)))
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
        when = int(result["timestamp"] * 1000)  # the result's own time, so that a repeated event is the same to MLflow
        context.events.put(EpochDone(category, trial.trial_id, epoch, tracked_figures(result), when))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        study_context().dispatcher.drop.remote(_key(trial))
        _send_end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        study_context().dispatcher.drop.remote(_key(trial))
        _send_end(trial, True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        context = study_context()
        if context.is_over:  # the last step; after it Tune marks all trials as terminated
            context.interrupted.update(trial.trial_id for trial in trials if not trial.is_finished())

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self.on_step_begin(0, trials)  # Tune takes no step if all trials had already ended
        context = study_context()
        for trial in trials:
            if trial.trial_id in context.running:
                study_context().dispatcher.drop.remote(_key(trial))
                if context.is_over:
                    context.events.put(TrialEnded(context.category, trial.trial_id, "interrupted", ""))


def _continued(trials: list[Trial]) -> CategoryContinued:
    ended = {trial.trial_id: _status(trial) for trial in trials if trial.is_finished()}
    objectives = [float(trial.last_result[OBJECTIVE]) for trial in trials if OBJECTIVE in (trial.last_result or {})]
    return CategoryContinued(study_context().category, ended, len(trials) - len(ended), max(objectives, default=None))


def _status(trial: Trial) -> Status:
    """How an ended trial ended."""
    last = trial.last_result or {}
    if trial.status == Trial.ERROR or last.get(ERROR):
        return "failed"
    return "finished" if last.get(EPOCH, 0) >= study_context().plan.num_reports else "pruned"


def _send_end(trial: Trial, is_lost: bool) -> None:
    """Send the trial's end; `is_lost`: it failed too often, and Tune gave up."""
    context = study_context()
    context.running.discard(trial.trial_id)
    last = trial.last_result or {}
    error = str(last.get(ERROR) or "")
    if is_lost:
        failures = _failure_text(trial)
        error = context.failure_reasons[trial.trial_id] = out_of_memory_reason(failures) or failures
    status = "failed" if error else _status(trial)
    detector = detector_uri(last, trial.checkpoint) if status == "finished" else None
    objective = float(last.get(OBJECTIVE, 0.0))
    context.events.put(TrialEnded(context.category, trial.trial_id, status, error, objective, detector or ""))


def _failure_text(trial: Trial) -> str:
    """Tune's text on every failure of a trial; its local file is up to date, the storage only after a snapshot."""
    here = Path(trial.error_file) if trial.error_file else None
    return here.read_text() if here and here.is_file() else str(trial.get_error() or "unknown error")


def _key(trial: Trial) -> str:
    """Key of the trial's assignment."""
    return f"{study_context().category}/{trial.trial_id}"

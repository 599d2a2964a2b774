"""What Ray Tune calls back while a category is searched: searcher, scheduler, stopper and callbacks."""

import math
import signal
import time
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from tune.runtime.cluster import cluster_nodes, count_trials
from tune.runtime.ray_internals import fill_rungs, free, free_abandoned, num_open_suggestions, study_and_known_trials
from tune.storage.uris import DETECTOR_FOLDER
from tune.study.context import study_context
from tune.tracking.events import DataUsed, EpochDone, Remarked, Status, TrialEnded, TrialStarted
from tune.trial.failures import cost, out_of_memory_reason
from tune.trial.spec import (
    CATEGORY,
    DATA_SHA256,
    EPOCH,
    ERROR,
    OBJECTIVE,
    PLACEMENT_GROUP,
    REMARK,
    RUNG,
    tracked_figures,
)

_SWEEP_SECONDS = 2.0
"""Between two looks for what dead trials left reserved."""


def close_abandoned(study: optuna.Study, known: Set[int]) -> None:
    """Mark as failed what a killed process asked Optuna for and no snapshot of Tune knows.

    What the study had been told to try is put back: another trial tries it.
    """
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        if trial.number not in known:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if told := trial.system_attrs.get("fixed_params"):
                study.enqueue_trial(told)


def detector_uri(metrics: Mapping[str, Any], checkpoint: ray.tune.Checkpoint | None) -> str | None:
    """Where a finished trial left its detector; a nested Ray Train job reports the place as a metric."""
    path = metrics.get("checkpoint_path") or (checkpoint.path if checkpoint else None)
    if path is None:
        return None
    is_s3 = study_context().plan.addresses.home.startswith("s3://")
    return f"{'s3://' if is_s3 and '://' not in path else ''}{path}/{DETECTOR_FOLDER}"


class StudyStorage(optuna.storages.RDBStorage):
    """Optuna's storage, whose pickled form holds no URL: Tune's snapshots must not carry a password."""

    def __init__(self, url: str) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _revive_storage, ()


class Searcher(OptunaSearch):
    """OptunaSearch for a cluster that grows and shrinks, and for a search killed between two of Tune's snapshots.

    Such a snapshot knows as running what the study already knows as finished: the trial runs its last
    epochs once more, and what it reports of them is not news to the study. And it does not know the trials
    that were asked for since: others take their places.
    """

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """None, which means later, while as many trials run as should."""
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
        """What needs more memory than there is counts as bad; other failures say nothing about the values tried."""
        if error and trial_id in study_context().out_of_memory:
            result = {OBJECTIVE: 0.0}
        super().on_trial_complete(trial_id, result, error)


class Halving(ASHAScheduler):
    """ASHA that lets the untuned presets train to their end, so that no search is worse than they are.

    They take their places in the rungs all the same. The rungs themselves are in no snapshot of Tune; of a
    continued search they are filled from what its trials reported last, or new trials would be compared
    with nothing, and old ones that go on would enter rungs that they passed long ago with what they reach now.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        last = trial.last_result or {}
        reported = {int(name.removeprefix(RUNG)): value for name, value in last.items() if name.startswith(RUNG)}
        fill_rungs(self, trial, reported)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if study_context().space.is_untuned(trial.config) else decision

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Tune tells the scheduler of every failure, and then the searcher of the last, by the trial's name only."""
        super().on_trial_error(tune_controller, trial)
        text = _failures(trial)
        trial.run_metadata.num_failures += cost(text) - 1  # Tune has counted it as one
        without_memory = study_context().out_of_memory
        (without_memory.add if out_of_memory_reason(text) else without_memory.discard)(trial.trial_id)


class Suggestions(SearchGenerator):
    """Lets a study be continued with more trials than it was begun with; with fewer, it begins no more."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"total_samples": study_context().plan.trials})


class Deadline(ray.tune.Stopper):
    """Interrupts the study when its time is over, as a person would who means to continue it.

    Tune takes a last snapshot then, in which the trials still run; to stop them would end them for good.
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        context = study_context()
        if context.deadline is not None and time.time() >= context.deadline:
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "Tune handles it where it runs a study"
            signal.raise_signal(signal.SIGUSR1)
            context.is_over = True
        return False


def _revive_storage() -> StudyStorage:
    return StudyStorage(study_context().plan.studies)


class Observe(ray.tune.Callback):
    """Sends what happens to the trials of this process's category to the search's driver."""

    def __init__(self) -> None:
        self._is_recalled = False
        self._furthest: dict[str, int] = {}
        self._remarks: dict[str, str] = {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A killed driver may never have handed on how trials ended: say it once more, which changes nothing."""
        if self._is_recalled:
            return
        self._is_recalled = True
        for trial in trials:
            if trial.is_finished():
                self.on_trial_start(iteration, trials, trial)
                if trial.last_result:
                    self.on_trial_result(iteration, trials, trial, trial.last_result)
                _tell_end(trial, trial.status == Trial.ERROR)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        context = study_context()
        params = context.space.configuration(trial.config).flat() | context.spec.tracked_values()
        params |= {"preset": context.space.preset_of(trial.config)}
        context.running.add(trial.trial_id)
        context.events.put(TrialStarted(context.category, trial.trial_id, params))

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
        if epoch > self._furthest.get(trial.trial_id, 0):
            # Failures before a new epoch are forgiven: a cluster that loses nodes for days ends no sound trial.
            self._furthest[trial.trial_id] = epoch
            trial.run_metadata.num_failures = 0
        when = int(result["timestamp"] * 1000)  # of the result, so that MLflow knows one that it is told twice
        context.events.put(EpochDone(category, trial.trial_id, epoch, tracked_figures(result), when))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free_workers(trial)
        _tell_end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free_workers(trial)
        _tell_end(trial, True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        context = study_context()
        if context.is_over:  # this was the last step; afterwards Tune calls them all terminated
            context.interrupted.update(trial.trial_id for trial in trials if not trial.is_finished())

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self.on_step_begin(0, trials)  # where all had ended already, no step is taken
        context = study_context()
        for trial in trials:
            if trial.trial_id in context.running:
                _free_workers(trial)
                if context.is_over:
                    context.events.put(TrialEnded(context.category, trial.trial_id, "interrupted", ""))


class Sweep(ray.tune.Callback):
    """Frees what killed trials left reserved, or the next ones would wait for it for ever."""

    def __init__(self) -> None:
        self._swept = -math.inf

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() > self._swept + _SWEEP_SECONDS:
            free_abandoned()
            self._swept = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {"_swept": -math.inf}  # revived on another machine, whose clock is another one


def _tell_end(trial: Trial, is_lost: bool) -> None:
    """`is_lost`: it failed too often for Tune to go on."""
    context = study_context()
    context.running.discard(trial.trial_id)
    last = trial.last_result or {}
    error = str(last.get(ERROR) or "")
    if is_lost:
        failures = _failures(trial)
        error = context.failure_reasons[trial.trial_id] = out_of_memory_reason(failures) or failures
    is_last = last.get(EPOCH, 0) >= context.plan.epochs
    status: Status = "failed" if error else "finished" if is_last else "pruned"
    detector = detector_uri(last, trial.checkpoint) if status == "finished" else None
    objective = float(last.get(OBJECTIVE, 0.0))
    context.events.put(TrialEnded(context.category, trial.trial_id, status, error, objective, detector or ""))


def _failures(trial: Trial) -> str:
    """What Tune wrote about every failure of a trial: here at once, in the storage with its next snapshot."""
    here = Path(trial.error_file) if trial.error_file else None
    return here.read_text() if here and here.is_file() else str(trial.get_error() or "unknown error")


def _free_workers(trial: Trial) -> None:
    """Take back at once what the workers of an ended trial had reserved: Ray takes seconds, or for ever."""
    if reserved := (trial.last_result or {}).get(PLACEMENT_GROUP):
        free(reserved)

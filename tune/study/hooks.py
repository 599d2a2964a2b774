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

from tune.runtime import ray_internals as reservations
from tune.runtime.cluster import concurrent_trials
from tune.settings.space import Space
from tune.storage.uris import DETECTOR_FOLDER
from tune.tracking.events import DataUsed, EpochDone, Remarked, Status, TrialEnded, TrialStarted
from tune.trial.failures import cost, out_of_memory_reason
from tune.trial.spec import CATEGORY, DATA_SHA256, PLACEMENT_GROUP, REMARK, RUNG, TrialSpec
from tune.trial.spec import PREFIX as MACHINE

_SWEEP_SECONDS = 2.0
"""Between two looks for what dead trials left reserved."""
_EPOCH_METRICS = (
    "loss",
    "encoder_loss",
    "decoder_loss",
    "hard_loss",
    "images_per_second",
    "seconds",
    "validation_seconds",
    "objective",
)


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
    is_s3 = _revived["search_uri"].startswith("s3://")
    return f"{'s3://' if is_s3 and '://' not in path else ''}{path}/{DETECTOR_FOLDER}"


# Tune pickles its callbacks and its searcher into the experiment's folder and revives them there when a
# search is continued; what must not be pickled, a password or a handle, is found again here.
_revived: dict[str, Any] = {}


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
        slots = _revived["max_concurrent"] or concurrent_trials(_revived["spec"])
        if len(self._ot_trials.keys() - self._completed_trials) >= _revived["share"].of(
            slots, is_limit=_revived["max_concurrent"] is not None
        ):
            return None
        suggested: dict[str, Any] | None = super().suggest(trial_id)
        return suggested

    def restore(self, checkpoint_path: str) -> None:
        super().restore(checkpoint_path)
        assert self._ot_study is not None
        close_abandoned(self._ot_study, {trial.number for trial in self._ot_trials.values()})

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What needs more memory than there is counts as bad; other failures say nothing about the values tried."""
        if error and trial_id in _revived["starved"]:
            result = {"objective": 0.0}
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
        for milestone, recorded in self._trial_info[trial.trial_id]._rungs:
            if (value := last.get(f"{RUNG}{milestone}")) is not None:
                recorded[trial.trial_id] = self._metric_op * value

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        space: Space = _revived["space"]
        return self.CONTINUE if space.is_untuned(trial.config) else decision

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Tune tells the scheduler of every failure, and then the searcher of the last, by the trial's name only."""
        super().on_trial_error(tune_controller, trial)
        text = _failures(trial)
        trial.run_metadata.num_failures += cost(text) - 1  # Tune has counted it as one
        starved: set[str] = _revived["starved"]
        (starved.add if out_of_memory_reason(text) else starved.discard)(trial.trial_id)


class Suggestions(SearchGenerator):
    """Lets a study be continued with more trials than it was begun with; with fewer, it begins no more."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"total_samples": _revived["num_trials"]})


class Deadline(ray.tune.Stopper):
    """Interrupts the study when its time is over, as a person would who means to continue it.

    Tune takes a last snapshot then, in which the trials still run; to stop them would end them for good.
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        deadline: float | None = _revived["deadline"]
        if deadline is not None and time.time() >= deadline:
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "Tune handles it where it runs a study"
            signal.raise_signal(signal.SIGUSR1)
            _revived["is_cut"] = True
        return False


def _revive_storage() -> StudyStorage:
    return StudyStorage(_revived["study_url"])


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
        spec: TrialSpec = _revived["spec"]
        config = _revived["space"].configuration(trial.config)
        weights = spec.teacher_weights
        params = config.flat() | {
            "preset": _revived["space"].preset_of(trial.config),
            "textures": Path(spec.textures).name or "drawn",
            "teacher_weights": weights if weights in ("hub", "random") else Path(weights).name,
            "num_workers": spec.num_workers,
        }
        _revived["running"].add(trial.trial_id)
        _revived["events"].put(TrialStarted(spec.category, trial.trial_id, params))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = {
            name: float(value)
            for name, value in result.items()
            if (name in _EPOCH_METRICS or name.startswith(("val/", MACHINE))) and isinstance(value, int | float)
        }
        spec: TrialSpec = _revived["spec"]
        category, epoch = spec.category, int(result["epoch"])
        if (trained := result.get(CATEGORY, category)) != category:
            raise RuntimeError(f"a trial of {category} trained on {trained}: its results must not count.")
        if result.get("training_iteration") == 1 and DATA_SHA256 in result:
            source = f"{spec.data}/{category}"
            _revived["events"].put(DataUsed(category, trial.trial_id, source, result[DATA_SHA256]))
        if (remark := result.get(REMARK)) and self._remarks.get(trial.trial_id) != remark:
            self._remarks[trial.trial_id] = remark
            _revived["events"].put(Remarked(category, trial.trial_id, remark))
        if epoch > self._furthest.get(trial.trial_id, 0):
            # Failures before a new epoch are forgiven: a cluster that loses nodes for days ends no sound trial.
            self._furthest[trial.trial_id] = epoch
            trial.run_metadata.num_failures = 0
        when = int(result["timestamp"] * 1000)  # of the result, so that MLflow knows one that it is told twice
        _revived["events"].put(EpochDone(category, trial.trial_id, epoch, metrics, when))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free_workers(trial)
        _tell_end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        _free_workers(trial)
        _tell_end(trial, True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if _revived["is_cut"]:  # this was the last step; afterwards Tune calls them all terminated
            _revived["cut"].update(trial.trial_id for trial in trials if not trial.is_finished())

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self.on_step_begin(0, trials)  # where all had ended already, no step is taken
        for trial in trials:
            if trial.trial_id in _revived["running"]:
                _free_workers(trial)
                if _revived["is_cut"]:
                    _revived["events"].put(TrialEnded(_revived["spec"].category, trial.trial_id, "cut", ""))


class Sweep(ray.tune.Callback):
    """Frees what killed trials left reserved, or the next ones would wait for it for ever."""

    def __init__(self) -> None:
        self._swept = -math.inf

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() > self._swept + _SWEEP_SECONDS:
            reservations.free_abandoned()
            self._swept = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {"_swept": -math.inf}  # revived on another machine, whose clock is another one


def _tell_end(trial: Trial, is_lost: bool) -> None:
    """`is_lost`: it failed too often for Tune to go on."""
    _revived["running"].discard(trial.trial_id)
    last, spec = trial.last_result or {}, _revived["spec"]
    error = str(last.get("error") or "")
    if is_lost:
        failures = _failures(trial)
        error = _revived["reasons"][trial.trial_id] = out_of_memory_reason(failures) or failures
    is_last = last.get("epoch", 0) >= spec.config["train"]["epochs"]
    status: Status = "failed" if error else "finished" if is_last else "pruned"
    detector = detector_uri(last, trial.checkpoint) if status == "finished" else None
    objective = float(last.get("objective", 0.0))
    _revived["events"].put(TrialEnded(spec.category, trial.trial_id, status, error, objective, detector or ""))


def _failures(trial: Trial) -> str:
    """What Tune wrote about every failure of a trial: here at once, in the storage with its next snapshot."""
    here = Path(trial.error_file) if trial.error_file else None
    return here.read_text() if here and here.is_file() else str(trial.get_error() or "unknown error")


def _free_workers(trial: Trial) -> None:
    """Take back at once what the workers of an ended trial had reserved: Ray takes seconds, or for ever."""
    if reserved := (trial.last_result or {}).get(PLACEMENT_GROUP):
        reservations.free(reserved)

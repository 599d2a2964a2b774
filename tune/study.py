"""One category's search, in a process of its own: an Optuna study driven by a Ray Tune experiment.

Ray Tune keeps module-level state that two experiments in one process corrupt (seen with Ray 2.60:
"dictionary changed size during iteration"), hence a process per category.
"""

import functools
import logging
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
import ray.tune
import ray.util
from ray import PlacementGroupID
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.placement_group import PlacementGroup
from ray.util.queue import Queue

from dskd.config import RunConfig
from tune.machine import PREFIX as MACHINE
from tune.settings import SearchSettings
from tune.space import known_good, search_space, with_suggestions
from tune.tracking import DataUsed, EpochDone, Status, TrialEnded, TrialStarted
from tune.trial import MAX_FAILURES, run_trial, trial_resources
from tune.worker import DATA_SHA256, DETECTOR_FOLDER, PLACEMENT_GROUP, Assignment

_REDUCTION = 3
_EPOCH_METRICS = ("loss", "encoder_loss", "decoder_loss", "hard_loss", "images_per_second", "seconds", "objective")


class Study(NamedTuple):
    """What the trials of a category came to."""

    num_trials: int
    num_pruned: int
    errors: tuple[str, ...]
    """Why trials failed, one each."""
    best: tuple[str, str] | None
    """(trial id, address of its detector folder); None where no trial reached its last epoch."""


def search_category(settings: SearchSettings, assignment: Assignment, concurrency: int, events: Queue) -> Study:
    """Run or continue the trials of `assignment.category`, telling `events` what happens to them.

    Meant to run in a Ray task: started again where its process was lost, it goes on from Tune's last
    snapshot.
    """
    _set_up_tune()
    base = RunConfig.from_dict(assignment.config)
    _revived.update(assignment=assignment, events=events, study_url=settings.studies, search_uri=settings.search_uri)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, assignment=assignment), trial_resources(assignment)
    )
    folder, name = f"{settings.search_uri}/tune", assignment.category
    if ray.tune.Tuner.can_restore(f"{folder}/{name}"):
        tuner = ray.tune.Tuner.restore(f"{folder}/{name}", trainable, resume_unfinished=True)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            tune_config=ray.tune.TuneConfig(
                metric="objective",
                mode="max",
                num_samples=settings.trials,
                max_concurrent_trials=concurrency,
                # A process that serves trial after trial saves seconds each; one whose workers are stopped
                # from outside must not live on.
                reuse_actors=assignment.num_workers == 1,
                search_alg=_Searcher(
                    functools.partial(search_space, base=base),
                    metric="objective",
                    mode="max",
                    # Another seed for each category, or all would draw the same first suggestions.
                    sampler=optuna.samplers.TPESampler(
                        seed=zlib.crc32(f"{settings.seed}/{name}".encode()), multivariate=True
                    ),
                    storage=StudyStorage(settings.studies),
                    study_name=f"{settings.name}/{name}",
                    points_to_evaluate=known_good(base)[: settings.trials],
                ),
                scheduler=ASHAScheduler(
                    time_attr="epoch",
                    # Beyond the last epoch, which a trial reaches and ends by itself.
                    max_t=base.train.epochs + 1,
                    grace_period=max(1, base.train.epochs // _REDUCTION**2),
                    reduction_factor=_REDUCTION,
                ),
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=name,
                storage_path=folder,
                failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                callbacks=[_Observe()],
                verbose=0,
            ),
        )
    results = tuner.fit()
    _close_abandoned(settings.studies, f"{settings.name}/{name}")
    return _summarise(results, base.train.epochs)


def _close_abandoned(url: str, study_name: str) -> None:
    """Mark what a killed process asked Optuna for, and no trial took up again, as failed."""
    study = optuna.load_study(study_name=study_name, storage=url)
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _summarise(results: ray.tune.ResultGrid, epochs: int) -> Study:
    finished, num_pruned, errors = [], 0, []
    for result in (results[index] for index in range(len(results))):
        metrics = result.metrics or {}
        detector = _detector_uri(metrics, result.checkpoint)
        if result.error or metrics.get("error"):
            errors.append(str(metrics.get("error") or result.error).strip().splitlines()[-1])
        elif metrics.get("epoch", 0) < epochs or detector is None:
            num_pruned += 1
        else:
            finished.append((metrics["objective"], metrics["trial_id"], detector))
    best = max(finished)[1:] if finished else None
    return Study(len(results), num_pruned, tuple(errors), best)


def _detector_uri(metrics: Mapping[str, Any], checkpoint: ray.tune.Checkpoint | None) -> str | None:
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


class _Searcher(OptunaSearch):
    """OptunaSearch that a search killed between two of Tune's snapshots can go on with.

    Such a snapshot knows as running what the study already knows as finished: the trial runs its last
    epochs once more, and what it reports of them is not news to the study.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            super().on_trial_result(trial_id, result)


def _revive_storage() -> StudyStorage:
    return StudyStorage(_revived["study_url"])


class _Observe(ray.tune.Callback):
    """Sends what happens to the trials of this process's category to the search's driver."""

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        assignment: Assignment = _revived["assignment"]
        config = with_suggestions(RunConfig.from_dict(assignment.config), trial.config)
        weights = assignment.teacher_weights
        params = config.flat() | {
            "teacher_weights": weights if weights in ("hub", "random") else Path(weights).name,
            "num_workers": assignment.num_workers,
        }
        _revived["events"].put(TrialStarted(assignment.category, trial.trial_id, params))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = {
            name: float(value)
            for name, value in result.items()
            if (name in _EPOCH_METRICS or name.startswith(("val/", MACHINE))) and isinstance(value, int | float)
        }
        now = int(time.time() * 1000)
        assignment: Assignment = _revived["assignment"]
        category = assignment.category
        if result["training_iteration"] == 1 and DATA_SHA256 in result:
            source = f"{assignment.data}/{category}"
            _revived["events"].put(DataUsed(category, trial.trial_id, source, result[DATA_SHA256]))
        _revived["events"].put(EpochDone(category, trial.trial_id, int(result["epoch"]), metrics, now))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        last = trial.last_result or {}
        is_last = last.get("epoch", 0) >= _revived["assignment"].config["train"]["epochs"]
        error = str(last.get("error") or "")
        self._ended(trial, "failed" if error else "finished" if is_last else "pruned", error)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended(trial, "failed", str(trial.get_error() or "unknown error"))

    def _ended(self, trial: Trial, status: Status, error: str) -> None:
        _free_workers(trial)
        last = trial.last_result or {}
        detector = _detector_uri(last, trial.checkpoint) if status == "finished" else None
        category, objective = _revived["assignment"].category, float(last.get("objective", 0.0))
        _revived["events"].put(TrialEnded(category, trial.trial_id, status, error, objective, detector or ""))


def _free_workers(trial: Trial) -> None:
    """Take back what the workers of an ended trial had reserved, which also ends them if they still compute.

    Ray Train's own cleaner does so within seconds where it can ask the dashboard; where the dashboard is
    slow or gone it never does, and later trials wait for ever (ray issue 54305).
    """
    if reserved := (trial.last_result or {}).get(PLACEMENT_GROUP):
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(reserved))))


def _trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


def _set_up_tune() -> None:
    """Tune's console and its log files per trial are replaced by the events; snapshots are frequent."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "2"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    for name in ("ray.tune", "ray.train", "optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

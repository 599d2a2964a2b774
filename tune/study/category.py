"""One category's search, in a process of its own: an Optuna study driven by a Ray Tune experiment.

Ray Tune keeps module-level state that two experiments in one process corrupt (seen with Ray 2.60:
"dictionary changed size during iteration"), hence a process per category.
"""

import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.util.queue import Queue

from tune.runtime.ray_internals import keep_aws_keys_out_of_runtime_environments
from tune.settings.plan import SearchPlan
from tune.settings.search import SamplerName
from tune.settings.space import Space
from tune.storage.files import Storage
from tune.storage.inputs import TrainedOn
from tune.study.budget import Share
from tune.study.context import StudyContext, enter_study
from tune.study.finalists import FinishedTrial
from tune.study.hooks import (
    Deadline,
    Halving,
    Observe,
    Searcher,
    StudyStorage,
    Suggestions,
    close_abandoned,
    detector_uri,
)
from tune.trial.asha import REDUCTION, grace_period
from tune.trial.failures import MAX_RETRY_COST
from tune.trial.spec import EPOCH, ERROR, OBJECTIVE, TrialSpec
from tune.trial.trainable import trainable


class StudyResult(NamedTuple):
    """Outcome of a category's trials."""

    num_trials: int
    num_pruned: int
    errors: tuple[str, ...]
    """Reasons of failed trials, one each."""
    finished: tuple[FinishedTrial, ...]
    """Trials that reached their last report, the best first."""
    num_interrupted: int = 0
    """Trials interrupted by the deadline; continuing the study continues them."""


def search_category(
    plan: SearchPlan, spec: TrialSpec, share: Share, events: Queue, deadline: float | None, dispatcher: str
) -> StudyResult:
    """Run or continue the trials of the plan's only category and put their events into `events`.

    All trials use `spec`, each with its own configuration. The category runs its `share` of `--max-concurrent`
    trials, or of as many as the cluster can hold at that time. `deadline` is in seconds since 1970. The `dispatcher` of
    that name gives the trials to worker groups.

    Meant to run in a Ray task: if its process is lost, a retry continues from Tune's last snapshot.
    """
    _set_up_tune()
    context = StudyContext(
        plan=plan,
        spec=spec,
        share=share,
        events=events,
        deadline=deadline,
        dispatcher=ray.get_actor(dispatcher),
        trained_on=TrainedOn(Storage(plan.addresses.home), spec.category),
    )
    enter_study(context)
    space = context.space
    runs = trainable(spec, space, dispatcher)
    folder, name = f"{plan.addresses.home}/tune", context.category
    if ray.tune.Tuner.can_restore(f"{folder}/{name}"):
        tuner = ray.tune.Tuner.restore(f"{folder}/{name}", runs, resume_unfinished=True)
    else:
        tuner = ray.tune.Tuner(
            runs,
            tune_config=ray.tune.TuneConfig(
                metric=OBJECTIVE,
                mode="max",
                num_samples=plan.trials,
                reuse_actors=True,  # a relay begins a trial at once, a new process in seconds
                search_alg=Suggestions(_searcher(plan, name, space)),
                scheduler=Halving(
                    time_attr=EPOCH,
                    # Above the last epoch, so that a trial ends by itself after its last one.
                    max_t=plan.num_reports + 1,
                    grace_period=grace_period(plan.num_reports),
                    reduction_factor=REDUCTION,
                ),
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=name,
                storage_path=folder,
                failure_config=ray.tune.FailureConfig(max_failures=MAX_RETRY_COST),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                callbacks=[Observe()],
                stop=Deadline(),
                verbose=0,
            ),
        )
    return _summarise(tuner.fit(), context)


def _searcher(plan: SearchPlan, category: str, space: Space) -> Searcher:
    study_name = plan.study_name(category)
    points = space.starting_points()[: plan.trials]
    return Searcher(
        space.ask,
        metric=OBJECTIVE,
        mode="max",
        sampler=make_sampler(plan.sampler, plan.seed, category, len(space.bases)),
        storage=StudyStorage(plan.studies),
        study_name=study_name,
        points_to_evaluate=not_yet_asked_for(points, plan.studies, study_name),
    )


def make_sampler(name: SamplerName, seed: int, category: str, num_presets: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name; the same `seed` gives each category different suggestions."""
    seed = zlib.crc32(f"{seed}/{category}".encode())
    if name == "tpe":
        # All that Optuna's versions have different defaults for; `dskd.optuna` in MLflow says which version it was.
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=num_presets > 1,
            n_startup_trials=10,
            n_ei_candidates=24,
            constant_liar=True,
        )
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    if name == "qmc":
        return optuna.samplers.QMCSampler(seed=seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def not_yet_asked_for(points: list[dict[str, Any]], url: str, study_name: str) -> list[dict[str, Any]]:
    """The `points` that are not yet in the study, where a search killed before its first snapshot may have put some."""
    storage = StudyStorage(url)
    if study_name not in optuna.get_all_study_names(storage):
        return points
    study = optuna.load_study(study_name=study_name, storage=storage)
    close_abandoned(study, set())
    asked = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
    return [point for point in points if point not in asked]


def _summarise(results: ray.tune.ResultGrid, context: StudyContext) -> StudyResult:
    finished, num_pruned, num_interrupted, errors = [], 0, 0, []
    for result in (results[index] for index in range(len(results))):
        metrics = result.metrics or {}
        detector = detector_uri(metrics, result.checkpoint)
        trial_id = Path(result.path).name
        if trial_id in context.interrupted:
            num_interrupted += 1
        elif result.error or metrics.get(ERROR):
            # Tune's own error may be from an earlier attempt.
            reason = context.failure_reasons.get(trial_id) or str(metrics.get(ERROR) or result.error)
            errors.append(reason.strip().splitlines()[-1])
        elif metrics.get(EPOCH, 0) < context.plan.num_reports or detector is None:
            num_pruned += 1
        else:
            suggested = dict(metrics["config"])
            is_untuned = context.space.is_untuned(suggested)
            finished.append(FinishedTrial(metrics["trial_id"], metrics[OBJECTIVE], detector, suggested, is_untuned))
    finished.sort(key=lambda trial: (trial.objective, trial.trial_id), reverse=True)
    return StudyResult(len(results), num_pruned, tuple(errors), tuple(finished), num_interrupted)


def _trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


def _set_up_tune() -> None:
    """Configure Tune: no console output or log files per trial, since events replace them; frequent snapshots."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "2"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    keep_aws_keys_out_of_runtime_environments()
    # By default Tune starts one pending trial at a time; here the searcher limits their number.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"
    for name in ("ray.tune", "ray.train", "optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

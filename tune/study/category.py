"""One category's search, in a process of its own: an Optuna study driven by a Ray Tune experiment.

Ray Tune keeps module-level state that two experiments in one process corrupt (seen with Ray 2.60:
"dictionary changed size during iteration"), hence a process per category.
"""

import functools
import logging
import os
import time
import zlib
from typing import Any, NamedTuple

import optuna
import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.util.queue import Queue

from tune.runtime.ray_internals import keep_aws_keys_out_of_runtime_environments, lost_relays_replaced
from tune.settings.plan import SearchPlan
from tune.settings.search import SamplerName
from tune.settings.space import Space
from tune.storage.files import Storage
from tune.storage.inputs import TrainedOn
from tune.storage.temporary import temporary_folder
from tune.study.budget import Share
from tune.study.context import StudyContext, enter_study
from tune.study.database import StudyStorage
from tune.study.finalists import FinishedTrial
from tune.study.hooks import (
    Deadline,
    Halving,
    Observe,
    Searcher,
    Suggestions,
    detector_uri,
    repeat_ended,
)
from tune.study.records import TrialRecords, complete_study
from tune.trial.asha import REDUCTION, grace_period
from tune.trial.failures import MAX_RETRY_COST
from tune.trial.spec import EPOCH, OBJECTIVE, TrialSpec
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
    trials, or of as many as the cluster can hold at that time. `deadline` is in seconds since 1970 by the clock of the
    driver. The `dispatcher` of that name gives the trials to worker groups.

    Meant to run in a Ray task: if its process is lost, a retry continues from the trials' records.
    """
    _set_up_tune()
    home, category = Storage(plan.addresses.home), spec.category
    records = TrialRecords(home, category)
    records.read()
    post: Any = ray.get_actor(dispatcher)
    context = StudyContext(
        plan=plan,
        spec=spec,
        share=share,
        events=events,
        deadline=None if deadline is None else monotonic_deadline(deadline, post),
        dispatcher=post,
        records=records,
        trained_on=TrainedOn(home, category),
        waiting=[each.trial_id for each in records.unfinished],
    )
    enter_study(context)
    context.check_lease()
    searcher = _searcher(plan, category, context.space, records)
    repeat_ended()
    left = max(plan.trials - len(records.ended), len(records.unfinished))
    if left:
        with temporary_folder() as folder:
            try:
                with lost_relays_replaced():
                    _tuner(context, searcher, left, str(folder), dispatcher).fit()
            except Exception:
                if context.fault is not None:
                    raise context.fault from None
                raise
    return _summarise(context)


def monotonic_deadline(deadline: float, post: Any) -> float:
    """A deadline by the driver's clock, as one of `time.monotonic` in this process, whose node's clock may be wrong.

    `post`: handle of the dispatcher, which runs on the driver's node.
    """
    return time.monotonic() + deadline - float(ray.get(post.now.remote()))


def _tuner(context: StudyContext, searcher: Searcher, left: int, folder: str, dispatcher: str) -> ray.tune.Tuner:
    """Tune's experiment for the trials that are left; nobody needs what it writes to the local `folder`."""
    plan = context.plan
    return ray.tune.Tuner(
        trainable(context.spec, context.space, dispatcher),
        tune_config=ray.tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            num_samples=left,
            reuse_actors=True,  # a relay begins a trial at once, a new process in seconds
            search_alg=Suggestions(searcher),
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
            name=context.category,
            storage_path=folder,
            failure_config=ray.tune.FailureConfig(max_failures=MAX_RETRY_COST),
            checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
            callbacks=[Observe()],
            stop=Deadline(),
            verbose=0,
        ),
    )


def _searcher(plan: SearchPlan, category: str, space: Space, records: TrialRecords) -> Searcher:
    study_name = plan.study_name(category)
    points = space.starting_points()[: plan.trials]
    return Searcher(
        space.ask,
        sampler_of=functools.partial(make_sampler, plan.sampler, plan.seed, category, len(space.bases)),
        metric=OBJECTIVE,
        mode="max",
        storage=StudyStorage(plan.studies),
        study_name=study_name,
        points_to_evaluate=not_yet_asked_for(points, plan.studies, study_name, records),
    )


def make_sampler(
    name: SamplerName, seed: int, category: str, num_presets: int, number: int = 0
) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name for the study's trial `number`, whatever was drawn before in this process.

    The same `seed` gives each category different suggestions.
    """
    # One sequence of quasi-random points serves all trials: the study says how far it has come.
    of_trial = f"/{number}" if number and name != "qmc" else ""
    seed = zlib.crc32(f"{seed}/{category}{of_trial}".encode())
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
        return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True)
    if name == "qmc":
        return optuna.samplers.QMCSampler(seed=seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def not_yet_asked_for(
    points: list[dict[str, Any]], url: str, study_name: str, records: TrialRecords
) -> list[dict[str, Any]]:
    """The `points` that are not yet in the study, which afterwards says what the records of its trials say."""
    storage = StudyStorage(url)
    if study_name not in optuna.get_all_study_names(storage) and not records.all:
        return points
    study = optuna.create_study(study_name=study_name, storage=storage, direction="maximize", load_if_exists=True)
    complete_study(study, records)
    asked = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
    return [point for point in points if point not in asked]


def _summarise(context: StudyContext) -> StudyResult:
    finished, num_pruned, errors = [], 0, []
    for record in context.records.ended:
        detector = detector_uri(record.last)
        if record.status == "failed":
            errors.append(record.error.strip().splitlines()[-1])
        elif record.status == "pruned" or detector is None:
            num_pruned += 1
        else:
            suggested, objective = dict(record.suggested), record.objective or 0.0
            is_untuned = context.space.is_untuned(suggested)
            finished.append(FinishedTrial(record.trial_id, objective, detector, suggested, is_untuned))
    finished.sort(key=lambda trial: (trial.objective, trial.trial_id), reverse=True)
    num_interrupted = len(context.records.unfinished)
    return StudyResult(len(context.records.all), num_pruned, tuple(errors), tuple(finished), num_interrupted)


def _trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


def _set_up_tune() -> None:
    """Configure Tune: no console output or log files per trial, since events replace them."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "3600"  # the trials' records are what counts
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    keep_aws_keys_out_of_runtime_environments()
    # By default Tune starts one pending trial at a time; here the searcher limits their number.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"
    for name in ("ray.tune", "ray.train", "optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

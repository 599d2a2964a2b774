"""One category's search, in a process of its own: an Optuna study driven by a Ray Tune experiment.

Ray Tune keeps module-level state that two experiments in one process corrupt (seen with Ray 2.60:
"dictionary changed size during iteration"), hence a process per category.
"""

import logging
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.util.queue import Queue

from tune.settings.search import SearchSettings
from tune.settings.space import Space
from tune.study.budget import Share
from tune.study.hooks import (
    Deadline,
    Halving,
    Observe,
    Searcher,
    StudyStorage,
    Suggestions,
    Sweep,
    _revived,
    close_abandoned,
    detector_uri,
)
from tune.trial.asha import REDUCTION, grace_period
from tune.trial.failures import PATIENCE
from tune.trial.spec import TrialSpec
from tune.trial.trainable import trainable

_AWS_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


class StudyResult(NamedTuple):
    """What the trials of a category came to."""

    num_trials: int
    num_pruned: int
    errors: tuple[str, ...]
    """Why trials failed, one each."""
    best: tuple[str, str] | None
    """(trial id, address of its detector folder); None where no trial reached its last epoch."""
    num_cut: int = 0
    """Trials that the deadline ended, and that go on where the study is continued."""


def search_category(
    settings: SearchSettings,
    spec: TrialSpec,
    share: Share,
    events: Queue,
    space: Space,
    deadline: float | None,
) -> StudyResult:
    """Run or continue the trials of `spec.category`, telling `events` what happens to them.

    It runs its `share` of `--max-concurrent` trials, or of as many as the cluster holds at the time. `deadline` is
    a time in seconds since 1970.

    Meant to run in a Ray task: started again where its process was lost, it goes on from Tune's last
    snapshot.
    """
    _set_up_tune()
    _revived.update(
        spec=spec,
        events=events,
        study_url=settings.studies,
        search_uri=settings.search_uri,
        space=space,
        deadline=deadline,
        num_trials=settings.trials,
        max_concurrent=settings.max_concurrent,
        share=share,
        running=set(),
        cut=set(),
        starved=set(),
        reasons={},
        is_cut=False,
    )
    runs = trainable(spec, space)
    folder, name = f"{settings.search_uri}/tune", spec.category
    if ray.tune.Tuner.can_restore(f"{folder}/{name}"):
        tuner = ray.tune.Tuner.restore(f"{folder}/{name}", runs, resume_unfinished=True)
    else:
        tuner = ray.tune.Tuner(
            runs,
            tune_config=ray.tune.TuneConfig(
                metric="objective",
                mode="max",
                num_samples=settings.trials,
                # A process that serves trial after trial saves seconds each; one whose workers are stopped
                # from outside must not live on.
                reuse_actors=spec.num_workers == 1,
                search_alg=Suggestions(
                    Searcher(
                        space.ask,
                        metric="objective",
                        mode="max",
                        sampler=_sampler(settings, name, len(space.bases)),
                        storage=StudyStorage(settings.studies),
                        study_name=f"{settings.name}/{name}",
                        points_to_evaluate=_not_yet_asked_for(
                            space.starting_points()[: settings.trials], settings.studies, f"{settings.name}/{name}"
                        ),
                    )
                ),
                scheduler=Halving(
                    time_attr="epoch",
                    # Beyond the last epoch, which a trial reaches and ends by itself.
                    max_t=settings.epochs + 1,
                    grace_period=grace_period(settings.epochs),
                    reduction_factor=REDUCTION,
                ),
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=name,
                storage_path=folder,
                failure_config=ray.tune.FailureConfig(max_failures=PATIENCE),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                callbacks=[Observe(), Sweep()],
                stop=Deadline(),
                verbose=0,
            ),
        )
    return _summarise(tuner.fit(), settings.epochs, _revived["cut"], _revived["reasons"])


def _sampler(settings: SearchSettings, category: str, num_presets: int) -> optuna.samplers.BaseSampler:
    # Another seed for each category, or all would draw the same first suggestions.
    seed = zlib.crc32(f"{settings.seed}/{category}".encode())
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=num_presets > 1)
    if settings.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if settings.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    if settings.sampler == "qmc":
        return optuna.samplers.QMCSampler(seed=seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _not_yet_asked_for(points: list[dict[str, Any]], url: str, study_name: str) -> list[dict[str, Any]]:
    """Those of `points` that no search killed before its first snapshot has put into the study already."""
    storage = StudyStorage(url)
    if study_name not in optuna.get_all_study_names(storage):
        return points
    study = optuna.load_study(study_name=study_name, storage=storage)
    close_abandoned(study, set())
    asked = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
    return [point for point in points if point not in asked]


def _summarise(
    results: ray.tune.ResultGrid, epochs: int, cut: Collection[str], reasons: Mapping[str, str]
) -> StudyResult:
    """`reasons` why trials failed, by trial id: Tune's own may be those of an earlier attempt."""
    finished, num_pruned, num_cut, errors = [], 0, 0, []
    for result in (results[index] for index in range(len(results))):
        metrics = result.metrics or {}
        detector = detector_uri(metrics, result.checkpoint)
        trial_id = Path(result.path).name
        if trial_id in cut:
            num_cut += 1
        elif result.error or metrics.get("error"):
            reason = reasons.get(trial_id) or str(metrics.get("error") or result.error)
            errors.append(reason.strip().splitlines()[-1])
        elif metrics.get("epoch", 0) < epochs or detector is None:
            num_pruned += 1
        else:
            finished.append((metrics["objective"], metrics["trial_id"], detector))
    best = max(finished)[1:] if finished else None
    return StudyResult(len(results), num_pruned, tuple(errors), best, num_cut)


def _trial_id(trial: Trial) -> str:
    return str(trial.trial_id)


def _set_up_tune() -> None:
    """Tune's console and its log files per trial are replaced by the events; snapshots are frequent."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "2"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Tune hands the driver's AWS keys to its trials in their runtime environments, which every node logs and the
    # dashboard shows (seen with Ray 2.60). Nodes have keys or roles of their own.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS_KEYS)
    # Tune would start one trial at a time; the searcher says how many there may be.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"
    for name in ("ray.tune", "ray.train", "optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

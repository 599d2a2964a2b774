"""What Optuna knows of a category's trials, as a report tells it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from dskd.report.document import Trial
from tune.settings.space import Space

FEWEST_TO_WEIGH = 8
"""Finished trials from which the importance of parameters is more than noise."""


def trials_of(study: optuna.Study, space: Space, finished: Sequence[Mapping[str, Any]] | None) -> tuple[Trial, ...]:
    """The trials that have begun, in their order.

    `finished` are the values of those that reached their last report. Ray Tune tells Optuna that a pruned trial is
    complete, so that Optuna alone cannot say; None: it is asked all the same.
    """
    known = study.get_trials(deepcopy=False)
    return tuple(
        Trial(
            number=trial.number,
            state=_state(trial, finished),
            objective=_objective(trial),
            is_untuned=space.is_untuned(trial.params),
            params=dict(trial.params),
            seconds=trial.duration.total_seconds() if trial.duration else None,
        )
        for trial in known
        if trial.state != TrialState.WAITING
    )


def importance_of(study: optuna.Study, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Share of each parameter in the variance of the finished trials' objectives, greatest first; or why there is none.

    Pruned trials are left out, whose objectives are of shorter trainings.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    values = {trial.objective for trial in finished}
    if len(finished) < FEWEST_TO_WEIGH or len(values) < 2:
        return {}, f"too few trials to tell, {len(finished)} finished of at least {FEWEST_TO_WEIGH}"
    numbers = {trial.number for trial in finished}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study that is made
    alone = optuna.create_study(direction="maximize")
    alone.add_trials([trial for trial in study.get_trials(deepcopy=False) if trial.number in numbers])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parameters that never varied
            shares = optuna.importance.get_param_importances(alone)
    except (ValueError, RuntimeError) as error:  # Optuna's own requirements on spaces and trials
        return {}, str(error).splitlines()[0][:200]
    return {name: share for name, share in shares.items() if share > 0}, ""


def _state(
    trial: FrozenTrial, finished: Sequence[Mapping[str, Any]] | None
) -> Literal["finished", "pruned", "failed", "running"]:
    if trial.state == TrialState.COMPLETE:
        is_finished = finished is None or any(
            all(values.get(name) == value for name, value in trial.params.items()) for values in finished
        )
        return "finished" if is_finished else "pruned"
    if trial.state == TrialState.PRUNED:
        return "pruned"
    return "failed" if trial.state == TrialState.FAIL else "running"


def _objective(trial: FrozenTrial) -> float | None:
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.value is not None:
        return float(trial.value)
    return float(trial.intermediate_values[trial.last_step]) if trial.last_step is not None else None

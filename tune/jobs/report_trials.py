"""What Optuna knows of a category's trials, as a report tells it."""

from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from dskd.report.document import Trial
from tune.settings.space import Space
from tune.tracking.category_page import FEWEST_TO_WEIGH, importances


def trials_of(study: optuna.Study, space: Space) -> tuple[Trial, ...]:
    """The trials that have begun, in their order."""
    return tuple(
        Trial(
            number=trial.number,
            state=_state(trial),
            objective=_objective(trial),
            is_untuned=space.is_untuned(trial.params),
            params=dict(trial.params),
            seconds=trial.duration.total_seconds() if trial.duration else None,
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING
    )


def importance_of(study: optuna.Study) -> tuple[dict[str, float], str]:
    """Share of each parameter in the variance of the finished trials' objectives, greatest first; or why there is none.

    Pruned trials are left out, whose objectives are of shorter trainings.
    """
    shares = {name: share for name, share in importances(study).items() if share > 0}
    if shares:
        return shares, ""
    num_finished = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    return {}, f"too few trials to tell, {num_finished} finished of at least {FEWEST_TO_WEIGH} that differ"


def _state(trial: FrozenTrial) -> Literal["finished", "pruned", "failed", "running"]:
    if trial.state == TrialState.COMPLETE:
        return "finished"
    if trial.state == TrialState.PRUNED:
        return "pruned"
    return "failed" if trial.state == TrialState.FAIL else "running"


def _objective(trial: FrozenTrial) -> float | None:
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.value is not None:
        return float(trial.value)
    return float(trial.intermediate_values[trial.last_step]) if trial.last_step is not None else None

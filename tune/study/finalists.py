"""Which trials are trained on the other folds too, and which of them becomes champion: decisions on plain values.

The fold that chose the finalists flatters them, so it has no part in the decision.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dskd.training.evidence import Evidence, paired_gain


class FinishedTrial(NamedTuple):
    """A trial that reached its last report."""

    trial_id: str
    objective: float
    """Validation objective on the first fold."""
    detector: str
    """Address of its detector folder."""
    suggested: Mapping[str, Any]
    """Values that its category's space suggested."""
    is_untuned: bool
    """Whether it is one of the presets, unchanged."""


class CommonWinner(NamedTuple):
    """The configuration that is best in the mean over the categories of a search."""

    trials: Mapping[str, str]
    """Its trial's id by category."""
    gain: float
    """Mean, over those categories, of its objective minus that of the untuned preset."""
    num_compared: int
    num_left_out: int
    """Configurations that several categories tried and that one of them did not finish."""


def find_common_winner(
    finished: Mapping[str, Sequence[FinishedTrial]], shared: Mapping[str, Sequence[Mapping[str, Any]]]
) -> CommonWinner | None:
    """The best of the points that several categories tried; None if none is ahead of the untuned preset.

    `shared` are the points that each category was to try. A point counts if every category with that point finished it.
    """
    by_point: dict[str, dict[str, FinishedTrial | None]] = {}
    baselines = {category: best_untuned(trials) for category, trials in finished.items()}
    for category, points in shared.items():
        baseline = baselines.get(category)
        if baseline is None:
            continue
        known = {_key(trial.suggested): trial for trial in finished[category]}
        for point in points:
            by_point.setdefault(_key(point), {})[category] = known.get(_key(point))
    several = [trials for trials in by_point.values() if len(trials) > 1]
    complete = [{name: trial for name, trial in each.items() if trial is not None} for each in several]
    complete = [known for known, each in zip(complete, several, strict=True) if len(known) == len(each)]

    def gain(trials: Mapping[str, FinishedTrial]) -> float:
        gains = [
            trial.objective - baseline.objective
            for category, trial in trials.items()
            if (baseline := baselines[category]) is not None
        ]
        return math.fsum(gains) / len(gains)

    best = max(complete, key=gain, default=None)
    if best is None or gain(best) <= 0:
        return None
    ids = {category: trial.trial_id for category, trial in best.items()}
    return CommonWinner(ids, gain(best), len(complete), len(several) - len(complete))


def best_untuned(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """The best of the untuned presets; None if none finished."""
    return max((trial for trial in trials if trial.is_untuned), key=lambda trial: trial.objective, default=None)


def choose_finalists(trials: Sequence[FinishedTrial], count: int, common: str | None = None) -> list[FinishedTrial]:
    """The `count` trials of the highest objective, best first, and the one with the id `common`."""
    ranked = sorted(trials, key=lambda trial: (-trial.objective, trial.trial_id))
    return ranked[:count] + [trial for trial in ranked[count:] if trial.trial_id == common]


class Gain(NamedTuple):
    """How far a finalist is ahead of the untuned preset, on the folds that had no part in choosing it."""

    trial_id: str
    mean: float
    error: float
    """Standard error of `mean`, by the paired bootstrap over parts."""


def measure_gains(finalists: Mapping[str, Sequence[Evidence]], preset: Sequence[Evidence]) -> list[Gain]:
    """The gain of each finalist, by trial id; highest first."""
    gains = [Gain(name, *paired_gain(evidence, preset)) for name, evidence in finalists.items()]
    return sorted(gains, key=lambda gain: -gain.mean)


def winning(gains: Sequence[Gain], min_errors: float) -> Gain | None:
    """The highest gain that is above `min_errors` times its error; None: the preset stays."""
    return next((gain for gain in gains if gain.mean > min_errors * gain.error), None)


def explain(gains: Sequence[Gain], winner: Gain | None, num_folds: int, min_errors: float) -> str:
    """The decision in one sentence."""
    folds = f"the {num_folds - 1} folds that did not choose it" if num_folds > 2 else "the other fold"
    if winner is not None:
        return f"tuning gained {winner.mean:+.4f} ± {winner.error:.4f} over the untuned preset, on {folds}"
    if not gains:
        return "tuning gained nothing here: no finalist could be compared with the untuned preset"
    best = gains[0]
    return (
        "tuning gained nothing here, the untuned preset stays: the best finalist is at "
        f"{best.mean:+.4f} ± {best.error:.4f} to it, on {folds}, "
        f"which is no more than {min_errors:g} × the error"
    )


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(dict(point), sort_keys=True)

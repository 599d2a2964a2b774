"""Text and pictures of one category in MLflow: results, optimisation history, parameter importance, trials."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

_FEWEST_TO_COMPARE = 2
FEWEST_TO_WEIGH = 8
"""Minimum number of trials for parameter importance; with fewer it is only noise, with few more still unreliable."""
_MOST_PARAMETERS = 9
"""Parameters that the picture of trials shows, the most important first."""
_BLUE, _GREY, _ORANGE = "#1f5fa8", "#8a8f98", "#c2571a"


class _Study(NamedTuple):
    """The trials of a study that say something."""

    finished: list[FrozenTrial]
    pruned: list[FrozenTrial]
    """Stopped early: their values are of a few epochs, so they are drawn hollow and never compared."""
    preset: float | None
    """Highest objective of an untuned preset."""
    varied: list[str]
    """Parameters with more than one value, the most important first where that can be told."""


def draw_study(
    storage: str | optuna.storages.BaseStorage,
    name: str,
    folder: Path,
    is_untuned: Callable[[Mapping[str, Any]], bool] = lambda params: False,
) -> tuple[str, ...]:
    """Write `history.png`, `importance.png` and `trials.png` to `folder`, which is created.

    `storage` or its URL holds the study of that `name`.
    `is_untuned` tells the presets by a trial's parameters. Returns a line for each picture that cannot be drawn yet,
    with the reason.
    """
    study = optuna.load_study(study_name=name, storage=storage)
    return draw(study, folder, is_untuned)


def draw(
    study: optuna.Study, folder: Path, is_untuned: Callable[[Mapping[str, Any]], bool] = lambda params: False
) -> tuple[str, ...]:
    """`draw_study` of a loaded study."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = importances(study)
    seen = _seen(study, is_untuned, weights)
    differing = {trial.value for trial in seen.finished}
    missing = []
    kinds: tuple[tuple[str, int, Callable[[], Figure]], ...] = (
        ("history", 1, lambda: _history(seen)),
        ("importance", FEWEST_TO_WEIGH, lambda: _importance(weights, len(seen.finished))),
        ("trials", _FEWEST_TO_COMPARE, lambda: _trials(seen)),
    )
    for kind, fewest, plot in kinds:
        if len(seen.finished) < fewest or (fewest > 1 and len(differing) < 2):
            missing.append(
                f"{kind}.png: needs {fewest} finished trials"
                f"{' of different objectives' if fewest > 1 else ''}, there are {len(seen.finished)}"
            )
        elif fewest > 1 and not (weights if kind == "importance" else seen.varied):
            missing.append(f"{kind}.png: no parameter has more than one value in the finished trials")
        else:
            FigureCanvasAgg(plot()).print_figure(str(folder / f"{kind}.png"), dpi=100, bbox_inches="tight")
    return tuple(missing)


def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each parameter that varied in all finished trials, the highest first; empty if none can be told."""
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(finished) < FEWEST_TO_WEIGH or len({trial.value for trial in finished}) < 2:
        return {}
    everywhere = set.intersection(*(set(trial.params) for trial in finished))
    varied = [name for name in sorted(everywhere) if len({str(trial.params[name]) for trial in finished}) > 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # evaluators that Optuna calls experimental
        return optuna.importance.get_param_importances(study, params=varied) if varied else {}


def _seen(study: optuna.Study, is_untuned: Callable[[Mapping[str, Any]], bool], weights: Mapping[str, float]) -> _Study:
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    pruned = [each for each in study.get_trials(deepcopy=False, states=[TrialState.PRUNED]) if each.value is not None]
    names = dict.fromkeys(name for trial in finished for name in trial.params)
    varied = [name for name in names if len({str(trial.params.get(name)) for trial in finished}) > 1]
    varied.sort(key=lambda name: -weights.get(name, 0.0))
    presets = [_value(trial) for trial in finished if is_untuned(trial.params)]
    return _Study(finished, pruned, max(presets, default=None), varied)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _history(seen: _Study) -> Figure:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    _points(axes, [trial.number for trial in seen.finished], [trial.number for trial in seen.pruned], seen)
    best, steps = float("-inf"), []
    for trial in sorted(seen.finished, key=lambda trial: trial.number):
        best = max(best, _value(trial))
        steps.append((trial.number, best))
    last = max(trial.number for trial in [*seen.finished, *seen.pruned])
    steps.append((last, best))
    axes.step(*zip(*steps, strict=True), where="post", color=_BLUE, linewidth=1.5, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation objective")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_counts(seen), loc="right", fontsize=9)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _importance(weights: Mapping[str, float], num_trials: int) -> Figure:
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(weights)))
    axes = figure.subplots()
    names = list(weights)[::-1]
    bars = axes.barh(names, [weights[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_xlim(0, 1.1 * max(weights.values()))
    axes.set_xlabel("share of the objective's variance, among parameters that varied")
    axes.set_title(f"{num_trials} finished trials", loc="right", fontsize=9)
    return figure


def _trials(seen: _Study) -> Figure:
    """The objective over each varied parameter, the most important first."""
    names = seen.varied[:_MOST_PARAMETERS]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(7.0, 3.4 * columns), 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        having = seen._replace(
            finished=[trial for trial in seen.finished if name in trial.params],
            pruned=[trial for trial in seen.pruned if name in trial.params],
        )
        scale = having.finished[0].distributions[name]
        shown: Callable[[Any], Any] = str if isinstance(scale, CategoricalDistribution) else lambda value: value
        if isinstance(scale, FloatDistribution) and scale.log:
            axes.set_xscale("log")
        finished, pruned = (
            [shown(trial.params[name]) for trial in trials] for trials in (having.finished, having.pruned)
        )
        _points(axes, finished, pruned, having)
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation objective", fontsize=9)
    left_out = (
        f"; the {len(names)} most important of {len(seen.varied)} parameters" if seen.varied[len(names) :] else ""
    )
    figure.suptitle(f"{_counts(seen)}{left_out}", x=1, ha="right", fontsize=9)
    return figure


def _points(axes: Axes, finished: Sequence[Any], pruned: Sequence[Any], seen: _Study) -> None:
    """Finished trials filled, pruned ones hollow, the preset's objective as a line."""
    axes.scatter(finished, [_value(trial) for trial in seen.finished], color=_BLUE, s=28, zorder=3, label="finished")
    if seen.pruned:
        values = [_value(trial) for trial in seen.pruned]
        axes.scatter(pruned, values, facecolors="none", edgecolors=_GREY, s=28, zorder=2, label="pruned early")
    if seen.preset is not None:
        axes.axhline(seen.preset, color=_ORANGE, linestyle="--", linewidth=1.2, label="untuned preset")


def _counts(seen: _Study) -> str:
    return f"{len(seen.finished)} finished trials, {len(seen.pruned)} pruned"


_FIGURES = {
    "validation objective": "val/objective",
    "gain over the untuned preset": "gain/objective",
    "error of the gain": "gain/error",
    "test image AUROC": "test/image_auroc",
    "test pixel AUROC": "test/pixel_auroc",
    "test AUPRO": "test/aupro",
}


def category_note(
    *,
    category: str,
    trial_id: str,
    metrics: Mapping[str, float],
    counts: tuple[int, int, int],
    registered: str,
    pull: str,
    remarks: Sequence[str],
    caveats: Sequence[str] = (),
) -> str:
    """Markdown note on a category with a champion; `counts`: number of trials, of pruned and of failed ones.

    The `caveats` come first: MLflow folds long notes.
    """
    num_trials, num_pruned, num_failed = counts
    rows = [f"| {label} | {metrics[name]:.4f} |" for label, name in _FIGURES.items() if name in metrics]
    untested = [] if "test/image_auroc" in metrics else [_UNTESTED]
    lines = [
        *_warnings([*caveats, *untested]),
        f"**{category}**: best of {num_trials} trials ({num_pruned} pruned, {num_failed} failed) is **{trial_id}**",
        "",
        "| | |",
        "|---|---|",
        *rows,
        f"| registered as | {registered} |",
        "",
        f"    {pull}",
        "",
        *(f"- {remark}" for remark in remarks),
    ]
    return "\n".join(lines).rstrip() + "\n"


def champion_note(
    *, category: str, changes: str, threshold: str, serve: str, pull: str, caveats: Sequence[str] = ()
) -> str:
    """Markdown note on the run of a category's champion; `threshold` in words, commands as they are typed."""
    lines = [
        *_warnings(caveats),
        f"Champion of **{category}**: {changes}. Its detector's own values are the parameters `delivered.…`; those "
        "without are what the trial began with.",
        "",
        threshold,
        "",
        f"    {serve}",
        f"    {pull}",
    ]
    return "\n".join(lines) + "\n"


_UNTESTED = "There is no usable test split: no test figures."


def _warnings(caveats: Sequence[str]) -> list[str]:
    return [line for caveat in caveats for line in (f"> **{caveat}**", "")]

"""Text and pictures of one category in MLflow: results, optimisation history, parameter importance, trials."""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from matplotlib.backends.backend_agg import FigureCanvasAgg

_FEWEST_TO_COMPARE = 2
_FEWEST_TO_WEIGH = 8
"""Minimum number of trials for parameter importance; with fewer it is only noise, with few more still unreliable."""
# Optuna draws with pyplot, whose figures and styles are global to the process.
_drawing = threading.Lock()


def draw_study(url: str, name: str, folder: Path) -> tuple[str, ...]:
    """Write `history.png`, `importance.png` and `trials.png` to `folder`, which is created.

    Returns a line for each picture that cannot be drawn yet, with the reason.
    """
    study = optuna.load_study(study_name=name, storage=url)
    return draw(study, folder)


def draw(study: optuna.Study, folder: Path) -> tuple[str, ...]:
    """`draw_study` of a loaded study."""
    from optuna.visualization import matplotlib as plots

    folder.mkdir(parents=True, exist_ok=True)
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    differing = {trial.value for trial in complete}
    missing = []
    kinds: tuple[tuple[str, int, Callable[[optuna.Study], Any]], ...] = (
        ("history", 1, plots.plot_optimization_history),
        ("importance", _FEWEST_TO_WEIGH, plots.plot_param_importances),
        ("trials", _FEWEST_TO_COMPARE, plots.plot_parallel_coordinate),
    )
    for kind, fewest, plot in kinds:
        if len(complete) < fewest or (fewest > 1 and len(differing) < 2):
            missing.append(
                f"{kind}.png: needs {fewest} finished trials"
                f"{' of different objectives' if fewest > 1 else ''}, there are {len(complete)}"
            )
            continue
        try:
            _save(plot, study, len(complete), folder / f"{kind}.png")
        except (ValueError, RuntimeError) as error:  # Optuna's own requirements on spaces and trials
            missing.append(f"{kind}.png: {str(error).splitlines()[0][:200]}")
    return tuple(missing)


def _save(plot: Callable[[optuna.Study], Any], study: optuna.Study, num_trials: int, path: Path) -> None:
    from matplotlib import pyplot

    with _drawing, warnings.catch_warnings(), pyplot.rc_context():
        warnings.simplefilter("ignore")  # experimental functions, parameters that never varied
        pyplot.switch_backend("agg")
        axes = plot(study)
        figure = axes.figure
        axes.set_title(f"{num_trials} finished trials", loc="right", fontsize=9)
        try:
            wide = max(7.0, 1.1 * len(study.best_trial.params)) if path.stem == "trials" else 8.0
            figure.set_size_inches(wide, 5.0)
            FigureCanvasAgg(figure).print_figure(str(path), dpi=100, bbox_inches="tight")
        finally:
            pyplot.close(figure)


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
) -> str:
    """Markdown note on a category with a champion; `counts`: number of trials, of pruned and of failed ones."""
    num_trials, num_pruned, num_failed = counts
    rows = [f"| {label} | {metrics[name]:.4f} |" for label, name in _FIGURES.items() if name in metrics]
    untested = [] if "test/image_auroc" in metrics else ["There is no usable test split: no test figures."]
    lines = [
        f"**{category}**: best of {num_trials} trials ({num_pruned} pruned, {num_failed} failed) is **{trial_id}**",
        "",
        "| | |",
        "|---|---|",
        *rows,
        f"| registered as | {registered} |",
        "",
        f"    {pull}",
        "",
        *(f"- {remark}" for remark in (*untested, *remarks)),
    ]
    return "\n".join(lines).rstrip() + "\n"

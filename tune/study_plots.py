"""Pictures of one category's study: its history, which parameters mattered, and how the trials lie in the space."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from matplotlib.backends.backend_agg import FigureCanvasAgg

_FEWEST = 2
"""Trials below which neither importance nor a comparison of trials means anything."""
# Optuna draws through pyplot, which keeps its figures and styles for the whole process.
_drawing = threading.Lock()


def draw_study(url: str, name: str, folder: Path) -> tuple[str, ...]:
    """Write `history.png`, `importance.png` and `trials.png` into `folder`, which is made.

    A line for each picture that this study cannot give yet, with the reason.
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
        ("importance", _FEWEST, plots.plot_param_importances),
        ("trials", _FEWEST, plots.plot_parallel_coordinate),
    )
    for kind, fewest, plot in kinds:
        if len(complete) < fewest or (fewest > 1 and len(differing) < fewest):
            missing.append(
                f"{kind}.png: needs {fewest} finished trials"
                f"{' of different objectives' if fewest > 1 else ''}, there are {len(complete)}"
            )
            continue
        try:
            _save(plot, study, folder / f"{kind}.png")
        except (ValueError, RuntimeError) as error:  # Optuna's own conditions on a space or its trials
            missing.append(f"{kind}.png: {str(error).splitlines()[0][:200]}")
    return tuple(missing)


def _save(plot: Callable[[optuna.Study], Any], study: optuna.Study, path: Path) -> None:
    from matplotlib import pyplot

    with _drawing, warnings.catch_warnings(), pyplot.rc_context():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pyplot.switch_backend("agg")
        figure = plot(study).figure
        try:
            wide = max(7.0, 1.1 * len(study.best_trial.params)) if path.stem == "trials" else 8.0
            figure.set_size_inches(wide, 5.0)
            FigureCanvasAgg(figure).print_figure(str(path), dpi=100, bbox_inches="tight")
        finally:
            pyplot.close(figure)

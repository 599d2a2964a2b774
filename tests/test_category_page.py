"""Pictures of studies of every size: what cannot be drawn is said, never guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image

from tune.tracking import category_page
from tune.tracking.category_page import category_note, draw, draw_study

SPACE = {
    "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "embedding_depth": IntDistribution(1, 6),
    "hkd_margin": FloatDistribution(0, 0.5),
    "level_weights": CategoricalDistribution(["even", "deep"]),
}


def study_of(*objectives: float, storage: str | None = None) -> optuna.Study:
    study = optuna.create_study(direction="maximize", study_name="try/tile", storage=storage)
    for number, value in enumerate(objectives):
        params = {
            "learning_rate": 1e-3 * (number + 1), "embedding_depth": 1 + number % 6, "hkd_margin": 0.01 * number,
            "level_weights": ("even", "deep")[number % 2],
        }  # fmt: skip
        study.add_trial(optuna.trial.create_trial(params=params, distributions=SPACE, value=value))
    pruned = optuna.trial.create_trial(
        params={"learning_rate": 5e-3, "embedding_depth": 3, "hkd_margin": 0.3, "level_weights": "even"},
        distributions=SPACE, state=optuna.trial.TrialState.PRUNED, intermediate_values={1: 0.99}, value=0.99,
    )  # fmt: skip
    study.add_trial(pruned)
    study.ask()  # a running trial is in no picture and disturbs none
    return study


@pytest.mark.parametrize(
    ("objectives", "drawn", "reason"),
    [
        ((), set(), "needs 1 finished trials, there are 0"),
        ((0.5,), {"history.png"}, "needs 8 finished trials of different objectives, there are 1"),
        ((0.5, 0.5), {"history.png"}, "of different objectives, there are 2"),
        ((0.5, 0.7), {"history.png", "trials.png"}, "importance.png: needs 8 finished trials"),
        ((0.5, 0.7, 0.6, 0.9, 0.2, 0.4, 0.3, 0.8), {"history.png", "importance.png", "trials.png"}, ""),
    ],
)
def test_each_picture_is_there_or_its_absence_explained(
    tmp_path: Path, objectives: tuple[float, ...], drawn: set[str], reason: str
) -> None:
    missing = draw(study_of(*objectives), tmp_path / "study")
    found = {path.name for path in (tmp_path / "study").iterdir()}
    assert found == drawn
    assert {line.partition(":")[0] for line in missing} == {"history.png", "importance.png", "trials.png"} - drawn
    assert all(reason in line for line in missing[:1])
    for name in found:
        with Image.open(tmp_path / "study" / name) as picture:
            picture.load()
            assert min(picture.size) > 250
        assert (tmp_path / "study" / name).stat().st_size < 300_000


def test_a_stored_study_is_found_by_its_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    study_of(0.5, storage=url)
    draw_study(url, "try/tile", tmp_path / "study")
    assert (tmp_path / "study/history.png").is_file()


def test_the_note_holds_the_figures_and_says_what_is_missing() -> None:
    note = category_note(
        category="tile", trial_id="a1", metrics={"val/objective": 0.91234, "test/aupro": 0.5}, counts=(8, 3, 1),
        registered="dskd-tile version 2", pull="python tune/pull.py tile --out detectors", remarks=["one remark"],
    )  # fmt: skip
    caveat, empty, *lines = note.splitlines()
    assert (caveat, empty) == ("> **There is no usable test split: no test figures.**", "")
    assert lines[0] == "**tile**: best of 8 trials (3 pruned, 1 failed) is **a1**"
    assert "| validation objective | 0.9123 |" in lines and "| test AUPRO | 0.5000 |" in lines
    assert "    python tune/pull.py tile --out detectors" in lines
    assert lines[-1] == "- one remark"


def heights(artist: Any) -> list[float]:
    return [float(height) for height in artist.get_ydata()]


def test_a_pruned_trial_is_hollow_and_best_of_nothing() -> None:
    """Its objective is the highest of all, after one epoch."""
    axes: Any = category_page._history(category_page._seen(study_of(0.5, 0.7), lambda params: False, {})).axes[0]
    (best,) = axes.get_lines()
    assert heights(best) == [0.5, 0.7, 0.7]
    finished, pruned = axes.collections
    assert len(finished.get_offsets()) == 2 and len(finished.get_facecolor()) == 1
    assert np.asarray(pruned.get_offsets()).tolist() == [[2, 0.99]] and len(pruned.get_facecolor()) == 0


def test_the_preset_is_a_line() -> None:
    seen = category_page._seen(study_of(0.5, 0.7), lambda params: params["embedding_depth"] == 1, {})
    lines = {line.get_label(): line for line in category_page._history(seen).axes[0].get_lines()}
    assert heights(lines["untuned preset"]) == [0.5, 0.5]


def test_only_parameters_that_varied_are_drawn_the_most_important_first() -> None:
    study = study_of(*np.linspace(0.1, 0.9, 9).tolist())
    weights = category_page.importances(study)
    axes = category_page._trials(category_page._seen(study, bool, weights)).axes
    shown = [each.get_xlabel() for each in axes if each.get_visible()]
    assert sorted(shown) == sorted(SPACE) and shown == list(weights), "all varied"
    same = optuna.create_study()
    for value, rate in ((0.5, 0.001), (0.6, 0.002)):
        same.add_trial(optuna.trial.create_trial(
            params={"learning_rate": rate, "embedding_depth": 2, "hkd_margin": 0.1, "level_weights": "even"},
            distributions=SPACE, value=value,
        ))  # fmt: skip
    assert category_page._seen(same, bool, {}).varied == ["learning_rate"]

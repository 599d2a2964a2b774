"""Which trials are compared on the other folds, and who becomes champion; no Ray in here."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dskd.calibration import nearest_threshold
from dskd.checkpoint import DetectorRecord, read_record
from dskd.config import RunConfig
from dskd.training.evidence import NUM_REPLICATES, Evidence
from tune.study import selection
from tune.study.finalists import (
    FinishedTrial,
    Gain,
    best_untuned,
    choose_finalists,
    explain,
    find_common_winner,
    winning,
)
from tune.study.selection import select_champion

PRESET = {"learning_rate": 0.005}


def trial(name: str, objective: float, *, rate: float = 0.005, category: str = "") -> FinishedTrial:
    return FinishedTrial(f"{category}{name}", objective, f"/at/{name}", {"learning_rate": rate}, rate == 0.005)


def test_finalists_are_the_best_few_and_the_best_over_all_categories() -> None:
    trials = [trial("a", 0.7), trial("b", 0.9, rate=0.01), trial("c", 0.8, rate=0.02), trial("d", 0.5, rate=0.04)]
    assert [each.trial_id for each in choose_finalists(trials, 2)] == ["b", "c"]
    assert [each.trial_id for each in choose_finalists(trials, 2, "d")] == ["b", "c", "d"]
    assert [each.trial_id for each in choose_finalists(trials, 2, "b")] == ["b", "c"]
    untuned = best_untuned(trials)
    assert untuned is not None and untuned.trial_id == "a" and best_untuned(trials[1:]) is None


def test_categories_lend_each_other_evidence() -> None:
    """The point that is second in each category may be the best over both."""
    points = [{"learning_rate": rate} for rate in (0.005, 0.01, 0.02, 0.04)]
    finished = {
        "bolt": [trial("p", 0.6), trial("x", 0.9, rate=0.01), trial("y", 0.8, rate=0.02)],
        "nut": [trial("p", 0.7), trial("x", 0.6, rate=0.01), trial("y", 0.9, rate=0.02), trial("z", 1.0, rate=0.04)],
    }
    found = find_common_winner(finished, {"bolt": points, "nut": points})
    assert found is not None and found.trials == {"bolt": "y", "nut": "y"}
    assert found.gain == pytest.approx(0.2)
    assert (found.num_compared, found.num_left_out) == (3, 1), "bolt did not finish the last point"
    held = find_common_winner(finished, {"bolt": points[:2], "nut": points})
    assert held is not None and held.trials == {"bolt": "x", "nut": "x"}, "a point of one category is nobody's evidence"
    assert held.gain == pytest.approx((0.3 - 0.1) / 2)


def test_without_a_gain_or_an_untuned_preset_there_is_no_common_winner() -> None:
    points = [{"learning_rate": rate} for rate in (0.005, 0.01)]
    worse = [trial("p", 0.6), trial("x", 0.5, rate=0.01)]
    assert find_common_winner({"bolt": worse, "nut": worse}, {"bolt": points, "nut": points}) is None
    assert find_common_winner({"bolt": worse[1:], "nut": worse}, {"bolt": points, "nut": points}) is None
    assert find_common_winner({"bolt": worse, "nut": worse}, {"bolt": [], "nut": []}) is None


def test_a_gain_counts_beyond_its_error_alone() -> None:
    gains = [Gain("a", 0.03, 0.04), Gain("b", 0.02, 0.01)]
    assert winning(gains, 1.0) == gains[1] and winning(gains, 0.5) == gains[0] and winning(gains, 3.0) is None
    said = explain(gains, gains[1], 5, 1.0)
    assert "gained +0.0200 ± 0.0100" in said and "4 folds that did not choose" in said
    stays = explain(gains, None, 2, 1.5)
    assert "untuned preset stays: the best finalist is at +0.0300 ± 0.0400" in stays
    assert "on the other fold" in stays and "no more than 1.5 × the error" in stays
    assert "gained nothing here" in explain([], None, 5, 1.0)


class Trainings:
    """In the place of worker groups: every configuration is as good as its learning rate says."""

    def __init__(self, quality: Mapping[float, float], broken: Callable[[str], bool] = lambda name: False) -> None:
        self.quality, self.broken, self.done = quality, broken, dict[str, RunConfig]()

    def train(self, run_id: str, config: RunConfig) -> str | None:
        self.done[run_id] = config
        return None if self.broken(run_id) else f"/at/{run_id}"

    def evidence(self, run_id: str, config: RunConfig) -> Evidence | None:
        if self.train(run_id, config) is None:
            return None
        rng = np.random.default_rng(config.data.fold)
        mean = self.quality[config.train.learning_rate]
        noise = rng.normal(0, 0.01, NUM_REPLICATES) * (1 + mean)  # hardly paired, so that there is an error
        return Evidence(mean, tuple((mean + noise).tolist()), (f"{config.data.fold}.png",), (config.data.fold / 10,))


@pytest.fixture
def choose(detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`select_champion` on trials whose detectors have the trial's configuration, and other score parameters."""
    base = read_record(detector_folder)

    def record_of(detector: str, rates: Mapping[str, float], num_folds: int) -> DetectorRecord | None:
        name = detector.rpartition("/")[2]
        config = base.config.with_values({"learning_rate": rates[name], "folds": 3, "blur_sigma": 3.0})
        return dataclasses.replace(base, config=config, num_folds=num_folds)

    def select(trials: list[FinishedTrial], trainings: Trainings, *, num_folds: int = 3, **given: Any) -> Any:
        rates = {each.trial_id: each.suggested["learning_rate"] for each in trials}
        monkeypatch.setattr(selection, "read_record_of", lambda detector: record_of(detector, rates, num_folds))
        return select_champion(
            trials,
            trainings,  # type: ignore[arg-type]
            lambda suggested: base.config.with_values({**suggested, "folds": 3, "score_candidates": 50}),
            **{"num_finalists": 2, "min_errors": 1.0, **given},
        )

    return select


TRIALS = [trial("p", 0.6), trial("x", 0.9, rate=0.01), trial("y", 0.8, rate=0.02), trial("z", 0.7, rate=0.04)]


def test_the_champion_is_the_best_on_the_folds_that_did_not_choose(choose: Callable[..., Any]) -> None:
    trainings = Trainings({0.005: 0.6, 0.01: 0.61, 0.02: 0.75, 0.04: 0.9})
    found = choose(TRIALS, trainings)
    assert (found.trial_id, found.detector, found.is_untuned) == ("y", "/at/y", False)
    assert found.gain.mean == pytest.approx(0.15) and "gained +0.1500" in found.sentence
    assert sorted(trainings.done) == [
        "p-untuned-fold-1", "p-untuned-fold-2", "x-fold-1", "x-fold-2", "y-fold-1", "y-fold-2",
    ]  # fmt: skip
    tuned, untuned = trainings.done["y-fold-2"], trainings.done["p-untuned-fold-1"]
    assert (tuned.data.fold, tuned.score.blur_sigma, tuned.score.score_candidates) == (2, 3.0, 0)
    assert untuned.score.blur_sigma != 3.0, "the preset as it is, without the score parameters that its trial found"
    assert choose(TRIALS, trainings, common="z").trial_id == "z"


def test_the_preset_stays_where_no_finalist_is_ahead_by_more_than_the_error(choose: Callable[..., Any]) -> None:
    trainings = Trainings({0.005: 0.6, 0.01: 0.6, 0.02: 0.59, 0.04: 0.9})
    found = choose(TRIALS, trainings)
    assert found.is_untuned and found.trial_id == "p-untuned" and found.detector == "/at/p-untuned"
    assert trainings.done["p-untuned"].data.fold == 0 and "the untuned preset stays" in found.sentence
    assert choose(TRIALS, Trainings({0.005: 0.6, 0.01: 0.75, 0.02: 0.5}), min_errors=1000.0).is_untuned


def test_what_fails_on_a_fold_is_out_and_without_the_preset_the_first_fold_chooses(choose: Callable[..., Any]) -> None:
    said: list[str] = []
    quality = {0.005: 0.6, 0.01: 0.7, 0.02: 0.9}
    found = choose(TRIALS, Trainings(quality, lambda name: name == "y-fold-2"), say=said.append)
    assert found.trial_id == "x" and said[-1] == "finalist y is out: it failed on a fold"
    found = choose(TRIALS, Trainings(quality, lambda name: name.startswith("p-")))
    assert found.trial_id == "x" and found.folds == () and "preset failed" in found.sentence


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_finalists": 0}, "--finalists 0"),
        ({"num_folds": 0}, "not cut into folds"),
        ({"num_folds": 0, "num_finalists": 0}, "not cut into folds"),
        ({"trials": TRIALS[1:]}, "no untuned preset finished"),
    ],
)
def test_without_finalists_the_best_trial_is_champion(
    choose: Callable[..., Any], given: dict[str, Any], reason: str
) -> None:
    trainings = Trainings({})
    found = choose(given.pop("trials", TRIALS), trainings, **given)
    assert found.trial_id == "x" and found.folds == () and reason in found.sentence and not trainings.done


def test_the_champion_has_thresholds_from_every_fold(detector_folder: Path) -> None:
    record = read_record(detector_folder)
    folds = tuple(Evidence(0.7 + fold / 10, (), (f"{fold}.png",), (fold / 10,)) for fold in (1, 2))
    found = selection.Selection("y", "/at/y", record.config, "", folds, Gain("y", 0.1, 0.02)).applied(record)
    scores = (*record.normal_scores, 0.1, 0.2)
    assert found.normal_scores == scores and found.calibration_files == (*record.calibration_files, "1.png", "2.png")
    assert found.threshold(0.01) == nearest_threshold(scores, 0.01) and found.calibration_folds == 3
    assert found.is_approximate and found.guaranteed_rate(found.threshold(0.3)) is None
    assert found.metrics["val/objective"] == pytest.approx(0.85)
    assert found.metrics["val/first_fold_objective"] == record.metrics["val/objective"]
    assert (found.metrics["gain/objective"], found.metrics["gain/error"]) == (0.1, 0.02)
    gain = Gain("y", 0.1, 0.2)
    stayed = selection.Selection("p", "/at/p", record.config, "", folds, gain, is_untuned=True).applied(record)
    assert stayed.metrics["gain/objective"] == 0.0
    assert selection.Selection("x", "/at/x", record.config, "").applied(record) == record
    assert selection.Selection("y", "/at/y", record.config, "", folds).applied(found) == found
    again = DetectorRecord.from_document(json.loads(found.to_json("0" * 64)))
    assert again == found

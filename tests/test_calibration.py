import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dskd.calibration import (
    FALSE_ALARM_RATES,
    Threshold,
    calibrate,
    conformal_threshold,
    discovery_threshold,
    p_value,
)
from dskd.checkpoint import threshold_for
from dskd.data.datasets import split_calibration
from dskd.data.samples import Sample


def by_search(scores: list[float], rate: Fraction) -> float | None:
    """The smallest score that, the new image counted in, at most the wanted share exceeds."""
    for candidate in sorted(scores):
        if Fraction(1 + sum(score > candidate for score in scores), len(scores) + 1) <= rate:
            return candidate
    return None


@given(
    st.lists(st.integers(0, 30).map(float), min_size=1, max_size=150),
    st.sampled_from(["0.7", "0.5", "0.3", "0.2", "0.1", "0.07", "0.05", "0.02", "0.01", "0.001"]),
)
@example([float(index) for index in range(9)], "0.7")  # 10 * (1 - 0.7) is more than 3 in floating point
def test_threshold_is_the_smallest_that_keeps_the_rate(scores: list[float], rate: str) -> None:
    found = conformal_threshold(scores, float(rate))
    wanted = by_search(scores, Fraction(rate))
    assert (found.value if found else None) == wanted
    assert found is None or found.num_normals == len(scores)


def test_new_normal_images_raise_false_alarms_at_the_promised_rate() -> None:
    rng = np.random.default_rng(0)
    rounds, rate = 20_000, 0.1
    alarms = 0
    for _ in range(rounds):
        *calibration, fresh = rng.normal(size=20).tolist()
        threshold = conformal_threshold(calibration, rate)
        assert threshold is not None
        alarms += fresh > threshold.value
    # 19 scores without ties make the bound exact: the share is binomial around the rate itself.
    assert abs(alarms / rounds - rate) < 4 * math.sqrt(rate * (1 - rate) / rounds)


@pytest.mark.parametrize(("fraction", "holds"), [(0.5, True), (0.0, False)])
def test_the_rate_holds_for_a_selected_model_where_other_images_set_its_threshold(fraction: float, holds: bool) -> None:
    """Many models whose scores are chance: the choice takes the one to which its images look most harmless."""
    rng = np.random.default_rng(1)
    held = [Sample(Path(f"{index}.png"), "good", None) for index in range(38)]
    selecting, calibrating = ([held.index(sample) for sample in part] for part in split_calibration(held, fraction, 0))
    rounds, rate = 4000, 0.1
    alarms = 0
    for _ in range(rounds):
        scores = rng.normal(size=(20, len(held) + 1))  # of 20 models; the last image is new
        chosen = scores[np.argmin(np.quantile(scores[:, selecting], 0.9, axis=1))]
        threshold = conformal_threshold(chosen[calibrating].tolist(), rate)
        assert threshold is not None
        alarms += chosen[-1] > threshold.value
    error = math.sqrt(rate * (1 - rate) / rounds)
    if holds:
        assert alarms / rounds < rate + 3 * error
    else:
        assert alarms / rounds > rate + 5 * error, "shared images are expected to break the rate, or this shows nothing"


@pytest.mark.parametrize(
    ("count", "rates"),
    [(18, (1 / 19,)), (19, (0.05,)), (98, (0.05,)), (99, (0.05, 0.01)), (998, (0.05, 0.01)), (999, FALSE_ALARM_RATES)],
)
def test_rates_that_the_images_cannot_vouch_for_are_left_out(count: int, rates: tuple[float, ...]) -> None:
    found = calibrate(list(range(count)))
    assert tuple(threshold.false_alarm_rate for threshold in found) == pytest.approx(rates)
    assert [threshold.value for threshold in found] == sorted(threshold.value for threshold in found)


@pytest.mark.parametrize("count", [1, 2, 7, 18])
def test_few_images_still_give_the_one_threshold_that_they_can(count: int) -> None:
    scores = [float(index) for index in range(count)]
    assert calibrate(scores) == (Threshold(1 / (count + 1), count - 1.0, count),)


def test_no_image_and_no_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        calibrate([])
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            conformal_threshold([1.0], rate)


def test_the_stored_threshold_is_never_stricter_than_asked() -> None:
    loose, middle, strict = (Threshold(rate, value, 999) for rate, value in ((0.05, 1.0), (0.01, 2.0), (0.001, 3.0)))
    stored = (loose, middle, strict)
    assert threshold_for(stored, 0.5) == loose
    assert threshold_for(stored, 0.01) == middle
    assert threshold_for(stored, 0.005) == middle
    assert threshold_for(stored, 0.0001) == strict


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_give_no_threshold(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        calibrate([0.1, value, 0.2])


def test_a_p_value_is_the_rate_of_the_strictest_threshold_that_the_score_passes() -> None:
    rng = np.random.default_rng(0)
    normal = rng.random(39).round(2).tolist()  # with ties
    for score in (-1.0, *normal, 0.333, 2.0):
        found = p_value(normal, score)
        assert 1 / 40 <= found <= 1
        for rate in (0.025, 0.05, 0.1, 0.33, 0.9):
            limit = conformal_threshold(normal, rate)
            assert limit is not None and (score > limit.value) == (found <= rate + 1e-12)


def test_p_values_of_good_images_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [p_value(rng.random(19).tolist(), rng.random()) for _ in range(4000)]
    for rate in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= rate) == pytest.approx(rate, abs=0.03)


def test_among_discoveries_at_most_the_asked_share_is_good() -> None:
    rng = np.random.default_rng(2)
    shares, hits = [], []
    for _ in range(300):
        good, bad = rng.normal(0, 1, 40), rng.normal(4, 1, 10)
        scores = np.concatenate([good, bad])
        limit, count = discovery_threshold(rng.normal(0, 1, 200).tolist(), scores.tolist(), 0.1)
        assert count == (scores > limit).sum()
        shares.append((good > limit).sum() / max(count, 1))
        hits.append((bad > limit).mean())
    assert np.mean(shares) <= 0.1 and np.mean(hits) > 0.7


def test_where_nothing_is_rare_enough_nothing_is_discovered() -> None:
    limit, count = discovery_threshold([0.1, 0.2, 0.3], [0.25, 9.0], 0.05)
    assert count == 0 and limit == 9.0, "three images vouch for no p-value below 1/4"
    assert discovery_threshold([0.1, 0.2], [], 0.05) == (0.2, 0)
    with pytest.raises(ValueError, match=r"false_discovery_rate must lie in \(0, 1\), got 1"):
        discovery_threshold([0.1], [0.2], 1)


def test_everything_may_be_a_discovery() -> None:
    scores = [5.0] * 30
    limit, count = discovery_threshold(list(range(5)), scores, 0.9)
    assert count == 30 and limit < 5.0 and math.isfinite(limit)

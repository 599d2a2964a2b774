"""Thresholds for chosen false-alarm rates, p-values, and drift, from the scores of held-out normal images.

The rates are guaranteed where these images took no part in training nor in choosing an epoch or a model
(`DataConfig.calibration_fraction`). A model that was chosen because these very images look harmless to it gives
them lower scores than new ones, and the rates are then approximate. So they are where every image was scored by the
detector of a fold that did not see it (`DataConfig.folds`), and another detector is delivered.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

FALSE_ALARM_RATES = (0.05, 0.01, 0.001)
DRIFT_LEVEL = 0.01
"""Of fair batches at most this share is called drifted, where the rates of the thresholds are proven."""
MIN_DRIFT_IMAGES = 20
"""Of a batch, and of the good images behind the thresholds: with fewer no drift is told."""


class Threshold(NamedTuple):
    """A score above `value` is anomalous; on new normal images at most `false_alarm_rate` of them are."""

    false_alarm_rate: float
    value: float
    num_normals: int
    """How many held-out normal images the value rests on."""


def conformal_threshold(normal_scores: Sequence[float], false_alarm_rate: float) -> Threshold | None:
    """The smallest threshold with a split-conformal guarantee, None where the images are too few.

    With n exchangeable normal scores the ceil((n + 1)(1 - rate))-th smallest is exceeded by a new
    normal score with probability at most the rate (Vovk et al. 2005; Lei et al. 2018, eq. 2), so
    1/(n + 1) is the lowest rate that n images can guarantee. The probability is over the draw of the
    n images and the new one together: a single draw's rate varies around it.

    >>> conformal_threshold([0.1, 0.4, 0.2, 0.3], 0.4)  # the ceil(5 · 0.6) = 3rd smallest
    Threshold(false_alarm_rate=0.4, value=0.3, num_normals=4)
    >>> conformal_threshold([0.1, 0.4, 0.2, 0.3], 0.1) is None  # 4 images vouch for 1/5 at best
    True
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie in (0, 1), got {false_alarm_rate}.")
    count = len(normal_scores)
    # A rate such as 0.7 has no exact binary form: 10 * (1 - 0.7) must not round up to 4.
    rank = math.ceil((count + 1) * (1 - false_alarm_rate) - 1e-9)
    if rank > count:
        return None
    return Threshold(false_alarm_rate, float(sorted(normal_scores)[rank - 1]), count)


def lowest_rate(num_normals: int) -> float:
    """The lowest false-alarm rate, in (0, 1], that so many normal images can vouch for.

    >>> lowest_rate(19)
    0.05
    """
    return 1 / (num_normals + 1)


def images_for(false_alarm_rate: float) -> int:
    """How many normal images it takes to vouch for that rate.

    >>> images_for(0.05), images_for(0.01)
    (19, 99)
    """
    return math.ceil(1 / false_alarm_rate - 1e-9) - 1


def nearest_threshold(normal_scores: Sequence[float], false_alarm_rate: float) -> Threshold:
    """The threshold for that rate, or for the lowest that so many images can vouch for, 1/(n + 1).

    >>> nearest_threshold([0.1, 0.4, 0.2, 0.3], 0.01)
    Threshold(false_alarm_rate=0.2, value=0.4, num_normals=4)
    """
    found = conformal_threshold(normal_scores, max(false_alarm_rate, lowest_rate(len(normal_scores))))
    assert found is not None
    return found


def p_value(normal_scores: Sequence[float], score: float) -> float:
    """How rare such a score is among good images: (1 + number of normal scores at or above it) / (n + 1).

    If the image is as good as the n images, the p-value is at most a with probability at most a (Vovk et al. 2005).

    >>> p_value([0.1, 0.4, 0.2, 0.3], 0.35)
    0.4
    """
    return (1 + sum(each >= score for each in normal_scores)) / (len(normal_scores) + 1)


def normal_floor(normal_scores: Sequence[float]) -> float:
    """The 95th percentile of normal scores: what lies below it is seen in good images too, and not worth showing.

    >>> normal_floor([0.1, 0.2, 0.3])
    0.29
    """
    import numpy as np  # a slow import, which the command line's help does without

    return float(np.quantile(np.asarray(normal_scores, np.float64), 0.95))


def discovery_threshold(
    normal_scores: Sequence[float], scores: Sequence[float], false_discovery_rate: float
) -> tuple[float, int]:
    """The threshold for a batch of `scores`, and how many lie above it: Benjamini-Hochberg on conformal p-values.

    Among the images of the batch that are called anomalous, at most that share is good in expectation (Bates et al.
    2023, theorem 1, for images that are independent of the normal ones). If none can be called anomalous, the
    threshold is the highest score that there is.
    """
    import numpy as np  # slow imports, which the command line's help does without
    from scipy.stats import false_discovery_control

    if not 0 < false_discovery_rate < 1:
        raise ValueError(f"false_discovery_rate must lie in (0, 1), got {false_discovery_rate}.")
    highest = max([*normal_scores, *scores])
    if not len(scores):
        return highest, 0
    ordered = np.sort(np.asarray(normal_scores, np.float64))
    above = len(ordered) - np.searchsorted(ordered, np.asarray(scores, np.float64), side="left")
    rejected = false_discovery_control((1 + above) / (len(ordered) + 1)) <= false_discovery_rate
    if not rejected.any():
        return highest, 0
    most = int(above[rejected].max())  # normal scores at or above the weakest of them: the next one lies below it
    if most == len(ordered):
        return math.nextafter(min(scores), -math.inf), int(rejected.sum())
    return float(ordered[len(ordered) - most - 1]), int(rejected.sum())


def calibrate(normal_scores: Sequence[float], rates: Iterable[float] = FALSE_ALARM_RATES) -> tuple[Threshold, ...]:
    """Thresholds for each attainable rate, the strictest last; at least one.

    Where the images are too few even for the loosest rate, the only entry is the lowest rate
    that they can guarantee, 1/(n + 1).

    >>> calibrate([0.1, 0.3, 0.2])
    (Threshold(false_alarm_rate=0.25, value=0.3, num_normals=3),)
    """
    if not normal_scores:
        raise ValueError("no held-out normal score to calibrate on; raise validation_fraction.")
    if not all(map(math.isfinite, normal_scores)):
        raise ValueError("scores of held-out normal images are not finite: no threshold can rest on them.")
    attainable = [conformal_threshold(normal_scores, rate) for rate in sorted(rates, reverse=True)]
    found = tuple(threshold for threshold in attainable if threshold is not None)
    if found:
        return found
    return (nearest_threshold(normal_scores, 0.0),)


class Drift(NamedTuple):
    """What a test says of a batch."""

    p_value: float
    """How rare such a difference is between batches of the same kind, in [0, 1]."""
    level: float
    num_images: int
    """Of the batch, those below the threshold, which were compared; all of it where most lie above."""
    num_normals: int
    """Good images that they were compared with."""
    mostly_anomalous: bool = False
    """More than half of the batch lies above the threshold: too many for a test of the others to mean anything."""

    @property
    def is_found(self) -> bool:
        return self.mostly_anomalous or self.p_value <= self.level

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "is_found": self.is_found}

    def describe(self) -> str:
        """One line for people; only of a drift that is found."""
        what = (
            "more than half of these images are anomalous"
            if self.mostly_anomalous
            else f"the scores of the images called good differ from those of the {self.num_normals} good images behind "
            f"the thresholds (p = {self.p_value:.2g}, level {self.level:g})"
        )
        return (
            f"drift: {what}. Where the parts are good, camera, light or the parts themselves have changed: look, and "
            "add images judged anew (dskd feedback), or train again."
        )


def drift_of(
    normal_scores: Sequence[float], scores: Sequence[float], threshold: float, level: float = DRIFT_LEVEL
) -> Drift | None:
    """Compare the scores of a batch with those of good images, below the threshold; None where there are too few.

    Defects in the batch must not count as drift, so both sides keep their scores below the threshold alone. That costs
    no validity: given an order statistic of exchangeable scores, those below it are a sample of one distribution
    (David and Nagaraja 2003, theorem 2.5), and so are the new ones below it. The test is Kolmogorov's and Smirnov's of
    two samples, which is exact for continuous scores. A shift that lifts most images above the threshold leaves none
    to compare, and is told by their number.
    """
    import numpy as np  # slow imports, which the command line's help does without
    from scipy.stats import ks_2samp

    normals, seen = np.asarray(normal_scores, np.float64), np.asarray(scores, np.float64)
    if min(normals.size, seen.size) < MIN_DRIFT_IMAGES:
        return None
    if (seen > threshold).mean() > 0.5:
        return Drift(0.0, level, seen.size, normals.size, True)
    old, new = normals[normals < threshold], seen[seen < threshold]
    if min(old.size, new.size) < MIN_DRIFT_IMAGES // 2:
        return None
    return Drift(float(ks_2samp(old, new).pvalue), level, new.size, old.size)

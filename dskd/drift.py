"""Whether a batch of images still looks like the good images that the thresholds rest on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

LEVEL = 0.01
"""Of fair batches at most this share is called drifted, where the rates of the thresholds are proven."""
MIN_IMAGES = 20
"""Of a batch, and of the good images behind the thresholds: with fewer no drift is told."""


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
    normal_scores: Sequence[float], scores: Sequence[float], threshold: float, level: float = LEVEL
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
    if min(normals.size, seen.size) < MIN_IMAGES:
        return None
    if (seen > threshold).mean() > 0.5:
        return Drift(0.0, level, seen.size, normals.size, True)
    old, new = normals[normals < threshold], seen[seen < threshold]
    if min(old.size, new.size) < MIN_IMAGES // 2:
        return None
    return Drift(float(ks_2samp(old, new).pvalue), level, new.size, old.size)

"""What held-out images say of trained students: the validation objective, how uncertain it is, and normal scores."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dskd.config import ScoreConfig

if TYPE_CHECKING:  # torch, which those who only compare evidence do not need
    from dskd.training.score_search import CoarseImages

NUM_REPLICATES = 200


class Evidence(NamedTuple):
    """Figures of trained students on the images of a fold that they were not trained on."""

    objective: float
    """Mean of image AUROC and AUPRO on the held-out images and their copies with synthetic defects."""
    replicates: tuple[float, ...]
    """The objective on `NUM_REPLICATES` resamples of the parts; the n-th resample is the same for all students, so
    that differences of two configurations are paired."""
    files: tuple[str, ...]
    """Names of the held-out normal images."""
    scores: tuple[float, ...]
    """Their anomaly scores."""
    part_scores: tuple[float, ...] = ()
    """The worst score of each part, if several images show one."""

    def to_json(self) -> str:
        return json.dumps(self._asdict(), allow_nan=False)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Evidence":
        """Raises KeyError or TypeError on a document that `to_json` did not write."""
        lists = {name: tuple(document[name]) for name in cls._fields if name != "objective"}
        return cls(objective=float(document["objective"]), **lists)


def paired_gain(one: Sequence[Evidence], other: Sequence[Evidence]) -> tuple[float, float]:
    """Mean over the folds of the first objective minus the second, and its standard error.

    The error is that of the paired bootstrap over parts, within each fold; the same folds in both, at least one.
    """
    pairs = list(zip(one, other, strict=True))
    gain = float(np.mean([mine.objective - theirs.objective for mine, theirs in pairs]))
    variances = [np.var(np.subtract(mine.replicates, theirs.replicates), ddof=1) for mine, theirs in pairs]
    return gain, float(np.sqrt(np.sum(variances)) / len(pairs))


def resampled_objectives(
    images: "CoarseImages", score: ScoreConfig, groups: npt.NDArray[np.int64], seed: int = 0
) -> tuple[float, ...]:
    """The objective on `NUM_REPLICATES` bootstrap samples of the parts, on the coarse grid of the score search.

    `groups` (N,) has the same number for the images of one part, defective copies included. A part is drawn with all
    its images; the samples depend on `groups` and `seed` alone. A sample of one class only is drawn again.
    """
    return tuple(images.objectives(score, _resamples(groups, images.labels, np.random.default_rng(seed))))


def _resamples(
    groups: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_], rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    names = np.unique(groups)
    members = {name: np.flatnonzero(groups == name) for name in names}
    samples: list[npt.NDArray[np.int64]] = []
    while len(samples) < NUM_REPLICATES:
        drawn = np.concatenate([members[name] for name in rng.choice(names, len(names))])
        if len(np.unique(labels[drawn])) == 2:
            samples.append(drawn)
    return samples

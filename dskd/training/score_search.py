"""Search better score parameters for students that are already trained: how maps are fused, blurred and pooled.

Thousands of configurations per minute are tried on the discrepancies of the validation images, without
retraining. With so many trials on so few images some are better only by chance. A winner is therefore
adopted only if winners of the same procedure, found on one half of the images, are better on the other half.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dskd import metrics
from dskd.anomaly import anomaly_maps, image_scores
from dskd.config import Fusion, ScoreConfig
from dskd.model.distances import Discrepancies

_GRID = 32
"""Side of the maps on which candidates are compared; the blur is scaled accordingly."""
_REPEATS = 3
"""Number of random splits of the images into halves."""
_STUDENT_FUSIONS = (*get_args(Fusion), "noisy-or")
_TOP_FRACTIONS = (0.0, 0.002, 0.005, 0.01, 0.03)


class CoarseImages(NamedTuple):
    """Labelled images on a coarse grid, on which thousands of score configurations are compared."""

    found: Discrepancies
    """Every level resized to the grid."""
    masks: npt.NDArray[np.bool_]
    """(N, G, G); a cell is defective if any of its pixels is, so no defect disappears."""
    components: metrics.Components
    labels: npt.NDArray[np.bool_]
    has_mask: npt.NDArray[np.bool_]
    inside: npt.NDArray[np.bool_] | np.bool_

    @classmethod
    def of(
        cls,
        found: Discrepancies,
        masks: npt.NDArray[np.bool_],
        labels: npt.NDArray[np.bool_],
        has_mask: npt.NDArray[np.bool_],
        inside: npt.NDArray[np.bool_] | None = None,
    ) -> "CoarseImages":
        """From discrepancies and, as in `LabelledImages`, truth at full size."""

        def resize(levels: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            if levels is None:
                return None
            return tuple(F.interpolate(level[:, None], (_GRID, _GRID), mode="area")[:, 0] for level in levels)

        coarse = _on_grid(masks)
        return cls(
            Discrepancies(resize(found.encoder), resize(found.decoder)),
            coarse,
            metrics.label_components(coarse),
            labels,
            has_mask,
            np.True_ if inside is None else _on_grid(inside),
        )

    def objectives(self, config: ScoreConfig, parts: Sequence[npt.NDArray[np.int64]]) -> list[float]:
        """Mean of image AUROC and AUPRO for each part of the images, given by indices that may repeat.

        Image AUROC alone if no image has a mask. Raises ValueError on a part of one class only.
        """
        maps = anomaly_maps(self.found, config, _GRID) * torch.from_numpy(np.asarray(self.inside))
        scores = image_scores(maps, config.score_top_fraction).numpy()
        pixels, has_defect = maps.numpy(), self.masks.any()
        figures = []
        for part in parts:
            known = part[self.has_mask[part]]
            of_images = metrics.auroc(scores[part], self.labels[part])
            if has_defect:
                of_pixels = metrics.aupro(pixels[known], self.masks[known], components=self.components.of(known))
                of_images = (of_images + of_pixels) / 2
            figures.append(of_images)
        return figures


class ScoreSearch(NamedTuple):
    """Result of a search of score parameters; gains refer to the mean of image AUROC and AUPRO."""

    best: ScoreConfig
    """The winner if it is adopted, otherwise the baseline: the given configuration, or the same with equal weights
    if that is at least as good."""
    is_adopted: bool
    """Whether winners beat the baseline by more than the standard error, on images not used to choose them."""
    gain: float
    """Mean of winner minus baseline on the images that were not used to choose the winner."""
    standard_error: float
    num_candidates: int
    seconds: float


def search_scores(
    found: Discrepancies,
    masks: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.bool_],
    has_mask: npt.NDArray[np.bool_],
    sources: npt.NDArray[np.int64],
    given: ScoreConfig,
    *,
    num_candidates: int,
    seed: int = 0,
    inside: npt.NDArray[np.bool_] | None = None,
) -> ScoreSearch:
    """Try `num_candidates` configurations of level weights, student weights, fusion, blur and pooling.

    `found` are the discrepancies of N validation images; `masks` (N, H, W), `labels`, `has_mask` and `sources`
    (N,), and `inside` as in `LabelledImages`. An image and its defective copies are always in the same half of the
    images.

    The gain is measured by repeated splits into halves: the winner on one half is compared with the baseline on
    the other. Its standard error follows Nadeau and Bengio (2003), who account for splits of the same images.
    With fewer than four sources nothing can be measured, and `given` is kept.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    halves = _halves(sources, labels, rng)
    if not halves or num_candidates < 1:
        return ScoreSearch(given, False, 0.0, math.inf, 0, time.perf_counter() - started)
    candidates = [given, _equal_weights(given), *draw_scores(given, found, rng, num_candidates)]
    images = CoarseImages.of(found, masks, labels, has_mask, inside)
    parts = [np.arange(len(labels)), *(half for pair in halves for half in pair)]
    objectives = np.array([images.objectives(each, parts) for each in candidates])
    baseline = 1 if objectives[1, 0] >= objectives[0, 0] else 0
    gains = []
    for index in range(len(halves)):
        first, second = objectives[:, 1 + 2 * index], objectives[:, 2 + 2 * index]
        gains += [second[first.argmax()] - second[baseline], first[second.argmax()] - first[baseline]]
    gain = float(np.mean(gains))
    # Both halves, for choosing and for measuring, are of equal size: a ratio of 1 in Nadeau and Bengio's correction.
    error = math.sqrt((1 / len(gains) + 1) * float(np.var(gains, ddof=1)))
    winner = int(objectives[:, 0].argmax())
    is_adopted = gain > error and winner != baseline
    return ScoreSearch(
        candidates[winner if is_adopted else baseline],
        is_adopted,
        gain,
        error,
        len(candidates),
        time.perf_counter() - started,
    )


def _equal_weights(given: ScoreConfig) -> ScoreConfig:
    return dataclasses.replace(
        given,
        score_level_weights=(1.0,) * len(given.score_level_weights),
        encoder_score_weight=1.0,
        decoder_score_weight=1.0,
    )


def draw_scores(
    given: ScoreConfig, found: Discrepancies, rng: np.random.Generator, count: int
) -> tuple[ScoreConfig, ...]:
    """Random configurations for the students of `found`; what they do not vary is as in `given`."""
    return tuple(_draw(given, found, rng) for _ in range(count))


def _draw(given: ScoreConfig, found: Discrepancies, rng: np.random.Generator) -> ScoreConfig:
    """A random candidate; its weights are drawn uniformly among all weights with the same sum."""
    levels = found.encoder or found.decoder
    assert levels is not None
    weights = rng.dirichlet(np.ones(len(levels))) * len(levels)
    changes: dict[str, object] = {
        "score_level_weights": tuple(round(float(weight), 3) for weight in weights),
        "level_fusion": str(rng.choice(get_args(Fusion))),
        "blur_sigma": round(float(rng.uniform(1, 8)), 2),
        "score_top_fraction": float(rng.choice(_TOP_FRACTIONS)),
    }
    if found.encoder is not None and found.decoder is not None:
        share = round(float(rng.uniform(0, 1)), 3)
        changes |= {
            "encoder_score_weight": share,
            "decoder_score_weight": round(1 - share, 3),
            "student_fusion": str(rng.choice(_STUDENT_FUSIONS)),
        }
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


def _halves(
    sources: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_], rng: np.random.Generator
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Indices of the images in random halves of the sources; an empty list if there are too few sources."""
    names = np.unique(sources)
    if len(names) < 4:
        return []
    halves = []
    for _ in range(_REPEATS):
        chosen = rng.permutation(names)[: len(names) // 2]
        is_first = np.isin(sources, chosen)
        if all(len(set(labels[side].tolist())) == 2 for side in (is_first, ~is_first)):
            halves.append((np.flatnonzero(is_first), np.flatnonzero(~is_first)))
    return halves


def _on_grid(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Masks on the grid; a cell is defective if any of its pixels is, so no defect disappears."""
    cells = F.adaptive_max_pool2d(torch.from_numpy(masks)[:, None].float(), _GRID)
    reduced: npt.NDArray[np.bool_] = cells[:, 0].numpy() > 0
    return reduced

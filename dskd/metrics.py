"""Exact detection and localisation metrics, and a state that merges across ranks without rounding.

Every metric here depends only on the order of the scores, so everything is counted, without bins:
the defects are ranked among the normals (`_rank`) and the metrics are sums over that ranking. Floats
are summed in sorted order or with `math.fsum`, so each result is independent of the order of the
images, to the last bit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

Array: TypeAlias = NDArray[Any] | torch.Tensor

AUPRO_FPR_LIMIT = 0.3
_RD_STEPS = 200
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Scores(NamedTuple):
    """All metrics of one category, each in [0, 1].

    The pixel metrics and `aupro` are NaN if no mask has a defect pixel.
    """

    image_auroc: float
    image_ap: float
    image_f1_max: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1max: float
    aupro: float


class Curve(NamedTuple):
    """All corners of a curve that rises with the false alarms; straight segments between them give the exact curve."""

    fpr: NDArray[np.float64]
    """(P,), ascending, starts at 0: share of normals at or above the threshold."""
    hits: NDArray[np.float64]
    """(P,), ascending: share of the defects at or above the threshold."""


class _Batch(NamedTuple):
    """What the metrics need from some images: their pixels split by the mask, and their image scores."""

    normals: NDArray[Any]
    defects: NDArray[Any]
    regions: NDArray[np.int32]  # per defect pixel, the number of its component within this batch
    image_scores: NDArray[Any]
    image_labels: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MetricState:
    """The images added so far; `MetricState()` is empty.

    Plain numpy arrays, about 4 bytes per pixel for float32 maps: it pickles cheaply, so
    `torch.distributed.all_gather_object` and Ray can send it unchanged. Add every image on one rank only:
    an image that a padding sampler gives to two ranks counts twice.
    """

    batches: tuple[_Batch, ...] = ()


class _Ranking(NamedTuple):
    """Each distinct positive value in ascending order, and how many negatives are above it."""

    positives: NDArray[np.int64]  # positives of exactly this value
    above: NDArray[np.int64]  # negatives greater than the value
    at_least: NDArray[np.int64]  # negatives greater than or equal to it


def auroc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve; a tie between the classes counts half.

    `scores` (N,), higher is more anomalous; `labels` (N,), 1 or True for anomalous. ValueError if the shapes
    differ, a score is not finite, a label is not 0 or 1, or a class is missing; also in the functions below.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))  # 3 of 4 pairs are in order
    0.75
    """
    positives, negatives = _split_scores(scores, labels)
    return _auroc(_rank(np.sort(negatives), np.sort(positives)), negatives.size)


def roc_curve(scores: Array, labels: Array) -> Curve:
    """The curve whose area is `auroc`; arguments and errors as for `auroc`."""
    positives, negatives = _split_scores(scores, labels)
    return _roc_curve(_rank(np.sort(negatives), np.sort(positives)), negatives.size)


def average_precision(scores: Array, labels: Array) -> float:
    """Mean over the positives of the precision at their threshold, without interpolation.

    Arguments and errors as for `auroc`; equal scores share one threshold, as in scikit-learn.

    >>> round(average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])), 4)  # (2/3 + 1) / 2
    0.8333
    """
    positives, negatives = _split_scores(scores, labels)
    return _average_precision(_rank(np.sort(negatives), np.sort(positives)))


def f1_max(scores: Array, labels: Array) -> float:
    """The best F1 = 2PR / (P + R) over all thresholds; arguments and errors as for `auroc`.

    >>> f1_max(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))  # P = 2/3 and R = 1 at 0.35
    0.8
    """
    positives, negatives = _split_scores(scores, labels)
    return _f1_max(_rank(np.sort(negatives), np.sort(positives)))


def pixel_auroc(maps: Array, masks: Array) -> float:
    """Area under the ROC curve over all pixels of all images, the normal images included.

    `maps` (N, H, W), higher is more anomalous; `masks` (N, H, W), 1 or True on defects. ValueError if
    the shapes differ, a map value is not finite, a mask value is not 0 or 1, or there is no defect pixel
    or no normal pixel; the same holds for `aupro`.

    >>> pixel_auroc(np.array([[[0.1, 0.9], [0.2, 0.3]]]), np.array([[[0, 1], [0, 1]]]))
    1.0
    """
    pixels, mask = _checked_maps(maps, masks)
    defects, normals = pixels[mask], pixels[~mask]
    _require_both(defects.size, normals.size, "pixel")
    normals.sort()
    return _auroc(_rank(normals, np.sort(defects)), normals.size)


def pixel_roc_curve(maps: Array, masks: Array) -> Curve:
    """The curve whose area is `pixel_auroc`; arguments and errors as for `pixel_auroc`."""
    pixels, mask = _checked_maps(maps, masks)
    defects, normals = pixels[mask], pixels[~mask]
    _require_both(defects.size, normals.size, "pixel")
    normals.sort()
    return _roc_curve(_rank(normals, np.sort(defects)), normals.size)


def pro_curve(maps: Array, masks: Array, fpr_limit: float = AUPRO_FPR_LIMIT) -> Curve:
    """The curve up to `fpr_limit`; its area divided by `fpr_limit` is `aupro`. Arguments and errors as for `aupro`."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}.")
    pixels, mask = _checked_maps(maps, masks)
    defects, normals = pixels[mask], pixels[~mask]
    _require_both(defects.size, normals.size, "pixel")
    normals.sort()
    order = np.argsort(defects)
    regions = _regions(mask)[order]
    sizes = np.bincount(regions)
    ranking = _rank(normals, defects[order])
    shares = np.add.reduceat(1 / (sizes[regions] * sizes.size), np.cumsum(ranking.positives) - ranking.positives)
    whole = _curve(ranking, shares, normals.size)
    inside = whole.fpr < fpr_limit
    return Curve(
        np.append(whole.fpr[inside], fpr_limit),
        np.append(whole.hits[inside], np.interp(fpr_limit, whole.fpr, whole.hits)),
    )


class Components(NamedTuple):
    """The 8-connected components of masks, labelled once for many maps."""

    numbers: NDArray[np.int32]
    """(N, H, W), the component of each defect pixel, counted from 0 in each image; elsewhere of no meaning."""
    counts: NDArray[np.int64]
    """(N,), components of each image."""

    def of(self, images: NDArray[np.int64]) -> "Components":
        """Those of the images at these indices, of which one may occur several times."""
        return Components(self.numbers[images], self.counts[images])


def label_components(masks: NDArray[np.bool_]) -> Components:
    """The components of masks (N, H, W), as `aupro` takes them."""
    numbers, counts = np.zeros(masks.shape, np.int32), np.zeros(len(masks), np.int64)
    for index in np.flatnonzero(masks.any(axis=(1, 2))):
        components, counts[index] = ndimage.label(masks[index], _EIGHT_NEIGHBOURS)
        numbers[index] = components - 1
    return Components(numbers, counts)


def aupro(
    maps: Array, masks: Array, fpr_limit: float = AUPRO_FPR_LIMIT, *, components: Components | None = None
) -> float:
    """Area under the per-region-overlap curve up to `fpr_limit`, divided by `fpr_limit` (Bergmann et al. 2021).

    PRO is the mean, over the 8-connected mask components of the whole data set, of the share of the
    component above the threshold. FPR is the share of the normal pixels of all images, normal images
    included. The curve uses every distinct threshold and is cut at the limit by linear
    interpolation. Arguments and errors as for `pixel_auroc`; also ValueError for `fpr_limit` outside (0, 1].
    `components` are those of `masks`, which save their labelling.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}.")
    pixels, mask = _checked_maps(maps, masks)
    regions = _regions(mask) if components is None else _numbered(components, mask)
    defects, normals = pixels[mask], pixels[~mask]
    _require_both(defects.size, normals.size, "pixel")
    limit = fpr_limit * normals.size
    # Only the normals within the limit, and those equal to the lowest of them, need sorting: a defect
    # below all of them adds no area. In place: boolean indexing has made a copy already, and new memory is slow.
    split = normals.size - math.ceil(limit)
    normals.partition(split)
    rest, top = normals[:split], normals[split:]
    order = np.argsort(defects)
    ranking = _rank(np.sort(np.append(rest[rest == top[0]], top)), defects[order])
    return _aupro(ranking, regions[order], limit)


def aupro_rd(maps: Array, masks: Array) -> float:
    """The per-image AUPRO of RD4AD's released code, which gives higher values; only to compare with such results.

    As in that code (and in RD++, ReContrast, AAND): each image with a defect has its own curve over 200
    thresholds in equal steps from its lowest value, with the FPR over its own normal pixels. Points with FPR < 0.3
    are kept, the kept FPRs are divided by the largest of them, and the areas are averaged over the images.
    Normal images never count, and the value changes under monotone transforms of a map: use `aupro` for all
    other purposes. If an image's kept points all have FPR 0 (that code divides by zero), the area is the
    highest kept PRO; if no point is kept, it is 0. Arguments and errors as for `pixel_auroc`, but each
    defective image must have a normal pixel.
    """
    pixels, mask = _checked_maps(maps, masks)
    defective = np.flatnonzero(mask.any(axis=(1, 2)))
    _require_both(defective.size, mask.size - int(mask.sum()), "pixel")
    return math.fsum(_rd_area(pixels[i], mask[i]) for i in defective) / defective.size


def score_maps(
    maps: Array,
    masks: Array,
    image_scores: Array,
    image_labels: Array,
    has_mask: Array | None = None,
    inside: Array | None = None,
) -> Scores:
    """All metrics of one set of images; the pixels are sorted only once.

    `maps`, `masks` (N, H, W) and `image_scores`, `image_labels` (N,) as for `pixel_auroc` and `auroc`.
    Labels come from the folders and are never derived from masks: a defective image may have an empty mask.
    Without any defect pixel the pixel metrics and `aupro` are NaN. `has_mask` (N,), by default all true, is
    false for an image whose mask is unknown: it counts only for the image metrics, not for the pixel metrics
    and `aupro`. `inside` (N, H, W), by default all true, is false for pixels that are not inspected: they are of
    neither kind. Errors as for `update` and `compute`.
    """
    return compute(update(MetricState(), maps, masks, image_scores, image_labels, has_mask, inside))


def update(
    state: MetricState,
    maps: Array,
    masks: Array,
    image_scores: Array,
    image_labels: Array,
    has_mask: Array | None = None,
    inside: Array | None = None,
) -> MetricState:
    """The state with a batch of images added; N may be 0, H and W may differ from batch to batch.

    Arguments as for `score_maps`; tensors may be on any device. ValueError if shapes differ, a map or score
    is not finite, or a mask or label is not 0 or 1. Missing classes are an error only in `compute`.
    """
    pixels, mask = _checked_maps(maps, masks)
    looked_at = np.ones_like(mask) if inside is None else _as_binary(inside, "inside")
    if looked_at.shape != mask.shape:
        raise ValueError(f"expected inside of the masks' shape {mask.shape}, got {looked_at.shape}.")
    scores, labels = _checked_scores(image_scores, image_labels)
    if len(scores) != len(pixels):
        raise ValueError(f"expected one image score per map, got {len(scores)} scores for {len(pixels)} maps.")
    if has_mask is not None:
        known = _as_binary(has_mask, "has_mask")
        if known.shape != labels.shape:
            raise ValueError(f"expected has_mask of the labels' shape {labels.shape}, got {known.shape}.")
        pixels, mask, looked_at = pixels[known], mask[known], looked_at[known]
    mask = mask & looked_at
    # Boolean indexing makes a copy of the maps; copy the scores too, as the caller may reuse its buffer.
    batch = _Batch(pixels[looked_at & ~mask], pixels[mask], _regions(mask), scores.copy(), labels.copy())
    return MetricState((*state.batches, batch))


def pro_points(state: MetricState, always: Sequence[float] = (), count: int = 100) -> list[tuple[float, float, float]]:
    """Threshold, share of the normal pixels above it, and mean share of the defect regions above it, (FPR, PRO).

    About `count` thresholds by falling value, dense where few normal pixels lie above, and those that are `always`
    asked for. Empty if no mask has a defect pixel, or no pixel is normal.
    """
    if not state.batches:
        return []
    defects = np.concatenate([batch.defects for batch in state.batches])
    normals = np.concatenate([batch.normals for batch in state.batches])
    if not defects.size or not normals.size:
        return []
    normals.sort()
    order = np.argsort(defects)
    regions = _joined_regions([batch.regions for batch in state.batches])[order]
    defects = defects[order]
    sizes = np.bincount(regions)
    below = np.append(0.0, np.cumsum(1 / (sizes[regions] * sizes.size)))
    shares = np.concatenate([np.geomspace(1e-5, 0.01, count // 3), np.linspace(0.01, 1, count - count // 3)])
    ranks = ((1 - shares) * (normals.size - 1)).astype(np.int64)
    chosen = np.unique(np.concatenate([normals[ranks], [defects[-1], normals[-1]], np.asarray(always, normals.dtype)]))
    fpr = 1 - np.searchsorted(normals, chosen, side="right") / normals.size
    pro = 1 - below[np.searchsorted(defects, chosen, side="right")]
    points = zip(chosen.tolist(), fpr.tolist(), pro.clip(0, 1).tolist(), strict=True)
    return sorted(points, reverse=True)


def merge(states: Iterable[MetricState]) -> MetricState:
    """One state with the images of all states; `compute` gives the same metrics for every partition and order."""
    return MetricState(tuple(batch for state in states for batch in state.batches))


def compute(state: MetricState) -> Scores:
    """All metrics of the images in the state.

    ValueError if normal or anomalous images are missing, or no pixel of any image is normal.
    """
    if not state.batches:
        raise ValueError("expected a state with images, got an empty one; update or merge it first.")
    image_scores = np.concatenate([batch.image_scores for batch in state.batches])
    image_labels = np.concatenate([batch.image_labels for batch in state.batches])
    positives, negatives = image_scores[image_labels], image_scores[~image_labels]
    _require_both(positives.size, negatives.size, "image")
    images = _rank(np.sort(negatives), np.sort(positives))
    return Scores(
        _auroc(images, negatives.size),
        _average_precision(images),
        _f1_max(images),
        *_pixel_figures(state),
    )


def _pixel_figures(state: MetricState) -> tuple[float, float, float, float]:
    defects = np.concatenate([batch.defects for batch in state.batches])
    if not defects.size:
        return math.nan, math.nan, math.nan, math.nan
    normals = np.concatenate([batch.normals for batch in state.batches])
    _require_both(defects.size, normals.size, "pixel")
    normals.sort()
    order = np.argsort(defects)
    ranking = _rank(normals, defects[order])
    regions = _joined_regions([batch.regions for batch in state.batches])[order]
    return (
        _auroc(ranking, normals.size),
        _average_precision(ranking),
        _f1_max(ranking),
        _aupro(ranking, regions, AUPRO_FPR_LIMIT * normals.size),
    )


def _rank(negatives: NDArray[Any], positives: NDArray[Any]) -> _Ranking:
    """Ranks sorted positives among sorted negatives."""
    first = np.flatnonzero(np.append(True, positives[1:] != positives[:-1]))
    values = positives[first]
    below = np.searchsorted(negatives, values)
    not_above = below.copy()
    # In real maps few defect values equal a normal value; only those need the second search.
    tied = np.flatnonzero(negatives[np.minimum(below, negatives.size - 1)] == values)
    not_above[tied] = np.searchsorted(negatives, values[tied], side="right")
    return _Ranking(
        positives=np.diff(first, append=positives.size),
        above=negatives.size - not_above,
        at_least=negatives.size - below,
    )


def _auroc(ranking: _Ranking, num_negatives: int) -> float:
    num_positives = int(ranking.positives.sum())
    # Twice the Mann-Whitney count of wrongly ordered pairs, in integers.
    wrong = int((ranking.positives * (ranking.above + ranking.at_least)).sum())
    pairs = 2 * num_positives * num_negatives
    return (pairs - wrong) / pairs


def _roc_curve(ranking: _Ranking, num_negatives: int) -> Curve:
    return _curve(ranking, ranking.positives / ranking.positives.sum(), num_negatives)


def _curve(ranking: _Ranking, shares: NDArray[np.float64], num_negatives: int) -> Curve:
    """Adds up each value's share of the defects, from the highest value down; a tie gives one sloped segment."""
    after = np.cumsum(shares[::-1])
    before = np.append(0.0, after[:-1])
    fpr = np.column_stack([ranking.above[::-1], ranking.at_least[::-1]]).ravel() / num_negatives
    hits = np.column_stack([before, after]).ravel()
    return Curve(np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], hits, [1.0]]).clip(0, 1))


def _average_precision(ranking: _Ranking) -> float:
    # Recall rises only at values of positives, so no other thresholds are needed.
    hits = _hits(ranking)
    precision = hits / (hits + ranking.at_least)
    return float((ranking.positives * precision).sum() / hits[0])


def _f1_max(ranking: _Ranking) -> float:
    # A threshold between two positive values gives only more false alarms than the upper of the two.
    hits = _hits(ranking)
    return float((2 * hits / (hits + ranking.at_least + hits[0])).max())


def _hits(ranking: _Ranking) -> NDArray[np.int64]:
    """Positives at or above each value."""
    return np.cumsum(ranking.positives[::-1])[::-1]


def _aupro(ranking: _Ranking, regions: NDArray[np.int32], limit: float) -> float:
    """AUPRO from ranked defect pixels; `regions` sorted by ascending pixel value, `limit` in normal pixels.

    When the threshold passes a pixel's value, the false positives grow from `above` to `at_least`. The pixel's
    coverage grows linearly from 0 to 1 meanwhile, as interpolation draws one straight segment through the tie, and
    stays 1 afterwards. Its area up to the limit is therefore
        limit - (above + at_least) / 2              if the segment ends within the limit,
        (limit - above)² / (2 (at_least - above))   if the limit cuts it: the triangle up to the cut,
        0                                           if it begins beyond the limit.
    """
    above, at_least = ranking.above, ranking.at_least
    areas = np.maximum(limit - (above + at_least) / 2, 0)
    cut = (above < limit) & (limit < at_least)
    areas[cut] = (limit - above[cut]) ** 2 / (2 * (at_least[cut] - above[cut]))
    # Each component sums its pixels by ascending value, so its batch makes no difference.
    sums = np.bincount(regions, weights=np.repeat(areas, ranking.positives))
    means = sums / np.bincount(regions)
    return math.fsum(means) / (limit * means.size)


def _regions(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each defect pixel in raster order, the number of its 8-connected component, counted from 0."""
    regions = []
    for mask in masks[masks.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        components, _ = ndimage.label(box, _EIGHT_NEIGHBOURS)
        regions.append(components[box] - 1)
    return _joined_regions(regions)


def _numbered(components: Components, masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """As `_regions`, from components that are known already."""
    first = np.cumsum(components.counts) - components.counts
    return (components.numbers[masks] + np.repeat(first, masks.sum(axis=(1, 2)))).astype(np.int32)


def _joined_regions(numbered: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Concatenates component numbers so that no number occurs in two parts."""
    joined = [np.empty(0, dtype=np.int32)]
    count = 0
    for regions in numbered:
        joined.append(regions + np.int32(count))
        count += int(regions.max(initial=-1)) + 1
    return np.concatenate(joined)


def _rd_area(pixels: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    normals, defects = pixels[~mask], pixels[mask]
    _require_both(defects.size, normals.size, "pixel (in each defective image)")
    lowest, highest = float(pixels.min()), float(pixels.max())
    thresholds = lowest + (highest - lowest) / _RD_STEPS * np.arange(_RD_STEPS)
    fpr = (normals.size - np.searchsorted(np.sort(normals), thresholds, side="right")) / normals.size

    regions = _regions(mask[None])
    sizes = np.bincount(regions)
    # A pixel is covered at each threshold strictly below it, so the curve is summed from the highest threshold down.
    covering = np.searchsorted(thresholds, defects)
    weight_at = np.bincount(covering, weights=1 / sizes[regions], minlength=_RD_STEPS + 1) / sizes.size
    pro = np.cumsum(weight_at[::-1])[::-1][1:]

    kept = fpr < AUPRO_FPR_LIMIT
    fpr, pro = fpr[kept][::-1], pro[kept][::-1]
    if not fpr.size:
        return 0.0
    if fpr[-1] == 0:
        return float(pro[-1])
    return float(np.trapezoid(pro, fpr / fpr[-1]))


def _split_scores(scores: Array, labels: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    values, anomalous = _checked_scores(scores, labels)
    positives, negatives = values[anomalous], values[~anomalous]
    _require_both(positives.size, negatives.size, "score")
    return positives, negatives


def _checked_scores(scores: Array, labels: Array) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values, anomalous = _as_finite(scores, "scores"), _as_binary(labels, "labels")
    if values.ndim != 1 or values.shape != anomalous.shape:
        raise ValueError(f"expected scores and labels of one shape (N,), got {values.shape} and {anomalous.shape}.")
    return values, anomalous


def _checked_maps(maps: Array, masks: Array) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    pixels, mask = _as_finite(maps, "maps"), _as_binary(masks, "masks")
    if pixels.ndim != 3 or pixels.shape != mask.shape:
        raise ValueError(
            f"expected maps and masks of one shape (N, H, W), got {pixels.shape} and {mask.shape}; "
            "drop a channel axis, resize masks with nearest."
        )
    return pixels, mask


def _require_both(num_anomalous: int, num_normal: int, what: str) -> None:
    if not (num_anomalous and num_normal):
        raise ValueError(
            f"expected at least one anomalous and one normal {what}, "
            f"got {num_anomalous} anomalous and {num_normal} normal; give a set with both."
        )


def _as_finite(values: Array, name: str) -> NDArray[Any]:
    array = _as_numpy(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected {name} of real numbers, got dtype {array.dtype}.")
    # Widens float16 and integers; float32 and float64 are unchanged, and so is their order.
    array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        wrong = array.size - np.count_nonzero(finite)
        raise ValueError(f"expected finite {name}, got {wrong} NaN or infinite of {array.size}; check the model.")
    return array


def _as_binary(values: Array, name: str) -> NDArray[np.bool_]:
    array = _as_numpy(values)
    ones: NDArray[np.bool_] = array == 1
    if array.dtype != np.bool_ and not (ones | (array == 0)).all():
        raise ValueError(f"expected {name} of 0 and 1 only, got other values; binarise them first.")
    return ones


def _as_numpy(values: Array) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16; float32 holds each of its values.
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics

from dskd import metrics
from dskd.metrics import MetricState, Scores, compute, merge, update

Arrays = tuple[np.ndarray, np.ndarray]


def components(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected components by flood fill."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    found = []
    while left:
        stack, component = [left.pop()], []
        while stack:
            row, column = stack.pop()
            component.append((row, column))
            for near in itertools.product((row - 1, row, row + 1), (column - 1, column, column + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(component)
    return found


def pro_curve(maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray, strict: bool) -> Arrays:
    """FPR and PRO at each threshold, by definition."""
    values = maps.astype(np.float64)
    regions = [
        np.array([image[pixel] for pixel in component])
        for image, mask in zip(values, masks, strict=True)
        for component in components(mask)
    ]
    normals = values[masks == 0]
    over = np.greater if strict else np.greater_equal
    fpr = [np.mean(over(normals, threshold)) for threshold in thresholds]
    pro = [np.mean([np.mean(over(region, threshold)) for region in regions]) for threshold in thresholds]
    return np.array(fpr), np.array(pro)


def slow_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Every distinct threshold, trapezoids, linear interpolation at the limit."""
    fpr, pro = pro_curve(maps, masks, np.unique(maps.astype(np.float64))[::-1], strict=False)
    area, last_fpr, last_pro = 0.0, 0.0, 0.0
    for next_fpr, next_pro in zip(fpr, pro, strict=True):
        if next_fpr > limit:
            at_limit = last_pro + (next_pro - last_pro) * (limit - last_fpr) / (next_fpr - last_fpr)
            return float(area + (limit - last_fpr) * (last_pro + at_limit) / 2) / limit
        area += (next_fpr - last_fpr) * (last_pro + next_pro) / 2
        last_fpr, last_pro = next_fpr, next_pro
    return float(area) / limit


def slow_aupro_rd(maps: np.ndarray, masks: np.ndarray) -> float:
    areas = []
    for image, mask in zip(maps.astype(np.float64), masks, strict=True):
        if mask.any():
            steps = image.min() + (image.max() - image.min()) / 200 * np.arange(200)
            fpr, pro = pro_curve(image[None], mask[None], steps, strict=True)
            pro, fpr = pro[fpr < 0.3], fpr[fpr < 0.3]
            areas.append(sklearn_metrics.auc(fpr / fpr.max(), pro))
    return float(np.mean(areas))


def slow_f1_max(scores: np.ndarray, labels: np.ndarray) -> float:
    return max(
        float(sklearn_metrics.f1_score(labels, scores >= threshold, zero_division=0.0))
        for threshold in np.unique(scores)
    )


def drawn_maps(seed: int, *, levels: int = 0, num_images: int = 5, side: int = 9) -> Arrays:
    """Random maps, a little higher on random specks; the first image is normal; `levels` makes ties."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num_images, side, side)) < 0.15
    masks[0] = False
    masks[1, 2, 3] = True
    maps = rng.random(masks.shape) + 0.4 * masks
    return (np.floor(maps * levels) if levels else maps).astype(np.float32), masks


def drawn_scores(seed: int, levels: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    labels = rng.random(60) < 0.4
    labels[:2] = True, False
    scores = rng.random(60) + 0.3 * labels
    return (np.floor(scores * levels) if levels else scores), labels


@st.composite
def tied_maps(draw: st.DrawFn) -> Arrays:
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 6)))
    maps = draw(hnp.arrays(np.float32, shape, elements=st.integers(-3, 3).map(np.float32)))
    masks = draw(hnp.arrays(np.bool_, shape))
    masks[0, 0, :2] = True, False
    return maps, masks


# Image metrics


@pytest.mark.parametrize("levels", [0, 20, 3, 1])
@pytest.mark.parametrize("seed", range(5))
def test_image_metrics_agree_with_sklearn(seed: int, levels: int) -> None:
    scores, labels = drawn_scores(seed, levels)
    assert metrics.auroc(scores, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.average_precision(scores, labels) == pytest.approx(
        sklearn_metrics.average_precision_score(labels, scores), abs=1e-12
    )
    assert metrics.f1_max(scores, labels) == pytest.approx(slow_f1_max(scores, labels), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "labels", "auroc", "precision", "f1"),
    [
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], 1.0, 1.0, 1.0),
        ([4.0, 3.0, 2.0, 1.0], [0, 0, 1, 1], 0.0, (1 / 3 + 2 / 4) / 2, 2 / 3),
        ([7.0, 7.0, 7.0, 7.0], [0, 0, 1, 1], 0.5, 0.5, 2 / 3),
        ([-0.0, 0.0], [1, 0], 0.5, 0.5, 2 / 3),
        ([1.0, 2.0, 2.0, 3.0], [0, 0, 1, 1], 0.875, (1 + 2 / 3) / 2, 0.8),
    ],
)
def test_image_metrics_by_hand(
    scores: list[float], labels: list[int], auroc: float, precision: float, f1: float
) -> None:
    values, classes = torch.tensor(scores), torch.tensor(labels)
    assert metrics.auroc(values, classes) == auroc
    assert metrics.average_precision(values, classes) == pytest.approx(precision, abs=1e-15)
    assert metrics.f1_max(values, classes) == pytest.approx(f1, abs=1e-15)


def test_neighbouring_floats_are_told_apart() -> None:
    one = np.float32(1)
    assert metrics.auroc(np.array([one, np.nextafter(one, np.float32(2))]), np.array([0, 1])) == 1
    # Equal once rounded to float32.
    assert metrics.auroc(np.array([1.0, 1.0 + 1e-12]), np.array([0, 1])) == 1
    big = np.array([2**24, 2**24 + 1])
    assert metrics.auroc(big, np.array([0, 1])) == 1
    maps = np.full((1, 4, 4), one)
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 1, 1] = True
    maps[masks] = np.nextafter(one, np.float32(2))
    assert metrics.aupro(maps, masks) == metrics.pixel_auroc(maps, masks) == 1


# Pixel metrics


@pytest.mark.parametrize("levels", [0, 30, 4, 1])
@pytest.mark.parametrize("limit", [0.01, 0.1, 0.3, 0.77, 1.0])
def test_aupro_equals_brute_force(limit: float, levels: int) -> None:
    for seed in range(3):
        maps, masks = drawn_maps(seed, levels=levels)
        assert metrics.aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(tied_maps(), st.sampled_from([1e-6, 0.05, 0.25, 0.3, 0.5, 0.9, 1.0]))
def test_aupro_equals_brute_force_under_heavy_ties(drawn: Arrays, limit: float) -> None:
    assert metrics.aupro(*drawn, limit) == pytest.approx(slow_aupro(*drawn, limit), abs=1e-12)


@pytest.mark.parametrize("limit", [0.1, 0.3, 1.0])
def test_a_constant_map_is_the_diagonal(limit: float) -> None:
    """One tie over the whole FPR axis: PRO = FPR, so the area to the limit is half of it."""
    _, masks = drawn_maps(0)
    assert metrics.aupro(np.zeros(masks.shape), masks, limit) == pytest.approx(limit / 2, abs=1e-15)


def test_a_tie_across_the_limit_is_cut_not_averaged() -> None:
    """Ten normals: one above the defect, six tied with it. PRO rises over FPR 0.1 to 0.7, cut at 0.3."""
    maps = np.array([[[9, 5, 5, 5, 5, 5, 5, 1, 1, 1, 5]]], dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[..., -1] = True
    triangle = 0.2 * (0.2 / 0.6) / 2
    assert metrics.aupro(maps, masks, 0.3) == pytest.approx(triangle / 0.3, abs=1e-15)


def test_regions_touch_at_corners_and_stay_in_their_image() -> None:
    """A diagonal pair is one region; the pixel at the same place of the next image is another."""
    masks = np.zeros((2, 5, 5), bool)
    masks[0, 1, 1] = masks[0, 2, 2] = masks[1, 2, 2] = True
    maps = np.where(masks, -1.0, 0.0)
    maps[0, 1, 1] = 1
    # Of two regions one is found by half before any false alarm, and nothing more within the limit.
    assert metrics.aupro(maps, masks) == pytest.approx(0.25, abs=1e-15)


def test_a_small_region_weighs_as_much_as_a_large_one() -> None:
    masks = np.zeros((1, 20, 20), bool)
    masks[0, :10, :10] = masks[0, 15, 15] = True
    maps = np.zeros(masks.shape)
    maps[0, :10, :10] = 2
    maps[0, 15, 15] = -1
    assert metrics.aupro(maps, masks) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("levels", [0, 10])
def test_pixel_auroc_agrees_with_sklearn(levels: int) -> None:
    maps, masks = drawn_maps(1, levels=levels)
    expected = sklearn_metrics.roc_auc_score(masks.ravel(), maps.ravel())
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    tied_maps(),
    st.sampled_from(
        [
            lambda maps: maps * 8 - 3,
            lambda maps: maps**3,
            lambda maps: np.exp(maps.astype(np.float64)),
            lambda maps: np.arctan(maps.astype(np.float64)),
            lambda maps: np.unique(maps, return_inverse=True)[1].reshape(maps.shape),
        ]
    ),
)
def test_only_the_order_of_the_values_counts(drawn: Arrays, transform: Callable[[Any], Any]) -> None:
    maps, masks = drawn
    assert metrics.aupro(transform(maps), masks) == metrics.aupro(maps, masks)
    assert metrics.pixel_auroc(transform(maps), masks) == metrics.pixel_auroc(maps, masks)


def test_normal_images_enlarge_the_false_positive_denominator() -> None:
    maps, masks = drawn_maps(3)
    quiet = np.full((4, 9, 9), -1.0, dtype=np.float32)
    more_maps, more_masks = np.concatenate([maps, quiet]), np.concatenate([masks, quiet > 0])
    assert metrics.aupro(more_maps, more_masks) == pytest.approx(slow_aupro(more_maps, more_masks, 0.3), abs=1e-12)
    assert metrics.aupro(more_maps, more_masks) > metrics.aupro(maps, masks)
    assert metrics.aupro_rd(more_maps, more_masks) == metrics.aupro_rd(maps, masks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [0, 30])
def test_aupro_rd_equals_a_loop_over_its_thresholds(seed: int, levels: int) -> None:
    maps, masks = drawn_maps(seed, levels=levels)
    assert metrics.aupro_rd(maps, masks) == pytest.approx(slow_aupro_rd(maps, masks), abs=1e-12)


def test_aupro_rd_where_its_source_divides_by_zero() -> None:
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = True
    assert metrics.aupro_rd(masks.astype(np.float32), masks) == 1
    assert metrics.aupro_rd(np.ones(masks.shape), masks) == 0
    assert metrics.aupro_rd(1 - masks.astype(np.float32), masks) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_tensors_of_every_precision(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    maps, masks = drawn_maps(2)
    tensor = torch.from_numpy(maps).to(dtype).requires_grad_()
    expected = slow_aupro(tensor.detach().double().numpy(), masks, 0.3)
    assert metrics.aupro(tensor, torch.from_numpy(masks).to(mask_dtype)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [metrics.pixel_auroc, metrics.aupro, metrics.aupro_rd])
def test_the_callers_maps_stay_as_they_are(metric: Callable[..., float]) -> None:
    maps, masks = drawn_maps(4)
    before = maps.copy(), masks.copy()
    metric(maps, masks)
    assert np.array_equal(maps, before[0])
    assert np.array_equal(masks, before[1])


# All at once, and across ranks


def drawn_set(seed: int, levels: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    maps, masks = drawn_maps(seed, levels=levels, num_images=9, side=8)
    labels = np.array([mask.any() for mask in masks])
    # A defective image whose mask vanished, as in MT Defect.
    masks[4] = False
    return maps, masks, maps.max(axis=(1, 2)), labels


@pytest.mark.parametrize("levels", [0, 6, 1])
def test_score_maps_is_each_metric_alone(levels: int) -> None:
    maps, masks, scores, labels = drawn_set(0, levels)
    found = metrics.score_maps(maps, masks, scores, labels)
    assert found == Scores(
        image_auroc=metrics.auroc(scores, labels),
        image_ap=metrics.average_precision(scores, labels),
        image_f1_max=metrics.f1_max(scores, labels),
        pixel_auroc=metrics.pixel_auroc(maps, masks),
        pixel_ap=metrics.average_precision(maps.ravel(), masks.ravel()),
        pixel_f1max=metrics.f1_max(maps.ravel(), masks.ravel()),
        aupro=metrics.aupro(maps, masks),
    )
    assert found.image_auroc == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)


def test_without_defect_pixels_the_image_figures_remain() -> None:
    maps, masks, scores, labels = drawn_set(0)
    found = metrics.score_maps(maps, np.zeros_like(masks), scores, labels)
    assert found[:3] == metrics.score_maps(maps, masks, scores, labels)[:3]
    assert all(math.isnan(figure) for figure in found[3:])


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 99), st.sampled_from([0, 6]))
def test_every_partition_and_order_gives_identical_figures(data: st.DataObject, seed: int, levels: int) -> None:
    images = drawn_set(seed, levels)
    whole = metrics.score_maps(*images)
    order = np.array(data.draw(st.permutations(range(9))))
    cuts = sorted(data.draw(st.lists(st.integers(0, 9), max_size=5)))
    states = [MetricState() for _ in range(3)]
    for part in np.split(order, cuts):
        rank = data.draw(st.integers(0, 2))
        states[rank] = update(states[rank], *(values[part] for values in images))
    sent = [pickle.loads(pickle.dumps(state)) for state in data.draw(st.permutations(states))]
    assert compute(merge(sent)) == whole
    assert compute(merge([merge(sent[:2]), sent[2]])) == whole


def test_pixels_of_an_image_without_a_mask_are_of_neither_kind() -> None:
    maps, masks, scores, labels = (values.copy() for values in drawn_set(11))
    hidden = np.flatnonzero(labels)[0]
    has_mask = np.arange(len(labels)) != hidden
    masks[hidden], scores[hidden] = False, 0
    found = metrics.score_maps(maps, masks, scores, labels, has_mask)
    pixels = metrics.score_maps(maps[has_mask], masks[has_mask], scores[has_mask], labels[has_mask])
    images = metrics.score_maps(maps, masks, scores, labels)
    assert found[:3] == images[:3] and found[3:] == pixels[3:]
    assert found[3:] != images[3:] and found[:3] != pixels[:3]
    with pytest.raises(ValueError, match="has_mask of the labels' shape"):
        metrics.score_maps(maps, masks, scores, labels, has_mask[1:])


def test_batches_may_differ_in_size_and_precision() -> None:
    maps, masks, scores, labels = drawn_set(1)
    rest = slice(5, None)
    state = update(MetricState(), maps[:5].astype(np.float64), masks[:5], scores[:5], labels[:5])
    wide = maps[rest].reshape(4, 4, 16), masks[rest].reshape(4, 4, 16)
    state = update(state, torch.from_numpy(maps[rest]), masks[rest], torch.from_numpy(scores[rest]), labels[rest])
    assert compute(state) == metrics.score_maps(maps, masks, scores, labels)
    reshaped = compute(update(MetricState(state.batches[:1]), *wide, scores[rest], labels[rest]))
    assert reshaped[:6] == compute(state)[:6]


def test_update_keeps_no_hold_on_the_callers_buffers() -> None:
    maps, masks, scores, labels = drawn_set(2)
    expected = metrics.score_maps(maps, masks, scores, labels)
    empty = MetricState()
    state = update(empty, maps, masks, scores, labels)
    assert empty == MetricState()
    maps[:], masks[:], scores[:], labels[:] = 0, False, 0, False
    assert compute(state) == expected
    assert compute(state) == expected


# Bad input


def corners(fpr: np.ndarray, hits: np.ndarray) -> set[tuple[float, float]]:
    return {(round(float(x), 9), round(float(y), 9)) for x, y in zip(fpr, hits, strict=True)}


def sklearn_corners(labels: np.ndarray, scores: np.ndarray) -> set[tuple[float, float]]:
    """Where the curve rises; scikit-learn keeps some points within straight lines too."""
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    rises = np.diff(tpr, prepend=0) > 0
    return corners(fpr[rises], tpr[rises])


def area(curve: metrics.Curve) -> float:
    assert (np.diff(curve.fpr) >= 0).all() and (np.diff(curve.hits) >= 0).all() and curve.fpr[0] == curve.hits[0] == 0
    return float(np.trapezoid(curve.hits, curve.fpr))


@pytest.mark.parametrize("levels", [0, 20, 3, 1])
def test_roc_curves_have_the_corners_of_sklearn_and_the_area_of_the_figure(levels: int) -> None:
    scores, labels = drawn_scores(3, levels)
    curve = metrics.roc_curve(scores, labels)
    assert sklearn_corners(labels, scores) <= corners(*curve)
    assert area(curve) == pytest.approx(metrics.auroc(scores, labels), abs=1e-12)
    maps, masks = drawn_maps(3, levels=levels)
    pixels = metrics.pixel_roc_curve(maps, masks)
    assert sklearn_corners(masks.ravel(), maps.ravel()) <= corners(*pixels)
    assert area(pixels) == pytest.approx(metrics.pixel_auroc(maps, masks), abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [0, 20, 3, 1])
def test_the_pro_curve_has_the_corners_of_its_definition_and_the_area_of_aupro(levels: int, limit: float) -> None:
    maps, masks = drawn_maps(5, levels=levels)
    curve = metrics.pro_curve(maps, masks, limit)
    assert curve.fpr[-1] == limit
    assert area(curve) / limit == pytest.approx(metrics.aupro(maps, masks, limit), abs=1e-12)
    fpr, pro = pro_curve(maps, masks, np.unique(maps.astype(np.float64))[::-1], strict=False)
    rises = (np.diff(pro, prepend=0) > 0) & (fpr < limit)
    assert corners(fpr[rises], pro[rises]) <= corners(*curve)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.average_precision, metrics.f1_max])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "0 normal"),
        ([1.0, 2.0], [0, 0], "0 anomalous"),
        ([], [], "0 anomalous"),
        ([1.0, math.nan], [0, 1], "finite scores"),
        ([1.0, math.inf], [0, 1], "finite scores"),
        ([1.0, 2.0, 3.0], [0, 1], "one shape"),
        ([[1.0, 2.0]], [[0, 1]], "one shape"),
        ([1.0, 2.0], [0, 255], "0 and 1 only"),
        ([1.0, 2.0], [0.0, math.nan], "0 and 1 only"),
        ([1.0 + 1j, 2.0], [0, 1], "real numbers"),
    ],
)
def test_scores_are_refused(metric: Callable[..., float], scores: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        metric(np.array(scores), np.array(labels))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metric", [metrics.pixel_auroc, metrics.aupro, metrics.aupro_rd])
def test_maps_are_refused(metric: Callable[..., float]) -> None:
    maps, masks = drawn_maps(0)
    broken = maps.copy()
    broken[0, 0, 0] = math.nan
    for bad_maps, bad_masks, message in [
        (maps[:, :-1], masks, "one shape"),
        (maps[:, None], masks[:, None], "one shape"),
        (maps[0], masks[0], "one shape"),
        (broken, masks, "finite maps"),
        (np.where(masks, np.inf, maps), masks, "finite maps"),
        (maps, masks * np.uint8(255), "0 and 1 only"),
        (maps, np.zeros_like(masks), "0 anomalous"),
        (maps, np.ones_like(masks), "0 normal"),
        (maps[:0], masks[:0], "0 anomalous"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            metric(bad_maps, bad_masks)
        assert "\n" not in str(error.value)


def test_aupro_rd_refuses_an_image_without_normal_pixels() -> None:
    maps, masks = drawn_maps(0)
    masks[2] = True
    with pytest.raises(ValueError, match="0 normal"):
        metrics.aupro_rd(maps, masks)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_fpr_limit_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="fpr_limit"):
        metrics.aupro(*drawn_maps(0), limit)


def test_states_are_refused() -> None:
    maps, masks, scores, labels = drawn_set(0)
    with pytest.raises(ValueError, match="empty"):
        compute(merge([]))
    with pytest.raises(ValueError, match="one image score per map"):
        update(MetricState(), maps[1:], masks[1:], scores, labels)
    with pytest.raises(ValueError, match="one normal image"):
        metrics.score_maps(maps, masks, scores, np.ones_like(labels))
    with pytest.raises(ValueError, match="one normal pixel"):
        metrics.score_maps(maps, np.ones_like(masks), scores, labels)


def test_pro_points_are_what_lies_above_their_thresholds() -> None:
    rng = np.random.default_rng(3)
    maps = rng.integers(0, 40, (4, 12, 12)).astype(np.float32)
    masks = np.zeros(maps.shape, np.bool_)
    masks[:3, 2:5, 2:6] = masks[0, 8:11, 7:9] = True
    state = metrics.update(metrics.MetricState(), maps[:2], masks[:2], maps[:2].max(axis=(1, 2)), np.array([1, 1]))
    state = metrics.update(state, maps[2:], masks[2:], maps[2:].max(axis=(1, 2)), np.array([1, 0]))
    points = metrics.pro_points(state, (7.5,))
    thresholds, fpr, pro = map(np.array, zip(*points, strict=True))
    assert 7.5 in thresholds and (np.diff(thresholds) < 0).all() and fpr[0] == pro[0] == 0
    expected = pro_curve(maps, masks, thresholds, strict=True)
    np.testing.assert_allclose(fpr, expected[0])
    np.testing.assert_allclose(pro, expected[1], atol=1e-12)
    assert (
        metrics.pro_points(metrics.update(metrics.MetricState(), maps, masks & False, maps[:, 0, 0], masks[:, 3, 3]))
        == []
    )

import dataclasses
import json

import numpy as np
import pytest

from dskd.data import depth
from dskd.data.depth import Levels, PixelScale, high_byte


def levels(low: float, high: float, *, is_float: bool = False, stated: int | None = None) -> Levels:
    return Levels(low, high, is_float, stated)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_cameras_depth_gives_the_very_levels_of_its_eight_bit_twin(bits: int) -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for twin in (eight.astype(np.uint16) << (bits - 8), np.rint(eight * ((2**bits - 1) / 255)).astype(np.uint16)):
        scale = PixelScale.of([levels(0, float(twin.max()))])
        found, num_clipped = scale.apply(twin)
        np.testing.assert_array_equal(found, eight)
        assert num_clipped == 0 and scale.white >= twin.max() - scale.step


def test_dim_training_images_leave_headroom_and_what_is_beyond_is_counted() -> None:
    scale = PixelScale.of([levels(10, 1100), levels(5, 2100)])
    values = np.array([[0, 2100, 4095, 4096, 65535]], np.uint16)
    found, num_clipped = scale.apply(values)
    assert found.tolist() == [[0, 131, 255, 255, 255]] and num_clipped == 2


def test_a_depth_that_every_file_states_stands_above_what_the_images_hold() -> None:
    dim = [levels(0, 200, stated=4095), levels(0, 90, stated=4095)]
    assert PixelScale.of(dim).step == 16
    assert PixelScale.of([*dim, levels(0, 90)]).step == 1, "one file does not say"
    assert PixelScale.of([levels(0, 9000, stated=4095)]).step == 64, "and one that says it wrongly is not believed"


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_fractions_and_floating_levels_give_those_of_their_eight_bit_twin(white: float) -> None:
    eight = np.arange(256, dtype=np.uint8)
    twin = (eight * (white / 255)).astype(np.float32)
    found, num_clipped = PixelScale.of([levels(0, white, is_float=True)]).apply(twin)
    np.testing.assert_array_equal(found, eight)
    assert num_clipped == 0


@pytest.mark.parametrize(
    ("low", "high", "is_float"),
    [(-300, 500, False), (-3.5, 2.25, True), (0, 7.0, True), (0, 3e6, True), (-0.25, 0.5, True), (-4, -4, False)],
)
def test_other_ranges_have_a_quarter_free_and_use_most_of_the_levels(low: float, high: float, is_float: bool) -> None:
    scale = PixelScale.of([levels(low, high, is_float=is_float)])
    span = high - low
    kind = np.float64 if is_float else np.int32
    found, num_clipped = scale.apply(np.array([low, high, high + 0.24 * span], kind))
    assert num_clipped == 0 and found[2] >= found[1]
    if span:
        assert int(found[1]) - int(found[0]) >= 150


def test_what_a_scale_does_not_fit_is_refused() -> None:
    eight = PixelScale.of([])
    with pytest.raises(ValueError, match="uint16 values, and the training images had 8 bits"):
        eight.apply(np.zeros(3, np.uint16))
    integers = PixelScale.of([levels(0, 4095)])
    with pytest.raises(ValueError, match="float32 values, and the training images had integer ones"):
        integers.apply(np.zeros(3, np.float32))
    fractions = PixelScale.of([levels(0, 1, is_float=True)])
    with pytest.raises(ValueError, match="2 values that are not finite"):
        fractions.apply(np.array([0.5, np.nan, np.inf], np.float32))
    with pytest.raises(ValueError, match="integers and of floating-point values"):
        PixelScale.of([levels(0, 1, is_float=True), levels(0, 900)])


@pytest.mark.parametrize("change", [{"step": 0.0}, {"step": float("nan")}, {"low": float("inf")}, {"kind": "other"}])
def test_a_scale_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    sound = json.loads(json.dumps(dataclasses.asdict(PixelScale.of([levels(0, 4095)]))))
    assert PixelScale(**sound) == PixelScale.of([levels(0, 4095)])
    # In the tests the shape checks refuse a wrong kind first, as a type; detector.json refuses it as a value.
    with pytest.raises((ValueError, TypeError), match=r"pixel scale|dskd\.data\.depth\.PixelScale"):
        PixelScale(**{**sound, **change})


def test_large_arrays_are_scaled_in_strips_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "_STRIP", 1000)
    values = np.random.default_rng(0).integers(0, 5000, (41, 31, 3), dtype=np.uint16)
    found, num_clipped = PixelScale.of([levels(0, 4095)]).apply(values)
    np.testing.assert_array_equal(found, (values >> 4).clip(0, 255))
    assert num_clipped == int((values > 4095).sum())


def test_without_a_scale_sixteen_bits_lose_the_low_ones_as_older_detectors_have_it() -> None:
    assert high_byte(np.array([0, 255, 256, 65535], np.uint16)).tolist() == [0, 0, 1, 255]
    assert high_byte(np.array([-5, 70000], np.int32)).tolist() == [0, 255]

"""The picture of a verdict: where it draws, in which colours, and what it says."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd.checkpoint import Origin
from dskd.data.geometry import Geometry
from dskd.data.images import place_on_canvas
from dskd.detector import Prediction, predictions
from dskd.draw import verdict
from dskd.draw.verdict import LONGEST, TOP, Panel, draw_panel, draw_verdict, heat_colours, to_webp


def lightness(colours: np.ndarray) -> np.ndarray:
    """L* (N,) in CIELAB of sRGB colours (N, 3), by the definitions of IEC 61966-2-1 and CIE 15."""
    share = colours.astype(float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    root = np.where(luminance > (6 / 29) ** 3, np.cbrt(luminance), luminance / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.asarray(116 * root - 16)


def panel(heat: np.ndarray, threshold: float, grey: int = 90, **more: object) -> Panel:
    height, width = heat.shape
    score = float(heat.max())
    given = {"boxes": [], "size": (width, height), "score": score, "is_anomalous": score > threshold} | more
    picture = np.full((height, width, 3), grey, np.uint8)
    return Panel(picture=picture, heat=heat.astype(np.float32), threshold=threshold, **given)  # type: ignore[arg-type]


def test_lightness_rises_all_along_the_scale_and_ends_with_it() -> None:
    found = lightness(heat_colours(np.linspace(0, TOP, 256)))
    steps = np.diff(found)
    assert (steps > -0.3).all() and found[-1] - found[0] > 75  # colours are whole numbers, hence the tolerance
    assert (np.diff(lightness(heat_colours(np.linspace(0, TOP, 16)))) > 2).all()
    assert (heat_colours(np.array([TOP, 9.0, 1e9])) == heat_colours(np.array([TOP]))).all()


def test_a_multiple_of_the_threshold_has_one_colour_in_every_picture() -> None:
    seen = []
    for threshold, peak, grey in ((0.5, 0.9, 20), (40.0, 300.0, 230)):
        heat = np.zeros((400, 400))
        heat[100:200, 100:200] = 1.5 * threshold
        heat[300:320, 300:320] = peak
        picture = np.asarray(draw_panel(panel(heat, threshold, grey)))
        seen.append(tuple(picture[150, 400 + 150]))
        assert tuple(picture[350, 400 + 350]) == (grey, grey, grey)
    assert seen[0] == seen[1] == tuple(heat_colours(np.array([1.5]))[0])


def test_nothing_is_drawn_below_what_good_images_reach() -> None:
    heat = np.full((400, 400), 0.6)
    heat[10:50, 10:50] = 0.9
    picture = np.asarray(draw_panel(panel(heat, 1.0, floor=0.8)))
    assert (picture[:, :400] == 90).all(), "the image itself stays as it is"
    assert (picture[60:, 400:] == 90).all()
    assert (picture[20, 420] == heat_colours(np.array([0.9], np.float32))[0]).all()
    assert (np.asarray(draw_panel(panel(heat, 1.0))) == 90).all(), "without normal scores the threshold is the floor"
    assert (np.asarray(draw_panel(panel(heat, 0.5, floor=0.8)))[:, 400:] != 90).any(), "never above the threshold"


def test_a_photo_of_16_to_9_has_its_box_where_the_defect_is() -> None:
    photo = np.full((1080, 1920, 3), 120, np.uint8)
    left, top, right, bottom = 1500, 270, 1620, 405  # eighths of the canvas, so that no rounding blurs them
    geometry = Geometry.square(128)
    framed = place_on_canvas(Image.fromarray(photo), geometry, 0)
    heat = np.zeros((128, 128), np.float32)
    heat[top * 128 // 1080 : bottom * 128 // 1080, left * 128 // 1920 : right * 128 // 1920] = 3.7
    (seen,) = predictions([Path("line/photo.png")], [framed], [heat], [3.7], 2.0, geometry, Origin())
    assert isinstance(seen, Prediction)
    region = seen.regions[0]
    assert (region.left, region.top, region.right, region.bottom) == (left, top, right, bottom)
    drawn = seen.panel()
    views = np.asarray(draw_panel(drawn))
    width, height = LONGEST, LONGEST * 9 // 16
    assert views.shape == (height, 2 * width, 3)
    orange = np.argwhere((views[:, :width] == verdict._DECIDED).all(axis=2))
    scale = width / 1920
    expected = np.array([top, left, bottom, right]) * scale
    assert np.abs(np.concatenate([orange.min(axis=0), orange.max(axis=0)]) - expected).max() <= 3
    coloured = np.argwhere((views[:, width:] == heat_colours(np.array([3.7 / 2]))[0]).all(axis=2))
    assert np.abs(np.concatenate([coloured.min(axis=0), coloured.max(axis=0) + 1]) - expected).max() <= 1


@pytest.mark.parametrize(
    ("is_anomalous", "is_defective", "word"),
    [
        (True, None, "ANOMALOUS"),
        (False, None, "good"),
        (True, True, "ANOMALOUS"),
        (False, False, "good"),
        (False, True, "MISS"),
        (True, False, "FALSE ALARM"),
    ],
)
def test_mistakes_are_said_in_words(is_anomalous: bool, is_defective: bool | None, word: str) -> None:
    heat = np.full((40, 40), 2.0 if is_anomalous else 0.5)
    seen = panel(heat, 1.0, is_defective=is_defective)
    assert seen.word == word
    plain = np.asarray(draw_verdict(seen._replace(is_defective=None)))
    assert (np.asarray(draw_verdict(seen)) == plain).all() == (word in ("ANOMALOUS", "good"))


def test_the_labelled_defect_is_outlined_beside_what_was_decided() -> None:
    heat = np.zeros((400, 400))
    heat[50:100, 50:100] = 2.0
    truth = np.zeros((200, 200), np.bool_)
    truth[100:150, 100:150] = True
    picture = np.asarray(draw_panel(panel(heat, 1.0, truth=truth, is_defective=True)))
    for view in (picture[:, :400], picture[:, 400:]):
        blue = np.argwhere((view == verdict._TRUTH).all(axis=2))
        orange = np.argwhere((view == verdict._DECIDED).all(axis=2))
        assert (blue.min(axis=0) == 198).all() and (blue.max(axis=0) == 301).all()
        assert (orange.min(axis=0) == 48).all() and (orange.max(axis=0) == 101).all()


def test_a_picture_keeps_to_its_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8))
    data = to_webp(noise, 9000)
    assert len(data) <= 9000
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "WEBP" and picture.width == 2 * picture.height
    assert len(to_webp(noise)) > 9000

"""The picture of a verdict, everywhere the same: the image with what was decided, beside it the map on the image.

One fixed scale gives each multiple of the threshold its colour in every picture; a colour bar says which. It rises in
lightness, so that it is readable in grey and by the colour-blind. Below the floor, which few good images exceed,
nothing is drawn over the image.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

LONGEST = 1024
"""Pixels of a panel's longer side, at most."""
TOP = 3.0
"""Multiple of the threshold at the end of the colour scale; higher ones have its colour too."""
OVERLAY_SUFFIX = ".webp"
"""Of files with pictures: a tenth of the bytes of a PNG."""
_SHORTEST = 384
"""Pixels to which the longer side of a small image is enlarged."""
_CAPTION, _FOOTER = 40, 36
_ANCHORS = np.array([[26, 14, 84], [112, 28, 138], [196, 54, 112], [242, 134, 52], [252, 238, 128]], np.float64)
_TICKS = (1, 2, 3)
_OK = (86, 178, 110)
_DECIDED = (240, 100, 20)
_TRUTH = (86, 190, 240)
_INK = (235, 235, 235)
PAPER = (24, 26, 30)
_QUALITIES = (85, 70, 55, 40, 25)

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
_Value = TypeVar("_Value", bound=np.generic)


class Panel(NamedTuple):
    """What there is to draw of one inspected image."""

    picture: npt.NDArray[np.uint8]
    """(H, W, 3), the whole image or a reduced copy."""
    heat: npt.NDArray[np.float32]
    """(H, W), its map."""
    boxes: Sequence[Box]
    """left, top, right, bottom of the anomalous regions, in pixels of an image of `size`."""
    size: tuple[int, int]
    """(width, height) of the image as it is in the file."""
    score: float
    threshold: float
    is_anomalous: bool
    floor: float | None = None
    """Map value that few good images exceed; None or above the threshold: the threshold."""
    is_defective: bool | None = None
    """What the label says; None: there is none."""
    truth: npt.NDArray[np.bool_] | None = None
    """(h, w), the labelled defect at any scale; None: unknown, or no defect."""
    name: str = ""
    note: str = ""

    @property
    def word(self) -> str:
        """The verdict, in capitals and as a mistake where the label says that it is one."""
        if self.is_defective is None or self.is_defective == self.is_anomalous:
            return "ANOMALOUS" if self.is_anomalous else "good"
        return "FALSE ALARM" if self.is_anomalous else "MISS"


def heat_colours(heat: npt.NDArray[np.floating], threshold: float = 1.0) -> npt.NDArray[np.uint8]:
    """Colours (..., 3) of map values (...) by their multiple of the threshold, from 0 to `TOP`; others as the ends."""
    multiples = np.asarray(heat, np.float64) / max(threshold, 1e-12)
    position = (multiples / TOP).clip(0, 1) * (len(_ANCHORS) - 1)
    lower = np.minimum(position.astype(int), len(_ANCHORS) - 2)
    share = (position - lower)[..., None]
    colours = (1 - share) * _ANCHORS[lower] + share * _ANCHORS[lower + 1]
    return np.asarray(colours.round().astype(np.uint8))


def times_threshold(score: float, threshold: float) -> str:
    """The score in the unit that all pictures share.

    >>> times_threshold(3.7, 2.0)
    '1.85 x threshold'
    """
    if threshold <= 0:
        return f"score {score:.4g}, threshold {threshold:.4g}"
    return f"{score / threshold:.2f} x threshold"


def draw_panel(panel: Panel, longest: int = LONGEST) -> Image.Image:
    """Two views side by side: the image with boxes and contours, and the image below its map.

    The longer side of a view has `longest` pixels, or fewer where the picture is smaller, but not fewer than 384 or
    `longest`. Orange: what was decided; blue: the labelled defect.
    """
    width, height = _view_size(panel, longest)
    image = Image.fromarray(panel.picture).resize((width, height), Image.Resampling.BICUBIC)
    heat = _reduced(panel.heat, width, height)
    unit = max(panel.threshold, 1e-12)
    floor = min(unit, unit if panel.floor is None else panel.floor)
    plain, mapped = np.array(image), np.array(image)
    colours = _enlarged(heat_colours(heat, unit), width, height)  # of few values, before each is repeated
    heat = _enlarged(heat, width, height)
    np.copyto(mapped, colours, where=(heat > floor)[..., None])
    for view in (plain, mapped):
        if panel.is_anomalous:
            _draw_edge(view, heat > panel.threshold, _DECIDED)
        if panel.truth is not None and panel.truth.any():
            _draw_edge(view, np.array(Image.fromarray(panel.truth).resize((width, height))), _TRUTH)
    canvas = Image.new("RGB", (2 * width, height), PAPER)
    canvas.paste(Image.fromarray(plain), (0, 0))
    canvas.paste(Image.fromarray(mapped), (width, 0))
    across, down = width / panel.size[0], height / panel.size[1]
    draw = ImageDraw.Draw(canvas)
    for box in panel.boxes if panel.is_anomalous else ():
        left, top, right, bottom = (round(share * side) for share, side in zip((across, down) * 2, box, strict=True))
        corners = (max(left - 2, 0), max(top - 2, 0), min(right + 1, width - 1), min(bottom + 1, height - 1))
        draw.rectangle(corners, outline=_DECIDED, width=2)
    return canvas


def draw_verdict(panel: Panel, longest: int = LONGEST) -> Image.Image:
    """`draw_panel` below a line that says the verdict, and above a colour bar and a legend; the note in a corner."""
    views = draw_panel(panel, longest)
    width = max(views.width, 2 * _SHORTEST)
    canvas = Image.new("RGB", (width, _CAPTION + views.height + _FOOTER), PAPER)
    canvas.paste(views, (0, _CAPTION))
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    is_mistake = panel.word in ("MISS", "FALSE ALARM")
    draw.text((10, 9), panel.word, _DECIDED if panel.is_anomalous or is_mistake else _OK, font=large)
    start = 22 + draw.textlength(panel.word, large)
    draw.text((start, 12), times_threshold(panel.score, panel.threshold), _INK, font=small)
    start += 16 + draw.textlength(times_threshold(panel.score, panel.threshold), small)
    draw.text((width - 10, 12), _shortened(panel.name, draw, small, width - 20 - start), _INK, small, anchor="ra")
    top = _CAPTION + views.height
    _draw_bar(canvas, (10, top + 8), 240)
    right = width - 10.0
    is_labelled = panel.truth is not None and bool(panel.truth.any())
    for is_shown, text, colour in ((is_labelled, "labelled defect", _TRUTH), (panel.is_anomalous, "decided", _DECIDED)):
        if is_shown:
            draw.text((right, top + 10), text, colour, small, anchor="ra")
            right -= draw.textlength(text, small) + 16
    if panel.note:
        # The note may be wider than a view: right-aligned, on a background that is readable over any image.
        place = (width - 10, top - 10)
        left, upper, end, lower = draw.textbbox(place, panel.note, small, anchor="rs")
        draw.rectangle([left - 6, upper - 4, end + 6, lower + 4], fill=PAPER)
        draw.text(place, panel.note, _DECIDED, small, anchor="rs")
    return canvas


def to_webp(image: Image.Image, max_bytes: int | None = None) -> bytes:
    """The picture as a WebP file, of at most `max_bytes` where that is given: of lower quality, then smaller."""
    while True:
        for quality in _QUALITIES if max_bytes else _QUALITIES[:1]:
            file = io.BytesIO()
            image.save(file, "WEBP", quality=quality, method=4 if max_bytes else 0)
            if max_bytes is None or file.tell() <= max_bytes:
                return file.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def _view_size(panel: Panel, longest: int) -> tuple[int, int]:
    there = max(panel.picture.shape[:2])
    share = min(longest, max(there, _SHORTEST)) / there
    height, width = (max(1, round(share * side)) for side in panel.picture.shape[:2])
    return width, height


def _reduced(heat: npt.NDArray[np.float32], width: int, height: int) -> npt.NDArray[np.float32]:
    """The map at this size, unless it is smaller: of the values that fall together the highest, none is mixed."""
    if width >= heat.shape[1] and height >= heat.shape[0]:
        return heat
    rows, columns = _places(heat.shape, (height, width))
    reduced: npt.NDArray[np.float32] = np.maximum.reduceat(np.maximum.reduceat(heat, rows, axis=0), columns, axis=1)
    return reduced


def _enlarged(values: npt.NDArray[_Value], width: int, height: int) -> npt.NDArray[_Value]:
    """Values (h, w, …) at a size of at least that, each repeated."""
    if values.shape[:2] == (height, width):
        return values
    rows, columns = _places(values.shape[:2], (height, width))
    return np.asarray(values[rows][:, columns])


def _places(there: tuple[int, ...], wanted: tuple[int, int]) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
    """The row and column from which each of the `wanted` ones begins."""
    rows, columns = (np.arange(side) * old // side for side, old in zip(wanted, there, strict=True))
    return rows, columns


def _draw_edge(view: npt.NDArray[np.uint8], region: npt.NDArray[np.bool_], colour: Colour) -> None:
    """Draw a line of two pixels around a region (H, W) into a view (H, W, 3), on a dark one that any image shows."""
    if not region.any():
        return
    lines = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    part = tuple(slice(max(each[0] - 3, 0), each[-1] + 4) for each in lines)
    view, region = view[part], region[part]  # defects are small; the line has three pixels with its dark one
    outside = ~region
    line = ndimage.binary_dilation(region, iterations=2) & outside
    view[ndimage.binary_dilation(line) & outside & ~line] = PAPER
    view[line] = colour


def _draw_bar(canvas: Image.Image, place: tuple[int, int], width: int) -> None:
    """The colour scale with its ticks, in multiples of the threshold."""
    left, top = place
    bar = heat_colours(np.linspace(0, TOP, width))[None].repeat(10, axis=0)
    canvas.paste(Image.fromarray(bar), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for tick in _TICKS:
        x = left + round((width - 1) * tick / TOP)
        draw.line((x, top, x, top + 12), _INK)
        text = "threshold" if tick == 1 else f"{tick} x"
        draw.text((x, top + 13), text, _INK, font, anchor="ma")
    draw.text((left, top + 13), "0", _INK, font)


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: object, width: float) -> str:
    """The end of the text, which names the file, as far as it fits into `width` pixels."""
    if draw.textlength(text, font) <= width:  # type: ignore[arg-type]
        return text
    while len(text) > 1 and draw.textlength("..." + text, font) > width:  # type: ignore[arg-type]
        text = text[1:]
    return "..." + text

"""The picture of a verdict: the image beside its heat map, understandable without a legend."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_PANEL = 384
_CAPTION = 40
_ANCHORS = np.array(  # dark blue, cyan, yellow, red: lightness rises, so it is readable in grey too
    [[20, 20, 60], [30, 90, 160], [60, 190, 190], [245, 220, 80], [235, 70, 30]], np.float32
)
_OK = (86, 178, 110)
_BAD = (226, 74, 60)
_INK = (235, 235, 235)
PAPER = (24, 26, 30)

Box = tuple[int, int, int, int]


def heat_colours(heat: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.uint8]:
    """Colours (H, W, 3) of a map (H, W); cyan changes to yellow at the threshold, whatever the range of the map."""
    top = max(float(heat.max()), threshold * 2, 1e-12)
    position = np.where(
        heat <= threshold,
        0.5 * heat / max(threshold, 1e-12),
        0.5 + 0.5 * (heat - threshold) / max(top - threshold, 1e-12),
    ).clip(0, 1) * (len(_ANCHORS) - 1)
    lower = np.minimum(position.astype(int), len(_ANCHORS) - 2)
    share = (position - lower)[..., None]
    colours: npt.NDArray[np.uint8] = ((1 - share) * _ANCHORS[lower] + share * _ANCHORS[lower + 1]).astype(np.uint8)
    return colours


def draw_verdict(
    picture: npt.NDArray[np.uint8],
    heat: npt.NDArray[np.float32],
    boxes: Sequence[Box],
    size: tuple[int, int],
    *,
    score: float,
    threshold: float,
    is_anomalous: bool,
    name: str,
    note: str,
) -> Image.Image:
    """A line with score and verdict; below it the image with boxes, and the image with its heat map on top.

    The image `picture` (H, W, 3) and its map (H, W) are whole and have their own aspect ratio; the longer side is drawn
    with 384 to 768 pixels, as the image allows. `boxes` (left, top, right, bottom) are in pixels of an image of the
    `size` (width, height). `note` stands in the lower right corner.
    """
    colours = heat_colours(heat, threshold)
    strength = (heat / max(threshold, 1e-12)).clip(0, 1)[..., None] * 0.65
    blended = ((1 - strength) * picture + strength * colours).astype(np.uint8)
    scale = max(_PANEL, *picture.shape[:2]) / max(picture.shape[:2])
    width, height = (max(1, round(scale * side)) for side in picture.shape[1::-1])
    panel_width = max(width, _PANEL)
    canvas = Image.new("RGB", (2 * panel_width, height + _CAPTION), PAPER)
    across, down = width / size[0], height / size[1]
    for column, pixels in enumerate((picture, blended)):
        panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(panel)
        for box in boxes if is_anomalous and column == 0 else ():
            left, top, right, bottom = (
                round(share * side) for share, side in zip((across, down) * 2, box, strict=True)
            )
            draw.rectangle([left - 2, top - 2, right + 1, bottom + 1], outline=_BAD, width=2)
        canvas.paste(panel, (column * panel_width, _CAPTION))
    draw = ImageDraw.Draw(canvas)
    verdict, colour = ("ANOMALOUS", _BAD) if is_anomalous else ("good", _OK)
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((10, 9), verdict, colour, font=large)
    draw.text((132, 12), f"score {score:.4g}   threshold {threshold:.4g}", _INK, font=small)
    draw.text((2 * panel_width - 10, 12), name, _INK, small, anchor="ra")
    if note:
        # The note may be wider than a panel: right-aligned, on a background that is readable over any image.
        place = (2 * panel_width - 10, _CAPTION + height - 10)
        left, top, right, bottom = draw.textbbox(place, note, small, anchor="rs")
        draw.rectangle([left - 6, top - 4, right + 6, bottom + 4], fill=PAPER)
        draw.text(place, note, _BAD, small, anchor="rs")
    return canvas

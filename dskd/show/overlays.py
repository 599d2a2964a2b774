"""Pictures of verdicts: the image beside its heat map, understandable without a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dskd.checkpoint import DetectorRecord
from dskd.detector import Prediction, find_regions
from dskd.evaluate import score_images
from dskd.training.run import TrainingRun

_PANEL = 384
_CAPTION = 40
_ANCHORS = np.array(  # dark blue, cyan, yellow, red: lightness rises, so it is readable in grey too
    [[20, 20, 60], [30, 90, 160], [60, 190, 190], [245, 220, 80], [235, 70, 30]], np.float32
)
_OK = (86, 178, 110)
_BAD = (226, 74, 60)
_INK = (235, 235, 235)
_PAPER = (24, 26, 30)


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


def overlay(prediction: Prediction, note: str = "") -> Image.Image:
    """A line with score and verdict; below it the image with boxes, and the image with its heat map on top.

    The image is whole and has its own aspect ratio; its longer side is 384 to 768 pixels, as the image allows.
    """
    picture = prediction.image
    heat = prediction.map_of(picture.shape[1], picture.shape[0])
    colours = heat_colours(heat, prediction.threshold)
    strength = (heat / max(prediction.threshold, 1e-12)).clip(0, 1)[..., None] * 0.65
    blended = ((1 - strength) * picture + strength * colours).astype(np.uint8)
    scale = max(_PANEL, *picture.shape[:2]) / max(picture.shape[:2])
    width, height = (max(1, round(scale * side)) for side in picture.shape[1::-1])
    panel_width = max(width, _PANEL)
    canvas = Image.new("RGB", (2 * panel_width, height + _CAPTION), _PAPER)
    across, down = width / prediction.width, height / prediction.height
    for column, pixels in enumerate((picture, blended)):
        panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(panel)
        for region in prediction.regions if prediction.is_anomalous and column == 0 else ():
            left, top = round(across * region.left), round(down * region.top)
            right, bottom = round(across * region.right), round(down * region.bottom)
            draw.rectangle([left - 2, top - 2, right + 1, bottom + 1], outline=_BAD, width=2)
        canvas.paste(panel, (column * panel_width, _CAPTION))
    draw = ImageDraw.Draw(canvas)
    verdict, colour = ("ANOMALOUS", _BAD) if prediction.is_anomalous else ("good", _OK)
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((10, 9), verdict, colour, font=large)
    draw.text((132, 12), f"score {prediction.score:.4g}   threshold {prediction.threshold:.4g}", _INK, font=small)
    draw.text(
        (2 * panel_width - 10, 12),
        f"{prediction.path.parent.name}/{prediction.path.name}",
        _INK,
        small,
        anchor="ra",
    )
    if note:
        # The note may be wider than a panel: right-aligned, on a background that is readable over any image.
        place = (2 * panel_width - 10, _CAPTION + height - 10)
        left, top, right, bottom = draw.textbbox(place, note, small, anchor="rs")
        draw.rectangle([left - 6, top - 4, right + 6, bottom + 4], fill=_PAPER)
        draw.text(place, note, _BAD, small, anchor="rs")
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures of equal size, arranged in rows and columns."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), _PAPER)
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def preview_of(run: TrainingRun, record: DetectorRecord, count: int = 4) -> npt.NDArray[np.uint8]:
    """A sheet (H, W, 3) of overlays of validation images with synthetic defects, scored by the best students."""
    truth = run.inputs.validation
    chosen = np.flatnonzero(truth.labels)[:count].tolist()
    seen = score_images(
        run.inputs.validation_features, run.students, truth.images, record.config, run.device, chosen, truth.inside
    )
    threshold = record.threshold(0.01).value
    note = "untrained teacher" if record.is_untrained_teacher else ""
    pictures = [
        overlay(
            Prediction(
                Path("validation", f"synthetic defect {number}"),
                score,
                threshold,
                score > threshold,
                find_regions(heat, threshold),
                truth.images[index],
                heat,
            ),
            note,
        )
        for number, (index, heat, score) in enumerate(zip(chosen, seen.maps, seen.scores.tolist(), strict=True), 1)
    ]
    return np.asarray(contact_sheet(pictures))

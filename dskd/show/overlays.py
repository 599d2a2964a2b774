"""Pictures of verdicts: the image beside its heat map, understandable without a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dskd.checkpoint import DetectorRecord, threshold_for
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
    """A line with score and verdict; below it the image with boxes, and the image with its heat map on top."""
    colours = heat_colours(prediction.map, prediction.threshold)
    strength = (prediction.map / max(prediction.threshold, 1e-12)).clip(0, 1)[..., None] * 0.65
    blended = ((1 - strength) * prediction.image + strength * colours).astype(np.uint8)
    canvas = Image.new("RGB", (2 * _PANEL, _PANEL + _CAPTION), _PAPER)
    scale = _PANEL / prediction.image.shape[0]
    for column, pixels in enumerate((prediction.image, blended)):
        panel = Image.fromarray(pixels).resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(panel)
        for region in prediction.regions if prediction.is_anomalous and column == 0 else ():
            box = [round(scale * edge) for edge in (region.left, region.top, region.right, region.bottom)]
            draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 1, box[3] + 1], outline=_BAD, width=2)
        canvas.paste(panel, (column * _PANEL, _CAPTION))
    draw = ImageDraw.Draw(canvas)
    verdict, colour = ("ANOMALOUS", _BAD) if prediction.is_anomalous else ("good", _OK)
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((10, 9), verdict, colour, font=large)
    draw.text((132, 12), f"score {prediction.score:.4g}   threshold {prediction.threshold:.4g}", _INK, font=small)
    draw.text(
        (2 * _PANEL - 10, 12),
        f"{prediction.path.parent.name}/{prediction.path.name}",
        _INK,
        small,
        anchor="ra",
    )
    if note:
        # The note may be wider than a panel: right-aligned, on a background that is readable over any image.
        place = (2 * _PANEL - 10, _CAPTION + _PANEL - 10)
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
    seen = score_images(run.inputs.validation_features, run.students, truth.images, record.config, run.device, chosen)
    threshold = threshold_for(record.thresholds, 0.01).value
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

"""Sheets of verdicts' pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dskd.calibration import normal_floor
from dskd.checkpoint import DetectorRecord
from dskd.detector import Prediction, find_regions
from dskd.draw.verdict import PAPER
from dskd.evaluate import AnomalyScores, LabelledImages, score_images
from dskd.training.run import TrainingRun


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures of equal size, arranged in rows and columns."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), PAPER)
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
    pictures = pictures_of(seen, truth, chosen, record, [f"synthetic defect {number + 1}" for number in range(count)])
    return np.asarray(contact_sheet(pictures))


def pictures_of(
    seen: AnomalyScores, truth: LabelledImages, chosen: Sequence[int], record: DetectorRecord, names: Sequence[str]
) -> list[Image.Image]:
    """A picture of each of the images `chosen` from `truth`; `seen` are the maps and scores of these, in their order.

    Labels and labelled defects are shown. The images are those that the network sees.
    """
    threshold = record.threshold(0.01).value
    note = "untrained teacher" if record.is_untrained_teacher else ""
    floor = normal_floor(record.normal_scores) if record.normal_scores else None
    pictures = []
    for index, heat, score, name in zip(chosen, seen.maps, seen.scores.tolist(), names, strict=False):
        regions = find_regions(heat, threshold)
        prediction = Prediction(
            Path("validation", name), score, threshold, score > threshold, regions, truth.images[index], heat,
            floor=floor,
        )  # fmt: skip
        pictures.append(prediction.plot(note, is_defective=bool(truth.labels[index]), truth=truth.masks[index]))
    return pictures

"""Sheets of verdicts' pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dskd.checkpoint import DetectorRecord
from dskd.detector import Prediction, find_regions
from dskd.draw.verdict import PAPER
from dskd.evaluate import score_images
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
    threshold = record.threshold(0.01).value
    note = "untrained teacher" if record.is_untrained_teacher else ""
    pictures = [
        Prediction(
            Path("validation", f"synthetic defect {number}"),
            score,
            threshold,
            score > threshold,
            find_regions(heat, threshold),
            truth.images[index],
            heat,
        ).plot(note)
        for number, (index, heat, score) in enumerate(zip(chosen, seen.maps, seen.scores.tolist(), strict=True), 1)
    ]
    return np.asarray(contact_sheet(pictures))

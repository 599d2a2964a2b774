"""Sheets of verdicts' pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dskd.calibration import normal_floor
from dskd.checkpoint import DetectorRecord
from dskd.data.geometry import Frame, Geometry, whole_frame
from dskd.data.images import frame_of
from dskd.detector import Prediction, find_regions, in_image
from dskd.draw.verdict import PAPER
from dskd.evaluate import AnomalyScores, score_images
from dskd.training.run import TrainingRun


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures in rows and columns, each in a place that holds the largest."""
    width, height = max(each.width for each in pictures), max(each.height for each in pictures)
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
    pictures = pictures_of(run, seen, chosen, record, [f"synthetic defect {number + 1}" for number in range(count)])
    return np.asarray(contact_sheet(pictures))


def pictures_of(
    run: TrainingRun, seen: AnomalyScores, chosen: Sequence[int], record: DetectorRecord, names: Sequence[str]
) -> list[Image.Image]:
    """A picture of each validation image in `chosen`; `seen` are the maps and scores of these, in their order.

    Labels and labelled defects are shown, and images have the shape of their files where these are known.
    """
    truth = run.inputs.validation
    threshold = record.threshold(0.01).value
    note = "untrained teacher" if record.is_untrained_teacher else ""
    floor = normal_floor(record.normal_scores) if record.normal_scores else None
    pictures = []
    for index, heat, score, name in zip(chosen, seen.maps, seen.scores.tolist(), names, strict=False):
        frame = frame_of_validation(run, index)
        left, top, right, bottom = frame.place
        regions = tuple(in_image(region, frame, 1) for region in find_regions(heat, threshold))
        share = max(right - left, bottom - top) / max(frame.width, frame.height)
        size = (max(1, round(frame.width * share)), max(1, round(frame.height * share)))
        image = np.asarray(Image.fromarray(truth.images[index][top:bottom, left:right]).resize(size))
        prediction = Prediction(
            Path("validation", name), score, threshold, score > threshold, regions, image, heat, frame=frame,
            floor=floor,
        )  # fmt: skip
        mask = truth.masks[index][top:bottom, left:right]
        pictures.append(prediction.plot(note, is_defective=bool(truth.labels[index]), truth=mask))
    return pictures


def frame_of_validation(run: TrainingRun, index: int) -> Frame:
    """Where a validation image lies on its canvas; the canvas itself, of tiles and of files that are not known.

    Only a synthetic defect's canvas exists, not its photo; the frame is that of the photo's inspected part.
    """
    inputs = run.inputs
    height, width = inputs.validation.images.shape[1:3]
    source = int(inputs.validation.sources[index])
    geometry = Geometry.of(run.config.data, inputs.region, run.config.model.tile_alignment)
    has_files = inputs.validation_files == inputs.calibration_files and source < len(inputs.calibration_paths)
    if geometry.tile or inputs.selection == "oracle" or not has_files:
        return whole_frame(width, height)
    found = frame_of(inputs.calibration_paths[source], geometry)
    across, down = found.box[2] - found.box[0], found.box[3] - found.box[1]
    return found._replace(width=across, height=down, box=(0, 0, across, down))

"""Pictures of a detector's validation: its curves, and the images with the best and the worst scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dskd.checkpoint import DetectorRecord
from dskd.evaluate import AnomalyScores, LabelledImages, score_images
from dskd.report.document import SCORES_FILE, ImageScore, scores_json
from dskd.show.overlays import contact_sheet, pictures_of
from dskd.show.plots import draw_curves
from dskd.training.run import TrainingRun

_OF_EACH_KIND = 2


def write_figures(folder: Path, run: TrainingRun, record: DetectorRecord) -> None:
    """Write `curves.png`, `best.jpg`, `worst.jpg` and `scores.json` of the validation images into `folder`.

    The folder is created.

    `run` must hold the detector's students, as `TrainingRun.detector` leaves it; `record` belongs to that detector.
    """
    truth = run.inputs.validation
    seen = score_images(
        run.inputs.validation_features, run.students, truth.images, record.config, run.device, inside=truth.inside
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES_FILE).write_bytes(scores_json(_scores(seen, run)))
    num_real = record.num_validation_defects
    num_synthetic = int(truth.labels.sum()) - num_real
    title = (
        f"{record.category}: validation on {int((~truth.labels).sum())} normals, {num_synthetic} synthetic and "
        f"{num_real} real defects{' (untrained teacher)' if record.is_untrained_teacher else ''}"
    )
    draw_curves(seen, truth, title).savefig(folder / "curves.png", dpi=100)
    best, worst = extremes(seen, truth)
    for name, chosen in (("best", best), ("worst", worst)):
        # JPEG needs a tenth of the bytes, and only people look at this picture.
        contact_sheet(_overlays(run, seen, chosen, record)).save(folder / f"{name}.jpg", quality=85)


def _scores(seen: AnomalyScores, run: TrainingRun) -> list[ImageScore]:
    """Each validation image with its label and score; copies with synthetic defects have the names of their originals.

    Tiles and images that no record names are numbered.
    """
    truth, names = run.inputs.validation, run.inputs.validation_files
    num_real = run.inputs.num_validation_defects
    is_named = not run.config.data.tile
    found = []
    for index, (label, source, score) in enumerate(zip(truth.labels, truth.sources, seen.scores.tolist(), strict=True)):
        is_real = run.inputs.selection == "oracle" or (num_real > 0 and index >= len(truth.labels) - num_real)
        kind = "good" if not label else "real" if is_real else "synthetic"
        file = names[source] if is_named and not is_real and source < len(names) else f"{kind} {index + 1}"
        found.append(ImageScore(file=file, defect=kind, is_defective=bool(label), score=score))
    return found


def extremes(seen: AnomalyScores, truth: LabelledImages) -> tuple[list[int], list[int]]:
    """Indices of the best and of the worst inspected images, each with at most two normal and two defective ones.

    Best are the normals with the lowest scores and the defects with the highest scores; worst is the reverse.
    """
    order = np.argsort(seen.scores, kind="stable")
    normals, defects = order[~truth.labels[order]], order[truth.labels[order]]
    count = _OF_EACH_KIND
    best = [*normals[:count], *defects[::-1][:count]]
    worst = [*normals[::-1][:count], *defects[:count]]
    return [int(index) for index in best], [int(index) for index in worst]


def _overlays(
    run: TrainingRun, seen: AnomalyScores, chosen: Sequence[int], record: DetectorRecord
) -> list[Image.Image]:
    # Normals and defects are numbered separately, as in preview.png: normals come first, then the defects.
    labels, order = run.inputs.validation.labels, list(chosen)
    names = [
        f"{'defect' if labels[index] else 'normal'} {(labels[: index + 1] == labels[index]).sum()}" for index in order
    ]
    return pictures_of(run, AnomalyScores(seen.maps[order], seen.scores[order]), order, record, names)

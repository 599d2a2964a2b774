"""Pictures of a validation: what they show is what the metrics say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dskd.config import RunConfig
from dskd.data.geometry import whole_frame
from dskd.evaluate import AnomalyScores, LabelledImages, compute_metrics, score_images
from dskd.report.document import read_scores
from dskd.show.overlays import frame_of_validation
from dskd.show.plots import draw_curves
from dskd.show.validation import extremes, write_figures
from dskd.training.inputs import TrainingData
from dskd.training.run import TrainingRun


def truth(labels: list[int], masks: np.ndarray | None = None) -> LabelledImages:
    count = len(labels)
    known = np.zeros((count, 8, 8), np.bool_) if masks is None else masks
    images = np.zeros((count, 8, 8, 3), np.uint8)
    return LabelledImages(images, known, np.array(labels, np.bool_), np.ones(count, np.bool_), np.arange(count))


def test_the_extremes_are_the_most_and_the_least_convincing_of_each_kind() -> None:
    scores = np.array([5, 1, 3, 2, 9, 4, 7, 8], np.float32)
    seen = AnomalyScores(np.zeros((8, 8, 8), np.float32), scores)
    best, worst = extremes(seen, truth([0, 0, 0, 0, 1, 1, 1, 1]))
    assert (best, worst) == ([1, 3, 4, 7], [0, 2, 5, 6])
    assert extremes(AnomalyScores(seen.maps[:2], scores[:2]), truth([0, 1])) == ([0, 1], [0, 1])


def test_a_run_leaves_readable_figures_whose_areas_are_its_metrics(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path
) -> None:
    run = TrainingRun.begin(tiny, inputs, torch.device("cpu"))
    for _ in run.intervals():
        pass
    record, _ = run.detector()
    write_figures(tmp_path / "figures", run, record)
    files = {path.name: path for path in (tmp_path / "figures").iterdir()}
    kept = read_scores(json.loads(files.pop("scores.json").read_text()))
    assert set(files) == {"curves.png", "best.jpg", "worst.jpg"}
    for path in files.values():
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300
        assert path.stat().st_size < 400_000
    seen = score_images(inputs.validation_features, run.students, inputs.validation.images, tiny, run.device)
    assert [image.score for image in kept] == seen.scores.tolist()
    assert [image.is_defective for image in kept] == inputs.validation.labels.tolist()
    assert [image.file for image in kept[:4]] == [*inputs.validation_files] * 2
    assert {image.defect for image in kept} == {"good", "synthetic"}
    scores = compute_metrics(seen, inputs.validation)
    titles = [axes.get_title() for axes in draw_curves(seen, inputs.validation, "t").axes]
    assert titles == [
        f"images: ROC, area {scores.image_auroc:.4f}",
        f"pixels: ROC, area {scores.pixel_auroc:.4f}",
        f"regions: PRO, area {scores.aupro:.4f}",
    ]


def test_curves_of_many_pixels_are_thinned_without_losing_their_shape() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 128, 128), np.bool_)
    masks[2:, 20:90, 20:90] = True
    maps = (rng.random((4, 128, 128)) + 0.5 * masks).astype(np.float32)
    images = LabelledImages(
        np.zeros((4, 128, 128, 3), np.uint8),
        masks,
        np.array([0, 0, 1, 1], np.bool_),
        np.ones(4, np.bool_),
        np.arange(4),
    )
    figure = draw_curves(AnomalyScores(maps, maps.max((1, 2))), images, "t")
    pixels = figure.axes[1]
    line = np.asarray(pixels.lines[0].get_xydata())
    assert 500 < len(line) <= 2001 and tuple(line[0]) == (0, 0) and tuple(line[-1]) == (1, 1)
    said = float(pixels.get_title().split()[-1])
    assert np.trapezoid(line[:, 1], line[:, 0]) == pytest.approx(said, abs=2e-3)


def test_without_a_mask_only_images_have_a_curve() -> None:
    seen = AnomalyScores(np.zeros((2, 8, 8), np.float32), np.array([0.0, 1.0], np.float32))
    assert len(draw_curves(seen, truth([0, 1]), "t").axes) == 1


def test_validation_pictures_have_the_shape_of_their_photos(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (160, 90)).save(photo)
    folds = inputs._replace(
        validation_files=inputs.calibration_files, calibration_paths=(photo,) * len(inputs.calibration_paths)
    )
    run = TrainingRun.begin(tiny, folds, torch.device("cpu"))
    for resize, place in (("square", (0, 0, 32, 32)), ("letterbox", (0, 7, 32, 25))):
        config = tiny.with_values({"resize": resize})
        run.config = config
        frame = frame_of_validation(run, 0)
        assert (frame.width, frame.height, frame.place) == (160, 90, place)
    run.config, run.inputs = tiny, inputs
    assert frame_of_validation(run, 0) == whole_frame(32, 32), "the files of the selection are not known"

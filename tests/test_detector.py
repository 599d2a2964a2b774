import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dskd import detector as module
from dskd import metrics
from dskd.detector import Detector, Region, find_regions
from dskd.training.inputs import TrainingData


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Detector:
    return Detector.load(detector_folder)


@pytest.fixture(scope="module")
def photos(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test").rglob("*.png"))


def test_an_image_is_anomalous_when_its_score_exceeds_the_threshold(detector: Detector, photos: list[Path]) -> None:
    for photo in photos:
        (seen,) = detector.predict([photo], 0.1)
        assert seen.score == pytest.approx(float(seen.map.max())), "the image score is the maximum by default"
        (at,) = detector.predict([photo], seen.score)
        (below,) = detector.predict([photo], float(np.nextafter(seen.score, 0)))
        assert not at.is_anomalous and at.threshold == at.score
        assert below.is_anomalous


def test_predictions_come_in_the_order_of_the_paths_whatever_the_chunk(
    detector: Detector, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = photos[::-1]
    whole = list(detector.predict(wanted, 0.1))
    monkeypatch.setattr(module, "PREDICT_CHUNK", 3)
    chunked = list(detector.predict(wanted, 0.1))
    assert [seen.path for seen in whole] == [seen.path for seen in chunked] == wanted
    assert len({seen.score for seen in whole}) == len(wanted)
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(other.map, one.map, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(other.image, one.image)
    assert list(detector.predict([], 0.1)) == []


def test_predict_works_lazily(detector: Detector, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREDICT_CHUNK", 2)
    endless = [*photos[:2], Path("unreadable.png")]
    assert len(list(itertools.islice(detector.predict(endless, 0.1), 2))) == 2
    with pytest.raises(ValueError, match=r"unreadable\.png does not exist"):
        list(detector.predict(endless, 0.1))


def test_regions_are_boxes_of_touching_pixels_above_the_threshold() -> None:
    heat = np.zeros((8, 8), np.float32)
    heat[1, 1], heat[2, 2], heat[2, 3] = 5, 6, 7  # one region: corners touch
    heat[5:8, 6] = 9
    heat[0, 6] = 4
    heat[4, 0] = 3  # at the threshold, hence not above it
    assert find_regions(heat, 3) == (
        Region(6, 5, 7, 8, 9, ((6, 5), (7, 5), (7, 8), (6, 8))),
        Region(1, 1, 4, 3, 7, ((1, 1), (2, 1), (2, 2), (4, 2), (4, 3), (2, 3), (2, 2), (1, 2))),
        Region(6, 0, 7, 1, 4, ((6, 0), (7, 0), (7, 1), (6, 1))),
    )
    assert find_regions(heat, 9) == ()
    assert find_regions(np.ones((4, 6), np.float32), 0.5) == (Region(0, 0, 6, 4, 1, ((0, 0), (6, 0), (6, 4), (0, 4))),)


def test_regions_of_a_prediction_hold_every_pixel_above_the_threshold(detector: Detector, photos: list[Path]) -> None:
    maps = detector.score_images(np.stack([np.asarray(Image.open(path).resize((32, 32))) for path in photos])).maps
    threshold = float(np.quantile(maps, 0.9))
    for seen in detector.predict(photos, threshold):
        boxed = np.zeros_like(seen.map, bool)
        for region in seen.regions:
            box = seen.map[region.top : region.bottom, region.left : region.right]
            assert box.max() == np.float32(region.peak) > threshold
            boxed[region.top : region.bottom, region.left : region.right] = True
        assert not (seen.map > threshold)[~boxed].any()
        assert [region.peak for region in seen.regions] == sorted((r.peak for r in seen.regions), reverse=True)


def test_evaluate_is_the_metrics_of_the_maps_of_the_test_split(detector: Detector, mvtec_root: Path) -> None:
    images, masks, labels = [], [], []
    for folder in ("good", "scratch"):
        for path in sorted((mvtec_root / "tile/test" / folder).iterdir()):
            images.append(np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)))
            mask = mvtec_root / "tile/ground_truth" / folder / f"{path.stem}_mask.png"
            there = mask.exists()
            masks.append(np.asarray(Image.open(mask).resize((32, 32), Image.Resampling.NEAREST)) > 127 if there
                         else np.zeros((32, 32), bool))  # fmt: skip
            labels.append(folder != "good")
    seen = detector.score_images(np.stack(images))
    expected = metrics.score_maps(seen.maps, np.stack(masks), seen.scores, np.array(labels))
    assert detector.evaluate(mvtec_root, "tile") == expected
    assert expected.pixel_auroc == pytest.approx(metrics.pixel_auroc(seen.maps, np.stack(masks)))


def test_evaluation_needs_good_and_defective_images(detector: Detector, mvtec_root: Path, tmp_path: Path) -> None:
    (tmp_path / "tile/train").mkdir(parents=True)
    (tmp_path / "tile/train/good").symlink_to(mvtec_root / "tile/train/good")
    (tmp_path / "tile/test").mkdir()
    (tmp_path / "tile/test/good").symlink_to(mvtec_root / "tile/test/good")
    with pytest.raises(ValueError, match="got 4 good and 0 defective"):
        detector.evaluate(tmp_path, "tile")


def test_a_loaded_detector_sees_what_its_training_saw(detector: Detector, inputs: TrainingData) -> None:
    scores = detector.score_images(inputs.calibration_images).scores
    highest = detector.record.thresholds[0]
    assert highest.num_normals == len(scores) == 2
    assert highest.value == pytest.approx(float(scores.max()), rel=1e-4)


def test_the_verdict_does_not_depend_on_its_neighbours(detector: Detector, inputs: TrainingData) -> None:
    images = inputs.train_images[:5]
    together = detector.score_images(images)
    alone = [detector.score_images(image[None]) for image in images]
    np.testing.assert_allclose(np.concatenate([seen.maps for seen in alone]), together.maps, rtol=1e-4, atol=1e-6)


def test_the_caller_random_state_is_left_alone(detector_folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Detector.load(detector_folder)
    assert torch.equal(torch.rand(3), expected)

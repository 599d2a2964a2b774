"""Networks for inference: scores of the folded ones are those of the trained ones."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from dskd.checkpoint import DetectorRecord
from dskd.config import RunConfig
from dskd.data.geometry import whole_frame
from dskd.detector import Detector
from dskd.evaluate import score_canvas, score_images
from dskd.export import as_inputs, generated_images
from dskd.model import AmplifiedTeacher, build_amplifier, build_students, build_teacher
from dskd.model.folding import folded, folded_pair
from dskd.model.frozen import FrozenNetworks
from dskd.presets import PRESETS

CPU = torch.device("cpu")
TINY = {
    "backbone": "test_resnet", "levels": [1, 2], "level_weights": [1, 1], "score_level_weights": [1, 0.5],
    "embedding_depth": 1, "image_size": 64,
}  # fmt: skip


def used(module: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not those of an untrained BatchNorm."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low in ((layer.running_mean, -0.3), (layer.running_var, 0.5), (layer.weight, 0.5)):
                assert value is not None
                value.data = torch.rand(value.shape, generator=generator) + low
            layer.bias.data = torch.rand(layer.bias.shape, generator=generator) - 0.5
    return module


def detector_of(config: RunConfig) -> Detector:
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    used(teacher)
    if config.amplification.amplification:
        teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, 4, seed=0))
    record = DetectorRecord(
        category="none", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
        calibration_files=(), step=1, thresholds=(), metrics={},
    )  # fmt: skip
    students = build_students(config.model, teacher, seed=1).eval()
    used(students)
    return Detector(record, teacher, students, CPU)


def has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [{}, {"resize": "96x64"}, {"resize": "letterbox"}], ids=["square", "wide", "bars"])
def test_scores_are_those_of_the_trained_networks(preset: str, shape: dict[str, str]) -> None:
    detector = detector_of(PRESETS[preset].with_values(TINY | shape))
    geometry, config = detector.geometry, detector.record.config
    images = generated_images(geometry.width, geometry.height)[:5]
    inside = None
    if geometry.is_masked:
        inside = np.ones(images.shape[:3], np.bool_)
        inside[:, :16] = False
    expected = score_images(detector.teacher, detector.students, images, config, CPU, inside=inside)
    found = detector.score_images(images, inside)
    assert not any(has_batchnorm(part) for part in (detector.frozen.teacher, detector.frozen.students))
    np.testing.assert_allclose(found.maps, expected.maps, rtol=0, atol=1e-5 * expected.maps.max())
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_tiles_are_scored_as_by_the_trained_networks() -> None:
    detector = detector_of(PRESETS["dskd"].with_values(TINY | {"tile": 64, "overlap": 32}))
    canvas = generated_images(160, 96)[4]
    (image,) = as_inputs(canvas[None])
    heat, score = score_canvas(
        FrozenNetworks(detector.teacher, detector.students),
        canvas,
        whole_frame(160, 96),
        detector.record.config,
        detector.geometry,
        CPU,
    )
    (found,), (value,) = detector.score_framed([image])
    np.testing.assert_allclose(found, heat, rtol=0, atol=1e-5 * heat.max())
    assert value == pytest.approx(score, rel=1e-5)


def test_networks_stay_as_they_are_where_a_layer_does_not_feed_the_next_one() -> None:
    class Twisted(nn.Module):
        """Its BatchNorm comes before the convolution that stands before it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.conv(self.norm(images)),)

    class Student(nn.Module):
        def forward(self, images: Tensor, targets: tuple[Tensor]) -> tuple[tuple[Tensor], None]:
            return targets, None

    twisted, student = used(Twisted()).eval(), Student()
    assert not has_batchnorm(folded(twisted)) and has_batchnorm(twisted)
    assert folded_pair(twisted, student, 8) == (twisted, student)


def test_a_weight_of_one_and_a_blur_cost_no_pass_and_change_no_map() -> None:
    config = PRESETS["rd4ad"].with_values(TINY | {"score_level_weights": [1, 1]})
    detector = detector_of(config)
    images = generated_images(64)[3:5]
    blurred = detector.score_images(images).maps
    sharp_record = dataclasses.replace(detector.record, config=config.with_values({"blur_sigma": 0}))
    sharp = Detector(sharp_record, detector.teacher, detector.students, CPU).score_images(images).maps
    for found, level in zip(blurred, sharp, strict=True):
        expected = ndimage.gaussian_filter(level.astype(float), 4.0 * 64 / 256)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.max())


def test_students_in_training_are_folded_as_they_are_and_stay_so() -> None:
    """In training mode the noise of the comparison would enter their statistics, and no folded pair would agree."""
    detector = detector_of(PRESETS["dskd"].with_values(TINY))
    students = detector.students.train()
    before = {name: value.clone() for name, value in students.state_dict().items()}
    pair = folded_pair(detector.teacher, students, 64)
    assert not any(has_batchnorm(part) for part in pair)
    assert all(torch.equal(value, before[name]) for name, value in students.state_dict().items())

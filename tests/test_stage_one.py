import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from timm.models import FeatureInfo
from torch import Tensor, nn

from dskd.config import AmplificationConfig
from dskd.data.defects import add_defects
from dskd.model import AmplifiedTeacher, Amplifier, Teacher, build_amplifier, normalize
from dskd.training import stage_one as amplify
from dskd.training.inputs import TrainingData
from dskd.training.loop import NonFiniteLossError
from dskd.training.stage_one import (
    AmplificationEpoch,
    amplifier_optimizer,
    draw_example,
    fit_amplifier,
    patch_masks,
    stage_losses,
)

CPU = torch.device("cpu")
CONFIG = AmplificationConfig(
    amplification=True, amplification_epochs=3, amplification_batch_size=4, amplification_learning_rate=0.002,
    memory_size=5,
)  # fmt: skip


def begun(inputs: TrainingData, config: AmplificationConfig = CONFIG) -> tuple[Amplifier, torch.optim.Optimizer]:
    amplifier = build_amplifier(inputs.teacher, config.memory_size, config.amplification_seed)
    return amplifier, amplifier_optimizer(amplifier, config)


def trained(
    inputs: TrainingData, config: AmplificationConfig = CONFIG, **options: Any
) -> tuple[Amplifier, list[AmplificationEpoch]]:
    amplifier, optimizer = begun(inputs, config)
    images = inputs.train_images
    epochs = fit_amplifier(amplifier, optimizer, inputs.teacher, images, config, device=CPU, **options)
    return amplifier, list(epochs)


def figures(epochs: list[AmplificationEpoch]) -> list[tuple[float, ...]]:
    return [epoch[:4] for epoch in epochs]


def same_weights(one: Amplifier, other: Amplifier) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return all(torch.equal(value, its[name]) for name, value in mine.items())


def test_two_runs_are_bit_identical_whatever_the_number_of_drawing_threads(
    inputs: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, epochs = trained(inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    second, again = trained(inputs)
    assert figures(epochs) == figures(again) and same_weights(first, second)
    assert [epoch.number for epoch in epochs] == [0, 1, 2]
    other, _ = trained(inputs, dataclasses.replace(CONFIG, amplification_seed=1))
    assert not same_weights(first, other)


def test_an_interrupted_stage_goes_on_exactly_as_if_never_interrupted(inputs: TrainingData) -> None:
    whole, expected = trained(inputs)
    amplifier, optimizer = begun(inputs)
    images = inputs.train_images
    started = next(fit_amplifier(amplifier, optimizer, inputs.teacher, images, CONFIG, device=CPU))
    restored, its_optimizer = begun(inputs)
    restored.load_state_dict(amplifier.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    rest = fit_amplifier(restored, its_optimizer, inputs.teacher, images, CONFIG, device=CPU, first_epoch=1)
    assert figures([started, *rest]) == figures(expected)
    assert same_weights(whole, restored)


def test_only_the_amplifier_learns_and_each_loss_trains_its_own_half(inputs: TrainingData) -> None:
    amplifier, _ = begun(inputs)
    teacher = inputs.teacher
    pyramid = teacher(normalize(torch.from_numpy(inputs.train_images[:4])))
    sizes = [(level.shape[2], level.shape[3]) for level in pyramid]
    defects = [np.random.default_rng(0).random((4, *size)) < 0.3 for size in sizes]
    gate, residual = stage_losses(
        amplifier, pyramid, defects, [~defect for defect in defects], 0.3, np.random.default_rng(0)
    )
    parameters = dict(amplifier.named_parameters())
    for loss, half in ((gate, ".gate."), (residual, ".residual.")):
        assert loss > 0
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        reached = {name for name, value in zip(parameters, gradients, strict=True) if value is not None and value.any()}
        assert reached == {name for name in parameters if half in name}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_training_moves_nothing_but_the_amplifier(inputs: TrainingData) -> None:
    before = {name: value.clone() for name, value in inputs.teacher.state_dict().items()}
    images = inputs.train_images.copy()
    amplifier, _ = trained(inputs)
    assert all(torch.equal(value, before[name]) for name, value in inputs.teacher.state_dict().items())
    np.testing.assert_array_equal(inputs.train_images, images)
    untrained = begun(inputs)[0].state_dict()
    assert not any(torch.equal(value, untrained[name]) for name, value in amplifier.state_dict().items())


class Patches(nn.Module):
    """Two levels of fixed random patch projections: unlike an untrained ResNet's, they tell colours apart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 16, 4, stride=4)
            self.second = nn.Conv2d(16, 32, 2, stride=2)
        self.feature_info = FeatureInfo(
            [{"num_chs": 16, "reduction": 4, "module": ""}, {"num_chs": 32, "reduction": 8, "module": ""}], (0, 1)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        level = torch.relu(3 * self.first(images))
        return [level, torch.relu(3 * self.second(level))]


def test_the_amplified_teacher_tells_unseen_defects_apart_better(inputs: TrainingData) -> None:
    teacher = Teacher(Patches())
    config = dataclasses.replace(CONFIG, amplification_epochs=60, amplification_learning_rate=0.005)
    amplifier, epochs = trained(inputs._replace(teacher=teacher), config)
    assert epochs[-1].residual_loss < 0.5 * epochs[0].residual_loss
    normals = inputs.validation.images[~inputs.validation.labels]
    images, masks = add_defects(np.concatenate([normals] * 12), seed=99)
    pixels = normalize(torch.from_numpy(images))
    plain, pushed = teacher(pixels), AmplifiedTeacher(teacher, amplifier)(pixels)
    sizes = [(level.shape[2], level.shape[3]) for level in plain]
    for before, after, level, defect in zip(plain, pushed, amplifier.levels, patch_masks(masks, sizes), strict=True):
        abnormal = torch.from_numpy(defect)
        units = [F.normalize(features, dim=1).movedim(1, 3) for features in (before, after)]
        between, within = ([float((u[a] @ u[~abnormal].T).mean()) for u in units] for a in (abnormal, ~abnormal))
        assert between[1] < between[0] - 0.01, "abnormal positions became less similar to normal ones"
        assert between[1] - within[1] < between[0] - within[0], "and more so than normal ones to each other"
        assert roc_auc_score(defect.ravel(), level.gate(before).flatten()) > 0.7  # type: ignore[operator]


def test_a_diverging_stage_says_so(inputs: TrainingData) -> None:
    config = dataclasses.replace(CONFIG, amplification_learning_rate=1e30)
    with pytest.raises(NonFiniteLossError, match=r"\(stage I\) is not finite in epoch \d; .*_rate 1e\+30") as caught:
        trained(inputs, config)
    assert "\n" not in str(caught.value)


def test_an_example_depends_on_seed_epoch_and_index_alone(inputs: TrainingData) -> None:
    image = inputs.train_images[0]
    drawn = {(seed, epoch, index): draw_example(image, index, seed, epoch)
             for seed in (0, 1) for epoch in (0, 1) for index in (0, 1, 5, 6)}  # fmt: skip
    for (seed, epoch, index), (picture, mask) in drawn.items():
        again, its_mask = draw_example(image, index, seed, epoch)
        assert np.array_equal(picture, again) and np.array_equal(mask, its_mask)
        assert mask.any() != np.array_equal(picture, image)
    defective = [picture.tobytes() for picture, mask in drawn.values() if mask.any()]
    assert len(set(defective)) == len(defective) > 8


def test_one_image_of_five_stays_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    marked = np.ones((1, 4, 4), bool)
    monkeypatch.setattr(amplify, "add_defects", lambda images, **options: (images + 1, marked))
    examples = [draw_example(image, index, 0, epoch) for index in range(40) for epoch in range(50)]
    clean = sum(not mask.any() for _, mask in examples)
    assert abs(clean / 2000 - 0.2) < 3 * (0.2 * 0.8 / 2000) ** 0.5
    assert all(bool(picture.any()) == bool(mask.any()) for picture, mask in examples)


def test_patches_against_a_loop() -> None:
    masks = np.random.default_rng(0).random((3, 12, 12)) < 0.3
    for (rows, columns), found in zip([(4, 4), (3, 6)], patch_masks(masks, [(4, 4), (3, 6)]), strict=True):
        high, wide = 12 // rows, 12 // columns
        for image, row, column in np.ndindex(3, rows, columns):
            inside = masks[image, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            assert found[image, row, column] == (inside.sum() / inside.size > 0.3)


def test_a_batch_without_defects_costs_the_residuals_nothing(inputs: TrainingData) -> None:
    amplifier, _ = begun(inputs)
    pyramid = inputs.teacher(normalize(torch.from_numpy(inputs.train_images[:2])))
    clean = [np.zeros((2, *level.shape[2:]), bool) for level in pyramid]
    gate, residual = stage_losses(amplifier, pyramid, clean, [~mask for mask in clean], 0.3, np.random.default_rng(0))
    torch.autograd.backward(gate + residual)
    assert gate > 0 and residual == 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in amplifier.parameters())


def test_more_positions_than_the_limit_are_drawn_without_repetition() -> None:
    features = torch.arange(2 * 3 * 10 * 10, dtype=torch.float32).reshape(2, 3, 10, 10)
    where = np.random.default_rng(0).random((2, 10, 10)) < 0.5
    chosen = amplify.features_at(features, where, 20, np.random.default_rng(1))
    allowed = {tuple(features[b, :, y, x].tolist()) for b, y, x in np.argwhere(where)}
    rows = {tuple(row) for row in chosen.tolist()}
    assert chosen.shape == (20, 3) and len(rows) == 20 and rows <= allowed
    every = amplify.features_at(features, where, 1000, np.random.default_rng(1))
    assert {tuple(row) for row in every.tolist()} == allowed


def test_textures_reach_the_defects(inputs: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    given = np.full((1, 8, 8, 3), 7, np.uint8)
    seen = []

    def spy(images: np.ndarray, *, textures: np.ndarray | None, **_: object) -> tuple[np.ndarray, np.ndarray]:
        seen.append(textures)
        return images, np.zeros(images.shape[:3], bool)

    monkeypatch.setattr(amplify, "add_defects", spy)
    trained(inputs, dataclasses.replace(CONFIG, amplification_epochs=1), textures=given)
    assert len(seen) > 2 and all(textures is given for textures in seen)

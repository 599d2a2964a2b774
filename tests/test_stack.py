"""K trainings at once: each equal to its solo run, also after others leave and after an interruption."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dskd.config import LossConfig, ModelConfig, TrainConfig
from dskd.losses import distillation_loss
from dskd.model.network import Students, build_students
from dskd.model.teacher import build_teacher, normalize
from dskd.training.loop import build_optimizer
from dskd.training.stack import StudentStack

MODEL = ModelConfig(backbone="test_resnet", levels=(1, 2), embedding_depth=1)
LOSSES = (
    LossConfig(level_weights=(1.0, 1.0)),
    LossConfig(level_weights=(1.0, 0.5), hkd_weight=1.0, encoder_hkd_margin=0.1),
    LossConfig(level_weights=(1.0, 1.0), decoder_weight=2.0),
)
TRAININGS = (
    TrainConfig(learning_rate=1e-3),
    TrainConfig(learning_rate=4e-3, seed=1),
    TrainConfig(learning_rate=1e-2, optimizer="sgd", seed=2),
)
TEACHER = build_teacher(MODEL.backbone, MODEL.levels, "random")
Batch = tuple[Tensor, tuple[Tensor, ...]]


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]
    return [(normalize(each), TEACHER(normalize(each))) for each in drawn]


def untrained(model: ModelConfig = MODEL) -> list[Students]:
    return [build_students(model, TEACHER, training.seed) for training in TRAININGS]


def alone(index: int, seen: Sequence[Batch], model: ModelConfig = MODEL) -> dict[str, Tensor]:
    students = build_students(model, TEACHER, TRAININGS[index].seed).train()
    optimizer = build_optimizer(students, TRAININGS[index])
    for images, targets in seen:
        outputs = students(images, targets)
        optimizer.zero_grad()
        distillation_loss(targets, outputs.encoder, outputs.decoder, LOSSES[index]).total.backward()
        optimizer.step()
    return students.state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Apart by less than 1% of the way that training went; Adam turns the rounding of a tiny gradient into a step."""
    assert found.keys() == expected.keys()
    apart = sum((found[name] - value).double().square().sum() for name, value in expected.items())
    way = sum((start[name] - value).double().square().sum() for name, value in expected.items())
    assert apart < 1e-4 * way


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dataclasses.replace(MODEL, student_decoder=False),
        dataclasses.replace(MODEL, student_encoder=False, decoder_input="teacher"),
    ],
    ids=["dskd", "stfpm", "rd4ad"],
)
def test_each_student_of_a_stack_trains_as_it_would_alone(model: ModelConfig) -> None:
    seen = batches(3)
    stack = StudentStack(untrained(model), TRAININGS)
    for images, targets in seen:
        terms = stack.step(images, targets, LOSSES)
    assert len({terms[index].total.item() for index in range(3)}) == 3
    for index in range(3):
        assert_equal(stack.state_dict(index), alone(index, seen, model), untrained(model)[index].state_dict())


def test_a_pruned_student_leaves_and_a_stored_one_goes_on_where_it_was() -> None:
    seen = batches(4)
    stack = StudentStack(untrained(), TRAININGS)
    for images, targets in seen[:2]:
        stack.step(images, targets, LOSSES)
    stored = stack.state_dict(2), copy.deepcopy(stack.optimizers[2].state_dict())
    stack.keep([0, 2])
    for images, targets in seen[2:]:
        stack.step(images, targets, [LOSSES[0], LOSSES[2]])
    assert len(stack) == 2
    for place, index in enumerate((0, 2)):
        assert_equal(stack.state_dict(place), alone(index, seen), untrained()[index].state_dict())

    resumed = StudentStack([untrained()[2]], [TRAININGS[2]])
    resumed.load(0, *stored)
    for images, targets in seen[2:]:
        resumed.step(images, targets, [LOSSES[2]])
    assert_equal(resumed.state_dict(0), alone(2, seen), stored[0])


def test_students_of_different_architecture_are_refused() -> None:
    deeper = build_students(dataclasses.replace(MODEL, embedding_depth=2), TEACHER, 0)
    with pytest.raises(ValueError, match="must have equal architectures"):
        StudentStack([untrained()[0], deeper], TRAININGS[:2])

"""The bookkeeping of recorded steps and inspections, with a stand-in for graphs; test_gpu.py has the real ones."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dskd.config import RunConfig
from dskd.detector import Detector
from dskd.evaluate import inspect_images, score_images
from dskd.losses import LossTerms
from dskd.model import frozen, recording
from dskd.model.distances import Pyramid
from dskd.model.frozen import FrozenNetworks
from dskd.training import recorded as steps
from dskd.training.inputs import TrainingData
from dskd.training.loop import Interval, Step, TakeStep, build_optimizer, fit, plain_step
from dskd.training.recorded import NUM_REHEARSALS, RecordedSteps
from dskd.training.run import TrainingRun

CPU = torch.device("cpu")


class Tape:
    """What a graph does: the same act again, into the same tensors."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.outputs: Any = None

    def replay(self) -> None:
        for place, value in zip(self.outputs, self.act(), strict=True):
            place.copy_(value)


def trained(
    config: RunConfig, inputs: TrainingData, take_step: TakeStep, weights: list[nn.Parameter] | None = None
) -> tuple[list[float], list[Tensor]]:
    """Losses and weights of a whole training; `weights` is filled with the parameters before it."""
    run = TrainingRun.begin(config, inputs, CPU)
    if weights is not None:
        weights[:] = run.students.parameters()
    optimizer = build_optimizer(run.students, config.train)
    features = inputs.train_features
    found = list(fit(run.students, optimizer, inputs.train_images, features, config, device=CPU, take_step=take_step))
    assert sum(isinstance(each, Interval) for each in found) > 1
    return [each.loss.item() for each in found if isinstance(each, Step)], list(run.students.state_dict().values())


@pytest.fixture
def longer(tiny: RunConfig) -> RunConfig:
    return tiny.with_values({"epochs": 4, "batch_size": 3})


def test_recorded_steps_see_each_batch_and_equal_single_ones(
    longer: RunConfig, inputs: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_taken, weights = 0, list[nn.Parameter]()

    def in_their_order(students: Any, optimizer: Any, loss: Any, images: Tensor, targets: Pyramid) -> LossTerms:
        """A single step on targets in the memory order of recorded ones, which sums round with."""
        nonlocal num_taken
        num_taken += 1
        if num_taken > NUM_REHEARSALS:
            targets = tuple(level.contiguous(memory_format=torch.channels_last) for level in targets)
        return plain_step(students, optimizer, loss, images, targets)

    def record(device: torch.device, act: Callable[[], LossTerms]) -> tuple[Tape, LossTerms]:
        def anew() -> LossTerms:
            for weight in weights:  # a recorded backward pass replaces the gradients, where a repeated one adds to them
                weight.grad = None
            return act()

        tape = Tape(anew)
        total, encoder, decoder, hard = torch.full((4,), -1.0).unbind()
        tape.outputs = LossTerms(total, encoder, decoder, hard, torch.full((2, 2), -1.0))
        return tape, tape.outputs

    monkeypatch.setattr(steps, "rehearse", lambda device, act: act())
    monkeypatch.setattr(steps, "record", record)
    own = RecordedSteps()
    losses, state = trained(longer, inputs, own, weights)
    expected = trained(longer, inputs, in_their_order)
    assert own.is_recorded and len(losses) > NUM_REHEARSALS + 2
    assert losses == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(state, expected[1], strict=True))


def test_steps_that_cannot_be_recorded_are_taken_one_by_one(
    longer: RunConfig, inputs: TrainingData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: torch.device, act: Callable[[], object]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(steps, "rehearse", lambda device, act: act())
    monkeypatch.setattr(steps, "record", refuse)
    own = RecordedSteps()
    assert trained(longer, inputs, own)[0] == trained(longer, inputs, plain_step)[0] and not own.is_recorded
    (message,) = [each.message for each in caplog.records]
    assert message.endswith("operation not permitted when stream is capturing")


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inspections are recorded on the CPU too; the sizes of the batches that were."""
    sizes: list[int] = []

    def record(device: torch.device, act: Callable[[], tuple[Tensor, ...]]) -> tuple[Tape, tuple[Tensor, ...]]:
        tape = Tape(act)
        tape.outputs = tuple(torch.full_like(each, -1.0) for each in act())
        sizes.append(len(tape.outputs[0]))
        return tape, tape.outputs

    monkeypatch.setattr(recording, "rehearse", lambda device, act: act())
    monkeypatch.setattr(recording, "record", record)
    yield sizes


def test_an_inspection_is_recorded_once_for_each_power_of_two(
    tiny: RunConfig, inputs: TrainingData, on_tape: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    students = TrainingRun.begin(tiny, inputs, CPU).students.eval()
    networks = FrozenNetworks(inputs.teacher, students)
    networks._recorded = recording.Recorded(networks._levels)
    monkeypatch.setattr(networks, "batch_size", lambda *size: 4)
    images = np.random.default_rng(0).integers(0, 256, (11, *inputs.train_images.shape[1:]), np.uint8)
    for count in (11, 3, 1, 11):  # of 4, 4 and 3; of 3; of 1
        expected = score_images(inputs.teacher, students, images[:count], tiny, CPU)
        found = inspect_images(networks, images[:count], tiny, CPU)
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    assert on_tape == [4, 1]


def test_what_cannot_be_recorded_is_computed_as_it_is_and_many_shapes_are_not_all_kept(
    on_tape: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_MOST_SHAPES", 2)
    double = recording.Recorded(lambda values: (values * 2,))
    for length in (1, 2, 1, 3, 1):
        (found,) = double(torch.ones(length))
        assert found.tolist() == [2.0] * length
    assert on_tape == [1, 2, 3, 1]

    def refuse(device: torch.device, act: Callable[[], object]) -> None:
        raise RuntimeError("cannot")

    monkeypatch.setattr(recording, "record", refuse)
    assert recording.Recorded(lambda values: (values + 1,))(torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_a_lower_precision_is_a_gpus_alone(tiny: RunConfig, inputs: TrainingData) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    list(run.intervals())
    record, _ = run.detector()
    with pytest.raises(ValueError, match="--precision float16 needs a GPU, got the device cpu; use float32"):
        Detector(record, inputs.teacher, run.students, CPU, "float16")
    with pytest.raises(ValueError, match=r"--precision must be one of float32, .*got 'int8'"):
        inspect.unwrap(frozen.check_precision)("int8", CPU)  # without the tests' own check of types

"""K trainings at once: each equal to its solo run, also where others leave, fail, or are of another architecture.

The networks compute in float64 here, so that equal means equal: to 1e-6 of the way that training moved the weights, and
of every figure. In float32 some of these tiny runs turn a single rounding, such as that of an initial weight, into a
fifth of that way within eight steps, stacked or not.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dskd.config import LossConfig, ModelConfig, RunConfig, TrainConfig
from dskd.losses import distillation_loss
from dskd.model.features import FeatureTable
from dskd.model.network import Students, build_students
from dskd.model.teacher import build_teacher, normalize
from dskd.training.inputs import TrainingData
from dskd.training.loop import Join, NonFiniteLossError, TakeStep, build_optimizer
from dskd.training.run import TrainingRun
from dskd.training.stack import Batch, SharedSteps, StudentStack

CPU = torch.device("cpu")
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


def batches(count: int, first: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(first)
    drawn = [torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]
    return [Batch(normalize(each), TEACHER(normalize(each))) for each in drawn]


def in_float64(students: nn.Module) -> nn.Module:
    """The same students; whatever calls them may go on to give them float32."""
    students.double().register_forward_pre_hook(
        lambda module, given: (given[0].double(), tuple(level.double() for level in given[1]))
    )
    return students


def untrained(model: ModelConfig = MODEL) -> list[Students]:
    made = [build_students(model, TEACHER, training.seed).train() for training in TRAININGS]
    return [cast(Students, in_float64(each)) for each in made]


def alone(index: int, seen: Sequence[Batch], model: ModelConfig = MODEL) -> Students:
    students = untrained(model)[index]
    optimizer = build_optimizer(students, TRAININGS[index])
    for images, targets in seen:
        outputs = students(images, targets)
        optimizer.zero_grad()
        distillation_loss(targets, outputs.encoder, outputs.decoder, LOSSES[index]).total.backward()
        optimizer.step()
    return students


def assert_equal(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    weights, aims, starts = found.state_dict(), expected.state_dict(), start.state_dict()
    assert weights.keys() == aims.keys()
    for name, aim in aims.items():
        way = (starts[name] - aim).double().norm()
        assert (weights[name] - aim).double().norm() <= 1e-6 * way + 1e-12, name


@pytest.mark.parametrize(
    ("model", "is_shared"),
    [
        (MODEL, False),
        (MODEL, True),
        (dataclasses.replace(MODEL, student_decoder=False), False),
        (dataclasses.replace(MODEL, student_encoder=False, decoder_input="teacher"), False),
    ],
    ids=["dskd", "one batch", "stfpm", "rd4ad"],
)
def test_each_student_of_a_stack_trains_as_it_would_alone(model: ModelConfig, is_shared: bool) -> None:
    students = untrained(model)
    optimizers = [build_optimizer(each, training) for each, training in zip(students, TRAININGS, strict=True)]
    strides = [[value.stride() for value in each.state_dict().values()] for each in students]
    stack = StudentStack(students)
    assert strides == [[value.stride() for value in each.state_dict().values()] for each in students]
    seen = [batches(3, 0 if is_shared else number) for number in range(3)]
    for step in range(3):
        own = [seen[0][step]] * 3 if is_shared else [mine[step] for mine in seen]
        terms = stack.backward(own, LOSSES)
        for optimizer in optimizers:
            optimizer.step()
    assert len({each.total.item() for each in terms}) == 3
    for index in range(3):
        stack.release(index)
        assert_equal(students[index], alone(index, seen[index], model), untrained(model)[index])
        for value in students[index].state_dict().values():
            assert value.untyped_storage().nbytes() == value.nbytes, "nothing of the others is saved with it"


def test_students_of_different_architecture_are_refused() -> None:
    deeper = build_students(dataclasses.replace(MODEL, embedding_depth=2), TEACHER, 0)
    with pytest.raises(ValueError, match="must have equal architectures"):
        StudentStack([untrained()[0], deeper])


def test_a_pass_that_fails_leaves_the_students_as_they_were() -> None:
    students = untrained()
    before = [value.clone() for each in students for value in each.state_dict().values()]
    stack = StudentStack(students)
    with pytest.raises(ValueError):
        stack.backward(batches(3), LOSSES[:2])
    after = [value for each in students for value in each.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# Runs in threads, which differ in all that a trial may differ in within one architecture.


def configs(tiny: RunConfig) -> list[RunConfig]:
    own: list[dict[str, Any]] = [
        {"seed": 0, "learning_rate": 1e-3},
        {"seed": 1, "learning_rate": 4e-3, "level_weights": (1.0, 0.5), "encoder_hkd_margin": 0.1},
        {"seed": 2, "learning_rate": 1e-2, "optimizer": "sgd", "decoder_weight": 2.0, "hkd_weight": 0.0},
    ]
    return [tiny.with_values(mine) for mine in own]


def begun(config: RunConfig, inputs: TrainingData) -> TrainingRun:
    run = TrainingRun.begin(config, inputs, CPU)
    in_float64(run.students)
    return run


def meeting(steps: SharedSteps, number: int, *, always: bool = True) -> Join:
    """The first interval of so many runs begins at the same moment, or all of them do."""
    barrier, met = threading.Barrier(number), set[int]()

    @contextmanager
    def join(*given: Any) -> Iterator[TakeStep]:
        with steps.join(*given) as take_step:
            if always or threading.get_ident() not in met:
                met.add(threading.get_ident())
                barrier.wait(60)
            yield take_step

    return join


def trained(run: TrainingRun, join: Join, intervals: int = 100, folder: Path | None = None) -> str:
    """Train that many further intervals, saved in `folder` after the first; the message of what ended it before."""
    try:
        for number, _ in enumerate(run.intervals(join=join), 1):
            if number == 1 and folder is not None:
                run.save(folder)
            if number == intervals:
                break
    except (NonFiniteLossError, RuntimeError) as error:
        return str(error)
    return ""


def at_once(runs: Sequence[TrainingRun], *given: Sequence[Any]) -> list[str]:
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(trained, runs, *given))


def assert_same_run(found: TrainingRun, expected: TrainingRun) -> None:
    assert len(found.history) == len(expected.history)
    for mine, aim in zip(found.history, expected.history, strict=True):
        assert mine.interval.step == aim.interval.step
        assert mine.interval[1:5] == pytest.approx(aim.interval[1:5], rel=1e-6)
        assert tuple(mine.scores) == pytest.approx(tuple(aim.scores), rel=1e-6)
    assert_equal(found.students, expected.students, begun(found.config, found.inputs).students)


@pytest.fixture(scope="module")
def solo(inputs: TrainingData) -> Callable[[RunConfig], TrainingRun]:
    """The whole run of a configuration by itself."""

    @functools.cache
    def run(config: RunConfig) -> TrainingRun:
        made = begun(config, inputs)
        for _ in made.intervals():
            pass
        return made

    return run


def test_runs_in_threads_equal_their_solo_runs_and_go_on_from_a_checkpoint_in_the_midst(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun], tmp_path: Path
) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    steps = SharedSteps(patience=60)
    runs = [begun(config, inputs) for config in configs(tiny)]
    assert at_once(runs, [meeting(steps, 3)] * 3, [100] * 3, folders) == [""] * 3
    assert steps.num_together == runs[0].num_steps, "every step was taken for all"
    again, later = [begun(run.config, inputs) for run in runs], SharedSteps(patience=60)
    for run, folder in zip(again, folders, strict=True):
        run.restore(folder)
    assert at_once(again, [meeting(later, 3)] * 3) == [""] * 3
    assert later.num_together == runs[0].num_steps // 2
    for run in (*runs, *again):
        assert_same_run(run, solo(run.config))


def test_one_that_is_pruned_leaves_and_one_that_diverges_ends_alone(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun]
) -> None:
    steps = SharedSteps(patience=60)
    chosen = [*configs(tiny), tiny.with_values({"seed": 3, "learning_rate": 1e30})]
    runs = [begun(config, inputs) for config in chosen]
    ends = at_once(runs, [meeting(steps, 4, always=False)] * 4, (100, 1, 100, 100))
    assert ends[:3] == ["", "", ""] and "1e+30 is probably too high" in ends[3]
    assert [len(run.history) for run in runs] == [2, 1, 2, 0] and steps.num_together > 1
    for run in (runs[0], runs[2]):
        assert_same_run(run, solo(run.config))
    pruned, whole = runs[1].history, solo(runs[1].config).history
    assert [each.interval.loss for each in pruned] == pytest.approx([whole[0].interval.loss], rel=1e-6)


def test_students_that_are_built_in_several_threads_have_the_weights_of_their_seeds() -> None:
    seeds = range(6)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: build_students(MODEL, TEACHER, seed), seeds))
    for seed, students in zip(seeds, found, strict=True):
        expected = build_students(MODEL, TEACHER, seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in students.state_dict().items())


def test_different_architectures_do_not_meet(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun]
) -> None:
    """Nobody waits for the others: with this patience the test would not end."""
    steps = SharedSteps(patience=3600)
    runs = [begun(tiny.with_values(own), inputs) for own in ({}, {"embedding_depth": 2}, {"batch_size": 3})]
    assert at_once(runs, [meeting(steps, 3)] * 3) == [""] * 3
    assert steps.num_together == 0
    for run in runs:
        assert [each.scores for each in run.history] == [each.scores for each in solo(run.config).history]


def test_an_error_stays_with_the_run_that_causes_it(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(targets: Any, encoder: Any, decoder: Any, config: LossConfig) -> Any:
        if config.decoder_weight == 2.0:
            raise RuntimeError("mine")
        return distillation_loss(targets, encoder, decoder, config)

    steps = SharedSteps(patience=60)
    runs = [begun(config, inputs) for config in configs(tiny)]
    with monkeypatch.context() as patch:
        patch.setattr("dskd.training.loop.distillation_loss", loss)
        patch.setattr("dskd.training.stack.distillation_loss", loss)
        assert at_once(runs, [meeting(steps, 3, always=False)] * 3) == ["", "", "mine"]
    assert steps.num_together > 0, "after that the others go on together"
    for run in runs[:2]:
        assert_same_run(run, solo(run.config))


def test_what_memory_cannot_hold_at_once_is_stepped_in_smaller_parts(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    backward = StudentStack.backward

    def limited(stack: StudentStack, *given: Any) -> Any:
        sizes.append(len(stack))
        terms = backward(stack, *given) if len(stack) <= 2 else None
        if terms is None:
            raise torch.OutOfMemoryError("GPU full")
        return terms

    monkeypatch.setattr(StudentStack, "backward", limited)
    steps = SharedSteps(patience=60)
    runs = [begun(config, inputs) for config in [*configs(tiny), tiny.with_values({"seed": 3})]]
    assert at_once(runs, [meeting(steps, 4)] * 4) == [""] * 4
    assert sizes == [4] + [2, 2] * (runs[0].num_steps - 1)
    for run in runs:
        assert_same_run(run, solo(run.config))


def test_a_step_does_not_wait_for_ever_for_one_that_does_not_come(
    tiny: RunConfig, inputs: TrainingData, solo: Callable[[RunConfig], TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The late one, whose images are read from a slow disk, trains on afterwards."""
    have_ended, late = threading.Event(), threading.local()
    pyramid = FeatureTable.pyramid

    def slow(table: FeatureTable, *given: Any) -> tuple[Tensor, ...]:
        if getattr(late, "is_me", False):
            assert have_ended.wait(60)
        return pyramid(table, *given)

    def train_late(run: TrainingRun, join: Join) -> str:
        late.is_me = True
        return trained(run, join)

    monkeypatch.setattr(FeatureTable, "pyramid", slow)
    runs = [begun(config, inputs) for config in configs(tiny)]
    join = meeting(SharedSteps(patience=0.02), 3, always=False)
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(train_late, runs[0], join)
        assert at_once(runs[1:], [join] * 2) == ["", ""]
        have_ended.set()
        assert one.result(60) == ""
    for run in runs:
        assert_same_run(run, solo(run.config))

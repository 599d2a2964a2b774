import dataclasses
import itertools
import math
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.random import default_rng
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from dskd.config import AmplificationConfig, DataSpec, RunConfig, TeacherSource, TrainConfig
from dskd.device import WorkerRank
from dskd.evaluate import compute_metrics_shared
from dskd.metrics import Scores
from dskd.model.features import FeatureTable
from dskd.model.network import StudentPyramids
from dskd.training.inputs import TrainingData, prepare
from dskd.training.loop import Interval, NonFiniteLossError, Step, build_optimizer, draw_batches, fit, learning_rate
from dskd.training.run import STATE_FILE, IntervalResult, TrainingRun

CPU = torch.device("cpu")


def figures(intervals: Sequence[Interval]) -> list[tuple[float, ...]]:
    """All but the speed."""
    return [(interval.step, *interval[:5]) for interval in intervals]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def changed(config: RunConfig, **values: Any) -> RunConfig:
    return config.with_values(values)


def test_two_runs_are_bit_identical(tiny: RunConfig, inputs: TrainingData) -> None:
    runs = [TrainingRun.begin(tiny, inputs, CPU) for _ in range(2)]
    first, second = ([progress for progress in run.intervals()] for run in runs)
    assert figures([each.interval for each in first]) == figures([each.interval for each in second])
    assert [each[1:] for each in first] == [each[1:] for each in second]
    assert same_weights(runs[0].students, runs[1].students)
    other = TrainingRun.begin(changed(tiny, seed=1), inputs, CPU)
    assert not same_weights(TrainingRun.begin(tiny, inputs, CPU).students, other.students)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_interrupted_run_goes_on_exactly_as_if_never_interrupted(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path, optimizer: str
) -> None:
    # batches of 3 out of 8 images: a pass ends in the middle of a batch, and an interval in the middle of a pass
    config = changed(tiny, steps=40, batch_size=3, optimizer=optimizer, learning_rate=0.01, schedule="cosine")
    whole = TrainingRun.begin(config, inputs, CPU)
    expected = list(whole.intervals())

    before = TrainingRun.begin(config, inputs, CPU)
    steps = before.steps()
    started = [next(each for each in steps if isinstance(each, IntervalResult)) for _ in range(2)]
    before.save(tmp_path)
    next(steps)  # and the process dies in the middle of an interval
    after = TrainingRun.begin(config, inputs, CPU)
    after.restore(tmp_path)
    continued = list(after.intervals())

    assert [each.interval.number for each in continued] == [2, 3]
    assert figures([each.interval for each in started + continued]) == figures([each.interval for each in expected])
    assert [each[1:] for each in started + continued] == [each[1:] for each in expected]
    assert same_weights(whole.students, after.students)
    assert (after.best_interval, after.best_objective, after.best_scores) == (
        whole.best_interval,
        whole.best_objective,
        whole.best_scores,
    )
    assert all(torch.equal(after.best_weights[name], value) for name, value in whole.best_weights.items())


def test_a_finished_run_restored_has_nothing_left_to_train(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path
) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    assert len(list(run.intervals())) == tiny.train.epochs
    run.save(tmp_path)
    again = TrainingRun.begin(tiny, inputs, CPU)
    again.restore(tmp_path)
    assert list(again.intervals()) == []
    assert again.history == run.history
    assert again.detector()[0] == run.detector()[0]


@pytest.mark.parametrize(
    ("values", "other", "message"),
    [
        ({"epochs": 9}, {}, "epochs is 2 there and 9 here"),
        ({}, {"category": "wood"}, "category is tile there and wood here"),
        ({}, {"data_sha256": "0" * 64}, "data is sha256 .* there and sha256 000000000000… here"),
        ({}, {"num_textures": 3, "textures_sha256": "2" * 64}, "textures is drawn there and sha256 222222222222… here"),
        ({}, {"teacher_sha256": "1" * 64}, "teacher is sha256 .* there and sha256 111111111111… here"),
    ],
)
def test_the_state_of_another_run_is_refused_naming_what_differs(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path, values: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    TrainingRun.begin(tiny, inputs, CPU).save(tmp_path)
    with pytest.raises(ValueError, match=f"{message}; start afresh .*--restart") as raised:
        TrainingRun.begin(changed(tiny, **values), inputs._replace(**other), CPU).restore(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_damaged_state_is_refused(tiny: RunConfig, inputs: TrainingData, tmp_path: Path) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    run.save(tmp_path)
    path = tmp_path / STATE_FILE
    for content in (path.read_bytes()[:5000], b"", b"no state at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"training\.pt is no readable training state .*--restart") as raised:
            run.restore(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_failed_save_leaves_the_older_state(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    run.save(tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()

    def full_disk(file: Path, content: memoryview) -> None:
        with file.open("wb") as opened:
            opened.write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run.save(tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e30), ("sgd", 1e30)])
def test_divergence_names_step_student_and_learning_rate(
    tiny: RunConfig, inputs: TrainingData, optimizer: str, rate: float
) -> None:
    run = TrainingRun.begin(changed(tiny, optimizer=optimizer, learning_rate=rate, epochs=5), inputs, CPU)
    with pytest.raises(
        NonFiniteLossError,
        match=r"student .*coder at level .* at step \d+ of 10; learning_rate 1e\+30 is probably",
    ):
        list(run.intervals())


class Poisoned(nn.Module):
    """Two students whose decoder gives an infinite feature at the deeper level from the third step on."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.levels = nn.ParameterList(torch.ones(shape) for shape in shapes)
        self.steps = 0

    def forward(self, images: Tensor, teacher: tuple[Tensor, ...]) -> StudentPyramids:
        self.steps += 1
        whole = tuple(level.expand(len(images), -1, -1, -1) for level in self.levels)
        poison = torch.zeros_like(whole[1])
        poison[0, 0, 0, 0] = torch.inf if self.steps == 3 else 0
        return StudentPyramids(whole, (whole[0], whole[1] + poison))


def test_a_loss_that_is_not_finite_is_traced_to_step_student_and_level(tiny: RunConfig) -> None:
    table, config = random_table(), changed(tiny, batch_size=3, levels=(2, 3))
    images = np.zeros((12, 32, 32, 3), np.uint8)
    students = Poisoned(table.shapes)
    expected = (
        r"loss of the student decoder at level 3 is not finite at step 3 of 8; learning_rate 0.005 is "
        "probably too high, try a tenth of it"
    )
    with pytest.raises(NonFiniteLossError, match=expected):
        list(fit(students, build_optimizer(students, config.train), images, table, config, device=CPU))
    table.rows[:, -1] = np.nan
    sound = Linear(table.shapes)
    config = changed(config, student_decoder=False)
    with pytest.raises(NonFiniteLossError, match=r"encoder at level 3 .* teacher's own features at level 3 are not"):
        list(fit(sound, build_optimizer(sound, config.train), images, table, config, device=CPU))


def test_a_last_update_that_breaks_the_maps_is_a_divergence_too(tiny: RunConfig, inputs: TrainingData) -> None:
    run = TrainingRun.begin(changed(tiny, learning_rate=1e38, batch_size=100, epochs=1), inputs, CPU)
    with pytest.raises(NonFiniteLossError, match=r"step 1 give no finite anomaly maps; learning_rate 1e\+38"):
        list(run.intervals())


def test_steps_come_before_the_interval_that_they_make(tiny: RunConfig, inputs: TrainingData) -> None:
    seen = list(TrainingRun.begin(tiny, inputs, CPU).steps())
    assert [type(each) for each in seen] == [Step, Step, IntervalResult] * 2
    first, second, result = seen[:3]
    assert isinstance(first, Step) and isinstance(second, Step) and isinstance(result, IntervalResult)
    assert first.num_images == second.num_images == 4
    assert result.interval.loss == pytest.approx((first.loss.item() + second.loss.item()) / 2)


def test_training_lowers_the_loss_and_leaves_the_teacher(tiny: RunConfig, inputs: TrainingData) -> None:
    before = {name: value.clone() for name, value in inputs.teacher.state_dict().items()}
    run = TrainingRun.begin(changed(tiny, epochs=8), inputs, CPU)
    losses = [progress.interval.loss for progress in run.intervals()]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in inputs.teacher.state_dict().items())


def test_the_loss_of_an_interval_is_the_sum_of_its_terms(tiny: RunConfig, inputs: TrainingData) -> None:
    config = changed(tiny, decoder_weight=0.5, hkd_weight=2.0, epochs=1)
    (progress,) = TrainingRun.begin(config, inputs, CPU).intervals()
    interval = progress.interval
    assert min(interval.encoder_loss, interval.decoder_loss, interval.hard_loss) > 0
    only_encoder = changed(config, student_decoder=False)
    (alone,) = TrainingRun.begin(only_encoder, inputs, CPU).intervals()
    assert alone.interval.decoder_loss == 0
    assert alone.interval.loss == pytest.approx(alone.interval.encoder_loss + 2 * alone.interval.hard_loss)


def test_schedules() -> None:
    def rates(schedule: str, *progress: float) -> list[float]:
        config = TrainConfig(learning_rate=0.5, schedule=schedule)  # type: ignore[arg-type]
        return [learning_rate(config, share) for share in progress]

    assert rates("constant", 0, 0.5, 0.99) == [0.5] * 3
    assert rates("multistep", 0, 0.79, 0.8, 0.89, 0.9, 0.99) == pytest.approx([0.5, 0.5, 0.1, 0.1, 0.02, 0.02])
    assert rates("cosine", 0, 1 / 3, 0.5, 2 / 3, 1) == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])


def test_fit_sets_the_schedule_at_every_step(tiny: RunConfig, inputs: TrainingData) -> None:
    config = changed(tiny, schedule="cosine", learning_rate=0.5, optimizer="sgd")
    run = TrainingRun.begin(config, inputs, CPU)
    seen = [run.optimizer.param_groups[0]["lr"] for each in run.steps() if isinstance(each, Step)]
    assert seen == pytest.approx([0.25 * (1 + math.cos(math.pi * done / 4)) for done in range(4)])


def test_the_optimisers_are_the_papers() -> None:
    layer = nn.Linear(2, 2)
    adam = build_optimizer(layer, TrainConfig(optimizer="adam"))
    sgd = build_optimizer(layer, TrainConfig(optimizer="sgd", learning_rate=0.4))
    assert isinstance(adam, torch.optim.Adam) and adam.param_groups[0]["betas"] == (0.5, 0.999)
    group = sgd.param_groups[0]
    assert isinstance(sgd, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.4, 0.9, 1e-4)


def drawn(count: int, size: int, number: int, seed: int = 0, worker: WorkerRank = WorkerRank()) -> list[list[int]]:  # noqa: B008
    return [batch.tolist() for batch in itertools.islice(draw_batches(count, size, seed, worker), number)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (17, 16), (31, 16), (33, 1), (21, 6), (7, 8), (1, 4)])
def test_after_any_step_every_image_was_seen_equally_often(count: int, size: int) -> None:
    """Within one: an incomplete batch at the end of a pass is never left out."""
    batches = drawn(count, size, 200)
    seen = np.zeros(count, int)
    for batch in batches:
        assert len(batch) == min(size, count) == len(set(batch)), "no image is twice in a batch"
        seen[batch] += 1
        assert seen.max() - seen.min() <= 1
    assert seen.sum() == 200 * min(size, count)
    assert batches == drawn(count, size, 200)
    if count > 1:
        per_pass = max(1, count // size)
        assert batches != drawn(count, size, 200, seed=1)
        assert batches[:per_pass] != batches[per_pass : 2 * per_pass], "each pass has an order of its own"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("count", "size"), [(40, 6), (41, 7), (5, 12)])
def test_any_number_of_workers_shares_the_batches_of_one(count: int, size: int, world_size: int) -> None:
    whole = drawn(count, size, 50, seed=3)
    shares = [drawn(count, size, 50, 3, WorkerRank(rank, world_size)) for rank in range(world_size)]
    used = set()
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        together = [index for part in parts for index in part]
        assert len({len(part) for part in parts}) == 1
        assert len(set(together)) == len(together) and set(together) <= set(batch)
        assert len(batch) - len(together) < world_size
        used |= set(together)
    assert len(used) == count, "no image is left out every time"


def test_more_workers_than_images_of_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 2 images cannot be shared by 3 workers"):
        drawn(10, 2, 1, worker=WorkerRank(0, 3))


LENGTHS = [({"steps": 25}, (12, 25)), ({"steps": 7}, (7,)), ({"epochs": 3}, (2, 4, 6))]


@pytest.mark.parametrize(("length", "ends"), LENGTHS)
def test_a_length_is_cut_into_intervals_with_a_validation_after_each(
    tiny: RunConfig, inputs: TrainingData, length: dict[str, int], ends: tuple[int, ...]
) -> None:
    run = TrainingRun.begin(changed(tiny, **length), inputs, CPU)
    assert (run.step, run.num_steps) == (0, ends[-1])
    seen = list(run.steps())
    assert sum(isinstance(each, Step) for each in seen) == ends[-1]
    assert tuple(each.interval.step for each in run.history) == ends
    assert [number for number, each in enumerate(seen, 1) if isinstance(each, IntervalResult)] == [
        end + done for done, end in enumerate(ends, 1)
    ]
    assert run.is_finished and run.step == ends[-1] and run.detector()[0].step in ends


def test_the_number_of_steps_is_the_same_for_any_number_of_images(tiny: RunConfig, inputs: TrainingData) -> None:
    config = changed(tiny, steps=12, batch_size=6)
    for count in (3, 6, 8):  # fewer than a batch, one, and not a multiple of it
        few = inputs._replace(
            train_images=inputs.train_images[:count],
            train_features=inputs.train_features._replace(rows=inputs.train_features.rows[:count]),
        )
        steps = [each for each in TrainingRun.begin(config, few, CPU).steps() if isinstance(each, Step)]
        assert [step.num_images for step in steps] == 12 * [min(count, 6)]


def test_a_run_whose_patience_is_at_its_end_ends_and_stays_ended(
    tiny: RunConfig, inputs: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = [0.1, 0.3, 0.2, 0.3, 0.25, 0.9, 0.9]
    given = iter(objectives)
    monkeypatch.setattr("dskd.training.run.objective", lambda scores: next(given))
    config = changed(tiny, epochs=7, patience=3)
    run = TrainingRun.begin(config, inputs, CPU)
    assert [each.objective for each in run.intervals()] == objectives[:5], "an equal objective is no better one"
    assert run.is_finished and run.best_interval == 1
    run.save(tmp_path)
    again = TrainingRun.begin(config, inputs, CPU)
    again.restore(tmp_path)
    assert list(again.steps()) == []


def test_a_state_that_counts_epochs_is_continued(tiny: RunConfig, inputs: TrainingData, tmp_path: Path) -> None:
    """As saved before there were steps."""
    config = changed(tiny, epochs=3)
    whole = TrainingRun.begin(config, inputs, CPU)
    expected = [each.interval for each in whole.intervals()]
    before = TrainingRun.begin(config, inputs, CPU)
    next(before.intervals())
    before.save(tmp_path)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    for name in ("steps", "patience"):
        del state["identity"][name]
    state["next_epoch"], state["best_epoch"] = state.pop("next_interval"), state.pop("best_interval")
    state["history"] = [(interval[:7], *rest) for interval, *rest in state["history"]]
    torch.save(state, tmp_path / STATE_FILE)
    after = TrainingRun.begin(config, inputs, CPU)
    after.restore(tmp_path)
    assert figures([each.interval for each in after.intervals()]) == figures(expected[1:])
    assert figures([each.interval for each in after.history]) == figures(expected)
    assert same_weights(whole.students, after.students)
    with pytest.raises(ValueError, match="epochs is 3 there and None here"):
        TrainingRun.begin(changed(tiny, steps=6), inputs, CPU).restore(tmp_path)


class Linear(nn.Module):
    """A student without BatchNorm: what two workers share is `fit`'s doing alone."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, width, 32 // side, 32 // side) for width, side, _ in shapes)

    def forward(self, images: Tensor, teacher: tuple[Tensor, ...]) -> StudentPyramids:
        return StudentPyramids(tuple(level(images) for level in self.levels), None)


def linear_run(config: RunConfig, worker: WorkerRank, table: FeatureTable) -> tuple[list[Interval], nn.Module]:
    torch.manual_seed(0)
    network = Linear(table.shapes)
    students: nn.Module = DistributedDataParallel(network) if worker.world_size > 1 else network
    images = default_rng(0).integers(0, 256, (len(table.rows), 32, 32, 3), np.uint8)
    optimizer = build_optimizer(students, config.train)
    taken = fit(students, optimizer, images, table, config, device=CPU, worker=worker)
    return [each for each in taken if isinstance(each, Interval)], network


def random_table() -> FeatureTable:
    shapes = ((4, 8, 8), (6, 4, 4))
    width = sum(math.prod(shape) for shape in shapes)
    return FeatureTable(default_rng(1).normal(size=(12, width)).astype(np.float32), shapes)


def linear_config(config: RunConfig) -> RunConfig:
    # two intervals; batches of 8 out of 12 images end in the middle of a pass
    values = {"steps": 20, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1}
    return changed(config, student_decoder=False, hkd_hardest=3, **values)


def validate(config: RunConfig, inputs: TrainingData, worker: WorkerRank) -> Scores:
    students = TrainingRun.begin(config, inputs, CPU).students
    table, truth = inputs.validation_features, inputs.validation
    return compute_metrics_shared(table, students, truth, config, CPU, worker.rank, worker.world_size)


def one_of_two(rank: int, port: int, values: dict[str, Any], root: str, out: str) -> None:
    """What each of the two processes does; the parent compares."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=3)
    )
    config, worker = RunConfig.from_dict(values), WorkerRank(rank, 2)
    intervals, network = linear_run(linear_config(config), worker, random_table())
    data = DataSpec(data=Path(root), category="tile", teacher=TeacherSource("random"))
    inputs = prepare(config, data, device=CPU, cache=None)
    # As if the two machines had rounded differently in stage I.
    own = AmplificationConfig(amplification=True, amplification_epochs=1, amplification_seed=rank)
    amplified = prepare(dataclasses.replace(config, amplification=own), data, device=CPU, cache=None)
    scores = validate(config, inputs, worker)
    run = TrainingRun.begin(config, inputs, CPU, num_workers=2)
    progress = list(run.intervals(DistributedDataParallel(run.students), worker))
    result = {
        "intervals": figures(intervals),
        "weights": network.state_dict(),
        "scores": tuple(scores),
        "progress": [(each.interval[:5], tuple(each.scores), each.objective) for each in progress],
        "best": run.best_weights,
        "amplified": (amplified.teacher.state_dict(), torch.from_numpy(np.array(amplified.train_features.rows))),
    }
    torch.save(result, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(mvtec_root: Path, tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that trained together over gloo."""
    out = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(one_of_two, (port, tiny.to_dict(), str(mvtec_root), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(pair: list[dict[str, Any]], tiny: RunConfig) -> None:
    intervals, network = linear_run(linear_config(tiny), WorkerRank(), random_table())
    for result in pair:
        # float32 sums over other groupings, in twenty steps of SGD with momentum
        np.testing.assert_allclose(result["intervals"], figures(intervals), rtol=1e-5)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=1e-6)


def test_two_workers_validate_to_the_very_figures_of_one(
    pair: list[dict[str, Any]], tiny: RunConfig, inputs: TrainingData
) -> None:
    alone = validate(tiny, inputs, WorkerRank())
    assert 0 < alone.pixel_auroc < 1, "a saturated figure would show nothing"
    assert pair[0]["scores"] == pair[1]["scores"] == tuple(alone)


def test_two_workers_of_the_real_students_stay_one_model_and_learn_as_one(
    pair: list[dict[str, Any]], tiny: RunConfig, inputs: TrainingData
) -> None:
    first, second = pair
    alone = next(TrainingRun.begin(tiny, inputs, CPU).intervals()).interval
    # Adam turns rounding into steps; normalising each share by itself would be off by far more.
    np.testing.assert_allclose(first["progress"][0][0], alone[:5], rtol=1e-3)
    assert len(first["progress"]) == tiny.train.epochs
    assert first["progress"] == second["progress"]
    assert first["best"].keys() == second["best"].keys()
    assert all(torch.equal(first["best"][name], second["best"][name]) for name in first["best"])


def test_two_workers_share_the_amplified_teacher_of_the_first(pair: list[dict[str, Any]]) -> None:
    (first, rows), (second, its_rows) = (result["amplified"] for result in pair)
    assert first.keys() == second.keys() and any(name.startswith("amplifier.") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(rows, its_rows)

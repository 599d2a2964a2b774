import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.schedulers.async_hyperband import _Bracket

from dskd.config import AmplificationConfig, RunConfig
from dskd.data.datasets import read_category
from dskd.presets import PRESETS
from dskd.training.inputs import TrainingData
from tune.preflight.forecast import (
    CategoryPlan,
    Slots,
    Speed,
    SpeedTask,
    cache_bytes,
    forecast,
    in_tiles,
    measure_speed,
    plan_categories,
    share_slots,
)
from tune.settings.workers import Workers
from tune.trial.asha import REDUCTION, expected_reports, expected_survivors, grace_period, rungs


def reports_under_asha(trials: int, reports: int, rng: random.Random) -> int:
    """What Ray's own scheduler lets run of trials whose objectives at every rung are uniform noise."""
    bracket = _Bracket(grace_period(reports), reports + 1, REDUCTION, 0)
    total = 0
    for trial in range(trials):
        trained = reports
        for rung in rungs(reports):
            if bracket.on_result(cast(Any, SimpleNamespace(trial_id=trial)), rung, rng.random()) == "STOP":
                trained = rung
                break
        total += trained
    return total


def test_rungs_are_those_of_rays_scheduler() -> None:
    for reports in (1, 2, 8, 9, 30, 100, 200):
        bracket = _Bracket(grace_period(reports), reports + 1, REDUCTION, 0)
        assert list(rungs(reports)) == sorted(rung for rung, _ in bracket._rungs if rung < reports)


@pytest.mark.parametrize("reports", [3, 10, 29, 30, 31, 35, 44, 100, 137])
def test_no_trial_is_stopped_before_a_tenth_of_its_length(reports: int) -> None:
    assert grace_period(reports) >= reports / 10
    assert rungs(30) == (3, 9, 27)


def test_survivors_of_one_rung_are_rays_in_the_mean() -> None:
    rng = random.Random(0)
    for trials in (1, 2, 5):
        passed = []
        for _ in range(600):
            bracket = _Bracket(1, 2, REDUCTION, 0)
            answers = [
                bracket.on_result(cast(Any, SimpleNamespace(trial_id=t)), 1, rng.random()) for t in range(trials)
            ]
            passed.append(answers.count("CONTINUE"))
        assert mean(passed) == pytest.approx(expected_survivors(trials), rel=0.05)


@pytest.mark.parametrize(("trials", "reports"), [(4, 30), (16, 100), (32, 9), (1, 50), (5, 1)])
def test_expected_reports_are_rays_in_the_mean(trials: int, reports: int) -> None:
    rng = random.Random(1)
    found = mean(reports_under_asha(trials, reports, rng) for _ in range(300))
    assert found == pytest.approx(expected_reports(trials, reports), rel=0.06)


ONE = Workers(1, cpus=1.0, gpus=0.0)


def test_a_plan_counts_the_images_that_training_uses(mvtec_root: Path, tiny: RunConfig, inputs: TrainingData) -> None:
    (plan,) = plan_categories({"tile": read_category(mvtec_root, "tile")}, tiny)
    assert plan.num_train == len(inputs.train_images)
    assert plan.num_validation == len(inputs.validation.images)
    assert plan.num_calibration == len(inputs.calibration_images)
    assert plan.num_test == 8


def test_tiles_are_counted_up_to_those_that_training_uses() -> None:
    tiled = in_tiles(CategoryPlan("strip", 100, 40, 32, 8, 20), 30.0)
    assert tiled == CategoryPlan("strip", 2048, 128, 64, 240, 600)
    assert in_tiles(tiled, 1.0) == tiled


def test_the_cache_holds_what_the_network_sees() -> None:
    plan = CategoryPlan("strip", 100, 40, 32, 8, 20)
    speed = Speed("CPU", 0, 4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, feature_bytes=1000)
    wide = RunConfig().with_values({"resize": "512x256"})
    assert cache_bytes([plan], speed, wide) == (100 + 8 + 8) * 3 * 512 * 256 + 148 * 1000
    tiled = RunConfig().with_values({"tile": 128})
    # 2048 tiles of training and 64 of selection, which has 64 with defects too; thresholds come from whole images
    assert cache_bytes([plan], speed._replace(tiles=30.0), tiled) == (2048 + 64) * 3 * 128**2 + (2048 + 128) * 1000


def test_times_add_up(mvtec_root: Path) -> None:
    config = PRESETS["dskd"].with_values({"epochs": 10, "image_size": 32, "batch_size": 4})
    names = ("tile", "wood")
    plans = plan_categories({name: read_category(mvtec_root, name) for name in names}, config)
    still = Speed("CPU", 0, 4, step=0.0, validation=0.0, decoding=0.0, teacher=0.0, defects=0.0, amplification=0.0)
    steps = plans[0].num_train // 4

    only_steps = still._replace(step=3.0)
    one = forecast(plans, only_steps, Slots(1, 1), config=config, trials=6, workers=ONE)
    assert one.trial_seconds == 10 * steps * 3.0
    assert one.wall_seconds_full == 2 * 6 * one.trial_seconds == pytest.approx(one.cpu_hours_full * 3600)
    assert one.wall_seconds_pruned == pytest.approx(2 * expected_reports(6, 10) * steps * 3.0)
    assert one.gpu_hours_full == 0 and one.steps_full == 120 * steps

    in_steps = config.with_values({"steps": 200})
    few = plans[0]._replace(num_train=2)
    given = forecast([plans[0], few], only_steps, Slots(1, 1), config=in_steps, trials=6, workers=ONE)
    assert given.trial_seconds == 200 * 3.0 and given.steps_full == 2 * 6 * 200
    assert given.wall_seconds_full == 6 * (200 * 3.0 + 200 * 1.5), "a batch of 2 images takes half of one of 4"

    both = forecast(plans, only_steps, Slots(2, 1), config=config, trials=6, workers=ONE._replace(gpus=1.0))
    assert both.wall_seconds_full == one.wall_seconds_full / 2
    assert both.gpu_hours_full == both.cpu_hours_full == one.cpu_hours_full
    crowd = forecast(plans, only_steps, Slots(1, 4), config=config, trials=6, workers=ONE)
    assert crowd.wall_seconds_full == 2 * 2 * one.trial_seconds, "six trials, four at once: two rounds"

    amplified = dataclasses.replace(config, amplification=AmplificationConfig(amplification=True))
    staged = forecast(plans, still._replace(amplification=1.0), Slots(1, 1), config=amplified, trials=6, workers=ONE)
    assert staged.wall_seconds_full == 2 * 100 * plans[0].num_train

    pairs = forecast(plans, only_steps, Slots(1, 1), config=config, trials=6, workers=ONE._replace(number=2))
    assert pairs.cpu_hours_full == 2 * one.cpu_hours_full

    shared = forecast(plans, only_steps, Slots(1, 3), config=config, trials=6, workers=ONE._replace(trials=3))
    assert shared.wall_seconds_full == one.wall_seconds_full / 3, "a step was measured for three trials at once"
    assert shared.cpu_hours_full == pytest.approx(one.cpu_hours_full / 3), "which take the CPUs of one"
    only_validations = still._replace(validation=1.0)
    alone = forecast(plans, only_validations, Slots(1, 1), config=config, trials=6, workers=ONE)
    shared = forecast(plans, only_validations, Slots(1, 3), config=config, trials=6, workers=ONE._replace(trials=3))
    tests = sum(plan.num_test for plan in plans)
    assert shared.wall_seconds_full - tests == alone.wall_seconds_full - tests, "they validate one after the other"


@pytest.mark.parametrize(("categories", "slots", "expected"), [(3, 2, (2, 1)), (2, 8, (2, 4)), (5, 1, (1, 1))])
def test_slots_are_shared(categories: int, slots: int, expected: tuple[int, int]) -> None:
    assert share_slots(categories, slots) == expected


def task(mvtec_root: Path, config: RunConfig, **changes: Any) -> SpeedTask:
    images = tuple(sample.path.read_bytes() for sample in read_category(mvtec_root, "tile").train[:2])
    values: dict[str, Any] = {"teacher_weights": "random", "num_workers": 1, "cpus_per_worker": 1.0}
    return SpeedTask(config=config.to_dict(), images=images, gpus_per_worker=0.0, **(values | changes))


@pytest.mark.parametrize(
    ("long_enough", "workers", "measured", "step"),
    [
        (0.5, 1, 2, 2.0),  # too slow for the whole batch of 4: two images, scaled up
        (10.0, 1, 4, 1.0),
        (10.0, 2, 2, 1.0),  # a worker's share
    ],
)
def test_a_step_is_measured_on_as_much_of_a_batch_as_there_is_time_for(
    long_enough: float,
    workers: int,
    measured: int,
    step: float,
    mvtec_root: Path,
    tiny: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def a_second(act: Callable[[], object]) -> float:
        act()
        return 1.0

    monkeypatch.setattr("dskd.training.speed.seconds_of", a_second)
    monkeypatch.setattr("dskd.training.speed.MIN_STEP_SECONDS", long_enough)
    speed = measure_speed(task(mvtec_root, tiny, num_workers=workers))
    assert (speed.images_measured, speed.step) == (measured, step)
    assert (speed.device, speed.amplification) == ("CPU", 0.0)
    # Two images and two copies with defects; two decoded; two defects drawn.
    assert (speed.validation, speed.decoding, speed.defects) == (0.25, 0.5, 0.5) and speed.teacher > 0


def test_trials_that_share_a_worker_take_turns(
    mvtec_root: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dskd.training.speed.seconds_of", lambda act: (act(), 1.0)[1])
    speed = measure_speed(task(mvtec_root, tiny, trials_per_gpu=3))
    assert (speed.images_measured, speed.step) == (2, 3 * 2.0)


def test_stage_one_is_measured_where_there_is_one(mvtec_root: Path, tiny: RunConfig) -> None:
    staged = dataclasses.replace(tiny, amplification=AmplificationConfig(amplification=True))
    assert measure_speed(task(mvtec_root, staged)).amplification > 0


def test_what_a_worker_could_not_read_is_a_fault(mvtec_root: Path, tiny: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"teacher weights must be .*got '/none\.pth'"):
        measure_speed(task(mvtec_root, tiny, teacher_weights="/none.pth"))

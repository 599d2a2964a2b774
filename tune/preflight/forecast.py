"""Forecast of a search's time and resources, from its plan and the measured speed of one worker."""

import dataclasses
import heapq
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import RunConfig
from dskd.data.datasets import (
    MAX_TRAINING_TILES,
    MAX_VALIDATION_TILES,
    NUM_VALIDATION_DEFECTS,
    Category,
)
from dskd.data.folds import num_folds, split_images
from tune.settings.workers import Workers
from tune.storage.temporary import temporary_folder
from tune.trial.asha import expected_reports


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpeedTask:
    """Input of the speed measurement; plain values, since another process measures."""

    config: Mapping[str, Any]
    """`RunConfig.to_dict()`."""
    teacher_weights: str
    images: tuple[bytes, ...]
    """Content of a few image files of the data that will be trained on."""
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float | None
    """None: 1 if this machine has GPUs, else 0."""
    trials_per_gpu: int = 1
    """Trials that share a worker."""


class Speed(NamedTuple):
    """Measured times of one worker of a trial, in seconds."""

    device: str
    num_gpus: int
    """Number of usable GPUs in the measuring process."""
    images_measured: int
    """Images in the timed step; if fewer than a worker's share of the batch, the time was scaled up."""
    step: float
    """One optimiser step on the worker's share of a batch, without communication between workers; of all trials that
    share the worker together."""
    validation: float
    """Per image: students, maps and metrics."""
    decoding: float
    """Per image file, read and resized."""
    teacher: float
    """Per image, once: the feature pyramid, which is cached."""
    defects: float
    """Per synthetic defect, drawn once."""
    amplification: float
    """Per image and epoch of stage I; 0 if the configuration has no stage I."""
    feature_bytes: int = 0
    """Size of an image's features in the cache."""
    tiles: float = 1.0
    """Tiles of an image; with them, what is said above of an image is of a tile."""


def measure_speeds(tasks: Sequence[SpeedTask]) -> list[Speed]:
    """`measure_speed` of each task, one after the other."""
    return [measure_speed(task) for task in tasks]


def measure_speed(task: SpeedTask) -> Speed:
    """Prepare, train and validate with a few images as a trial does, on the device that a trial would get here.

    The first step and validation include set-up and are not counted. Raises ValueError on unusable teacher
    weights or images, and if the batch does not fit into the device's memory.
    """
    import torch  # slow import; the calling process makes other checks meanwhile

    try:
        return _measured(task)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a worker's share of a batch does not fit into the device's memory ({str(error).splitlines()[0]}); "
            "lower --batch-size or --image-size, or "
            + ("--trials-per-gpu." if task.trials_per_gpu > 1 else "raise --workers-per-trial.")
        ) from None


def _measured(task: SpeedTask) -> Speed:
    import torch

    from dskd.config import RunConfig
    from dskd.data.geometry import Geometry
    from dskd.data.images import image_size, load_images
    from dskd.data.tiles import tile_places
    from dskd.device import computing_device
    from dskd.evaluate import compute_metrics_shared, join, synthetic_validation
    from dskd.model.amplification import AmplifiedTeacher, build_amplifier
    from dskd.model.features import feature_table
    from dskd.model.network import build_students
    from dskd.model.teacher import Teacher, build_teacher
    from dskd.training.speed import seconds_of, step_speed
    from dskd.training.stage_one import amplifier_optimizer, fit_amplifier

    torch.set_num_threads(max(1, int(task.cpus_per_worker)))
    config = RunConfig.from_dict(task.config)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uses_gpu = num_gpus > 0 if task.gpus_per_worker is None else task.gpus_per_worker > 0
    device = computing_device("cuda" if uses_gpu else "cpu")
    plain = build_teacher(config.model.backbone, config.model.levels, task.teacher_weights).to(device)
    with temporary_folder() as temporary:
        files = [Path(temporary, str(number)) for number in range(len(task.images))]
        for file, content in zip(files, task.images, strict=True):
            file.write_bytes(content)
        geometry = Geometry.of(config.data, alignment=config.model.tile_alignment)
        frames = [geometry.frame(*image_size(file)) for file in files] if geometry.tile else []
        tiles = len(tile_places(frames, geometry)) / len(files) if geometry.tile else 1.0
        geometry = dataclasses.replace(geometry, tile=0)  # a whole image of a tile's size takes as long as a tile
        decoding = seconds_of(lambda: load_images(files, geometry)) / len(files)
        images = load_images(files, geometry)

    teacher: Teacher = plain
    amplification = 0.0
    if config.amplification.amplification:
        stage = config.amplification
        amplifier = build_amplifier(plain, stage.memory_size, stage.amplification_seed).to(device)
        short = dataclasses.replace(stage, amplification_epochs=2, amplification_batch_size=len(images))
        stage_epochs = fit_amplifier(
            amplifier, amplifier_optimizer(amplifier, short), plain, images, short, device=device
        )
        amplification = list(stage_epochs)[-1].seconds / len(images)
        teacher = AmplifiedTeacher(plain, amplifier)

    share = max(1, config.train.batch_size // task.num_workers)
    measured, step = step_speed(config, teacher, images, share, device, task.num_workers)
    step *= task.trials_per_gpu  # they take turns, as far as anybody knows
    students = build_students(config.model, teacher, config.train.seed).to(device)

    defects = seconds_of(lambda: synthetic_validation(images[:1], seed=0, num_defective=2)) / 2
    truth = synthetic_validation(images, seed=0, num_defective=len(images))
    few = feature_table(teacher, truth.images, device)
    compute_metrics_shared(few, students, truth, config, device, 0, 1)
    if device.type == "cuda":  # a GPU takes about as long for a few images as for a full batch
        truth = join(truth, join(truth, join(truth, truth)))
    started = time.perf_counter()
    table = feature_table(teacher, truth.images, device)
    features = (time.perf_counter() - started) / (
        len(truth.images) + 1
    )  # feature_table computes one more pyramid, for the shapes
    validation = seconds_of(lambda: compute_metrics_shared(table, students, truth, config, device, 0, 1)) / len(
        truth.images
    )
    return Speed(
        device=torch.cuda.get_device_name(device) if uses_gpu else "CPU",
        num_gpus=num_gpus,
        images_measured=measured,
        step=step,
        validation=validation,
        decoding=decoding,
        teacher=features,
        defects=defects,
        amplification=amplification,
        feature_bytes=few.rows.shape[1] * few.rows.itemsize,
        tiles=tiles,
    )


class CategoryPlan(NamedTuple):
    """Number of images of one category, by use."""

    category: str
    num_train: int
    num_validation: int
    """Inspected at every validation: held-out normals, synthetic defects, labelled defects."""
    num_synthetic: int
    num_calibration: int
    num_test: int
    num_folds: int = 0
    """Folds that the normal images are cut into; calibration images are then validation images too."""
    num_normal: int = 0
    """Normal images for training and validation together."""

    @property
    def num_fold_free(self) -> int:
        """Calibration images that are read for themselves alone."""
        return 0 if self.num_folds else self.num_calibration


class Slots(NamedTuple):
    """How categories and trials share the cluster."""

    side_by_side: int
    """Categories searched at once."""
    concurrency: int
    """Trials of one category at once."""


class Forecast(NamedTuple):
    """Times in seconds and hours; `…_full`: no trial is pruned, `…_pruned`: with ASHA's expected pruning."""

    trial_seconds: float
    """The longest trial: all steps on the largest category."""
    wall_seconds_full: float
    wall_seconds_pruned: float
    cpu_hours_full: float
    cpu_hours_pruned: float
    gpu_hours_full: float
    gpu_hours_pruned: float
    steps_full: int
    """Over all trials and categories."""
    steps_pruned: float
    fold_trainings: int = 0
    """Trainings of finalists and untuned presets on the other folds, over all categories; part of the times."""


def plan_categories(categories: Mapping[str, Category], config: RunConfig) -> list[CategoryPlan]:
    """How the images of each category are used."""
    return [_plan(name, category, config) for name, category in categories.items()]


def _plan(name: str, category: Category, config: RunConfig) -> CategoryPlan:
    data = config.data
    train, selecting, calibrating, _ = split_images(category, data)
    num_synthetic = max(NUM_VALIDATION_DEFECTS, len(selecting))
    num_defects = sum(sample.is_defective for sample in category.validation)
    return CategoryPlan(
        category=name,
        num_train=len(train),
        num_validation=len(selecting) + num_synthetic + num_defects,
        num_synthetic=num_synthetic,
        num_calibration=len(calibrating),
        num_test=len(category.test),
        num_folds=num_folds(category, data),
        num_normal=len(train) + len({*selecting, *calibrating}),
    )


def share_slots(num_categories: int, slots: int) -> Slots:
    """As many categories at once as there are slots; further slots run more trials of each category."""
    side_by_side = min(num_categories, slots)
    return Slots(side_by_side, max(1, slots // side_by_side))


def forecast(
    plans: Sequence[CategoryPlan],
    speed: Speed,
    slots: Slots,
    *,
    config: RunConfig,
    trials: int,
    workers: Workers,
    finalists: int = 0,
) -> Forecast:
    """Forecast of a search of all `plans` on `slots`, with workers of the measured `speed`.

    A trial takes its optimiser steps + its validations + its thresholds, which trials that share a worker do one after
    the other; a category takes its preparation once (decoding, teacher, synthetic defects, stage I), then its trials on
    `concurrency` slots, then `finalists` and the untuned preset on each other fold, with a preparation of its own, then
    the test images.
    Not included: effects of suggested values (embedding depth, hard loss), communication between workers, the start
    of Ray and its processes, writing to the storage, and other load on the machines.
    """
    reports = config.train.num_validations
    compute_full = compute_pruned = 0.0
    walls_full, walls_pruned, longest = [], [], 0.0
    pruned_share = expected_reports(trials, reports) / (trials * reports)
    steps_full = fold_trainings = 0
    for plan in (in_tiles(plan, speed.tiles) for plan in plans):
        steps = config.train.num_steps(plan.num_train)
        steps_full += trials * steps
        step = speed.step * min(1.0, plan.num_train / config.train.batch_size)  # a batch holds no image twice
        inspection = speed.validation * workers.trials
        training = steps * step + reports * plan.num_validation * inspection / workers.number
        finish = plan.num_calibration * inspection
        preparation = _preparation(plan, config, speed)
        test = plan.num_test * (speed.decoding + speed.teacher + speed.validation)
        trial = training + finish
        longest = max(longest, trial)
        full, pruned = trials * trial, trials * pruned_share * trial
        rounds = -(-trials // slots.concurrency)
        others = max(0, plan.num_folds - 1) if finalists else 0
        # Where several categories are searched, the configuration that is best over all is a finalist too.
        repeated = others * (min(finalists, trials) + 1 + (len(plans) > 1))
        fold_trainings += repeated
        again = others * preparation + -(-repeated // slots.concurrency) * trial
        walls_full.append(preparation + rounds * trial + again + test)
        walls_pruned.append(preparation + max(trial, pruned / slots.concurrency) + again + test)
        other = preparation + others * preparation + repeated * trial / workers.trials + test
        compute_full += full / workers.trials + other
        compute_pruned += pruned / workers.trials + other
    hours = workers.number / 3600
    return Forecast(
        trial_seconds=longest,
        wall_seconds_full=_makespan(walls_full, slots.side_by_side),
        wall_seconds_pruned=_makespan(walls_pruned, slots.side_by_side),
        cpu_hours_full=compute_full * hours * workers.cpus,
        cpu_hours_pruned=compute_pruned * hours * workers.cpus,
        gpu_hours_full=compute_full * hours * workers.gpus,
        gpu_hours_pruned=compute_pruned * hours * workers.gpus,
        steps_full=steps_full,
        steps_pruned=steps_full * pruned_share,
        fold_trainings=fold_trainings,
    )


def cache_bytes(plans: Sequence[CategoryPlan], speed: Speed, config: RunConfig, finalists: int = 0) -> int:
    """Size in bytes of the decoded images and features that a node keeps if it trains on all `plans`.

    With `finalists` it keeps those of every fold.
    """
    width, height = config.data.input_size
    kept = [in_tiles(plan, speed.tiles) for plan in plans]
    if config.data.tile:  # thresholds come from whole images then, which are read one by one and not kept
        kept = [plan._replace(num_calibration=0) for plan in kept]
    times = [plan.num_folds if finalists and plan.num_folds else 1 for plan in kept]
    read = sum(count * _num_read(plan) for count, plan in zip(times, kept, strict=True))
    seen = sum(count * _num_seen(plan) for count, plan in zip(times, kept, strict=True))
    return read * 3 * width * height + seen * speed.feature_bytes


def _num_read(plan: CategoryPlan) -> int:
    """Image files that a training reads."""
    return plan.num_train + plan.num_validation - plan.num_synthetic + plan.num_fold_free


def _num_seen(plan: CategoryPlan) -> int:
    """Images, synthetic defects included, whose features the teacher gives."""
    return plan.num_train + plan.num_validation + plan.num_fold_free


def in_tiles(plan: CategoryPlan, tiles: float) -> CategoryPlan:
    """The same in tiles, if an image has so many; training and validation use no more than so many of them."""
    if tiles == 1:
        return plan
    selecting = min(round((plan.num_validation - plan.num_synthetic) * tiles), MAX_VALIDATION_TILES)
    synthetic = max(NUM_VALIDATION_DEFECTS, selecting)
    return plan._replace(
        num_train=min(round(plan.num_train * tiles), MAX_TRAINING_TILES),
        num_validation=selecting + synthetic,
        num_synthetic=synthetic,
        num_calibration=round(plan.num_calibration * tiles),
        num_test=round(plan.num_test * tiles),
    )


def _preparation(plan: CategoryPlan, config: RunConfig, speed: Speed) -> float:
    read, seen = _num_read(plan), _num_seen(plan)
    stage = config.amplification.amplification_epochs * plan.num_train * speed.amplification
    return read * speed.decoding + plan.num_synthetic * speed.defects + seen * speed.teacher + stage


def _makespan(durations: Iterable[float], lanes: int) -> float:
    """Seconds until all are done, if each starts in order on the lane that is free first."""
    free = [0.0] * lanes
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)

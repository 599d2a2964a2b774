"""How long a search will take and what it will use, from its plan and the measured speed of one worker."""

import dataclasses
import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dskd.config import RunConfig
from dskd.data.datasets import NUM_VALIDATION_DEFECTS, Category, split_calibration, split_normals
from tune.settings.search import SearchSettings
from tune.trial.asha import expected_epochs

_LONG_ENOUGH = 0.4
"""Seconds of a step beyond which no larger batch is tried: on a slow device the step of a whole batch takes many."""
_FEWEST_IMAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SpeedTask:
    """What is to be measured: plain values, since another process measures."""

    config: Mapping[str, Any]
    """`RunConfig.to_dict()`."""
    teacher_weights: str
    images: tuple[bytes, ...]
    """Content of a few image files of the data that will be trained on."""
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float | None
    """None: one where this machine has any."""


class Speed(NamedTuple):
    """What one worker of a trial takes, in seconds."""

    device: str
    num_gpus: int
    """Usable GPUs that the measuring process saw."""
    images_measured: int
    """Images of the step that was timed; where fewer than a worker's share of the batch, the time was scaled up."""
    step: float
    """One optimiser step on the worker's share of a batch, without the exchange between workers."""
    validation: float
    """Per image: students, maps and metrics."""
    decoding: float
    """Per image file, read and resized."""
    teacher: float
    """Per image, once: the pyramid that is cached."""
    defects: float
    """Per synthetic defect, drawn once."""
    amplification: float
    """Per image and epoch of stage I; 0 where the configuration has none."""


def measure_speed(task: SpeedTask) -> Speed:
    """Train, validate and prepare a handful of images as a trial does, on the device that a trial gets here.

    The first step and validation pay for set-up and are not counted. Raises ValueError on unusable teacher
    weights or images, and where the device's memory does not hold the batch.
    """
    import torch  # seconds, which the process that asks for this measurement can spend on other checks

    try:
        return _measured(task)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a worker's share of a batch does not fit into the device's memory ({str(error).splitlines()[0]}); "
            "lower --batch-size or --image-size, or raise --workers-per-trial."
        ) from None


def _measured(task: SpeedTask) -> Speed:
    import numpy as np
    import torch

    from dskd.config import RunConfig
    from dskd.data.images import load_images
    from dskd.device import computing_device
    from dskd.evaluate import compute_metrics_shared, join, synthetic_validation
    from dskd.model.amplification import AmplifiedTeacher, build_amplifier
    from dskd.model.features import feature_table
    from dskd.model.network import build_students
    from dskd.model.teacher import Teacher, build_teacher
    from dskd.training.loop import Step, build_optimizer, fit
    from dskd.training.stage_one import amplifier_optimizer, fit_amplifier

    torch.set_num_threads(max(1, int(task.cpus_per_worker)))
    config = RunConfig.from_dict(task.config)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uses_gpu = num_gpus > 0 if task.gpus_per_worker is None else task.gpus_per_worker > 0
    device = computing_device("cuda" if uses_gpu else "cpu")
    plain = build_teacher(config.model.backbone, config.model.levels, task.teacher_weights).to(device)
    with TemporaryDirectory(prefix="dskd-") as temporary:
        files = [Path(temporary, str(number)) for number in range(len(task.images))]
        for file, content in zip(files, task.images, strict=True):
            file.write_bytes(content)
        decoding = _seconds(lambda: load_images(files, config.data.image_size)) / len(files)
        images = load_images(files, config.data.image_size)

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

    students = build_students(config.model, teacher, config.train.seed).to(device)
    optimizer = build_optimizer(students, config.train)

    def step_seconds(num_images: int) -> float:
        batch = images[np.resize(np.arange(len(images)), num_images)]
        table = feature_table(teacher, batch, device)
        one_batch = config.with_values({"batch_size": num_images, "epochs": 1000})
        taken = fit(students, optimizer, batch, table, one_batch, device=device)
        steps = (each for each in taken if isinstance(each, Step))
        next(steps).loss.item()  # to read a loss waits for the device
        times: list[float] = []
        while len(times) < 3 and sum(times) < _LONG_ENOUGH:
            times.append(_seconds(lambda: next(steps).loss.item()))
        return median(times)

    share = max(1, config.train.batch_size // task.num_workers)
    measured = min(share, _FEWEST_IMAGES)
    step = step_seconds(measured)
    while measured < share and step < _LONG_ENOUGH:
        measured = min(share, max(measured + 1, int(measured * _LONG_ENOUGH / step)))
        step = step_seconds(measured)

    defects = _seconds(lambda: synthetic_validation(images[:1], seed=0, num_defective=2)) / 2
    truth = synthetic_validation(images, seed=0, num_defective=len(images))
    few = feature_table(teacher, truth.images, device)
    compute_metrics_shared(few, students, truth, config, device, 0, 1)
    if device.type == "cuda":  # a full batch takes it hardly longer than a few images
        truth = join(truth, join(truth, join(truth, truth)))
    started = time.perf_counter()
    table = feature_table(teacher, truth.images, device)
    features = (time.perf_counter() - started) / (len(truth.images) + 1)  # it asks for one pyramid more: the shapes
    validation = _seconds(lambda: compute_metrics_shared(table, students, truth, config, device, 0, 1)) / len(
        truth.images
    )
    return Speed(
        device=torch.cuda.get_device_name(device) if uses_gpu else "CPU",
        num_gpus=num_gpus,
        images_measured=measured,
        step=step * share / measured,
        validation=validation,
        decoding=decoding,
        teacher=features,
        defects=defects,
        amplification=amplification,
    )


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class CategoryPlan(NamedTuple):
    """Images of one category by what they are for."""

    category: str
    num_train: int
    num_validation: int
    """Inspected after every epoch: held-out normals, synthetic defects, labelled defects."""
    num_synthetic: int
    num_calibration: int
    num_test: int


class Slots(NamedTuple):
    """How trials share the cluster."""

    side_by_side: int
    """Categories searched at once."""
    concurrency: int
    """Trials of one category at once."""


class Forecast(NamedTuple):
    """In seconds and hours; `…_full` where no trial is pruned, `…_pruned` with ASHA's expected pruning."""

    trial_seconds: float
    """The longest trial: all epochs on the largest category."""
    wall_seconds_full: float
    wall_seconds_pruned: float
    cpu_hours_full: float
    cpu_hours_pruned: float
    gpu_hours_full: float
    gpu_hours_pruned: float
    epochs_full: int
    """Over all trials and categories."""
    epochs_pruned: float


def plan_categories(categories: Mapping[str, Category], config: RunConfig) -> list[CategoryPlan]:
    """How the images of each category are used."""
    return [_plan(name, category, config) for name, category in categories.items()]


def _plan(name: str, category: Category, config: RunConfig) -> CategoryPlan:
    data = config.data
    train, held, _ = split_normals(category, data.validation_fraction, data.split_seed)
    selecting, calibrating = split_calibration(held, data.calibration_fraction, data.split_seed)
    num_synthetic = max(NUM_VALIDATION_DEFECTS, len(selecting))
    num_defects = sum(sample.is_defective for sample in category.validation)
    return CategoryPlan(
        category=name,
        num_train=len(train),
        num_validation=len(selecting) + num_synthetic + num_defects,
        num_synthetic=num_synthetic,
        num_calibration=len(calibrating),
        num_test=len(category.test),
    )


def share_slots(num_categories: int, slots: int) -> Slots:
    """Categories side by side as far as there are slots, and the rest of the slots within each."""
    side_by_side = min(num_categories, slots)
    return Slots(side_by_side, max(1, slots // side_by_side))


def forecast(
    settings: SearchSettings,
    config: RunConfig,
    plans: Sequence[CategoryPlan],
    speed: Speed,
    slots: Slots,
    gpus_per_worker: float,
) -> Forecast:
    """A search of all `plans` on `slots`, every worker as fast as `speed` was measured.

    A trial is epochs × (optimiser steps + validation) + its thresholds; a category is its preparation once
    (decoding, teacher, synthetic defects, stage I), then its trials on `concurrency` slots, then the test images.
    Left out: what a learnt sampler changes (embedding depth, hard loss), the exchange between workers, starting
    Ray and its processes, writing to the storage, and other load on the machines.
    """
    workers, epochs, trials = settings.workers_per_trial, config.train.epochs, settings.trials
    compute_full = compute_pruned = 0.0
    walls_full, walls_pruned, longest = [], [], 0.0
    pruned_epochs = expected_epochs(trials, epochs)
    for plan in plans:
        steps = max(1, plan.num_train // config.train.batch_size)
        epoch = steps * speed.step + plan.num_validation * speed.validation / workers
        finish = plan.num_calibration * speed.validation
        preparation = _preparation(plan, config, speed)
        test = plan.num_test * (speed.decoding + speed.teacher + speed.validation)
        trial = epochs * epoch + finish
        longest = max(longest, trial)
        full, pruned = trials * trial, pruned_epochs * epoch + finish * min(trials, pruned_epochs / epochs)
        rounds = -(-trials // slots.concurrency)
        walls_full.append(preparation + rounds * trial + test)
        walls_pruned.append(preparation + max(trial, pruned / slots.concurrency) + test)
        compute_full += preparation + full + test
        compute_pruned += preparation + pruned + test
    hours = workers / 3600
    return Forecast(
        trial_seconds=longest,
        wall_seconds_full=_makespan(walls_full, slots.side_by_side),
        wall_seconds_pruned=_makespan(walls_pruned, slots.side_by_side),
        cpu_hours_full=compute_full * hours * settings.cpus_per_worker,
        cpu_hours_pruned=compute_pruned * hours * settings.cpus_per_worker,
        gpu_hours_full=compute_full * hours * gpus_per_worker,
        gpu_hours_pruned=compute_pruned * hours * gpus_per_worker,
        epochs_full=trials * epochs * len(plans),
        epochs_pruned=pruned_epochs * len(plans),
    )


def _preparation(plan: CategoryPlan, config: RunConfig, speed: Speed) -> float:
    read = plan.num_train + plan.num_validation - plan.num_synthetic + plan.num_calibration
    seen = plan.num_train + plan.num_validation + plan.num_calibration
    stage = config.amplification.amplification_epochs * plan.num_train * speed.amplification
    return read * speed.decoding + plan.num_synthetic * speed.defects + seen * speed.teacher + stage


def _makespan(durations: Iterable[float], lanes: int) -> float:
    """When the last is done, each starting on the lane that is free first, in order."""
    free = [0.0] * lanes
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)

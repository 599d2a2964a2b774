"""How long a search will take and what it will use, from its plan and the measured speed of one worker."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dskd.config import RunConfig
from dskd.data.datasets import NUM_VALIDATION_DEFECTS, Category, set_apart, split_normals
from tune.pruning import expected_epochs
from tune.settings import SearchSettings
from tune.speed import Speed


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
    selecting, calibrating = set_apart(held, data.calibration_fraction, data.split_seed)
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

"""How long a step of the optimiser takes on this machine."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dskd.config import RunConfig
from dskd.model.features import feature_table
from dskd.model.network import build_students
from dskd.model.teacher import Teacher, build_teacher
from dskd.training.loop import Step, build_optimizer, fit
from dskd.training.recorded import NUM_REHEARSALS, quickest_step

MIN_STEP_SECONDS = 0.4
"""Seconds of a step above which no larger batch is measured: on a slow device a full batch would take too long."""
_MIN_IMAGES = 2


class StepSpeed(NamedTuple):
    """Measured time of a step."""

    images_measured: int
    """Number of images in the timed step; if fewer than in the batch, the time was scaled up."""
    seconds: float
    """Of one step on the whole batch."""


def step_speed(
    config: RunConfig,
    teacher: Teacher,
    images: npt.NDArray[np.uint8],
    num_images: int,
    device: torch.device,
    num_workers: int = 1,
) -> StepSpeed:
    """Time of a step with untrained students on `num_images`, of which `images` (N, H, W, 3) may be fewer.

    Features of the teacher are taken as cached. The first steps include set-up and are not counted. `num_workers` is
    how many train together, each with a share of the batch.
    """
    students = build_students(config.model, teacher, config.train.seed).to(device)
    optimizer = build_optimizer(students, config.train)

    def timed(size: int) -> float:
        batch = images[np.resize(np.arange(len(images)), size)]
        # More steps than are taken, so that no interval ends meanwhile.
        endless = config.with_values({"batch_size": len(batch), "steps": 1000})
        steps = fit(
            students, optimizer, batch, feature_table(teacher, batch, device), endless, device=device,
            take_step=quickest_step(device, num_workers),
        )  # fmt: skip
        losses = (each.loss for each in steps if isinstance(each, Step))
        for _ in range(NUM_REHEARSALS + 2 if device.type == "cuda" else 1):
            next(losses).item()  # reading the loss waits for the device
        times: list[float] = []
        while len(times) < 3 and sum(times) < MIN_STEP_SECONDS:
            times.append(seconds_of(lambda: next(losses).item()))
        return median(times)

    measured = min(num_images, _MIN_IMAGES)
    seconds = timed(measured)
    while measured < num_images and seconds < MIN_STEP_SECONDS:
        measured = min(num_images, max(measured + 1, int(measured * MIN_STEP_SECONDS / seconds)))
        seconds = timed(measured)
    return StepSpeed(measured, seconds * num_images / measured)


def untrained_step_speed(config: RunConfig, device: torch.device) -> StepSpeed:
    """Time of a step on a batch of random pixels, with an untrained teacher: neither changes the time."""
    teacher = build_teacher(config.model.backbone, config.model.levels, "random").to(device)
    width, height = config.data.input_size
    images = np.random.default_rng(0).integers(0, 256, (_MIN_IMAGES, height, width, 3), np.uint8)
    return step_speed(config, teacher, images, config.train.batch_size, device)


def seconds_of(act: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started

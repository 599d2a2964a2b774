"""How long a step of the optimiser takes on this machine."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd.config import RunConfig
from dskd.device import to_device
from dskd.model.features import FeatureTable, feature_table
from dskd.model.network import build_students
from dskd.model.teacher import Teacher, build_teacher, normalize
from dskd.training.loop import Step, build_optimizer, fit
from dskd.training.stack import Batch, StudentStack

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
    num_together: int = 1,
) -> StepSpeed:
    """Time of a step with untrained students on `num_images`, of which `images` (N, H, W, 3) may be fewer.

    Features of the teacher are taken as cached. The first step includes set-up and is not counted. With `num_together`
    it is the time of one step for so many trainings at once, each with a batch of its own.
    """
    seeds = range(config.train.seed, config.train.seed + num_together)
    students = [build_students(config.model, teacher, seed).to(device) for seed in seeds]
    optimizers = [build_optimizer(each, config.train) for each in students]
    stack = StudentStack(students) if num_together > 1 else None

    def steps(batch: npt.NDArray[np.uint8], table: FeatureTable) -> Iterator[Tensor]:
        if stack is None:
            # More steps than are taken, so that no interval ends meanwhile.
            endless = config.with_values({"batch_size": len(batch), "steps": 1000})
            taken = fit(students[0], optimizers[0], batch, table, endless, device=device)
            yield from (each.loss for each in taken if isinstance(each, Step))
            return
        rows = np.arange(len(batch))
        precision = torch.bfloat16 if device.type == "cuda" else torch.float32
        while True:
            own = [Batch(normalize(to_device(device, batch, rows)), table.pyramid(rows, device)) for _ in students]
            terms = stack.backward(own, [config.loss] * num_together, precision)
            for optimizer in optimizers:
                optimizer.step()
            yield terms[0].total

    def timed(size: int) -> float:
        batch = images[np.resize(np.arange(len(images)), size)]
        losses = steps(batch, feature_table(teacher, batch, device))
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

"""How fast a trial's device is: a second or two of the real training, measured before a search begins."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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

    from dskd.amplify import amplifier_optimizer, fit_amplifier
    from dskd.config import RunConfig
    from dskd.data.images import load_images
    from dskd.device import computing_device
    from dskd.evaluate import join, measure_shared, synthetic_validation
    from dskd.model.amplification import AmplifiedTeacher, build_amplifier
    from dskd.model.network import build_students
    from dskd.model.teacher import Teacher, build_teacher
    from dskd.pyramids import feature_table
    from dskd.train import Step, build_optimizer, fit_steps

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
        taken = fit_steps(students, optimizer, batch, table, one_batch, device=device)
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
    measure_shared(few, students, truth, config, device, 0, 1)
    if device.type == "cuda":  # a full batch takes it hardly longer than a few images
        truth = join(truth, join(truth, join(truth, truth)))
    started = time.perf_counter()
    table = feature_table(teacher, truth.images, device)
    features = (time.perf_counter() - started) / (len(truth.images) + 1)  # it asks for one pyramid more: the shapes
    validation = _seconds(lambda: measure_shared(table, students, truth, config, device, 0, 1)) / len(truth.images)
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

"""Overhead of training over its bare loop, and time saved by the cached teacher: `python benchmarks/overhead.py`.

Three variants of one round over the images, alternating in one run: `dskd.training.loop.fit` with the teacher's
cached features, the same with the teacher run for every batch, and the bare loop (forward, loss, backward, step) on
prepared tensors.
Images and weights are random, which does not change the speed.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor

from dskd.device import to_device
from dskd.losses import distillation_loss
from dskd.model import Teacher, build_students, build_teacher, normalize
from dskd.model.features import FeatureTable, feature_table
from dskd.presets import PRESETS
from dskd.training.loop import build_optimizer, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    presets: tuple[str, ...] = tuple(PRESETS)
    image_size: int = 128
    num_images: int = 64
    batch_size: int = 16
    repeats: int = 5


class _Uncached:
    """Replaces a feature table and runs the teacher for every requested pyramid."""

    def __init__(self, teacher: Teacher, images: npt.NDArray[np.uint8]) -> None:
        self.teacher, self.images = teacher, images

    def pyramid(self, indices: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, ...]:
        pyramid: tuple[Tensor, ...] = self.teacher(normalize(to_device(device, self.images, indices)))
        return pyramid

    def resident(self, device: torch.device) -> "_Uncached":
        """Nothing to keep anywhere."""
        return self


def round_seconds(preset: str, options: Options) -> list[float]:
    """Median seconds of the bare loop, of `fit` with cached features, and of `fit` with the teacher."""
    device, side = torch.device("cpu"), options.image_size
    steps = num_used(options) // options.batch_size
    config = PRESETS[preset].with_values(
        {
            "image_size": side,
            "batch_size": options.batch_size,
            "steps": steps,
            "learning_rate": 1e-4,
        }
    )
    images = np.random.default_rng(0).integers(0, 256, (options.num_images, side, side, 3), dtype=np.uint8)
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    students = build_students(config.model, teacher, seed=0)
    optimizer = build_optimizer(students, config.train)
    cached, uncached = feature_table(teacher, images, device), cast(FeatureTable, _Uncached(teacher, images))
    ready = [
        (normalize(torch.from_numpy(images[indices])), cached.pyramid(indices, device))
        for indices in np.arange(num_used(options)).reshape(-1, options.batch_size)
    ]

    def bare() -> None:
        students.train()
        for pixels, targets in ready:
            outputs = students(pixels, targets)
            loss = distillation_loss(targets, outputs.encoder, outputs.decoder, config.loss).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def fitted(features: FeatureTable) -> None:
        for _ in fit(students, optimizer, images, features, config, device=device):
            pass

    ways: list[Callable[[], None]] = [bare, lambda: fitted(cached), lambda: fitted(uncached)]
    times: list[list[float]] = [[] for _ in ways]
    for round_ in range(options.repeats + 1):
        for way, known in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            if round_ > 0:  # the first is a warm-up
                known.append(time.perf_counter() - started)
    return [median(known) for known in times]


def num_used(options: Options) -> int:
    """Images used in a round: an incomplete last batch is left out."""
    return options.num_images // options.batch_size * options.batch_size


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} CPUs; {options.num_images} images of {options.image_size} pixels, batches of "
        f"{options.batch_size}, medians of {options.repeats} rounds\n"
    )
    print("| preset | bare loop, images/s | fit, cached teacher | fit, teacher every time | fit / bare | cache saves |")
    print("|---|---|---|---|---|---|")
    for preset in options.presets:
        seconds = round_seconds(preset, options)
        bare, cached, uncached = (num_used(options) / value for value in seconds)
        print(
            f"| {preset} | {bare:.1f} | {cached:.1f} | {uncached:.1f} | {cached / bare:.2f} | "
            f"{1 - seconds[1] / seconds[2]:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Distillation on normal images: `fit` yields one `Epoch` at a time, and the caller decides what follows."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskd.config import RunConfig, TrainConfig
from dskd.losses import distillation_loss
from dskd.model.teacher import normalize
from dskd.pyramids import FeatureTable


class NonFiniteLoss(FloatingPointError):
    """Training diverged; the message names the epoch, the student and what to try."""


class Shard(NamedTuple):
    """This process's place among the `world_size` processes that train together."""

    rank: int = 0
    world_size: int = 1


class Epoch(NamedTuple):
    """What one pass over the training images gave; losses are means over all workers' steps."""

    number: int
    """Counted from 0."""
    loss: float
    encoder_loss: float
    decoder_loss: float
    hard_loss: float
    images_per_second: float
    seconds: float


def build_optimizer(students: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of RD4AD (arXiv 2201.10703) or STFPM (arXiv 2103.04257) over the students' parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(students.parameters(), lr=config.learning_rate, momentum=0.9, weight_decay=1e-4)
    return torch.optim.Adam(students.parameters(), lr=config.learning_rate, betas=(0.5, 0.999))


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Step size after the share `progress` in [0, 1) of all optimiser steps."""
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "multistep":
        return config.learning_rate * 0.2 ** ((progress >= 0.8) + (progress >= 0.9))
    return config.learning_rate


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int, shard: Shard) -> list[npt.NDArray[np.int64]]:
    """Indices of this process's share of every global batch of an epoch.

    The order depends on seed and epoch alone, and a global batch holds the same images for any
    number of processes, so N workers see what one worker sees. The last batch is left out when it
    is not full, unless it is the only one; every share has the same size, as DDP's mean over
    gradients requires, so up to world_size - 1 images of a batch may be left out.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    size = min(batch_size, num_images)
    share = size // shard.world_size
    if share == 0:
        raise ValueError(
            f"a batch of {size} images cannot be shared by {shard.world_size} workers; "
            "lower --workers-per-trial or raise the batch size."
        )
    return [
        order[start : start + share * shard.world_size][shard.rank :: shard.world_size]
        for start in range(0, num_images - size + 1, size)
    ]


def fit(
    students: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: npt.NDArray[np.uint8],
    teacher_features: FeatureTable,
    config: RunConfig,
    *,
    device: torch.device,
    shard: Shard = Shard(),  # noqa: B008 - an immutable tuple
    first_epoch: int = 0,
) -> Iterator[Epoch]:
    """Train `students` in place on normal images (N, S, S, 3), yielding after every epoch.

    `students` maps (images, teacher pyramid) to student pyramids and may be wrapped for DDP. All
    state lies in `students` and `optimizer`: save both after an epoch, restore them and pass the
    next index as `first_epoch`, and the remaining epochs are those of an uninterrupted run.

    Raises NonFiniteLoss as soon as a loss is not a finite number.
    """
    on_gpu = device.type == "cuda"
    for epoch in range(first_epoch, config.train.epochs):
        started = time.perf_counter()
        students.train()
        batches = epoch_batches(len(images), config.train.batch_size, config.train.seed, epoch, shard)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for step, indices in enumerate(batches):
            progress = (epoch + step / len(batches)) / config.train.epochs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.train, progress)
            pixels = normalize(torch.from_numpy(images[indices]).to(device, non_blocking=on_gpu))
            targets = teacher_features.pyramid(indices, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                outputs = students(pixels, targets)
            terms = distillation_loss(targets, outputs.encoder, outputs.decoder, config.loss)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            sums += torch.stack([terms.total, terms.encoder, terms.decoder, terms.hard]).detach()
        loss, encoder, decoder, hard = (_mean_over_workers(sums) / len(batches)).tolist()
        if not math.isfinite(loss):
            raise NonFiniteLoss(_divergence(epoch, encoder, decoder, config))
        seconds = time.perf_counter() - started
        num_seen = sum(map(len, batches)) * shard.world_size
        yield Epoch(epoch, loss, encoder, decoder, hard, num_seen / seconds, seconds)


def _mean_over_workers(sums: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        total = sums.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()
    return sums


def _divergence(epoch: int, encoder: float, decoder: float, config: RunConfig) -> str:
    culprits = [name for name, loss in (("encoder", encoder), ("decoder", decoder)) if not math.isfinite(loss)]
    return (
        f"loss of the student {' and '.join(culprits) or 'pair'} is not finite in epoch {epoch}; "
        f"learning_rate {config.train.learning_rate:g} is probably too high, try a tenth of it."
    )

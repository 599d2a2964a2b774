"""Training of students on normal images: `fit` yields steps and intervals, and the caller decides what to do next.

An interval is the steps from one validation to the next. An epoch, one pass over the images, has no meaning here: with
few images it is so short that a validation after each would cost as much as the training itself.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dskd.config import LossConfig, RunConfig, TrainConfig
from dskd.device import WorkerRank, mean_over_workers, resident, to_device
from dskd.losses import LossTerms, distillation_loss
from dskd.model.distances import Pyramid
from dskd.model.features import FeatureTable
from dskd.model.teacher import normalize


class NonFiniteLossError(FloatingPointError):
    """Training diverged; the message names step, student and level, and says what to try."""


class Step(NamedTuple):
    """One completed optimiser step."""

    num_images: int
    """Number of images in the batch, over all workers."""
    loss: Tensor
    """This worker's loss, a scalar on the training device; reading it waits for the device."""


class Interval(NamedTuple):
    """Result of the steps from one validation to the next; losses are means over all workers' steps."""

    number: int
    """Counted from 0."""
    loss: float
    encoder_loss: float
    decoder_loss: float
    hard_loss: float
    images_per_second: float
    seconds: float
    step: int
    """Steps of the training up to the end of the interval."""


def build_optimizer(students: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of RD4AD (arXiv 2201.10703) or STFPM (arXiv 2103.04257) over the students' parameters."""
    # On a GPU one kernel updates all parameters; the result is the same up to rounding.
    fused = True if next(students.parameters()).is_cuda else None
    if config.optimizer == "sgd":
        rate = config.learning_rate
        return torch.optim.SGD(students.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, fused=fused)
    return torch.optim.Adam(students.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), fused=fused)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate after the share `progress` in [0, 1) of all optimiser steps."""
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "multistep":
        return config.learning_rate * 0.2 ** ((progress >= 0.8) + (progress >= 0.9))
    return config.learning_rate


def draw_batches(
    num_images: int,
    batch_size: int,
    seed: int,
    worker: WorkerRank = WorkerRank(),  # noqa: B008 - an immutable tuple
) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of this process's share of every global batch, without end.

    The images come in one random order after the other, and a batch may begin in one and end in the next: so after
    any step no image was seen more than once oftener than another. No image is twice in a batch; with fewer images
    than `batch_size` a batch is all of them. The order depends only on the seed, and a global batch holds the same
    images for any number of processes, so N workers see the same images as one worker. Every share has the same size,
    as DDP's mean over gradients requires, so up to world_size - 1 images of a batch, others each time, are left out.
    """
    size = min(batch_size, num_images)
    share = size // worker.world_size
    if share == 0:
        raise ValueError(
            f"a batch of {size} images cannot be shared by {worker.world_size} workers; "
            "lower --workers-per-trial or raise the batch size."
        )
    left = np.zeros(0, np.int64)  # images of the last order that did not fill a batch
    for number in itertools.count():
        order = np.random.default_rng((seed, number)).permutation(num_images)
        if len(left):
            # The batch that they begin is filled with the first images that it does not hold yet.
            is_held = np.isin(order, left)
            first = np.flatnonzero(~is_held)[: size - len(left)]
            order = np.concatenate([left, order[first], np.delete(order, first)])
        num_full = len(order) // size * size
        for batch in order[:num_full].reshape(-1, size):
            yield batch[: share * worker.world_size][worker.rank :: worker.world_size]
        left = order[num_full:]


TakeStep = Callable[[nn.Module, torch.optim.Optimizer, LossConfig, Tensor, Pyramid], LossTerms]
"""Takes one optimiser step on a batch, images from `normalize` and their teacher pyramid; the loss before it."""


def plain_step(
    students: nn.Module, optimizer: torch.optim.Optimizer, loss: LossConfig, images: Tensor, targets: Pyramid
) -> LossTerms:
    """One optimiser step, the convolutions in bfloat16 on a GPU; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    terms = gradients(students, loss, images, targets)
    optimizer.step()
    return terms


def gradients(students: nn.Module, loss: LossConfig, images: Tensor, targets: Pyramid) -> LossTerms:
    """Add the gradients of a batch's loss to the students' weights; the loss."""
    # No weight is used twice, so that a cache of rounded weights gains nothing; a recorded step must not have one.
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda, cache_enabled=False):
        outputs = students(images, targets)
    terms = distillation_loss(targets, outputs.encoder, outputs.decoder, loss)
    terms.total.backward()
    return LossTerms(*(term.detach() for term in terms))  # what is kept of a step keeps nothing of its graph


def fit(
    students: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: npt.NDArray[np.uint8],
    teacher_features: FeatureTable,
    config: RunConfig,
    *,
    device: torch.device,
    worker: WorkerRank = WorkerRank(),  # noqa: B008 - an immutable tuple
    first_interval: int = 0,
    take_step: TakeStep = plain_step,
) -> Iterator[Step | Interval]:
    """Train `students` in place on normal images (N, S, S, 3); yields every step, and each interval after its steps.

    `students` maps (images, teacher pyramid) to student pyramids and may be wrapped for DDP; `take_step` may be a
    quicker one of a GPU (`dskd.training.recorded`). The whole state is in `students` and `optimizer`: save both after
    an interval, later restore them and pass the next index as `first_interval`; the remaining intervals are then equal
    to those of an uninterrupted run.

    Raises NonFiniteLossError at the end of an interval in which a loss is not a finite number.
    """
    train = config.train
    there, table = resident(device, images), teacher_features.resident(device)
    ends = (0, *train.interval_ends(len(images)))
    batches = draw_batches(len(images), train.batch_size, train.seed, worker)
    batches = itertools.islice(batches, ends[first_interval], None)
    for number in range(first_interval, train.num_validations):
        started = time.perf_counter()
        students.train()
        losses, seen = [], []
        for step, indices in zip(range(ends[number], ends[number + 1]), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, step / ends[-1])
            pixels = normalize(to_device(device, there, indices))
            terms = take_step(students, optimizer, config.loss, pixels, table.pyramid(indices, device))
            scalars = torch.stack([terms.total, terms.encoder, terms.decoder, terms.hard])
            losses.append(torch.cat([scalars, terms.levels.flatten()]))
            seen.append(indices)
            yield Step(len(indices) * worker.world_size, scalars[0])
        # Read once per interval: reading every step would make the host wait for the GPU.
        means = mean_over_workers(torch.stack(losses).double()).cpu()  # (steps, 4 + 2 * levels)
        loss, encoder, decoder, hard = means[:, :4].mean(dim=0).tolist()
        if not math.isfinite(loss):
            raise NonFiniteLossError(_divergence(means, seen, ends[number], ends[-1], teacher_features, config))
        seconds = time.perf_counter() - started
        num_seen = sum(map(len, seen)) * worker.world_size
        yield Interval(number, loss, encoder, decoder, hard, num_seen / seconds, seconds, ends[number + 1])


def _divergence(
    losses: Tensor,
    batches: list[npt.NDArray[np.int64]],
    first_step: int,
    num_steps: int,
    teacher_features: FeatureTable,
    config: RunConfig,
) -> str:
    """The error message if not all `losses` (steps, 4 + 2 * levels) are finite; it names the first such step.

    `first_step` is the number, counted from 0 and out of `num_steps`, of the step of the first row and batch.
    """
    step = int(losses[:, 0].isfinite().logical_not().nonzero()[0])
    levels = config.model.levels
    wrong = losses[step, 4:].isfinite().logical_not().unflatten(0, (2, len(levels)))  # (2, levels)
    culprits = [
        f"student {student} at level {', '.join(str(levels[position]) for position in row.nonzero().flatten())}"
        for student, row in zip(("encoder", "decoder"), wrong, strict=True)
        if row.any()
    ]
    where = f"loss of the {' and the '.join(culprits) or 'student pair'} is not finite"
    at = f"at step {first_step + step + 1} of {num_steps}"
    targets = teacher_features.pyramid(batches[step], torch.device("cpu"))
    if broken := [level for level, target in zip(levels, targets, strict=True) if not target.isfinite().all()]:
        return (
            f"{where} {at}; the teacher's own features at level {', '.join(map(str, broken))} are not: "
            "its weights are damaged, give others with --teacher-weights."
        )
    return f"{where} {at}; learning_rate {config.train.learning_rate:g} is probably too high, try a tenth of it."

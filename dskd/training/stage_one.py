"""Stage I of AAND: an amplifier learns from synthetic defects to separate normal and abnormal teacher features.

`fit_amplifier` yields one epoch at a time; the students are trained afterwards on good images only
(Tang et al., arXiv 2405.02068).
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dskd.config import AmplificationConfig, TrainConfig
from dskd.data.defects import add_defects, find_foreground
from dskd.device import to_device
from dskd.losses import amplification_loss, focal_loss
from dskd.model.amplification import Amplifier, LevelAmplifier
from dskd.model.distances import Pyramid
from dskd.model.teacher import Teacher, normalize
from dskd.training.loop import NonFiniteLossError, build_optimizer, learning_rate

CLEAN_SHARE = 0.2
"""Probability that an image is shown without a defect."""
PATCH_SHARE = 0.3
"""A position belongs to a defect, or to the object, if more than this share of its pixels does."""
MAX_NORMAL, MAX_ABNORMAL = 5000, 1000
"""Largest numbers of positions per batch and level that the amplification loss pairs with each other."""

# Last element of a seed, so that defects and positions use different random streams; not 0, since numpy
# gives the same stream for a shorter seed.
_DEFECTS, _POSITIONS = 1, 2


class AmplificationEpoch(NamedTuple):
    """Result of one epoch of stage I; losses are means over the steps."""

    number: int
    """Counted from 0."""
    loss: float
    """gate_loss + amplification_weight · residual_loss."""
    gate_loss: float
    """Focal loss, summed over the levels."""
    residual_loss: float
    """Amplification loss, summed over the levels."""
    seconds: float


def amplifier_optimizer(amplifier: Amplifier, config: AmplificationConfig) -> torch.optim.Optimizer:
    """The optimiser of AAND: Adam with betas (0.5, 0.999)."""
    return build_optimizer(amplifier, _schedule(config))


def fit_amplifier(
    amplifier: Amplifier,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    images: npt.NDArray[np.uint8],
    config: AmplificationConfig,
    *,
    device: torch.device,
    first_epoch: int = 0,
    textures: npt.NDArray[np.uint8] | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
) -> Iterator[AmplificationEpoch]:
    """Train `amplifier` in place on good images (N, H, W, 3); yields after every epoch.

    In each epoch four of five images get a new synthetic defect (`textures` and `inside` as in `add_defects`). The gate
    learns to find the defects (focal loss). The residual learns to make their features less similar to
    normal ones (amplification loss), with the true positions instead of the gate's output, so each of the two is
    trained only by its own loss. The amplifier of the last epoch is the result: the released code selects the epoch
    by the test set, but a schedule that ends at 1/25 of the first learning rate needs no selection.

    The released code finds the object by grey thresholds chosen per category; we use `find_foreground`.
    A position is normal if it is on the object and has no defect.

    As in `fit`, the whole state is in `amplifier` and `optimizer`, and `first_epoch` continues exactly where an
    interrupted run stopped. Images are drawn by torch.get_num_threads() threads; the drawn images depend only on
    the seed, the epoch and the image's index.

    Raises NonFiniteLossError as soon as an epoch's loss is not a finite number.
    """
    schedule = _schedule(config)
    with torch.no_grad():
        sizes = [(level.shape[2], level.shape[3]) for level in teacher(_pixels(images[:1], device))]
    outlines = [find_foreground(image) for image in images]
    objects = _object_patches(outlines, sizes, inside)
    for epoch in range(first_epoch, config.amplification_epochs):
        started = time.perf_counter()
        batches = _epoch_batches(len(images), schedule.batch_size, schedule.seed, epoch)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            drawn = _draw_ahead(threads, images, outlines, batches, schedule.seed, epoch, textures, inside)
            for step, (indices, (pictures, masks)) in enumerate(zip(batches, drawn, strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(schedule, (epoch + step / len(batches)) / config.amplification_epochs)
                with torch.no_grad():
                    pyramid = teacher(_pixels(pictures, device))
                defects = patch_masks(masks, sizes)
                normals = [~defect & of_object[indices] for defect, of_object in zip(defects, objects, strict=True)]
                rng = np.random.default_rng((schedule.seed, epoch, step, _POSITIONS))
                gate, residual = stage_losses(amplifier, pyramid, defects, normals, config.amplification_margin, rng)
                loss = gate + config.amplification_weight * residual
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                sums += torch.stack([loss, gate, residual]).detach()
        loss_mean, gate_mean, residual_mean = (sums / len(batches)).tolist()
        if not math.isfinite(loss_mean):
            raise NonFiniteLossError(
                f"loss of the amplifier (stage I) is not finite in epoch {epoch + 1}; amplification_learning_rate "
                f"{config.amplification_learning_rate:g} is probably too high, try a tenth of it."
            )
        yield AmplificationEpoch(epoch, loss_mean, gate_mean, residual_mean, time.perf_counter() - started)


def stage_losses(
    amplifier: Amplifier,
    pyramid: Pyramid,
    defects: Sequence[npt.NDArray[np.bool_]],
    normals: Sequence[npt.NDArray[np.bool_]],
    margin: float,
    rng: np.random.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Focal and amplification loss of one batch, each summed over the levels.

    `defects` and `normals` mark per level the abnormal and the normal positions (B, H, W); `rng` chooses among
    them if there are more than MAX_ABNORMAL or MAX_NORMAL. The true positions are used instead of the gate's
    output (teacher forcing): a normal position keeps its features and an abnormal one gets its full residual, so
    residuals are computed only for the chosen abnormal positions.
    """
    gate_loss = residual_loss = torch.zeros((), device=pyramid[0].device)
    for level, features, defect, normal in zip(amplifier.levels, pyramid, defects, normals, strict=True):
        assert isinstance(level, LevelAmplifier)
        gate_loss = gate_loss + focal_loss(level.gate(features), torch.from_numpy(defect).to(features.device))
        unchanged = features_at(features, normal, MAX_NORMAL, rng)
        abnormal = features_at(features, defect, MAX_ABNORMAL, rng)
        amplified = abnormal + level.residual(abnormal[:, :, None, None])[:, :, 0, 0]
        residual_loss = residual_loss + amplification_loss(unchanged, abnormal, amplified, margin=margin)
    return gate_loss, residual_loss


def patch_masks(masks: npt.NDArray[np.bool_], sizes: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.bool_], ...]:
    """Pixel masks (N, h, w) converted to masks (N, H, W) of feature positions, for each size (H, W)."""
    pixels = torch.from_numpy(masks)[:, None].float()
    return tuple((F.adaptive_avg_pool2d(pixels, size)[:, 0] > PATCH_SHARE).numpy() for size in sizes)


def draw_example(
    image: npt.NDArray[np.uint8],
    index: int,
    seed: int,
    epoch: int,
    textures: npt.NDArray[np.uint8] | None = None,
    inside: npt.NDArray[np.bool_] | None = None,
    outline: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """The `index`-th good image (H, W, 3) as stage I uses it in an epoch, and the mask (H, W) of its defect.

    Only pixels `inside` (H, W) may have a defect. `outline` (H, W) is the object as `find_foreground` sees it.
    """
    rng = np.random.default_rng((seed, epoch, index, _DEFECTS))
    if rng.random() < CLEAN_SHARE:
        return image, np.zeros(image.shape[:2], np.bool_)
    where = None if inside is None else inside[None]
    objects = None if outline is None else [outline]
    drawn = int(rng.integers(2**63))
    changed, masks = add_defects(image[None], seed=drawn, textures=textures, inside=where, objects=objects)
    return changed[0], masks[0]


def _schedule(config: AmplificationConfig) -> TrainConfig:
    return TrainConfig(
        epochs=config.amplification_epochs,
        batch_size=config.amplification_batch_size,
        learning_rate=config.amplification_learning_rate,
        schedule="multistep",
        seed=config.amplification_seed,
    )


def _epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """Indices of the batches of an epoch in an order of its own; a last one that is not full is left out."""
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    size = min(batch_size, num_images)
    return [order[start : start + size] for start in range(0, num_images - size + 1, size)]


def _object_patches(
    outlines: Sequence[npt.NDArray[np.bool_]], sizes: Sequence[tuple[int, int]], inside: npt.NDArray[np.bool_] | None
) -> list[npt.NDArray[np.bool_]]:
    """For each level, which positions (N, H, W) lie on the object; all of them if it fills the image."""
    scored = (found if inside is None else found & inside[index] for index, found in enumerate(outlines))
    of_images = [patch_masks(found[None], sizes) for found in scored]
    return [np.concatenate(of_level) for of_level in zip(*of_images, strict=True)]


def _draw_ahead(
    threads: ThreadPoolExecutor,
    images: npt.NDArray[np.uint8],
    outlines: Sequence[npt.NDArray[np.bool_]],
    batches: Sequence[npt.NDArray[np.int64]],
    seed: int,
    epoch: int,
    textures: npt.NDArray[np.uint8] | None,
    inside: npt.NDArray[np.bool_] | None,
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]:
    """Images and masks of every batch; the next batch is drawn while the caller uses this one."""

    def start(batch: npt.NDArray[np.int64]) -> list[Future[tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]]]:
        return [
            threads.submit(
                draw_example,
                images[index],
                index,
                seed,
                epoch,
                textures,
                None if inside is None else inside[index],
                outlines[index],
            )
            for index in batch.tolist()
        ]

    ahead = start(batches[0])
    for step in range(len(batches)):
        drawn = ahead
        ahead = start(batches[step + 1]) if step + 1 < len(batches) else []
        pictures, masks = zip(*(example.result() for example in drawn), strict=True)
        yield np.stack(pictures), np.stack(masks)


def features_at(
    features: Float[Tensor, "b c h w"], where: npt.NDArray[np.bool_], limit: int, rng: np.random.Generator
) -> Float[Tensor, "n c"]:
    """Feature vectors at up to `limit` of the positions `where` (B, H, W), drawn without replacement."""
    places = np.flatnonzero(where)
    if len(places) > limit:
        places = rng.choice(places, limit, replace=False)
    return features.movedim(1, 3).flatten(0, 2)[torch.from_numpy(places).to(features.device)]


def _pixels(images: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    return normalize(to_device(device, images, slice(None)))

"""Anomaly maps and image scores: pure functions of feature pyramids."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from dskd.config import Fusion, ScoreConfig
from dskd.device import constant
from dskd.model.distances import Discrepancies

BLUR_REFERENCE = 256
"""Map side, in pixels, that `blur_sigma` is meant for."""
BLUR_TRUNCATE = 4.0
"""Radius of the Gaussian in standard deviations; scipy's default, as in RD4AD's code."""


def anomaly_maps(
    discrepancies: Discrepancies, config: ScoreConfig, image_size: int | tuple[int, int]
) -> Float[Tensor, "b h w"]:
    """One non-negative map per image: levels fused, then students, then blurred.

    Levels are first brought to `image_size`, a square's side or (height, width), by bilinear interpolation. Weights
    w fuse maps d as Σ w·d, max w·d or Π d^w. Students may also fuse as 1 - Π (1 - w·a) (noisy-or, arXiv 2509.24448),
    where a in [0, 1] is a student's fused map over its value at a distance of 1 in every level, and 1 above that:
    orthogonal features are as abnormal as can be, and those of a ReLU are never further apart. A student
    alone is taken as it is. The blur is a Gaussian of blur_sigma · side / 256 pixels, where a square of that
    side has the image's area.
    Raises ValueError where no student exists.

    >>> level = torch.tensor([[[0.0, 1.0], [0.0, 0.5]]])  # the encoder's only level, of one image
    >>> config = ScoreConfig(score_level_weights=(2.0,), level_fusion="sum", blur_sigma=0.0)
    >>> anomaly_maps(Discrepancies((level,), None), config, image_size=2).tolist()
    [[[0.0, 2.0], [0.0, 1.0]]]
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    sigma = config.blur_sigma * math.sqrt(size[0] * size[1]) / BLUR_REFERENCE
    compared = [
        (weight, levels)
        for weight, levels in (
            (config.encoder_score_weight, discrepancies.encoder),
            (config.decoder_score_weight, discrepancies.decoder),
        )
        if levels is not None
    ]
    if not compared:
        raise ValueError("anomaly maps need the discrepancies of at least one student, got none.")
    if sigma > 0 and config.level_fusion == "sum" and (len(compared) == 1 or config.student_fusion == "sum"):
        shares = [weight for weight, _ in compared] if len(compared) > 1 else [1.0]
        mixed = [_fuse(level, shares, "sum") for level in zip(*(levels for _, levels in compared), strict=True)]
        return _summed(mixed, config.score_level_weights, size, sigma)
    students = [
        (weight, _fuse(_resize(levels, size), config.score_level_weights, config.level_fusion))
        for weight, levels in compared
    ]
    if len(students) == 1:
        fused = students[0][1]
    elif config.student_fusion == "noisy-or":
        weights = config.score_level_weights
        certain = _fuse([torch.ones(())] * len(weights), weights, config.level_fusion)
        # x + y - x·y and not 1 - (1 - x)(1 - y), which rounds small probabilities to nothing.
        first, second = (weight * (level / certain).clamp_max(1) for weight, level in students)
        fused = first + second - first * second
    else:
        fused = _fuse([level for _, level in students], [weight for weight, _ in students], config.student_fusion)
    return _blur(fused, sigma)


def image_scores(maps: Float[Tensor, "b h w"], top_fraction: float) -> Float[Tensor, " b"]:
    """Each map's maximum for `top_fraction` 0, else the mean of that share of its highest values.

    >>> maps = torch.tensor([[[0.0, 3.0], [1.0, 4.0]]])
    >>> image_scores(maps, 0.0).item(), image_scores(maps, 0.5).item()
    (4.0, 3.5)
    """
    values = maps.flatten(1)
    if top_fraction == 0:
        return values.amax(dim=1)
    count = max(1, round(top_fraction * values.shape[1]))
    return values.topk(count, dim=1, sorted=False).values.mean(dim=1)


def _resize(levels: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
    return [_between(level, size, 0.0) for level in levels]


def _between(level: Tensor, size: tuple[int, int], sigma: float, weight: float = 1.0) -> Tensor:
    """A level brought to `size` by bilinear interpolation, and blurred, as two products with matrices.

    In float32 where autocast would round; a product is quicker than an interpolation in every runtime.
    """
    if sigma == 0 and tuple(level.shape[-2:]) == size:
        return level if weight == 1 else weight * level
    rows, columns = (
        constant(level.device, _resized_rows, small, side, sigma)
        for small, side in zip(level.shape[-2:], size, strict=True)
    )
    with torch.autocast(level.device.type, enabled=False):
        return (rows if weight == 1 else weight * rows) @ level @ columns.T


def _fuse(maps: Sequence[Tensor], weights: Sequence[float], fusion: Fusion) -> Tensor:
    pairs = zip(weights, maps, strict=True)
    # A weight of 1 changes nothing, and a pass over the maps less is measurable.
    if fusion == "product":
        return functools.reduce(torch.mul, (level if weight == 1 else level**weight for weight, level in pairs))
    combine = torch.add if fusion == "sum" else torch.maximum
    return functools.reduce(combine, (level if weight == 1 else weight * level for weight, level in pairs))


def _summed(levels: Sequence[Tensor], weights: Sequence[float], size: tuple[int, int], sigma: float) -> Tensor:
    """The weighted sum of resized and blurred levels: both are linear, so that one pair of products does both."""
    parts = (_between(level, size, sigma, weight) for weight, level in zip(weights, levels, strict=True))
    return functools.reduce(torch.add, parts)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return maps
    # As two matrix products: exact borders without padding, and float32 where autocast or cuDNN's
    # TF32 would round a convolution.
    rows, columns = (constant(maps.device, _blur_matrix, side, sigma) for side in maps.shape[-2:])
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps @ columns.T


@functools.lru_cache(maxsize=64)
def _resized_rows(small: int, side: int, sigma: float) -> npt.NDArray[np.float32]:
    """Bilinear interpolation of `small` values to `side`, and a blur after it, as one matrix (side, small)."""
    places = ((np.arange(side) + 0.5) * small / side - 0.5).clip(0, small - 1)
    lower = places.astype(int)
    share = places - lower
    resize = np.zeros((side, small))
    np.add.at(resize, (np.arange(side), lower), 1 - share)
    np.add.at(resize, (np.arange(side), np.minimum(lower + 1, small - 1)), share)
    return (_blur_matrix(side, sigma).astype(float) @ resize if sigma else resize).astype(np.float32)


@functools.lru_cache(maxsize=16)
def _blur_matrix(side: int, sigma: float) -> npt.NDArray[np.float32]:
    """The Gaussian along one axis (side, side), the edge pixels mirrored outwards ("reflect" in scipy's words).

    In numpy, so that it becomes a constant of an exported graph.
    """
    radius = math.floor(BLUR_TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    unfolded = (np.arange(side)[:, None] + offsets) % (2 * side)  # (side, 2 radius + 1)
    sources = np.where(unfolded < side, unfolded, 2 * side - 1 - unfolded)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], sources), kernel / kernel.sum())
    return matrix.astype(np.float32)

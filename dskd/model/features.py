"""Teacher pyramids of many images in one table, so that a frozen teacher runs only once per image."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from dskd.data.cache import ArrayCache
from dskd.data.images import progress_bar
from dskd.device import resident, to_device
from dskd.model.teacher import Teacher, normalize, weights_fingerprint

_CHUNK = 16


class FeatureTable(NamedTuple):
    """Pyramids of N images, one float32 row each, the levels one after the other."""

    rows: npt.NDArray[np.float32] | Float[Tensor, "n values"]
    shapes: tuple[tuple[int, int, int], ...]
    """(channels, height, width) of each level, shallowest first."""

    def pyramid(self, indices: npt.NDArray[np.int64] | slice, device: torch.device) -> tuple[Tensor, ...]:
        """The pyramids of some images: per level a tensor (B, C, H, W) on `device`."""
        rows = to_device(device, self.rows, indices)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return tuple(
            part.unflatten(1, shape) for part, shape in zip(rows.split(sizes, dim=1), self.shapes, strict=True)
        )

    def resident(self, device: torch.device) -> "FeatureTable":
        """The same, in a GPU's memory where there is room."""
        return self if isinstance(self.rows, Tensor) else FeatureTable(resident(device, self.rows), self.shapes)


def feature_table(
    teacher: Teacher,
    images: npt.NDArray[np.uint8],
    device: torch.device,
    *,
    cache: ArrayCache | None = None,
    progress: str | None = None,
) -> FeatureTable:
    """The teacher's pyramids of images (N, S, S, 3), from the cache if it holds those of these images and weights.

    With `progress` a progress bar of that name on the terminal counts the computed batches.
    """
    with torch.no_grad():
        sample = teacher(normalize(torch.zeros(1, *images.shape[1:], dtype=torch.uint8, device=device)))
    shapes = tuple((level.shape[1], level.shape[2], level.shape[3]) for level in sample)
    size = (len(images), sum(int(np.prod(shape)) for shape in shapes))

    def fill(rows: npt.NDArray[Any]) -> None:
        starts = range(0, len(images), _CHUNK)
        for start in progress_bar(starts, progress, len(starts), "batch"):
            with torch.no_grad():
                pyramid = teacher(normalize(to_device(device, images, slice(start, start + _CHUNK))))
            rows[start : start + _CHUNK] = torch.cat([level.flatten(1) for level in pyramid], dim=1).float().cpu()

    if cache is None:
        rows = np.empty(size, np.float32)
        fill(rows)
    else:
        # str(teacher) contains strides and activations, which are not in the weights; devices round differently.
        key = f"{content_sha256(images)}|{weights_fingerprint(teacher)}|{teacher}|{shapes}|{device.type}"
        rows = cache.get(f"teacher features|{key}", size, np.float32, fill)
    return FeatureTable(rows, shapes)


def content_sha256(images: npt.NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels, in hex."""
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()

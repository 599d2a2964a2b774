"""Teacher pyramids of many images as one table, so that a frozen teacher runs once per image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd.data.cache import ArrayCache
from dskd.device import rows_on
from dskd.model.teacher import Teacher, normalize
from dskd.progress import shown

_CHUNK = 16


class FeatureTable(NamedTuple):
    """Pyramids of N images, one float32 row each, the levels one after the other."""

    rows: npt.NDArray[np.float32]
    shapes: tuple[tuple[int, int, int], ...]
    """(channels, height, width) of each level, shallowest first."""

    def pyramid(self, indices: npt.NDArray[np.int64] | slice, device: torch.device) -> tuple[Tensor, ...]:
        """The pyramids of some images: per level a tensor (B, C, H, W) on `device`."""
        rows = rows_on(device, self.rows, indices)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return tuple(
            part.unflatten(1, shape) for part, shape in zip(rows.split(sizes, dim=1), self.shapes, strict=True)
        )


def feature_table(
    teacher: Teacher,
    images: npt.NDArray[np.uint8],
    device: torch.device,
    *,
    cache: ArrayCache | None = None,
    key: str = "",
    progress: str | None = None,
) -> FeatureTable:
    """The teacher's pyramids of images (N, S, S, 3), from the cache where `key` is known.

    `key` must name the content of `images` and the teacher's weights. With `progress` a bar of that name
    counts the batches that are computed on a terminal.
    """
    with torch.no_grad():
        sample = teacher(normalize(torch.from_numpy(np.array(images[:1])).to(device)))
    shapes = tuple((level.shape[1], level.shape[2], level.shape[3]) for level in sample)
    size = (len(images), sum(int(np.prod(shape)) for shape in shapes))

    def fill(rows: npt.NDArray[Any]) -> None:
        starts = range(0, len(images), _CHUNK)
        for start in shown(starts, progress, len(starts), "batch"):
            chunk = torch.from_numpy(np.array(images[start : start + _CHUNK])).to(device)
            with torch.no_grad():
                pyramid = teacher(normalize(chunk))
            rows[start : start + _CHUNK] = torch.cat([level.flatten(1) for level in pyramid], dim=1).float().cpu()

    return FeatureTable(_filled(cache, f"teacher features|{key}", size, fill), shapes)


def _filled(
    cache: ArrayCache | None, key: str, shape: tuple[int, int], fill: Callable[[npt.NDArray[Any]], None]
) -> npt.NDArray[np.float32]:
    if cache is not None:
        return cache.get(key, shape, np.float32, fill)
    rows = np.empty(shape, np.float32)
    fill(rows)
    return rows

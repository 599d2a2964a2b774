"""Which normal images train, which choose, and which set the thresholds: one held-out share, or one of several folds.

With folds every image is held out once, so that all of them together, each scored by students that did not see it,
say more than one share can.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dskd.config import DataConfig
from dskd.data.datasets import Category, held_out_names, split_calibration, split_normals
from dskd.data.parts import part_of
from dskd.data.samples import Sample, split_key


class Split(NamedTuple):
    """The normal images of one category by use, each in the given order."""

    train: tuple[Sample, ...]
    selecting: tuple[Sample, ...]
    """Held out, to choose the step and the configuration."""
    calibrating: tuple[Sample, ...]
    """Held out, to compute thresholds from."""
    names: dict[Sample, str]
    """Name of each held-out image, as records have it."""


def split_images(category: Category, data: DataConfig) -> Split:
    """How the normal images are used: as `split_normals` and `split_calibration`, or held out by `DataConfig.fold`.

    A whole fold both chooses and calibrates. Raises ValueError if the category has fewer folds.
    """
    count = num_folds(category, data)
    if count == 0:
        train, held, names = split_normals(category, data.validation_fraction, data.split_seed, data.group_by)
        selecting, calibrating = split_calibration(held, data.calibration_fraction, data.split_seed, data.group_by)
        return Split(train, selecting, calibrating, dict(zip(held, names, strict=True)))
    if data.fold >= count:
        raise ValueError(f"category {category.name} has {count} folds, counted from 0; got fold {data.fold}.")
    held = cut_folds(category.train, count, data.split_seed, data.group_by)[data.fold]
    train = tuple(sample for sample in category.train if sample not in set(held))
    return Split(train, held, held, dict(zip(held, held_out_names(category, held), strict=True)))


def num_folds(category: Category, data: DataConfig) -> int:
    """Folds of a category: `DataConfig.folds`, or as many as it has parts; 0 if its images are not cut into folds.

    They are not if the category brings validation normals of its own, which are held out as ever, or has one part.
    """
    if data.folds == 0 or any(not sample.is_defective for sample in category.validation):
        return 0
    num_parts = len(set(_part_keys(category.train, data.split_seed, data.group_by)))
    return min(data.folds, num_parts) if num_parts > 1 else 0


def cut_folds(samples: Sequence[Sample], count: int, seed: int, group_by: str = "") -> tuple[tuple[Sample, ...], ...]:
    """Cut samples into `count` folds of about equal size, each in the given order; the images of a part stay together.

    The folds depend only on file names, or names of parts, and the seed. Needs at least `count` parts.
    """
    from sklearn.model_selection import GroupKFold  # a slow import

    splits = GroupKFold(n_splits=count).split(samples, groups=_part_keys(samples, seed, group_by))
    return tuple(tuple(samples[index] for index in sorted(held)) for _, held in splits)


def _part_keys(samples: Sequence[Sample], seed: int, group_by: str) -> list[str]:
    """A key per sample, the same for images of one part; their order is random and depends on names and seed alone.

    GroupKFold deals parts of equal size in the order of their keys.
    """
    parts = [Path(part_of(sample, group_by)) if group_by else sample.path for sample in samples]
    return [split_key(part, seed).hex() for part in parts]

"""Find the samples of a category in a data folder: which images exist, and which are held out from training."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dskd.config import LayoutName
from dskd.data.files import REGION_FILES, class_folders, walk
from dskd.data.layouts import (
    CLASSES,
    LAYOUTS,
    SPLIT_FOLDERS,
    TEST_ONLY,
    Layout,
    Listing,
    class_folders_of,
    has_test_split,
    recognised,
)
from dskd.data.parts import part_of
from dskd.data.samples import Sample, split_key

NUM_VALIDATION_DEFECTS = 32
"""Least number of synthetic defects for the selection; they are made on copies of the held-out normals."""
MAX_TRAINING_TILES, MAX_VALIDATION_TILES = 2048, 64
"""More tiles than these are not used: the teacher's features of 2048 tiles of 256 pixels take 3.7 GB."""
_MAX_DEPTH = 3  # of a category folder below the data folder
_seen: "dict[tuple[Path, bool], dict[str, CategoryFolder]]" = {}
"""Folders by category that `_found` has seen below a data folder, with or without those that have a test split only."""


class Category(NamedTuple):
    """The samples of one product category; `train` holds normal images only."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()
    """Normal and labelled defective images that the layout or the user reserves for validation; often none."""
    folder: Path = Path()
    unread: str = ""
    """A few words on the files in its folder that are not read: how many of each kind."""

    def describe(self) -> str:
        """One line on what is used and what is left out."""
        used = (
            f"{self.name}: {len(self.train)} training, {len(self.validation)} validation, {len(self.test)} test images"
        )
        return f"{used}; not read: {self.unread}" if self.unread else used


class CategoryFolder(NamedTuple):
    """A folder that looks like the folder of a category."""

    folder: Path
    layouts: tuple[Layout, ...]
    """More than one if the folder is ambiguous."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fault(self) -> str | None:
        """If the folder is ambiguous, one line that says why it cannot be read; otherwise None."""
        if len(self.layouts) == 1:
            return None
        found = " and ".join(f"{layout.landmark} ({layout.name})" for layout in self.layouts)
        return f"{self.folder} is ambiguous, it holds {found}; keep one of them."


def scan(root: Path, layout: LayoutName = "auto", *, with_test_only: bool = False) -> tuple[CategoryFolder, ...]:
    """The folders of all categories at or up to three levels below `root`, in path order.

    With `with_test_only` also folders that have a test split and no training images. With the layout "classes" the
    class folders directly below `root`, or below its folder `train`.

    Raises ValueError if `root` does not exist or holds no category.
    """
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist; --data takes a folder of categories.")
    if layout == "classes":
        return tuple(CategoryFolder(folder, (CLASSES,)) for folder in class_folders_of(root.resolve()))
    found = tuple(_category_folders(root.resolve(), _MAX_DEPTH, with_test_only, set()))
    if not found:
        wanted = ", ".join(f"{layout.landmark} ({layout.name})" for layout in LAYOUTS)
        raise ValueError(
            f"no category in {root}: neither it nor a folder up to {_MAX_DEPTH} levels below holds one of {wanted}."
        )
    return found


def _category_folders(folder: Path, depth: int, with_test_only: bool, entered: set[Path]) -> Iterator[CategoryFolder]:
    if (real := folder.resolve()) in entered:  # a link back to a folder above
        return
    if layouts := _layouts_of(folder, with_test_only):
        yield CategoryFolder(folder, layouts)
    elif depth > 0:
        for child in class_folders(folder):
            if child.name not in SPLIT_FOLDERS:
                yield from _category_folders(child, depth - 1, with_test_only, entered | {real})


def _layouts_of(folder: Path, with_test_only: bool) -> tuple[Layout, ...]:
    layouts = recognised(folder)
    return (TEST_ONLY,) if not layouts and with_test_only and has_test_split(folder) else layouts


def find_categories(root: Path, layout: LayoutName = "auto") -> dict[str, Path]:
    """Name to folder of all categories, in any of the layouts, at or up to three levels below `root`; `layout` as in
    `scan`.

    Raises ValueError if `root` does not exist, holds no category, an ambiguous one, or two with the same name.
    """
    return {name: found.folder for name, found in _by_name(root, layout).items()}


def _by_name(root: Path, layout: LayoutName, *, with_test_only: bool = False) -> dict[str, CategoryFolder]:
    by_name: dict[str, CategoryFolder] = {}
    for found in scan(root, layout, with_test_only=with_test_only):
        if found.fault:
            raise ValueError(found.fault)
        if found.name in by_name:
            raise ValueError(f"two categories are named {found.name}: {by_name[found.name].folder} and {found.folder}.")
        by_name[found.name] = found
    return dict(sorted(by_name.items()))


def read_category(root: Path, name: str, layout: LayoutName = "auto") -> Category:
    """The samples of category `name` under `root` for training, each split in the order of its layout.

    Raises ValueError on an unknown category, fewer than two training images, or a fault in the training or validation
    images, such as a validation mask without an image. A fault in the test split prevents only evaluation.
    """
    folder, found, listing = _listed(root, name, layout, with_test_only=False)
    if faults := [fault for fault in listing.faults if fault.split != "test"]:
        raise ValueError(faults[0].message)
    if fault := too_few(listing, folder, found):
        raise ValueError(fault)
    return _as_category(name, folder, found, listing)


def read_test_split(root: Path, name: str, layout: LayoutName = "auto") -> Category:
    """The labelled test samples of category `name` under `root` for evaluation; training images are not required.

    Raises ValueError on an unknown category, and if it is unclear which images belong to the test split.
    """
    folder, found, listing = _listed(root, name, layout, with_test_only=True)
    if faults := [fault for fault in listing.faults if fault.split == "test" or not listing.test]:
        raise ValueError(faults[0].message)
    return _as_category(name, folder, found, listing)


def _listed(root: Path, name: str, layout: LayoutName, *, with_test_only: bool) -> tuple[Path, Layout, Listing]:
    folder, (found,) = _found(root, name, layout, with_test_only=with_test_only)
    return folder, found, found.read(folder)


def _found(root: Path, name: str, layout: LayoutName, *, with_test_only: bool) -> CategoryFolder:
    """The folder of a category.

    All folders are looked at only if it is not where it was: else each of N categories would cost N looks.
    """
    known = (root.resolve(), with_test_only)
    before = _seen.get(known, {}).get(name) if layout == "auto" else None
    if before is not None and root.is_dir() and _layouts_of(before.folder, with_test_only) == before.layouts:
        return before
    categories = _by_name(root, layout, with_test_only=with_test_only)
    if name not in categories:
        raise ValueError(f"no category {name!r} in {root}; it holds: {', '.join(categories)}.")
    if layout == "auto":
        _seen[known] = categories
    return categories[name]


def _as_category(name: str, folder: Path, layout: Layout, listing: Listing) -> Category:
    stray = unread_images(folder, layout, listing)
    found = walk(folder)
    words = [f"{len(stray)} images without a place in {layout.name}"] if stray else []
    words += [found.describe()] if found.describe() else []
    return Category(name, listing.train, listing.test, listing.validation, folder, ", ".join(words))


def unread_images(folder: Path, layout: Layout, listing: Listing) -> list[Path]:
    """Image files in a category's folder that are not part of its layout, in path order."""
    used = {path for split in listing[:3] for sample in split for path in (sample.path, sample.mask)}
    used |= {fault.path for fault in listing.faults} | {folder / name for name in REGION_FILES}
    return [
        path
        for path in walk(folder).images
        if path not in used and not layout.leaves_out(PurePosixPath(path.relative_to(folder).as_posix()))
    ]


def too_few(listing: Listing, folder: Path, layout: Layout) -> str | None:
    """If there are too few images to train on some and hold out others, one line that says so; otherwise None."""
    if len(listing.train) >= 2:
        return None
    return (
        f"{listing.normals or folder / layout.landmark} holds {len(listing.train)} images; training needs at least 2."
    )


def split_normals(
    category: Category, fraction: float, seed: int, group_by: str = ""
) -> tuple[tuple[Sample, ...], tuple[Sample, ...], tuple[str, ...]]:
    """Normal samples (for training, held out) and the names of the held-out files.

    If the category has validation normals, these are held out, named by their path below the category's folder.
    Otherwise a share of the training images is held out (`hold_out`), named as `held_out_names` does. `group_by` as in
    `hold_out`.
    """
    if held := tuple(sample for sample in category.validation if not sample.is_defective):
        return category.train, held, tuple(sample.path.relative_to(category.folder).as_posix() for sample in held)
    train, held = hold_out(category.train, fraction, seed, group_by)
    return train, held, held_out_names(category, held)


def held_out_names(category: Category, held: Iterable[Sample]) -> tuple[str, ...]:
    """Names of held-out training images: file names, or where those are in several folders paths below the common one.

    Two file names may be equal then.
    """
    base = Path(os.path.commonpath([sample.path.parent for sample in category.train]))
    return tuple(sample.path.relative_to(base).as_posix() for sample in held)


def hold_out(
    samples: Sequence[Sample], fraction: float, seed: int, group_by: str = ""
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split normal samples into (training, validation); the split depends only on file names and seed.

    Both parts keep the given order and hold at least one sample. With `group_by` (`DataConfig.group_by`) the images of
    a part are on one side, and the split depends on the names of parts; if there is only one part, it is torn.
    """
    num_held = num_held_out(len(samples), fraction)
    order = sorted(range(len(samples)), key=lambda i: split_key(samples[i].path, seed))
    held = set(order[:num_held])
    if group_by:
        parts: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            parts.setdefault(part_of(sample, group_by), []).append(index)
        if len(parts) > 1:
            held = set()
            for name in sorted(parts, key=lambda part: split_key(Path(part), seed))[:-1]:
                held.update(parts[name])
                if len(held) >= num_held:
                    break
    return (
        tuple(sample for i, sample in enumerate(samples) if i not in held),
        tuple(sample for i, sample in enumerate(samples) if i in held),
    )


def num_held_out(num_samples: int, fraction: float) -> int:
    """How many of so many normal samples `hold_out` takes from training."""
    return min(max(1, round(num_samples * fraction)), num_samples - 1)


def split_calibration(
    held: Sequence[Sample], fraction: float, seed: int, group_by: str = ""
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split held-out normals into (for selection, for calibration); the split depends only on file names and seed.

    Each part holds at least one sample. If that is impossible, or `fraction` is 0, each part holds all samples.
    `group_by` as in `hold_out`.
    """
    if fraction == 0 or len(held) < 2:
        return tuple(held), tuple(held)
    return hold_out(held, fraction, seed, group_by)


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of the files, in order: equal data give an equal fingerprint."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

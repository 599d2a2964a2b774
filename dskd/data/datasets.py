"""From a data folder to the samples of a category: which images exist, and which are held out from training."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dskd.data.layouts import LAYOUTS, SPLIT_FOLDERS, Layout, recognised
from dskd.data.samples import Sample, split_key

NUM_VALIDATION_DEFECTS = 32
"""Synthetic defects that selection sees at least, on copies of the held-out normals."""
_MAX_DEPTH = 3  # of a category folder below the data folder


class Category(NamedTuple):
    """The samples of one product category; `train` holds normal images only."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()
    """Normal and labelled defective images that the layout or the user keeps for validation; mostly none."""
    folder: Path = Path()


class CategoryFolder(NamedTuple):
    """A folder that looks like a category's."""

    folder: Path
    layouts: tuple[Layout, ...]
    """More than one where the folder is ambiguous."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fault(self) -> str | None:
        """One line that says why the folder cannot be read, where it is ambiguous."""
        if len(self.layouts) == 1:
            return None
        found = " and ".join(f"{layout.landmark} ({layout.name})" for layout in self.layouts)
        return f"{self.folder} is ambiguous, it holds {found}; keep one of them."


def scan(root: Path) -> tuple[CategoryFolder, ...]:
    """Every category's folder at or up to three levels below `root`, in path order.

    Raises ValueError when `root` does not exist or holds none.
    """
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist; --data takes a folder of categories.")
    found = tuple(_category_folders(root.resolve(), _MAX_DEPTH))
    if not found:
        wanted = ", ".join(f"{layout.landmark} ({layout.name})" for layout in LAYOUTS)
        raise ValueError(
            f"no category in {root}: neither it nor a folder up to {_MAX_DEPTH} levels below holds one of {wanted}."
        )
    return found


def _category_folders(folder: Path, depth: int) -> Iterator[CategoryFolder]:
    if layouts := recognised(folder):
        yield CategoryFolder(folder, layouts)
    elif depth > 0:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith(".") and child.name not in SPLIT_FOLDERS:
                yield from _category_folders(child, depth - 1)


def find_categories(root: Path) -> dict[str, Path]:
    """Folders of categories in any of the layouts, at or up to three levels below `root`, by name.

    Raises ValueError when `root` does not exist, holds none, one that is ambiguous, or two of the same name.
    """
    return {name: found.folder for name, found in _by_name(root).items()}


def _by_name(root: Path) -> dict[str, CategoryFolder]:
    by_name: dict[str, CategoryFolder] = {}
    for found in scan(root):
        if found.fault:
            raise ValueError(found.fault)
        if found.name in by_name:
            raise ValueError(f"two categories are named {found.name}: {by_name[found.name].folder} and {found.folder}.")
        by_name[found.name] = found
    return dict(sorted(by_name.items()))


def read_category(root: Path, name: str) -> Category:
    """The samples of category `name` under `root`, each split in the order of its layout.

    Raises ValueError on an unknown category, fewer than two images to train on, or a fault of the layout
    such as a mask that has no image.
    """
    categories = _by_name(root)
    if name not in categories:
        raise ValueError(f"no category {name!r} in {root}; it holds: {', '.join(categories)}.")
    folder, (layout,) = categories[name]
    listing = layout.read(folder)
    if listing.faults:
        raise ValueError(listing.faults[0].message)
    if fault := too_few(listing.train, folder, layout):
        raise ValueError(fault)
    return Category(name, listing.train, listing.test, listing.validation, folder)


def too_few(train: Sequence[Sample], folder: Path, layout: Layout) -> str | None:
    """One line where the images are too few to train on and hold some out."""
    if len(train) >= 2:
        return None
    return f"{folder / layout.landmark} holds {len(train)} images; training needs at least 2."


def split_normals(
    category: Category, fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...], tuple[str, ...]]:
    """Normal samples (to train on, held out) and the names of the held-out files.

    The validation normals of the category are held out where there are any, named by their path below the
    category's folder; otherwise a share of the training images (`hold_out`), named by file name.
    """
    if held := tuple(sample for sample in category.validation if not sample.is_defective):
        return category.train, held, tuple(sample.path.relative_to(category.folder).as_posix() for sample in held)
    train, held = hold_out(category.train, fraction, seed)
    return train, held, tuple(sample.path.name for sample in held)


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split normal samples into (training, validation); depends on file names and seed alone.

    Both parts keep the given order and hold at least one sample.
    """
    num_held = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    order = sorted(range(len(samples)), key=lambda i: split_key(samples[i].path, seed))
    held = set(order[:num_held])
    return (
        tuple(sample for i, sample in enumerate(samples) if i not in held),
        tuple(sample for i, sample in enumerate(samples) if i in held),
    )


def split_calibration(
    held: Sequence[Sample], fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split held-out normals into (for selection, for calibration), by file names and seed alone.

    Each part holds at least one sample; where that is impossible, or `fraction` is 0, both are all of them.
    """
    if fraction == 0 or len(held) < 2:
        return tuple(held), tuple(held)
    return hold_out(held, fraction, seed)


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the contents of the files, in order: equal data, equal fingerprint."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

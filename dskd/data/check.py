"""What is in a data folder, and everything that is wrong with it: said before a training fails or misleads."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from dskd.data.datasets import CategoryFolder, scan, too_few
from dskd.data.images import is_image, progress_bar, read_image, read_mask, resize_mask
from dskd.data.layouts import Listing
from dskd.data.samples import Sample

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Problem(NamedTuple):
    """One thing that is wrong, or worth knowing, about one file or folder."""

    severity: Literal["error", "note"]
    """error: training or evaluating would fail or be wrong."""
    kind: str
    """A few words, the same for all of a kind."""
    category: str
    """Empty where it belongs to none."""
    path: Path
    message: str
    """One line that names the file."""
    stops_training: bool = False


class Extent(NamedTuple):
    """Smallest and largest side in pixels over all readable images."""

    width: tuple[int, int]
    height: tuple[int, int]


class CategoryReport(NamedTuple):
    """One category in numbers."""

    name: str
    folder: Path
    layout: str
    counts: Mapping[Split, Mapping[str, int]]
    """Images per split and defect, "good" among them."""
    extent: Extent | None
    """None where no image can be read."""


class Report(NamedTuple):
    """The whole data folder."""

    root: Path
    categories: tuple[CategoryReport, ...]
    problems: tuple[Problem, ...]
    """Errors first, then by category in the order that they were found."""

    @property
    def is_trainable(self) -> bool:
        """Whether every category could be trained on."""
        return not any(problem.stops_training for problem in self.problems)

    def to_document(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON."""
        return {
            "root": str(self.root),
            "is_trainable": self.is_trainable,
            "categories": [
                {
                    "name": category.name,
                    "folder": str(category.folder),
                    "layout": category.layout,
                    "counts": {split: dict(counts) for split, counts in category.counts.items()},
                    "width": category.extent.width if category.extent else None,
                    "height": category.extent.height if category.extent else None,
                }
                for category in self.categories
            ],
            "problems": [{**problem._asdict(), "path": str(problem.path)} for problem in self.problems],
        }


class _Look(NamedTuple):
    """What decoding one sample showed."""

    split: Split
    sample: Sample
    size: tuple[int, int] | None
    """(width, height); None where the image cannot be read."""
    content: bytes
    """Hash of the pixels."""
    problems: tuple[Problem, ...]


def check_data(root: Path, image_size: int = 256, *, progress: bool = False) -> Report:
    """Read every image and mask of every category at or below `root`, on all cores.

    A defect that vanishes when its mask is resized to `image_size` is noted. With `progress` a bar counts
    the images on a terminal. Raises ValueError where `root` does not exist or holds no category.
    """
    if image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {image_size}.")
    found = scan(root)
    problems = [*_same_names(found)]
    categories = []
    for place in found:
        if place.fault:
            problems.append(Problem("error", "ambiguous folder", place.name, place.folder, place.fault, True))
            continue
        report, wrong = _check_category(place, image_size, progress)
        categories.append(report)
        problems += wrong
    problems += _files_outside(root.resolve(), [place.folder for place in found])
    ordered = sorted(problems, key=lambda problem: problem.severity == "note")
    return Report(root, tuple(categories), tuple(ordered))


def _same_names(found: Iterable[CategoryFolder]) -> Iterator[Problem]:
    first: dict[str, Path] = {}
    for place in found:
        if place.name in first:
            message = f"{place.folder} and {first[place.name]} have one name: choose a folder that holds one of them."
            yield Problem("error", "name twice", place.name, place.folder, message, True)
        first.setdefault(place.name, place.folder)


def _check_category(place: CategoryFolder, image_size: int, progress: bool) -> tuple[CategoryReport, list[Problem]]:
    (layout,) = place.layouts
    listing = layout.read(place.folder)
    problems = [Problem("error", "layout", place.name, fault.path, fault.message, True) for fault in listing.faults]
    if (fault := too_few(listing.train, place.folder, layout)) and not (listing.faults and not listing.train):
        problems.append(Problem("error", "too few images", place.name, place.folder / layout.landmark, fault, True))
    tasks = [(split, sample) for split in _SPLITS for sample in getattr(listing, split)]

    def look(task: tuple[Split, Sample]) -> _Look:
        return _look(place.name, *task, image_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        label = f"checking {place.name}" if progress else None
        looks = list(progress_bar(pool.map(look, tasks), label, len(tasks), "image"))
    problems += [problem for each in looks for problem in each.problems]
    problems += _repeats(place.name, looks)
    problems += _missing_sides(place, listing)
    used = {path for _, sample in tasks for path in (sample.path, sample.mask)} | {f.path for f in listing.faults}
    for path in _image_files(place.folder):
        if path not in used and not layout.leaves_out(PurePosixPath(path.relative_to(place.folder).as_posix())):
            message = f"{path} is not read: {layout.name} has no place for it."
            problems.append(Problem("note", "unread file", place.name, path, message))
    counts = {split: dict(Counter(sample.defect for sample in getattr(listing, split))) for split in _SPLITS}
    sizes = [each.size for each in looks if each.size]
    widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
    extent = Extent((min(widths), max(widths)), (min(heights), max(heights))) if sizes else None
    return CategoryReport(place.name, place.folder, layout.name, counts, extent), problems


def _look(category: str, split: Split, sample: Sample, image_size: int) -> _Look:
    matters = split != "test"
    try:
        pixels = read_image(sample.path)
    except ValueError as error:
        problem = Problem("error", "unreadable image", category, sample.path, str(error), matters)
        return _Look(split, sample, None, b"", (problem,))
    height, width = pixels.shape[:2]
    content = hashlib.blake2b(pixels.tobytes() + f"{width}x{height}".encode(), digest_size=16).digest()
    problems = tuple(_mask_problems(category, sample, (width, height), image_size, matters))
    return _Look(split, sample, (width, height), content, problems)


def _mask_problems(
    category: str, sample: Sample, size: tuple[int, int], image_size: int, matters: bool
) -> Iterator[Problem]:
    if sample.mask is None:
        if sample.is_defective:
            message = f"{sample.path} has no mask: it counts for the image figures, not for the pixel figures."
            yield Problem("note", "defect without mask", category, sample.path, message)
        return
    try:
        mask = read_mask(sample.mask, sample.mask_above)
    except ValueError as error:
        yield Problem("error", "unreadable mask", category, sample.mask, str(error), matters)
        return
    width, height = mask.shape[1], mask.shape[0]
    if (width, height) != size:
        message = f"mask {sample.mask} is {width} x {height} pixels, its image {size[0]} x {size[1]}"
        # both are resized to one square, so that a mask of the image's shape at another scale still lies right
        if abs(width * size[1] - height * size[0]) <= max(*size, width, height):
            yield Problem("note", "mask at another scale", category, sample.mask, f"{message}; it is scaled to fit.")
        else:
            message = f"{message}: another shape, so it may mark the wrong place."
            yield Problem("error", "mask of another shape", category, sample.mask, message)
    if not mask.any():
        message = f"mask {sample.mask} is empty: the pixels of this defective image count as normal."
        yield Problem("note", "empty mask", category, sample.mask, message)
    elif not resize_mask(mask, image_size).any():
        message = f"mask {sample.mask} becomes empty at {image_size} pixels: its {int(mask.sum())} vanish."
        yield Problem("note", "mask vanishes", category, sample.mask, message)


def _repeats(category: str, looks: Iterable[_Look]) -> Iterator[Problem]:
    """Images of the same pixels: wrong across splits, or under two labels; worth knowing within one."""
    first: dict[bytes, _Look] = {}
    for each in looks:
        if each.size is None:
            continue
        earlier = first.setdefault(each.content, each)
        if earlier is each:
            continue
        path, same = each.sample.path, earlier.sample.path
        if each.split != earlier.split:
            message = f"{path} ({each.split}) shows the very pixels of {same} ({earlier.split}); remove one."
            yield Problem("error", "repeated across splits", category, path, message)
        elif each.sample.is_defective != earlier.sample.is_defective:
            message = f"{path} ({each.sample.defect}) shows the very pixels of {same} ({earlier.sample.defect})."
            yield Problem("error", "two labels", category, path, message)
        else:
            message = f"{path} shows the very pixels of {same}, both in {each.split}."
            yield Problem("note", "repeated image", category, path, message)


def _missing_sides(place: CategoryFolder, listing: Listing) -> Iterator[Problem]:
    num_defective = sum(sample.is_defective for sample in listing.test)
    num_good = len(listing.test) - num_defective
    if not (num_good and num_defective):
        message = (
            f"{place.folder} has {num_good} good and {num_defective} defective test images: "
            "it can be trained on, not evaluated."
        )
        yield Problem("note", "no test split", place.name, place.folder, message)


def _files_outside(root: Path, categories: list[Path]) -> Iterator[Problem]:
    for path in _image_files(root):
        if not any(path.is_relative_to(folder) for folder in categories):
            yield Problem("note", "unread file", "", path, f"{path} is not read: it belongs to no category.")


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if is_image(path))

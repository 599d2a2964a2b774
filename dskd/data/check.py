"""Check a data folder: report its content and all its problems before a training fails or gives wrong results."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dskd.config import LayoutName
from dskd.data.datasets import CategoryFolder, num_held_out, scan, too_few, unread_images
from dskd.data.depth import Levels, PixelScale
from dskd.data.files import Walk, walk
from dskd.data.geometry import Geometry, RegionOfInterest, is_same_shape
from dskd.data.images import image_size as size_of
from dskd.data.images import in_threads, read_levels, read_mask, read_pixels, resize_mask
from dskd.data.layouts import Listing
from dskd.data.regions import find_region
from dskd.data.samples import Sample

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Problem(NamedTuple):
    """One thing that is wrong, or worth knowing, about one file or folder."""

    severity: Literal["error", "note"]
    """error: training or evaluating would fail or be wrong."""
    kind: str
    """A few words, the same for all problems of one kind."""
    category: str
    """Empty if the problem belongs to no category."""
    path: Path
    message: str
    """One line with the name of the file."""
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
    """Images per split and defect; "good" counts as one of the defects."""
    extent: Extent | None
    """None if no image can be read."""
    depths: Mapping[str, int]
    """Number of readable images per depth of their values: "8 bits", "integer" or "float"."""
    values: tuple[float, float] | None
    """Lowest and highest value of the images of more than 8 bits; None if there are none."""
    scale: str
    """Which value is black and which is white; empty if the training images have no common scale."""
    unread: Walk
    """Files in its folder that are not images."""
    num_strays: int
    """Images at a place that is not part of the layout."""

    def num_training_images(self, validation_fraction: float) -> int:
        """Images that train the students: good ones, without those held out; 0 if training is impossible."""
        good = self.counts["train"].get("good", 0)
        if self.counts["validation"].get("good", 0):
            return good
        return good - num_held_out(good, validation_fraction) if good >= 2 else 0


class Report(NamedTuple):
    """The whole data folder."""

    root: Path
    categories: tuple[CategoryReport, ...]
    problems: tuple[Problem, ...]
    """Errors first; then by category, in the order in which they were found."""

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
                    "depths": dict(category.depths),
                    "values": category.values,
                    "scale": category.scale,
                    "unread": {
                        "images": category.num_strays,
                        "others": dict(category.unread.others),
                        "left_out": dict(category.unread.left_out),
                    },
                }
                for category in self.categories
            ],
            "problems": [{**problem._asdict(), "path": str(problem.path)} for problem in self.problems],
        }


class _Look(NamedTuple):
    """What decoding one sample has shown."""

    split: Split
    sample: Sample
    size: tuple[int, int] | None
    """(width, height); None if the image cannot be read."""
    content: bytes
    """Hash of the pixels."""
    levels: Levels | None
    """None for 8 bits."""
    problems: tuple[Problem, ...]


def check_data(root: Path, image_size: int = 256, layout: LayoutName = "auto", *, progress: bool = False) -> Report:
    """Read every image and mask of every category at or below `root`, on all cores, with limited memory.

    A defect that disappears when its mask is resized to `image_size` is reported as a note. With `progress` a progress
    bar on the terminal counts the images. Raises ValueError if `root` does not exist or holds no category.
    """
    if image_size < 1:
        raise ValueError(f"--image-size must be at least 1, got {image_size}.")
    found = scan(root, layout)
    problems = [*_same_names(found)]
    categories = []
    for place in found:
        if place.fault:
            problems.append(Problem("error", "ambiguous folder", place.name, place.folder, place.fault, True))
            continue
        report, wrong = _check_category(place, image_size, progress)
        categories.append(report)
        problems += wrong
    inside = [place.folder for place in found]
    if layout == "classes" and (root.resolve() / "test") not in inside:
        inside.append(root.resolve() / "test")  # of all classes, where the split is published
    problems += _files_outside(root.resolve(), inside)
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
    problems = [
        Problem("error", "layout", place.name, fault.path, fault.message, fault.split != "test")
        for fault in listing.faults
    ]
    if (fault := too_few(listing, place.folder, layout)) and not (listing.faults and not listing.train):
        folder = listing.normals or place.folder / layout.landmark
        problems.append(Problem("error", "too few images", place.name, folder, fault, True))
    scale, wrong_scale = _scale_of(place, listing)
    region, wrong_region = _region_of(place, listing)
    geometry = Geometry(width=image_size, height=image_size, region=region)
    tasks = [(split, sample) for split in _SPLITS for sample in getattr(listing, split)]

    def look(task: tuple[Split, Sample]) -> _Look:
        return _look(place.name, *task, geometry, scale)

    looks = in_threads(
        look,
        tasks,
        [sample.path for _, sample in tasks],
        progress=f"checking {place.name}" if progress else None,
        also=lambda task: [task[1].mask] if task[1].mask else [],
    )
    problems += wrong_scale + wrong_region
    problems += [problem for each in looks for problem in each.problems]
    problems += _repeats(place.name, looks)
    problems += _missing_sides(place, listing)
    strays = unread_images(place.folder, layout, listing)
    for path in strays:
        message = f"{path} is not read: {layout.name} has no place for it."
        problems.append(Problem("note", "unread file", place.name, path, message))
    found = walk(place.folder)
    if found.num_unread or found.closed:
        message = f"{place.folder} holds files that are not read: {found.describe()}."
        problems.append(Problem("note", "files not read", place.name, place.folder, message))
    counts = {split: dict(Counter(sample.defect for sample in getattr(listing, split))) for split in _SPLITS}
    sizes = [each.size for each in looks if each.size]
    widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
    extent = Extent((min(widths), max(widths)), (min(heights), max(heights))) if sizes else None
    levels = [each.levels for each in looks if each.levels is not None]
    kinds = ["8 bits" if look.levels is None else _kind(look.levels) for look in looks if look.size]
    report = CategoryReport(
        place.name,
        place.folder,
        layout.name,
        counts,
        extent,
        dict(Counter(kinds)),
        (min(each.low for each in levels), max(each.high for each in levels)) if levels else None,
        scale.describe() if scale else "",
        found,
        len(strays),
    )
    return report, problems


def _kind(levels: Levels) -> str:
    return "float" if levels.is_float else "integer"


def _scale_of(place: CategoryFolder, listing: Listing) -> tuple[PixelScale | None, list[Problem]]:
    """The scale that training would find; if it would fail, None and why. Unreadable files are reported elsewhere."""
    found = []
    for sample in listing.train:
        try:
            found.append(read_levels(sample.path))
        except ValueError:
            continue
    try:
        return PixelScale.of([levels for levels in found if levels is not None]), []
    except ValueError as error:
        folder = listing.normals or place.folder
        message = f"{folder}: {error}"
        return None, [Problem("error", "mixed depths", place.name, folder, message, True)]


def _region_of(place: CategoryFolder, listing: Listing) -> tuple[RegionOfInterest | None, list[Problem]]:
    """The region of interest in the category's folder; if training would fail, None and why."""
    for sample in listing.train:
        try:
            size_of(sample.path)
        except ValueError:  # reported elsewhere
            continue
        try:
            return find_region("", place.folder, sample.path), []
        except ValueError as error:
            message = f"the region of interest in {place.folder} cannot be used: {error}"
            return None, [Problem("error", "region of interest", place.name, place.folder, message, True)]
    return None, []


def _look(category: str, split: Split, sample: Sample, geometry: Geometry, scale: PixelScale | None) -> _Look:
    matters = split != "test"
    try:
        levels = read_levels(sample.path)
        pixels, num_clipped = read_pixels(sample.path, scale)
    except ValueError as error:
        problem = Problem("error", "unreadable image", category, sample.path, str(error), matters)
        return _Look(split, sample, None, b"", None, (problem,))
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(pixels.data, digest_size=16)  # without a copy, which may take a gigabyte
    digest.update(f"{width}x{height}".encode())
    problems = tuple(_mask_problems(category, sample, (width, height), geometry.width, matters))
    try:
        geometry.frame(width, height)
    except ValueError as error:
        message = f"{sample.path}: {error}."
        problems += (Problem("error", "another shape than the region", category, sample.path, message, matters),)
    if num_clipped:
        message = f"{sample.path} has {num_clipped} values beyond the scale of the training images; they are clipped."
        problems += (Problem("note", "clipped values", category, sample.path, message),)
    return _Look(split, sample, (width, height), digest.digest(), levels, problems)


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
        # Both are resized to the same square, so a mask with the image's aspect ratio at another scale still fits.
        if is_same_shape((width, height), size):
            yield Problem("note", "mask at another scale", category, sample.mask, f"{message}; it is scaled to fit.")
        else:
            message = f"{message}: another shape, so it may mark the wrong place."
            yield Problem("error", "mask of another shape", category, sample.mask, message, matters)
    if (share := float(mask.mean())) > 0.5:
        message = f"mask {sample.mask} marks {share:.0%} of its image as defect; is it inverted?"
        yield Problem("note", "mask of most of the image", category, sample.mask, message)
    if not mask.any():
        message = f"mask {sample.mask} is empty: the pixels of this defective image count as normal."
        yield Problem("note", "empty mask", category, sample.mask, message)
    elif not resize_mask(mask, image_size).any():
        message = f"mask {sample.mask} becomes empty at {image_size} pixels: its {int(mask.sum())} vanish."
        yield Problem("note", "mask vanishes", category, sample.mask, message)


def _repeats(category: str, looks: Iterable[_Look]) -> Iterator[Problem]:
    """Images with equal pixels: an error if they are in two splits or have two labels, otherwise a note."""
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
    found = walk(root)
    for path in found.images:
        if not any(path.is_relative_to(folder) for folder in categories):
            yield Problem("note", "unread file", "", path, f"{path} is not read: it belongs to no category.")
    outside = found.num_unread - sum(walk(folder).num_unread for folder in categories)
    if outside > 0:
        message = f"{root} holds {outside} more files that are not read, outside of its categories."
        yield Problem("note", "files not read", "", root, message)

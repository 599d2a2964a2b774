"""How published data sets, and people's own folders, lay out one category; told apart by their folders alone.

A category's folder holds, with `…` for image files:

MVTec AD      train/good/…  test/<good or defect>/…  ground_truth/<defect>/…   (a mask is named as its image, or
              as its image with `_mask`; VisA as re-organised by its authors' tool is this layout too)
MVTec 3D-AD   {train,validation,test}/<good or defect>/{rgb,gt}/…              (the depth images in xyz stay unread)
BTAD          train/ok/…  test/{ok,ko}/…  ground_truth/ko/…                    (suffixes of all kinds)
VisA          Data/{Images,Masks}/…, split by ../split_csv/1cls.csv            (masks hold the defect's number)
MT Defects    MT_Free/Imgs/…  MT_<defect>/Imgs/…                               (.jpg with its .png mask beside it)
plain folder  good/…, the rest as MVTec AD

Where the normal images lie in train/good, train/ok or good, people may add validation images of their own:
validation/<good or defect>/…, with masks in validation_ground_truth/<defect>/….
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dskd.data.images import list_images
from dskd.data.samples import Sample, split_key

SPLIT_FOLDERS = frozenset({"train", "validation", "test", "ground_truth", "validation_ground_truth"})
"""Folders inside of a category: never one themselves."""
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_MT_TEST_SHARE = 0.2
_MT_SEED = 0


class Fault(NamedTuple):
    """What makes a category unusable."""

    path: Path
    message: str
    """One line that names the file and says what is wrong."""


class Listing(NamedTuple):
    """The images of one category, each split in the order of folders, then file names."""

    train: tuple[Sample, ...]
    """Normal images only."""
    validation: tuple[Sample, ...]
    """Held-out normals and labelled defects, where the layout or the user has some."""
    test: tuple[Sample, ...]
    faults: tuple[Fault, ...]


class Layout(NamedTuple):
    """How to tell a category's folder, and how to read it."""

    name: str
    landmark: str
    """The folder below a category's that tells this layout."""
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Listing]
    leaves_out: Callable[[PurePosixPath], bool]
    """Whether a file, given relative to the category's folder, is known and unread by design."""


def recognised(folder: Path) -> tuple[Layout, ...]:
    """The layouts that `folder` has as a category's folder: none, one, or several where it is ambiguous."""
    return tuple(layout for layout in LAYOUTS if layout.recognises(folder))


def _read_mvtec(folder: Path) -> Listing:
    return _read_splits(folder, folder / "train" / "good", "good")


def _read_plain(folder: Path) -> Listing:
    return _read_splits(folder, folder / "good", "good")


def _read_btad(folder: Path) -> Listing:
    return _read_splits(folder, folder / "train" / "ok", "ok")


def _read_splits(folder: Path, train: Path, normal: str) -> Listing:
    validation, wrong_validation = _read_split(folder / "validation", folder / "validation_ground_truth", normal)
    test, wrong_test = _read_split(folder / "test", folder / "ground_truth", normal)
    return Listing(_normals(list_images(train)), validation, test, wrong_validation + wrong_test)


def _read_split(images: Path, masks: Path, normal: str) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """Samples of the folders below `images`, with masks of the same-named folders below `masks`."""
    defects = {child.name for folder in (images, masks) for child in folder.glob("*") if child.is_dir()} - {normal}
    found = {name: _paired(list_images(images / name), list_images(masks / name), name) for name in defects}
    found[normal] = _normals(list_images(images / normal)), ()
    ordered = [found[name] for name in sorted(found)]
    return (
        tuple(sample for samples, _ in ordered for sample in samples),
        tuple(fault for _, faults in ordered for fault in faults),
    )


def _normals(paths: Iterable[Path]) -> tuple[Sample, ...]:
    return tuple(Sample(path, "good", None) for path in paths)


def _paired(images: Sequence[Path], masks: Sequence[Path], defect: str) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """Defective samples with the mask of the same stem, or of that stem and `_mask`; suffixes may differ."""
    stems = {image.stem for image in images}
    mask_of: dict[str, Path] = {}
    faults = []
    for mask in masks:
        stem = mask.stem if mask.stem in stems else mask.stem.removesuffix("_mask")
        if stem not in stems:
            faults.append(Fault(mask, f"mask {mask} has no image {stem}.* among the {defect} images."))
        elif stem in mask_of:
            faults.append(Fault(mask, f"mask {mask} and {mask_of[stem].name} belong to one image; remove one."))
        else:
            mask_of[stem] = mask
    seen: dict[str, Path] = {}
    for image in images:
        if image.stem in mask_of and image.stem in seen:
            faults.append(
                Fault(image, f"image {image} and {seen[image.stem].name} share one mask {mask_of[image.stem]}.")
            )
        seen[image.stem] = image
    return tuple(Sample(image, defect, mask_of.get(image.stem)) for image in images), tuple(faults)


def _read_mvtec_3d(folder: Path) -> Listing:
    validation, wrong_validation = _read_3d_split(folder / "validation")
    test, wrong_test = _read_3d_split(folder / "test")
    train = _normals(list_images(folder / "train" / "good" / "rgb"))
    return Listing(train, validation, test, wrong_validation + wrong_test)


def _read_3d_split(split: Path) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    samples: tuple[Sample, ...] = ()
    faults: tuple[Fault, ...] = ()
    for folder in sorted(child for child in split.glob("*") if child.is_dir()):
        images = list_images(folder / "rgb")
        if folder.name == "good":
            samples += _normals(images)
        else:
            paired, wrong = _paired(images, list_images(folder / "gt"), folder.name)
            samples, faults = samples + paired, faults + wrong
    return samples, faults


def _read_visa(folder: Path) -> Listing:
    table = folder.parent / "split_csv" / "1cls.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader if row.get("object") == folder.name]
            columns = reader.fieldnames or ()
    except FileNotFoundError:
        return _unusable(table, f"{folder} has VisA's layout, which is split by {table}; that file does not exist.")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return _unusable(table, f"{table} cannot be read as a table ({error}); fetch it again.")
    if missing := [name for name in _VISA_COLUMNS if name not in columns]:
        return _unusable(table, f"{table} has no column {missing[0]!r}; VisA's has: {', '.join(_VISA_COLUMNS)}.")
    if not rows:
        return _unusable(table, f"{table} has no row of object {folder.name!r}.")
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    faults = []
    for number, row in rows:
        files = [folder.parent / row[column] for column in ("image", "mask") if row[column]]
        if absent := [path for path in files if not path.is_file()]:
            faults.append(Fault(absent[0], f"{table}, line {number}: {absent[0]} does not exist."))
        elif not row["image"] or row["split"] not in splits or row["label"] not in ("normal", "anomaly"):
            wanted = "an image, split train or test, label normal or anomaly"
            faults.append(
                Fault(table, f"{table}, line {number}: expected {wanted}, got {', '.join(map(str, row.values()))}.")
            )
        elif row["label"] == "normal":
            splits[row["split"]].append(Sample(files[0], "good", None))
        elif row["split"] == "train":
            faults.append(Fault(files[0], f"{table}, line {number}: an anomaly is no image to train on, {files[0]}."))
        else:
            splits["test"].append(Sample(files[0], "anomaly", files[1] if row["mask"] else None, mask_above=0))
    test = sorted(splits["test"], key=lambda sample: (sample.defect, sample.path))
    return Listing(tuple(sorted(splits["train"])), (), tuple(test), tuple(faults))


def _unusable(path: Path, message: str) -> Listing:
    return Listing((), (), (), (Fault(path, message),))


def _read_mt(folder: Path) -> Listing:
    """As published there is no split: by file name, 80 % of MT_Free train, the rest and all defects test.

    That is the share of DifferNet and its successors, whose lists differ. Exposures of one tile may fall on both sides.
    """
    free = [path for path in list_images(folder / "MT_Free" / "Imgs") if _is_mt_photograph(path)]
    ranked = sorted(free, key=lambda path: split_key(path, _MT_SEED))
    kept = set(ranked[: round(_MT_TEST_SHARE * len(ranked))])
    test = _normals(path for path in free if path in kept)
    faults: tuple[Fault, ...] = ()
    for child in sorted(folder.glob("MT_*")):
        if child.name != "MT_Free" and child.is_dir():
            files = list_images(child / "Imgs")
            images = [path for path in files if _is_mt_photograph(path)]
            masks = [path for path in files if path.suffix.lower() == ".png"]
            paired, wrong = _paired(images, masks, child.name.removeprefix("MT_").lower())
            test, faults = test + paired, faults + wrong
    return Listing(_normals(path for path in free if path not in kept), (), test, faults)


def _is_mt_photograph(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def _holds(landmark: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / landmark).is_dir()


def _is_mvtec(folder: Path) -> bool:
    good = folder / "train" / "good"
    return good.is_dir() and (not (good / "rgb").is_dir() or bool(list_images(good)))


def _is_plain(folder: Path) -> bool:
    return (folder / "good").is_dir() and folder.name not in SPLIT_FOLDERS


def _reads_all(_: PurePosixPath) -> bool:
    return False


def _is_mask_of_normal_tile(file: PurePosixPath) -> bool:
    return file.parts[:-1] == ("MT_Free", "Imgs") and file.suffix.lower() == ".png"


def _is_depth_or_mask_of_normal(file: PurePosixPath) -> bool:
    return file.parent.name == "xyz" or file.parts[1:-1] == ("good", "gt")


LAYOUTS = (
    Layout("MVTec AD", "train/good", _is_mvtec, _read_mvtec, _reads_all),
    Layout("MVTec 3D-AD", "train/good/rgb", _holds("train/good/rgb"), _read_mvtec_3d, _is_depth_or_mask_of_normal),
    Layout("BTAD", "train/ok", _holds("train/ok"), _read_btad, _reads_all),
    Layout("VisA", "Data/Images", _holds("Data/Images"), _read_visa, _reads_all),
    Layout("MT Defects", "MT_Free/Imgs", _holds("MT_Free/Imgs"), _read_mt, _is_mask_of_normal_tile),
    Layout("plain folder", "good", _is_plain, _read_plain, _reads_all),
)

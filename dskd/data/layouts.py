"""The folder layouts of one category, in published data sets and users' own folders; recognised by folder names only.

A category's folder holds, with `…` for image files:

MVTec AD      train/good/…  test/<good or defect>/…  ground_truth/<defect>/…   (a mask has its image's name, or
              that name with `_mask`, `-gt` and the like; also VisA after its authors' reorganising tool)
MVTec 3D-AD   {train,validation,test}/<good or defect>/{rgb,gt}/…              (the depth images in xyz stay unread)
BTAD          train/ok/…  test/{ok,ko}/…  ground_truth/ko/…                    (suffixes of all kinds)
VisA          Data/{Images,Masks}/…, split by ../split_csv/1cls.csv            (masks hold the defect's number)
MT Defects    MT_Free/Imgs/…  MT_<defect>/Imgs/…                               (.jpg with its .png mask beside it)
plain folder  good/…, the rest as MVTec AD

A folder of class folders, for one-class novelty, is read only if it is asked for (`--layout classes`), since its names
tell nothing:

classes       {train,test}/<class>/…, or <class>/…, of which a fifth by file name is for test

If the normal images are in train/good, train/ok or good, users may add their own validation images:
validation/<good or defect>/…, with masks in validation_ground_truth/<defect>/….

Folders of normal images are recognised in other spellings too (`is_normal_name`). Images in folders below the folder
of a class belong to that class. Hidden and service folders are no classes.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from dskd.data.files import REGION_FILES, class_folders, list_images
from dskd.data.samples import Sample, split_key

SPLIT_FOLDERS = frozenset({"train", "validation", "test", "ground_truth", "validation_ground_truth"})
"""Folders inside a category; they are never categories themselves."""
_NORMAL_NAMES = frozenset(
    {"good", "ok", "okay", "normal", "nominal", "pass", "passed", "io", "gut", "defectfree", "nodefect", "nodefects"}
)
_MASK_WORDS = re.compile(r"[ _.-]+(mask|masks|gt|ground[ _-]?truth|label|labels|seg|segmentation|annotation)$", re.I)
"""What follows an image's name in the name of its mask."""
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_CLASS_TEST_SHARE = 0.2
_CLASS_SEED = 0
_MT_TEST_SHARE = 0.2
_MT_SEED = 0


class Fault(NamedTuple):
    """What makes a category unusable."""

    path: Path
    message: str
    """One line with the name of the file and what is wrong."""
    split: Literal["train", "validation", "test"] = "train"
    """The affected split: a fault in the test split prevents evaluation, but not training."""


class Listing(NamedTuple):
    """The images of one category, each split in the order of folders, then file names."""

    train: tuple[Sample, ...]
    """Normal images only."""
    validation: tuple[Sample, ...]
    """Held-out normals and labelled defects, if the layout or the user provides some."""
    test: tuple[Sample, ...]
    faults: tuple[Fault, ...]
    normals: Path | None = None
    """The folder of the normal training images, if it is not the layout's landmark."""


class Layout(NamedTuple):
    """How to recognise a category's folder, and how to read it."""

    name: str
    landmark: str
    """The folder below a category's folder that identifies this layout."""
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Listing]
    leaves_out: Callable[[PurePosixPath], bool]
    """Whether a file, given relative to the category's folder, is part of the layout but deliberately not read."""


def recognised(folder: Path) -> tuple[Layout, ...]:
    """The layouts that fit `folder` as a category's folder: none, one, or several if it is ambiguous."""
    return tuple(layout for layout in LAYOUTS if layout.recognises(folder))


def is_normal_name(name: str) -> bool:
    """Whether a folder with that name holds normal images: good, OK, Normal, `good `, defect_free, …, in any case."""
    return re.sub(r"[ _-]", "", name).casefold() in _NORMAL_NAMES


def normal_folders(folder: Path) -> list[Path]:
    """The folders of normal images, by their name, directly inside `folder`, in order."""
    return [child for child in class_folders(folder) if is_normal_name(child.name)]


def _read_train(folder: Path) -> Listing:
    return _read_splits(folder, normal_folders(folder / "train"))


def _read_plain(folder: Path) -> Listing:
    return _read_splits(folder, normal_folders(folder))


def _read_splits(folder: Path, train: Sequence[Path]) -> Listing:
    validation, wrong_validation = _read_split(folder / "validation", folder / "validation_ground_truth", "validation")
    test, wrong_test = _read_split(folder / "test", folder / "ground_truth", "test")
    normals = [image for each in train for image in list_images(each)]
    return Listing(_normals(normals), validation, test, wrong_validation + wrong_test, train[0] if train else None)


Evaluated = Literal["validation", "test"]


def _read_split(images: Path, masks: Path, split: Evaluated) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """Samples of the folders below `images`, with masks from the folders of the same names below `masks`."""
    classes = class_folders(images)
    defects = [child for child in classes if not is_normal_name(child.name)]
    good = [image for child in classes if is_normal_name(child.name) for image in list_images(child)]
    mask_folders = [child for child in class_folders(masks) if not is_normal_name(child.name)]
    normal = next((child.name for child in classes if is_normal_name(child.name)), "good")
    found: dict[str, tuple[tuple[Sample, ...], tuple[Fault, ...]]] = {normal: (_normals(good), ())}
    for child in defects:
        of_it = [each for each in mask_folders if each.name == child.name] or [
            each
            for each in mask_folders
            if _plain_name(each.name) == _plain_name(child.name) and each.name not in {other.name for other in defects}
        ]
        found[child.name] = _paired(child, of_it, child.name.strip(), split)
        mask_folders = [each for each in mask_folders if each not in of_it]
    for child in mask_folders:
        samples, faults = found.get(child.name, ((), ()))
        found[child.name] = samples, faults + _paired(images / child.name, [child], child.name, split)[1]
    ordered = [found[name] for name in sorted(found)]
    return (
        tuple(sample for samples, _ in ordered for sample in samples),
        tuple(fault for _, faults in ordered for fault in faults),
    )


def _plain_name(name: str) -> str:
    return name.strip().casefold()


def _normals(paths: Iterable[Path]) -> tuple[Sample, ...]:
    return tuple(Sample(path, "good", None) for path in paths)


def _paired(
    images: Path, masks: Iterable[Path], defect: str, split: Evaluated
) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """The defective images below `images`, each with its mask below one of the folders `masks`."""
    placed = [(path, path.relative_to(images).parent) for path in list_images(images)]
    drawn = [(path, path.relative_to(folder).parent) for folder in masks for path in list_images(folder)]
    return _matched(placed, drawn, defect, split)


def _matched(
    images: Sequence[tuple[Path, Path]], masks: Sequence[tuple[Path, Path]], defect: str, split: Evaluated
) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    """Defective samples with their masks: of the same stem, or that stem and a word for a mask; suffixes may differ.

    Files come with their path below the folder of the class. A mask belongs to the image with the same path, or
    otherwise to the only image with its name.
    """
    stems = {(place, image.stem) for image, place in images}
    only = Counter(image.stem for image, _ in images)
    places = {image.stem: place for image, place in images}
    mask_of: dict[tuple[Path, str], Path] = {}
    faults = []
    for mask, place in masks:
        names = [mask.stem, _MASK_WORDS.sub("", mask.stem)]
        keys = [(place, name) for name in names if (place, name) in stems]
        keys += [(places[name], name) for name in names if only[name] == 1]
        if not keys:
            faults.append(Fault(mask, f"mask {mask} has no image {names[1]}.* among the {defect} images.", split))
        elif keys[0] in mask_of:
            message = f"mask {mask} and {mask_of[keys[0]].name} belong to one image; remove one."
            faults.append(Fault(mask, message, split))
        else:
            mask_of[keys[0]] = mask
    seen: dict[tuple[Path, str], Path] = {}
    for image, place in images:
        key = place, image.stem
        if key in mask_of and key in seen:
            message = f"image {image} and {seen[key].name} share one mask {mask_of[key]}."
            faults.append(Fault(image, message, split))
        seen[key] = image
    return tuple(Sample(image, defect, mask_of.get((place, image.stem))) for image, place in images), tuple(faults)


def _read_mvtec_3d(folder: Path) -> Listing:
    validation, wrong_validation = _read_3d_split(folder / "validation", "validation")
    test, wrong_test = _read_3d_split(folder / "test", "test")
    normals = [image for child in normal_folders(folder / "train") for image in list_images(child / "rgb")]
    return Listing(_normals(normals), validation, test, wrong_validation + wrong_test)


def _read_3d_split(folder: Path, split: Evaluated) -> tuple[tuple[Sample, ...], tuple[Fault, ...]]:
    samples: tuple[Sample, ...] = ()
    faults: tuple[Fault, ...] = ()
    for child in class_folders(folder):
        if is_normal_name(child.name):
            samples += _normals(list_images(child / "rgb"))
        else:
            paired, wrong = _paired(child / "rgb", [child / "gt"], child.name.strip(), split)
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
            split: Literal["train", "test"] = "test" if row["split"] == "test" else "train"
            faults.append(Fault(absent[0], f"{table}, line {number}: {absent[0]} does not exist.", split))
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
    """The data set has no published split: by file name, 80 % of MT_Free are for training, all other images for test.

    DifferNet and its successors use the same share with other lists. Images of one tile may be in both splits.
    """
    free = [path for path in list_images(folder / "MT_Free" / "Imgs") if _is_mt_photograph(path)]
    ranked = sorted(free, key=lambda path: split_key(path, _MT_SEED))
    kept = set(ranked[: round(_MT_TEST_SHARE * len(ranked))])
    test = _normals(path for path in free if path in kept)
    faults: tuple[Fault, ...] = ()
    for child in class_folders(folder):
        if child.name.startswith("MT_") and child.name != "MT_Free":
            files = list_images(child / "Imgs")
            images = [(path, path.parent) for path in files if _is_mt_photograph(path)]
            masks = [(path, path.parent) for path in files if path.suffix.lower() == ".png"]
            paired, wrong = _matched(images, masks, child.name.removeprefix("MT_").lower(), "test")
            test, faults = test + paired, faults + wrong
    return Listing(_normals(path for path in free if path not in kept), (), test, faults)


def class_folders_of(root: Path) -> list[Path]:
    """The folders of the classes in a folder of class folders, in order.

    Raises ValueError if there are fewer than two.
    """
    found = class_folders(root / "train") if _has_class_split(root) else class_folders(root)
    if len(found) < 2:
        raise ValueError(
            f"--layout classes needs at least two class folders in {root} or in its train, got {len(found)}; "
            "leave the flag out for a folder of products."
        )
    return found


def _has_class_split(root: Path) -> bool:
    return all(class_folders(root / split) for split in ("train", "test"))


def _read_class(folder: Path) -> Listing:
    """The class of `folder` as normal and all others as anomalous, which only the test split has."""
    if folder.parent.name == "train" and _has_class_split(folder.parent.parent):
        train, test = _images_of_class(folder), folder.parent.parent / "test"
        parts = {child.name: _images_of_class(child) for child in class_folders(test)}
    else:
        train, _ = _class_split(folder)
        parts = {child.name: _class_split(child)[1] for child in class_folders(folder.parent)}
    others = [
        # "good" is the name of what is normal, and a class may be called so
        Sample(path, "class good" if name == "good" else name, None)
        for name, paths in parts.items()
        if name != folder.name
        for path in paths
    ]
    return Listing(_normals(train), (), (*_normals(parts.get(folder.name, ())), *others), (), folder)


def _images_of_class(folder: Path) -> list[Path]:
    """The images of a class, among which its region of interest may lie as a mask."""
    regions = {folder / name for name in REGION_FILES}
    return [path for path in list_images(folder) if path not in regions]


def _class_split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a class for training and for test; which one is which depends on its file name alone."""
    images = _images_of_class(folder)
    ranked = sorted(images, key=lambda path: split_key(path, _CLASS_SEED))
    held = set(ranked[: round(_CLASS_TEST_SHARE * len(ranked))])
    return [path for path in images if path not in held], [path for path in images if path in held]


def _is_mt_photograph(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def _holds(landmark: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / landmark).is_dir()


def _is_mvtec(folder: Path) -> bool:
    return any(
        child.name.strip().casefold() != "ok"
        and (not (child / "rgb").is_dir() or bool(list_images(child, is_deep=False)))
        for child in normal_folders(folder / "train")
    )


def _is_btad(folder: Path) -> bool:
    return any(child.name.strip().casefold() == "ok" for child in normal_folders(folder / "train"))


def _is_mvtec_3d(folder: Path) -> bool:
    return any((child / "rgb").is_dir() for child in normal_folders(folder / "train"))


def _is_plain(folder: Path) -> bool:
    if folder.name in SPLIT_FOLDERS:
        return False
    # A category may itself be called "ok" or "normal", so only the name "good" needs no images directly inside.
    return any(child.name == "good" or bool(list_images(child, is_deep=False)) for child in normal_folders(folder))


def has_test_split(folder: Path) -> bool:
    """Whether `folder` has a labelled test split in the layout of MVTec AD, whatever else is missing."""
    return folder.name not in SPLIT_FOLDERS and bool(normal_folders(folder / "test"))


def _reads_all(_: PurePosixPath) -> bool:
    return False


def _is_mask_of_normal_tile(file: PurePosixPath) -> bool:
    return file.parts[:-1] == ("MT_Free", "Imgs") and file.suffix.lower() == ".png"


def _is_depth_or_mask_of_normal(file: PurePosixPath) -> bool:
    return file.parent.name == "xyz" or (file.parent.name == "gt" and is_normal_name(file.parent.parent.name))


TEST_ONLY = Layout("a test split alone", "test/good", has_test_split, _read_train, _reads_all)
"""Enough for evaluation, not for training."""
CLASSES = Layout("class folders", "", lambda folder: True, _read_class, _reads_all)
"""Each folder of `class_folders_of`; never recognised, only asked for."""
LAYOUTS = (
    Layout("MVTec AD", "train/good", _is_mvtec, _read_train, _reads_all),
    Layout("MVTec 3D-AD", "train/good/rgb", _is_mvtec_3d, _read_mvtec_3d, _is_depth_or_mask_of_normal),
    Layout("BTAD", "train/ok", _is_btad, _read_train, _reads_all),
    Layout("VisA", "Data/Images", _holds("Data/Images"), _read_visa, _reads_all),
    Layout("MT Defects", "MT_Free/Imgs", _holds("MT_Free/Imgs"), _read_mt, _is_mask_of_normal_tile),
    Layout("plain folder", "good", _is_plain, _read_plain, _reads_all),
)

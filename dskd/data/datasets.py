"""From a folder on disk to samples: which images exist, what they show, and which are held out."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_MAX_DEPTH = 3  # of a category folder below the data folder


class Sample(NamedTuple):
    """One image file and what is known of it."""

    path: Path
    defect: str
    """Name of the defect's folder; "good" for a normal image."""
    mask: Path | None

    @property
    def is_defective(self) -> bool:
        return self.defect != "good"


class Category(NamedTuple):
    """The samples of one product category; `train` holds normal images only."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def find_categories(root: Path) -> dict[str, Path]:
    """Folders in the MVTec AD layout (`train/good`) at or up to three levels below `root`, by name.

    Raises ValueError when `root` does not exist, holds none, or holds two of the same name.
    """
    if not root.is_dir():
        raise ValueError(f"data folder {root} does not exist; --data takes a folder of categories.")
    found: dict[str, Path] = {}
    for folder in _folders(root.resolve(), _MAX_DEPTH):
        if (folder / "train" / "good").is_dir():
            if folder.name in found:
                raise ValueError(f"two categories are named {folder.name}: {found[folder.name]} and {folder}.")
            found[folder.name] = folder
    if not found:
        raise ValueError(f"no category in {root}: expected folders like <category>/train/good (MVTec AD layout).")
    return dict(sorted(found.items()))


def _folders(folder: Path, depth: int) -> Iterable[Path]:
    yield folder
    if depth > 0 and not (folder / "train").is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _folders(child, depth - 1)


def read_category(root: Path, name: str) -> Category:
    """The samples of category `name` under `root`, each split in file-name order.

    Raises ValueError on an unknown category, a split without images, or a mask that has no image.
    """
    categories = find_categories(root)
    if name not in categories:
        raise ValueError(f"no category {name!r} in {root}; it holds: {', '.join(categories)}.")
    folder = categories[name]
    train = tuple(Sample(path, "good", None) for path in list_images(folder / "train" / "good"))
    if len(train) < 2:
        raise ValueError(f"{folder / 'train' / 'good'} holds {len(train)} images; training needs at least 2.")
    test = tuple(
        sample
        for defect in sorted(child for child in (folder / "test").glob("*") if child.is_dir())
        for sample in _test_samples(folder, defect.name)
    )
    return Category(name, train, test)


def _test_samples(folder: Path, defect: str) -> list[Sample]:
    images = list_images(folder / "test" / defect)
    if defect == "good":
        return [Sample(path, defect, None) for path in images]
    mask_folder = folder / "ground_truth" / defect
    masks = {mask.stem.removesuffix("_mask"): mask for mask in list_images(mask_folder)}
    if orphans := sorted(set(masks) - {image.stem for image in images}):
        raise ValueError(f"{masks[orphans[0]]} has no image {orphans[0]}.* in {folder / 'test' / defect}.")
    return [Sample(path, defect, masks.get(path.stem)) for path in images]


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside `folder`, sorted by name; empty when the folder does not exist."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split normal samples into (training, validation); depends on file names and seed alone.

    Both parts keep the given order and hold at least one sample.
    """
    num_held = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    order = sorted(
        range(len(samples)), key=lambda i: hashlib.sha256(f"{seed}/{samples[i].path.name}".encode()).digest()
    )
    held = set(order[:num_held])
    return (
        tuple(sample for i, sample in enumerate(samples) if i not in held),
        tuple(sample for i, sample in enumerate(samples) if i in held),
    )


def load_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """RGB pixels (size, size, 3), resized bilinearly with antialiasing, without crop.

    Raises ValueError naming the file when it cannot be decoded or is too large to be a photograph.
    """
    with _opened(path) as image:
        rgb = _eight_bit(image).convert("RGB")
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR))


def load_mask(path: Path, size: int) -> npt.NDArray[np.bool_]:
    """Defect pixels (size, size) of a mask file: nearest-neighbour resize, then above mid-grey."""
    with _opened(path) as image:
        grey = _eight_bit(image).convert("L").resize((size, size), Image.Resampling.NEAREST)
        return np.asarray(grey) > 127


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is refused as a decompression bomb: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace or remove it.") from None
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey at 255 on conversion; scale it to 8 bits instead."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image


def load_images(paths: Sequence[Path], size: int, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Pixels (N, size, size, 3) of many files, decoded on all cores; written into `out` where given."""
    pixels = np.empty((len(paths), size, size, 3), np.uint8) if out is None else out

    def load(index: int) -> None:
        pixels[index] = load_image(paths[index], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(load, range(len(paths))):
            pass
    return pixels


def load_masks(samples: Sequence[Sample], size: int) -> npt.NDArray[np.bool_]:
    """Defect pixels (N, size, size); all false where a sample has no mask."""
    masks = np.zeros((len(samples), size, size), np.bool_)
    for index, sample in enumerate(samples):
        if sample.mask is not None:
            masks[index] = load_mask(sample.mask, size)
    return masks


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the contents of the files, in order: equal data, equal fingerprint."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

"""From image files to pixels."""

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dskd.data.samples import Sample

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_CLASS_NUMBER_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def is_image(path: Path) -> bool:
    """Whether the name is an image's and no folder has it; a broken link counts, so that reading it names it."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside `folder`, sorted by name; empty when the folder does not exist.

    Leaves hidden files out: what macOS writes beside each image on a foreign disk is named like one.
    """
    return sorted(path for path in folder.glob("*") if is_image(path) and not path.name.startswith("."))


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """RGB pixels (H, W, 3) at the file's own size.

    Raises ValueError naming the file when it cannot be decoded or is too large to be a photograph.
    """
    with _opened(path) as image:
        return np.asarray(_eight_bit(image).convert("RGB"))


def load_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """RGB pixels (size, size, 3), resized bilinearly with antialiasing, without crop; errors as `read_image`."""
    with _opened(path) as image:
        rgb = _eight_bit(image).convert("RGB")
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR))


def check_header(path: Path) -> None:
    """Raise ValueError, naming the file, where its header is no image's or a PNG is cut short; nothing is decoded."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and not _ends_as_png(path):
                image.verify()
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist.") from None
    except (Image.DecompressionBombError, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace or remove it.") from None


def _ends_as_png(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), os.SEEK_END)
        return b"IEND" in file.read()


def read_mask(path: Path, above: int = 127) -> npt.NDArray[np.bool_]:
    """Defect pixels (H, W) of a mask file at its own size: those with a grey level above `above`.

    With `above` 0 any number but 0 is a defect, also the entries of a palette and 16-bit ones. Errors as `read_image`.
    """
    with _opened(path) as image:
        if above == 0 and image.mode in _CLASS_NUMBER_MODES:
            return np.asarray(image) > 0
        return np.asarray(_eight_bit(image).convert("L")) > above


def resize_mask(mask: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """Each of (size, size) pixels as the nearest one of a mask (H, W)."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def load_mask(path: Path, size: int, above: int = 127) -> npt.NDArray[np.bool_]:
    """Defect pixels (size, size) of a mask file; `above` and errors as `read_mask`."""
    return resize_mask(read_mask(path, above), size)


def load_images(
    paths: Sequence[Path], size: int, out: npt.NDArray[np.uint8] | None = None, *, progress: str | None = None
) -> npt.NDArray[np.uint8]:
    """Pixels (N, size, size, 3) of many files, decoded on all cores; written into `out` where given.

    With `progress` a bar of that name counts the files on a terminal. Errors as `read_image`.
    """
    pixels = np.empty((len(paths), size, size, 3), np.uint8) if out is None else out

    def load(index: int) -> None:
        pixels[index] = load_image(paths[index], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in progress_bar(pool.map(load, range(len(paths))), progress, len(paths), "image"):
            pass
    return pixels


def load_masks(samples: Sequence[Sample], size: int) -> npt.NDArray[np.bool_]:
    """Defect pixels (N, size, size); all false where a sample has no mask."""
    masks = np.zeros((len(samples), size, size), np.bool_)
    for index, sample in enumerate(samples):
        if sample.mask is not None:
            masks[index] = load_mask(sample.mask, size, sample.mask_above)
    return masks


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            try:
                # other threads switch the filter too, so the warning may have been missed
                if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError(
                        f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}"
                    )
                image.load()
            except BaseException:
                image.close()  # Pillow leaves the file open where it cannot be decoded
                raise
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


T = TypeVar("T")


def progress_bar(steps: Iterable[T], label: str | None, total: int, unit: str) -> Iterable[T]:
    """The same `steps`, counted by a bar on stderr that vanishes at the end; silent where `label` is None."""
    # tqdm's disable=None: draw where stderr is a terminal
    return tqdm(steps, desc=label, total=total, unit=unit, leave=False, disable=None if label else True)

"""Synthetic pictures instead of product photographs: three categories with defects and exact masks.

Every picture is a small rendering: a surface with height and colour under a lamp, seen by a camera with
blur, noise and a changing pose. A defect changes the surface, never the finished picture; its mask holds the
pixels that this changes in the picture.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from dskd.demo.board import draw_board
from dskd.demo.fabric import draw_fabric
from dskd.demo.flange import draw_flange
from dskd.demo.rendering import Bytes, Defect, Draw, Mask, photograph

CATEGORIES: tuple[str, ...] = ("board", "fabric", "flange")
"""What can be drawn."""

_VERSION = 2  # of the drawings: if equal parameters give other pictures, it is another data set
_MANIFEST = "demo.json"
_MIN_SIZE = 64
_NOTICEABLE = 8  # in 8-bit levels
_ATTEMPTS = 40  # to draw a visible defect; most need only one


class Product(NamedTuple):
    draw: Draw
    defects: tuple[str, ...]


class Item(NamedTuple):
    """One picture of the data set."""

    category: str
    split: str
    defect: str
    number: int

    @property
    def image(self) -> Path:
        return Path(self.category, self.split, self.defect, f"{self.number:03d}.png")

    @property
    def mask(self) -> Path | None:
        if self.defect == "good":
            return None
        return Path(self.category, "ground_truth", self.defect, f"{self.number:03d}_mask.png")

    @property
    def files(self) -> list[Path]:
        return [self.image] if self.mask is None else [self.image, self.mask]


def draw_dataset(
    root: Path,
    *,
    categories: tuple[str, ...] = CATEGORIES,
    num_train: int = 40,
    num_test: int = 24,
    image_size: int = 256,
    seed: int = 0,
) -> None:
    """Draws good and defective pictures of each category below `root`, in the MVTec AD layout.

    `num_train` and `num_test` count pictures of one category. Half of the test pictures are defective, with
    all kinds of defects in turn. Masks are 0 or 255. The same parameters give the same bytes with the same versions
    of NumPy, SciPy and Pillow, and a picture does not change when more are drawn. `root` is created only when
    the set is complete; if it already holds the complete set of the same parameters, nothing is done.
    Raises ValueError on an unknown category, fewer than 2 pictures in a split, sizes below 64 pixels,
    negative seeds, and a `root` that holds anything else.
    """
    _check_request(categories, num_train, num_test, image_size, seed)
    root = root.absolute()
    items = list(_plan(categories, num_train, num_test))
    request = {
        "version": _VERSION,
        "categories": sorted(categories),
        "num_train": num_train,
        "num_test": num_test,
        "image_size": image_size,
        "seed": seed,
    }
    if _is_done(root, request, items):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        made = staging / root.name
        for folder in {(made / path).parent for item in items for path in item.files}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda item: draw_item(made, item, image_size, seed), items))
        (made / _MANIFEST).write_text(json.dumps(request, indent=2) + "\n")
        try:
            made.rename(root)
        except OSError:
            # another process may have drawn the same set in the meantime
            if not _is_done(root, request, items):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_request(categories: tuple[str, ...], num_train: int, num_test: int, image_size: int, seed: int) -> None:
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown or not categories or len(set(categories)) < len(categories):
        raise ValueError(f"categories must be different ones of {', '.join(CATEGORIES)}; got {categories}.")
    if num_train < 2 or num_test < 2:
        raise ValueError(f"num_train and num_test must be at least 2, got {num_train} and {num_test}.")
    if image_size < _MIN_SIZE:
        raise ValueError(f"image_size must be at least {_MIN_SIZE} pixels, got {image_size}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")


def _plan(categories: tuple[str, ...], num_train: int, num_test: int) -> Iterator[Item]:
    for category in categories:
        kinds = PRODUCTS[category].defects
        yield from (Item(category, "train", "good", number) for number in range(num_train))
        yield from (Item(category, "test", "good", number) for number in range(num_test - num_test // 2))
        for number in range(num_test // 2):
            yield Item(category, "test", kinds[number % len(kinds)], number // len(kinds))


def _is_done(root: Path, request: dict[str, Any], items: list[Item]) -> bool:
    """True if `root` holds the requested set, False if it may be written; ValueError if it holds something else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f"{root} is a file; name a new folder for the data set.")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{root} is not empty and holds no drawn data set; name a new folder.") from None
    if found != request:
        raise ValueError(f"{root} holds a data set of other parameters ({_MANIFEST}); name a new folder or delete it.")
    missing = [path for item in items for path in item.files if not (root / path).is_file()]
    if missing:
        raise ValueError(f"{root} lacks {len(missing)} of its files, such as {missing[0]}; delete it and draw again.")
    return True


def draw_item(root: Path, item: Item, image_size: int, seed: int) -> None:
    product, scale = PRODUCTS[item.category], 2 if image_size >= 128 else 3

    def numbers(*purpose: int) -> Generator:
        key = zlib.crc32(f"{item.category}/{item.split}/{item.defect}".encode())
        return np.random.default_rng([seed, key, item.number, *purpose])

    def picture(defect: Defect | None) -> Bytes:
        return photograph(numbers(1), product.draw(numbers(0), image_size * scale, defect), scale)

    image = picture(None)
    if item.mask is not None:
        image, mask = _first_visible(image, lambda a: picture(Defect(item.defect, numbers(2, a))))
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(root / item.mask)
    # Sensor noise hardly compresses: the fastest level makes files 4 % larger and saves most of the time.
    Image.fromarray(image).save(root / item.image, compress_level=1)


def _first_visible(clean: Bytes, attempt: Callable[[int], Bytes]) -> tuple[Bytes, Mask]:
    for number in range(_ATTEMPTS):
        found = find_change(clean, attempt(number))
        if found is not None:
            return found
    raise AssertionError(f"none of {_ATTEMPTS} drawings of a defect can be seen.")


def find_change(clean: Bytes, defective: Bytes) -> tuple[Bytes, Mask] | None:
    """The defective picture and its mask; None if the defect is hidden, outside the picture or too faint."""
    difference = np.abs(defective.astype(np.int16) - clean).max(axis=2)
    labels, count = ndimage.label(difference > _NOTICEABLE, structure=np.ones((3, 3)))
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= max(4, labels.size // 8192)
    keep[0] = False
    mask = keep[labels]
    if mask.sum() < max(4, 0.0004 * mask.size) or np.percentile(difference[mask], 75) < 1.5 * _NOTICEABLE:
        return None
    mask |= ndimage.binary_closing(mask)
    specks = (labels > 0) & ~mask  # tiny changes that are not part of the defect, as at a shadow's far edge
    return np.where(specks[..., None], clean, defective), mask


PRODUCTS: dict[str, Product] = {
    "board": Product(draw_board, ("missing_part", "open_track", "residue", "scratch", "skewed_part", "solder_bridge")),
    "fabric": Product(draw_fabric, ("broken_thread", "foreign_fibre", "hole", "misweave", "stain")),
    "flange": Product(draw_flange, ("chip", "dent", "missing_hole", "rust", "scratch")),
}

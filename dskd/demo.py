"""Drawn stand-ins for product photographs: three categories with defects and exact masks.

Every picture is a small rendering: a surface with height and colour under a lamp, seen by a camera with
blur, noise and a changing pose. A defect changes the surface, never the finished picture; its mask is what
the camera sees differently.
"""

import functools
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

CATEGORIES: tuple[str, ...] = ("board", "fabric", "flange")
"""What can be drawn."""

_VERSION = 1  # of the pictures: another drawing of the same parameters is another data set
_MANIFEST = "demo.json"
_MIN_SIZE = 64
_NOTICEABLE = 8  # of 255
_ATTEMPTS = 40  # of a defect to be seen; most need one


class _Defect(NamedTuple):
    kind: str
    rng: Generator


Draw: TypeAlias = Callable[[Generator, int, _Defect | None], Floats]
"""Renders one scene (S, S, 3), linear light where 1 is about white. Takes the same numbers from the generator with and
without a defect, so that two calls with equal generators show the same part."""


class _Product(NamedTuple):
    draw: Draw
    defects: tuple[str, ...]


class _Item(NamedTuple):
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

    `num_train` and `num_test` count pictures of one category; half of the test pictures are defective, in
    turn of every kind. Masks are 0 or 255. The same parameters give the same bytes with the same versions
    of NumPy, SciPy and Pillow, and a picture does not change when more are asked for. `root` appears when
    it is complete; if it already holds the complete set of the same parameters, nothing is done.
    Raises ValueError on an unknown category, fewer than 2 pictures of a split, sizes below 64 pixels,
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
            list(pool.map(lambda item: _draw_item(made, item, image_size, seed), items))
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


def _plan(categories: tuple[str, ...], num_train: int, num_test: int) -> Iterator[_Item]:
    for category in categories:
        kinds = _PRODUCTS[category].defects
        yield from (_Item(category, "train", "good", number) for number in range(num_train))
        yield from (_Item(category, "test", "good", number) for number in range(num_test - num_test // 2))
        for number in range(num_test // 2):
            yield _Item(category, "test", kinds[number % len(kinds)], number // len(kinds))


def _is_done(root: Path, request: dict[str, Any], items: list[_Item]) -> bool:
    """False where `root` may be written; ValueError where it holds something else."""
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


def _draw_item(root: Path, item: _Item, image_size: int, seed: int) -> None:
    product, scale = _PRODUCTS[item.category], 2 if image_size >= 128 else 3

    def numbers(*purpose: int) -> Generator:
        key = zlib.crc32(f"{item.category}/{item.split}/{item.defect}".encode())
        return np.random.default_rng([seed, key, item.number, *purpose])

    def picture(defect: _Defect | None) -> Bytes:
        return _photograph(numbers(1), product.draw(numbers(0), image_size * scale, defect), scale)

    image = picture(None)
    if item.mask is not None:
        image, mask = _first_visible(image, lambda a: picture(_Defect(item.defect, numbers(2, a))))
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(root / item.mask)
    # sensor noise hardly compresses: the fastest level costs 4 % of size and saves most of the time
    Image.fromarray(image).save(root / item.image, compress_level=1)


def _first_visible(clean: Bytes, attempt: Callable[[int], Bytes]) -> tuple[Bytes, Mask]:
    for number in range(_ATTEMPTS):
        found = _compare(clean, attempt(number))
        if found is not None:
            return found
    raise AssertionError(f"none of {_ATTEMPTS} drawings of a defect can be seen.")


def _compare(clean: Bytes, defective: Bytes) -> tuple[Bytes, Mask] | None:
    """The defective picture and its mask; None where the defect is hidden, outside or too faint."""
    difference = np.abs(defective.astype(np.int16) - clean).max(axis=2)
    labels, count = ndimage.label(difference > _NOTICEABLE, structure=np.ones((3, 3)))
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= max(4, labels.size // 8192)
    keep[0] = False
    mask = keep[labels]
    if mask.sum() < max(4, 0.0004 * mask.size) or np.percentile(difference[mask], 75) < 1.5 * _NOTICEABLE:
        return None
    mask |= ndimage.binary_closing(mask)
    specks = (labels > 0) & ~mask  # such as a shadow's far edge, one level more or less
    return np.where(specks[..., None], clean, defective), mask


# ------------------------------------------------------------------------------------------------ the lab


def _noise(rng: Generator, size: int, down: float, across: float) -> Floats:
    """Smooth noise (S, S) of unit variance, of about `down` by `across` lumps."""
    rows, columns = max(2, round(down) + 1), max(2, round(across) + 1)
    coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(field / np.float32(max(float(field.std()), 1e-6)))


def _soft(field: Floats, sigma: float) -> Floats:
    """Wide Gaussian blur, computed on a smaller copy."""
    step = max(1, int(sigma / 2))
    size = field.shape[0]
    small = Image.fromarray(field).resize((-(-size // step),) * 2, Image.Resampling.BOX)
    blurred = ndimage.gaussian_filter(np.asarray(small), sigma / step, mode="nearest")
    return np.asarray(Image.fromarray(blurred).resize((size, size), Image.Resampling.BICUBIC))


def _grid(size: int, *, turn: float = 0.0, zoom: float = 1.0, x: float = 0.0, y: float = 0.0) -> tuple[Floats, Floats]:
    """Product coordinates u (right), v (down) of every pixel; the picture spans -1 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across, down = (
        (line[None, :] - np.float32(x)) / np.float32(zoom),
        (line[:, None] - np.float32(y)) / np.float32(zoom),
    )
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return across * cos + down * sin, down * cos - across * sin


def _step(distance: Floats, width: float) -> Floats:
    """0 below -width/2, 1 above width/2, smooth between."""
    t = np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _sharpen(cosine: Floats, power: int) -> Floats:
    """Cosine to a power of two; squaring is many times faster than a general power."""
    while power > 1:
        cosine, power = cosine * cosine, power // 2
    return cosine


def _cast(shape: Floats, down: float, right: float, blur: float) -> Floats:
    """The soft shadow of a shape, displaced by pixels."""
    return _soft(np.roll(shape, (round(down), round(right)), axis=(0, 1)), blur)


class _Lamp(NamedTuple):
    """Directions of the light over the surface, for a viewer straight above."""

    diffuse: Floats
    gloss: Floats
    """Cosine between the surface normal and the half vector."""
    half_x: Floats
    half_y: Floats


def _light(height: Floats, position: tuple[float, float, float]) -> _Lamp:
    """A lamp at `position` (right, down, up) over a surface of `height`; the picture spans -1 to 1."""
    size = height.shape[0]
    down, across = np.gradient(height, np.float32(2 / size))
    u, v = _grid(size)
    x, y, z = np.float32(position[0]) - u, np.float32(position[1]) - v, np.float32(position[2])
    inverse = 1 / np.sqrt(x * x + y * y + z * z)
    to_x, to_y, to_z = x * inverse, y * inverse, z * inverse
    inverse = 1 / np.sqrt(to_x * to_x + to_y * to_y + (to_z + 1) ** 2)
    half_x, half_y, half_z = to_x * inverse, to_y * inverse, (to_z + 1) * inverse
    steepness = np.sqrt(1 + across * across + down * down)
    diffuse = np.clip((to_z - to_x * across - to_y * down) / steepness, 0, None)
    gloss = np.clip((half_z - half_x * across - half_y * down) / steepness, 0, None)
    return _Lamp(*(np.asarray(field, dtype=np.float32) for field in (diffuse, gloss, half_x, half_y)))


def _line(size: int, points: NDArray[Any], width: float) -> Floats:
    """Coverage (S, S) of a polyline (K, 2) of (u, v), `width` in the same units, tapered at its ends."""
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    pixels = (points + 1) * (size / 2)
    count = len(pixels) - 1
    for index in range(count):
        thickness = max(width * size / 2, 2.5) * min(1.0, 0.4 + 4 * min(index + 1, count - index) / count)
        pen.line([tuple(pixels[index]), tuple(pixels[index + 1])], fill=255, width=max(1, round(thickness)))
    return np.asarray(ndimage.gaussian_filter(np.asarray(canvas, dtype=np.float32) / 255, 0.6))


def _wander(rng: Generator, centre: tuple[float, float], length: float, bend: float) -> NDArray[Any]:
    """Points (40, 2) of a smooth, wandering curve around `centre`."""
    steps = 39
    bends = ndimage.gaussian_filter1d(rng.normal(0, bend, size=steps), 4, mode="nearest")
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bends)
    points = np.stack([np.cos(heading), np.sin(heading)], axis=1).cumsum(axis=0) * (length / steps)
    points = np.concatenate([np.zeros((1, 2)), points])
    return np.asarray(points - points.mean(axis=0) + np.asarray(centre))


def _blob(rng: Generator, size: int, centre: tuple[float, float], radius: float, ragged: float) -> Floats:
    """Signed distance (S, S), positive inside, to an irregular disc."""
    u, v = _grid(size)
    noise = _noise(rng, size, 2.2 / radius, 2.2 / radius)
    stretch, turn = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
    du, dv = u - np.float32(centre[0]), v - np.float32(centre[1])
    along = (du * np.cos(turn) + dv * np.sin(turn)) / stretch
    beside = (dv * np.cos(turn) - du * np.sin(turn)) * stretch
    return np.asarray(radius - np.hypot(along, beside) + ragged * radius * noise, dtype=np.float32)


def _paint(canvas: Floats, colour: tuple[float, float, float] | Floats, cover: Floats) -> Floats:
    return np.asarray(canvas + cover[..., None] * (np.asarray(colour, dtype=np.float32) - canvas))


def _photograph(rng: Generator, light: Floats, scale: int) -> Bytes:
    """The camera: exposure, a little colour cast and vignetting, lens blur, sampling, noise, 8 bits."""
    size = light.shape[0] // scale
    exposure = rng.normal(1, 0.03)
    cast = rng.normal(1, 0.008, size=3).astype(np.float32)
    blur = rng.uniform(0.35, 0.6)
    parts = [light[row::scale, column::scale] for row in range(scale) for column in range(scale)]
    pixels = sum(parts[1:], start=parts[0]) / np.float32(len(parts))
    pixels = ndimage.gaussian_filter(pixels, (blur, blur, 0), mode="nearest")
    u, v = _grid(size)
    fall = 1 - np.float32(0.10) * (u * u + v * v) / 2
    pixels = np.clip(pixels * cast * np.float32(exposure) * fall[..., None], 0, None)
    noise = rng.standard_normal((size, size, 1)) * 0.7 + rng.standard_normal((size, size, 3)) * 0.7
    pixels = pixels + noise * np.sqrt(0.0004**2 + 0.00006 * pixels)  # read and shot noise
    # a film-like shoulder instead of a hard cut at white
    pixels = np.clip(pixels, 0, None)
    pixels = np.where(pixels < 0.7, pixels, 0.7 + 0.3 * np.tanh((pixels - 0.7) / 0.3))
    return np.asarray(np.rint(255 * pixels ** (1 / 2.2)).clip(0, 255), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------- flange

_BOLTS = 6
_BORE, _RIM, _BOLT_CIRCLE, _BOLT = 0.27, 0.86, 0.61, 0.085


def _flange(rng: Generator, size: int, defect: _Defect | None) -> Floats:
    """A turned steel flange with six bolt holes on a dark rubber mat."""
    turn, zoom = rng.uniform(-0.25, 0.25), rng.uniform(0.96, 1.02)
    x, y = rng.normal(0, 0.015, size=2)
    lamp = (rng.normal(-1.0, 0.15), rng.normal(-1.3, 0.15), rng.normal(1.7, 0.1))
    u, v = _grid(size, turn=turn, zoom=zoom, x=x, y=y)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)

    # rings of the lathe's tool, slowly changing around the circle
    rings = rng.standard_normal((220, 9)).astype(np.float32)
    rings[:, -1] = rings[:, 0]
    rings = 0.8 * rings + 1.2 * ndimage.gaussian_filter1d(rings, 3, axis=0) * 2.0
    where = np.stack([np.clip(radius, 0, 1) * 219, (angle / (2 * np.pi) + 0.5) * 8])
    ring = ndimage.map_coordinates(rings, where, order=1, mode="nearest")
    mat = _noise(rng, size, size / 3, size / 3)
    cloud = _noise(rng, size, 5, 5)

    fold = 2 * np.pi / _BOLTS
    sector = np.floor(angle / fold).astype(np.int8)
    local = angle - (sector + np.float32(0.5)) * np.float32(fold)
    to_bolt = np.hypot(radius * np.cos(local) - _BOLT_CIRCLE, radius * np.sin(local)) - _BOLT
    if defect is not None and defect.kind == "missing_hole":
        to_bolt = np.where(sector == defect.rng.integers(-3, 3), np.float32(1), to_bolt)
    inside = np.minimum(np.minimum(_RIM - radius, radius - _BORE), to_bolt)

    stain = scratch = np.zeros((size, size), np.float32)
    dent = np.zeros((size, size), np.float32)
    if defect is not None:
        r = defect.rng
        place, spot = r.uniform(0, 2 * np.pi), r.uniform(0.36, 0.78)
        centre = x + zoom * spot * np.cos(place), y + zoom * spot * np.sin(place)
        if defect.kind == "chip":
            edge = x + zoom * _RIM * np.cos(place), y + zoom * _RIM * np.sin(place)
            inside = np.minimum(inside, -_blob(r, size, edge, r.uniform(0.05, 0.12), 0.25))
        elif defect.kind == "dent":
            for _ in range(r.integers(1, 3)):
                spread = r.uniform(0.025, 0.055)
                du, dv = _grid(size, x=centre[0] + r.normal(0, 0.06), y=centre[1] + r.normal(0, 0.06))
                distance = (du * du + dv * dv) / np.float32(spread**2)
                # a crater with a raised lip
                dent += np.float32(0.8 * spread) * np.exp(-distance / 2) * (1 - np.float32(0.35) * distance)
        elif defect.kind == "scratch":
            for _ in range(r.integers(1, 3)):
                path = _wander(r, centre, r.uniform(0.25, 0.6), 0.03)
                scratch = np.maximum(scratch, _line(size, path, r.uniform(0.011, 0.022)))
        elif defect.kind == "rust":
            blob = _blob(r, size, centre, r.uniform(0.06, 0.16), 0.45)
            blob = blob + np.float32(0.016) * _noise(r, size, size / 7, size / 7)  # eaten edges and pits
            stain = _step(blob, 0.07) * np.float32(r.uniform(0.6, 0.9))

    metal = _step(inside, 4 / size)
    bevel = np.float32(0.028)
    height = bevel * np.clip(inside / bevel, -1, 1) * np.float32(0.9)
    height += np.interp(radius, [0.40, 0.425, 0.735, 0.742, 0.765, 0.772], [0.03, 0, 0, -0.008, -0.008, 0]).astype(
        np.float32
    )
    seat = _step(np.float32(0.05) - to_bolt, 0.012)  # spot-faced around each bolt
    height += np.float32(-0.006) * seat - dent - np.float32(0.008) * scratch
    height += np.float32(0.00022) * ring * (1 - seat)

    key = _light(height, lamp)
    fill = _light(height, (1.3, 0.4, 1.8))
    sin, cos = v / np.maximum(radius, 1e-3), u / np.maximum(radius, 1e-3)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along_x, along_y = -(sin * c + cos * s), cos * c - sin * s  # the tool's direction in the picture
    shine = np.zeros_like(radius)
    for source, strength in ((key, 1.25), (fill, 0.55)):
        across = along_x * source.half_x + along_y * source.half_y + np.float32(0.03) * ring
        # light on grooves spreads across them (Kajiya and Kay 1989, eq. 16)
        shine += np.float32(strength) * _sharpen(np.clip(1 - across * across, 0, 1), 16) * _sharpen(source.gloss, 8)
    shine *= 1 + np.float32(0.07) * ring + np.float32(0.04) * cloud
    flat = np.float32(0.05) + np.float32(0.13) * key.diffuse + np.float32(0.05) * fill.diffuse
    shine = shine * (1 - np.float32(0.75) * stain) + np.float32(0.35) * scratch * key.diffuse
    steel = np.asarray([0.80, 0.82, 0.85], np.float32) * (flat + np.float32(0.62) * shine)[..., None]
    glint = _sharpen(key.gloss, 32) * np.float32(0.30) * (1 - stain)
    steel = steel + glint[..., None]
    rust = np.asarray([0.20, 0.075, 0.028], np.float32) * (0.5 + 0.7 * key.diffuse)[..., None]
    rust = rust * np.clip(1 + np.float32(0.3) * mat + np.float32(0.35) * cloud, 0.2, 2)[..., None]
    steel = _paint(steel, rust, stain)

    reach = size / 40
    shadow = _cast(metal, reach * 0.9, reach * 0.7, reach)
    table = np.asarray([0.050, 0.053, 0.060], np.float32) * (1 + np.float32(0.16) * mat)[..., None]
    table = (
        table
        * (1 - np.float32(0.75) * shadow)[..., None]
        * (np.float32(0.6) + np.float32(0.5) * key.diffuse)[..., None]
    )
    return _paint(table, steel, metal)


# ------------------------------------------------------------------------------------------------- fabric

_THREADS = 25


def _fabric(rng: Generator, size: int, defect: _Defect | None) -> Floats:
    """A plain weave of oatmeal warp and blue-grey weft, filling the picture."""
    pitch = np.float32(2 / _THREADS)
    u, v = _grid(size, turn=rng.normal(0, 0.025), x=rng.uniform(-0.1, 0.1), y=rng.uniform(-0.1, 0.1))
    lamp = (rng.normal(-1.6, 0.2), rng.normal(-1.4, 0.2), rng.normal(1.9, 0.1))
    u = u + pitch * np.float32(0.22) * _noise(rng, size, 3, 5)
    v = v + pitch * np.float32(0.22) * _noise(rng, size, 5, 3)
    upright = _noise(rng, size, 24, 0.7 * size)
    level = _noise(rng, size, 0.7 * size, 24)
    uneven = _noise(rng, size, 14, 14)
    lumps = rng.normal(0, 1, size=(2, 2, 3 * _THREADS)).astype(np.float32)

    centre = (0.0, 0.0)
    if defect is not None:
        centre = (float(defect.rng.uniform(-0.75, 0.75)), float(defect.rng.uniform(-0.75, 0.75)))
    opening = np.ones((size, size), np.float32)
    if defect is not None and defect.kind == "hole":
        reach = defect.rng.uniform(0.05, 0.085)
        blob = _blob(defect.rng, size, centre, reach, 0.2)
        du, dv = _grid(size, x=centre[0], y=centre[1])
        push = np.exp(-(du * du + dv * dv) / np.float32(2 * (1.3 * reach) ** 2)) * np.float32(0.40)
        u, v = u - push * du, v - push * dv  # the threads around have been pulled apart
        opening = 1 - _step(blob + np.float32(0.02) * upright, 0.03)

    row, column = np.floor(v / pitch), np.floor(u / pitch)
    i, j = column.astype(np.intp) + _THREADS, row.astype(np.intp) + _THREADS
    s, t = 2 * (u / pitch - column) - 1, 2 * (v / pitch - row) - 1
    over = np.where((i + j) % 2 == 0, np.float32(1), np.float32(-1))
    warp_wide = np.float32(0.90) + np.float32(0.035) * lumps[0, 0, i] + np.float32(0.025) * uneven
    weft_wide = np.float32(0.86) + np.float32(0.035) * lumps[1, 0, j] - np.float32(0.025) * uneven
    warp_wave, weft_wave = over * np.cos(np.pi / 2 * t), -over * np.cos(np.pi / 2 * s)
    warp_wide, weft_wide = warp_wide * opening, weft_wide * opening

    if defect is not None and defect.kind in ("broken_thread", "misweave"):
        thread, first = i[tuple(((np.array(centre[::-1]) + 1) * size / 2).astype(int))], centre[1]
        reach = defect.rng.uniform(0.06, 0.2) if defect.kind == "broken_thread" else 2.5 * float(pitch)
        picked = (i == thread) & (np.abs(_grid(size)[1] - np.float32(first)) < np.float32(reach))
        if defect.kind == "broken_thread":
            warp_wide = np.where(picked, np.float32(0.02), warp_wide)
            weft_wave = np.where(picked, np.float32(0.5), weft_wave)
        else:  # the thread runs over three others instead of over and under
            warp_wave = np.where(picked, np.float32(1.0), warp_wave)
            weft_wave = np.where(picked, np.float32(-1.0), weft_wave)

    def yarn(offset: Floats, wide: Floats, wave: Floats) -> Floats:
        body = np.sqrt(np.clip(1 - (offset / np.maximum(wide, 0.01)) ** 2, 0, None))
        return np.where(np.abs(offset) < wide, np.float32(0.6) * body + np.float32(0.4) * wave, np.float32(-0.9))

    warp, weft = yarn(s, warp_wide, warp_wave), yarn(t, weft_wide, weft_wave)
    is_warp = warp >= weft
    top = np.maximum(warp, weft)
    twist = np.where(is_warp, np.sin(np.float32(4.2) * s + 9 * v / pitch), np.sin(np.float32(4.2) * t + 9 * u / pitch))
    fibre = np.where(is_warp, upright, level)
    relief = top + np.float32(0.05) * twist + np.float32(0.07) * fibre
    height = ndimage.gaussian_filter(relief, size / 700) * pitch * np.float32(0.30)

    tone = np.where(is_warp, lumps[0, 1, i], lumps[1, 1, j])
    colour = np.where(
        is_warp[..., None],
        np.asarray([0.56, 0.47, 0.35], np.float32),
        np.asarray([0.25, 0.30, 0.37], np.float32),
    )
    colour = colour * (1 + np.float32(0.05) * tone + np.float32(0.07) * fibre + np.float32(0.04) * twist)[..., None]
    backing = top < np.float32(-0.85)
    colour = np.where(backing[..., None], np.asarray([0.035, 0.032, 0.030], np.float32), colour)

    shade = np.ones((size, size), np.float32)
    if defect is not None:
        r = defect.rng
        if defect.kind == "stain":
            blob = _blob(r, size, centre, r.uniform(0.08, 0.22), 0.25)
            wet = _step(blob, r.uniform(0.04, 0.12)) * (1 - np.float32(0.35) * _step(blob, 0.3))
            tint = np.asarray(r.uniform([0.35, 0.28, 0.18], [0.7, 0.6, 0.5]), np.float32)
            colour = colour * (1 - wet[..., None] * (1 - tint))
        elif defect.kind == "foreign_fibre" or defect.kind == "broken_thread":
            loose = defect.kind == "broken_thread"
            count = 5 if loose else 1
            hue = np.asarray(
                [0.62, 0.53, 0.41] if loose else r.choice([[0.5, 0.04, 0.05], [0.02, 0.02, 0.03], [0.05, 0.30, 0.10]])
            )
            for _ in range(count):
                spread = 0.05 if loose else 0.0
                start = (centre[0] + r.normal(0, 0.3 * spread), centre[1] + r.normal(0, 1.5 * spread))
                path = _wander(r, start, r.uniform(0.06, 0.14) if loose else r.uniform(0.3, 0.8), 0.25)
                hair = _line(size, path, 0.008 if loose else r.uniform(0.012, 0.022))
                shade *= 1 - np.float32(0.45) * _cast(hair, size / 120, size / 120, size / 170)
                colour = _paint(colour, hue.astype(np.float32), hair)
                height = height + hair * np.float32(0.012)

    key = _light(height, lamp)
    occlusion = np.float32(0.45) + np.float32(0.55) * np.clip((top + 1) / np.float32(1.7), 0, 1)
    sheen = _sharpen(key.gloss, 16) * np.float32(0.06)
    light = (np.float32(0.22) + np.float32(0.95) * key.diffuse) * occlusion * shade
    return np.asarray(colour * light[..., None] + (sheen * occlusion * opening)[..., None], dtype=np.float32)


# -------------------------------------------------------------------------------------------------- board


_Colour: TypeAlias = tuple[int, int, int]

_GREEN, _TRACK, _TIN, _DARK = (12, 62, 40), (36, 110, 66), (196, 194, 186), (30, 30, 33)
_SILK, _HOLE, _TAN, _BARE, _CAN = (214, 217, 208), (9, 12, 10), (158, 124, 84), (176, 138, 92), (172, 174, 176)
_ROWS = tuple(0.30 + 0.133 * row for row in range(4))  # of the small parts, left and right
_PINS = tuple(0.365 + 0.045 * pin for pin in range(7))  # of the chip, left and right
_PADS = tuple(0.22 + 0.08 * pad for pad in range(8))  # of the connectors, above and below
_TALL = 60  # heights above are parts, below is the bare board


class _Sheet(NamedTuple):
    """The board from straight above, drawn in three layers; coordinates 0 to 1."""

    colour: Image.Image
    height: Image.Image
    metal: Image.Image

    def polygon(self, points: NDArray[Any], colour: _Colour, height: int, metal: int) -> None:
        corners = [(float(x), float(y)) for x, y in np.asarray(points) * self.colour.width]
        ImageDraw.Draw(self.colour).polygon(corners, fill=colour)
        ImageDraw.Draw(self.height).polygon(corners, fill=height)
        ImageDraw.Draw(self.metal).polygon(corners, fill=metal)

    def track(self, points: NDArray[Any], width: float, colour: _Colour, height: int) -> None:
        corners = [(float(x), float(y)) for x, y in np.asarray(points) * self.colour.width]
        pixels = round(width * self.colour.width)
        ImageDraw.Draw(self.colour).line(corners, fill=colour, width=pixels, joint="curve")
        ImageDraw.Draw(self.height).line(corners, fill=height, width=pixels, joint="curve")

    def text(self, x: float, y: float, words: str, size: float, colour: _Colour) -> None:
        _write(self.colour, x, y, words, size, colour)


def _write(layer: Image.Image, x: float, y: float, words: str, size: float, colour: _Colour | int) -> None:
    font = ImageFont.load_default(size * layer.width)
    ImageDraw.Draw(layer).text((x * layer.width, y * layer.width), words, fill=colour, font=font, anchor="mm")


def _rectangle(x: float, y: float, width: float, height: float, turn: float = 0.0) -> NDArray[Any]:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    cos, sin = np.cos(turn), np.sin(turn)
    return np.asarray(corners @ np.array([[cos, sin], [-sin, cos]]) + [x, y])


def _ellipse(x: float, y: float, width: float, height: float) -> NDArray[Any]:
    turns = np.linspace(0, 2 * np.pi, 33)
    return np.stack([x + width / 2 * np.cos(turns), y + height / 2 * np.sin(turns)], axis=1)


def _disc(x: float, y: float, radius: float) -> NDArray[Any]:
    return _ellipse(x, y, 2 * radius, 2 * radius)


@functools.lru_cache(maxsize=1)
def _lettering(canvas: int) -> Image.Image:
    """Coverage of everything printed on the bare board."""
    layer = Image.new("L", (canvas, canvas))
    _write(layer, 0.5, 0.055, "DK-42  REV C", 0.034, 255)
    for number, x in enumerate(_PADS, start=1):
        _write(layer, x, 0.945, str(number), 0.026, 255)
    for number, y in enumerate(_ROWS, start=1):
        _write(layer, 0.185, y - 0.043, f"R{number}", 0.026, 255)
        _write(layer, 0.815, y - 0.043, f"C{number}", 0.026, 255)
    return layer


def _tracks() -> list[NDArray[Any]]:
    """The copper of the one board that all pictures show: polylines (K, 2)."""
    half = []
    for row, pin in zip(_ROWS, _PINS[::2], strict=True):
        half.append([(0.35, pin), (0.31, pin), (0.31 - abs(pin - row), row), (0.22, row)])
        half.append([(0.15, row), (0.105, row), (0.085, row + 0.02), (0.085, 0.74)])
    half.extend([(0.35, pin), (0.285, pin)] for pin in _PINS[1::2])
    for number, x in enumerate(_PADS[1:4]):
        inner = 0.405 + 0.035 * number
        half.append([(x, 0.12), (x, 0.19), (inner, 0.19 + inner - x), (inner, 0.30)])
        half.append([(x, 0.88), (x, 0.84 - 0.025 * number), (inner, 0.74 - 0.01 * number), (inner, 0.66)])
    half.append([(0.22, 0.12), (0.22, 0.18), (0.15, 0.25), (0.085, 0.25), (0.085, 0.34)])
    half.append([(0.22, 0.88), (0.22, 0.80), (0.16, 0.74), (0.085, 0.74)])
    left = [np.array(points) for points in half]
    return left + [points * [-1, 1] + [1, 0] for points in left]


def _draw_bare_board(rng: Generator, canvas: int, defect: _Defect | None) -> _Sheet:
    sheet = _Sheet(
        Image.new("RGB", (canvas, canvas), _GREEN),
        Image.new("L", (canvas, canvas), 20),
        Image.new("L", (canvas, canvas), 0),
    )
    tracks = _tracks()
    for points in tracks:
        sheet.track(points, 0.013, _TRACK, 26)
    if defect is not None and defect.kind == "open_track":
        points = tracks[defect.rng.integers(len(tracks))]
        lengths = np.hypot(*np.diff(points, axis=0).T)
        start = int(np.argmax(lengths))
        middle, half = (
            defect.rng.uniform(0.35, 0.65),
            max(defect.rng.uniform(0.012, 0.028), 9 / canvas) / lengths[start],
        )
        ends = np.array([[middle - half], [middle + half]])
        sheet.track(points[start] + ends * (points[start + 1] - points[start]), 0.020, _GREEN, 20)
    for x, y in itertools.product((0.075, 0.925), repeat=2):
        sheet.polygon(_disc(x, y, 0.040), _TIN, 26, 200)
        sheet.polygon(_disc(x, y, 0.024), _HOLE, 0, 0)
    for x, y in itertools.product(_PADS, (0.12, 0.88)):
        swell, dx, dy = rng.normal(0, 0.0006, size=3)
        sheet.polygon(_disc(x, y, 0.025 + swell), _TIN, 32, 210)
        sheet.polygon(_disc(x + dx, y + dy, 0.012), _HOLE, 0, 0)
    for x, y in itertools.product((0.285, 0.715), _PINS[1::2]):
        sheet.polygon(_disc(x, y, 0.011), _TIN, 28, 200)
        sheet.polygon(_disc(x, y, 0.005), _HOLE, 0, 0)
    sheet.colour.paste(_SILK, mask=_lettering(canvas))
    return sheet


def _mount_small_parts(rng: Generator, sheet: _Sheet, defect: _Defect | None) -> None:
    """Resistors on the left, capacitors on the right, a crystal below the chip."""
    kind, victim = "", -1
    if defect is not None and defect.kind in ("missing_part", "skewed_part"):
        kind, victim = defect.kind, int(defect.rng.integers(9))
    for number, (x, y) in enumerate(itertools.product((0.185, 0.815), _ROWS)):
        dx, dy = rng.normal(0, 0.0015, size=2)
        turn = rng.normal(0, 0.012)
        for end in (-0.036, 0.036):
            sheet.polygon(_rectangle(x + end, y, 0.034, 0.052), _TIN, 30, 190)
        if number == victim and kind == "missing_part":
            continue
        if number == victim and defect is not None:
            turn = float(defect.rng.choice([-1, 1]) * defect.rng.uniform(0.3, 0.9))
            dx, dy = defect.rng.normal(0, 0.008, size=2)
        for end in (-0.032, 0.032):
            tip = x + dx + end * np.cos(turn), y + dy + end * np.sin(turn)
            sheet.polygon(_rectangle(*tip, 0.020, 0.042, turn), _TIN, 95, 230)
        sheet.polygon(_rectangle(x + dx, y + dy, 0.046, 0.043, turn), _DARK if x < 0.5 else _TAN, 100, 0)
        if x < 0.5 and number != victim:
            sheet.text(x + dx, y + dy, "103", 0.021, (190, 190, 188))
    turn = rng.normal(0, 0.015)
    for end in (-0.085, 0.085):
        sheet.polygon(_disc(0.5 + end, 0.765, 0.016), _TIN, 32, 200)
    if victim == 8 and kind == "missing_part":
        return
    if victim == 8 and defect is not None:
        turn = float(defect.rng.choice([-1, 1]) * defect.rng.uniform(0.15, 0.4))
    can = _rectangle(0.5, 0.765, 0.125, 0.062, turn)
    for x, y in ((can[0] + can[3]) / 2, (can[1] + can[2]) / 2):
        sheet.polygon(_disc(x, y, 0.031), _CAN, 110, 255)
    sheet.polygon(can, _CAN, 110, 255)


def _mount_chip(rng: Generator, sheet: _Sheet, defect: _Defect | None) -> None:
    for side, y in itertools.product((-1, 1), _PINS):
        sheet.polygon(_rectangle(0.5 + side * 0.148, y, 0.052, 0.026), _TIN, 30, 190)
        sheet.polygon(_rectangle(0.5 + side * 0.134, y + rng.normal(0, 0.0008), 0.052, 0.017), _TIN, 62, 235)
    if defect is not None and defect.kind == "solder_bridge":
        r = defect.rng
        for _ in range(r.integers(1, 3)):
            x = 0.5 + r.choice([-1, 1]) * r.uniform(0.145, 0.16)
            y = (_PINS[0] + _PINS[1]) / 2 + 0.045 * r.integers(6)
            ring = _ellipse(x, y, r.uniform(0.016, 0.032), 0.056)
            bulge = 1 + 0.12 * np.sin(3 * np.linspace(0, 2 * np.pi, len(ring)) + r.uniform(0, 6))
            sheet.polygon((ring - [x, y]) * bulge[:, None] + [x, y], _TIN, 58, 240)
    dx, dy = rng.normal(0, 0.0015, size=2)
    sheet.polygon(_rectangle(0.5 + dx, 0.5 + dy, 0.232, 0.345, rng.normal(0, 0.004)), _DARK, 140, 0)
    sheet.polygon(_disc(0.415 + dx, 0.355 + dy, 0.011), (18, 18, 20), 130, 0)
    sheet.text(0.5 + dx, 0.475 + dy, "74HC165", 0.038, (150, 150, 150))
    sheet.text(0.5 + dx, 0.52 + dy, "K2403", 0.030, (135, 135, 135))


def _scratch_board(sheet: _Sheet, r: Generator) -> None:
    """Cuts through the green lacquer, not through the parts that stand above it."""
    centre = float(r.uniform(-0.7, 0.7)), float(r.uniform(-0.7, 0.7))
    cut = _line(sheet.colour.width, _wander(r, centre, r.uniform(0.25, 0.6), 0.03), r.uniform(0.010, 0.018))
    cut = np.where(np.asarray(sheet.height) < _TALL, cut, np.float32(0))
    mask = Image.fromarray(np.asarray(255 * cut, dtype=np.uint8))
    sheet.colour.paste(_BARE, mask=mask)
    sheet.height.paste(18, mask=mask)
    sheet.metal.paste(150, mask=mask)


def _board(rng: Generator, size: int, defect: _Defect | None) -> Floats:
    """A small circuit board with a chip, resistors, capacitors and a crystal on a light table."""
    turn, zoom = rng.normal(0, 0.02), rng.uniform(0.93, 0.96)
    x, y = rng.normal(0, 0.012, size=2)
    lamp = (rng.normal(-1.2, 0.2), rng.normal(-1.5, 0.2), rng.normal(1.8, 0.1))
    u, v = _grid(size, turn=turn, zoom=zoom, x=x, y=y)
    grain, cloud = _noise(rng, size, size / 2, size / 2), _noise(rng, size, 6, 6)
    sheet = _draw_bare_board(rng, 2 * size, defect)
    _mount_small_parts(rng, sheet, defect)
    _mount_chip(rng, sheet, defect)
    if defect is not None and defect.kind == "scratch":
        _scratch_board(sheet, defect.rng)

    # picture to sheet: the grid above, written as the matrix that Pillow wants
    scale = 0.5 * size
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    across = (cos, sin, scale - cos * (scale + x * scale) - sin * (scale + y * scale))
    down = (-sin, cos, scale + sin * (scale + x * scale) - cos * (scale + y * scale))
    colour_bytes, relief_bytes, metal_bytes = (
        np.asarray(
            layer.reduce(2).transform((size, size), Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR)
        )
        for layer in sheet
    )
    linear = (np.arange(256, dtype=np.float32) / 255) ** np.float32(2.2)
    colour, metal = linear[colour_bytes], metal_bytes / np.float32(255)
    relief = relief_bytes / np.float32(255)

    corner = np.float32(0.06)
    out = np.hypot(np.clip(np.abs(u) - 1 + corner, 0, None), np.clip(np.abs(v) - 1 + corner, 0, None)) - corner
    board = _step(-out, 4 / size)
    relief = ndimage.gaussian_filter(relief, size / 260)
    weave = np.sin(u * np.float32(170)) * np.sin(v * np.float32(170))
    height = np.float32(0.10) * relief + np.float32(0.00035) * weave * (1 - metal) + np.float32(0.0004) * cloud
    height = height + np.float32(0.0003) * grain * (1 + 2 * metal)
    key, fill = _light(height, lamp), _light(height, (1.5, 0.8, 1.6))
    standing = _step(relief - np.float32(0.22), 0.1)
    reach = size / 90
    shadow = _cast(standing, reach * 1.2, reach, reach * 0.8)
    shadow = np.float32(0.65) * shadow * (1 - standing)

    body = np.float32(0.25) + np.float32(0.85) * key.diffuse + np.float32(0.15) * fill.diffuse
    light = colour * (body * (1 - np.float32(0.55) * metal) * (1 + np.float32(0.03) * grain))[..., None]
    coat = _sharpen(key.gloss, 32) * np.float32(0.16) + _sharpen(fill.gloss, 32) * np.float32(0.06)
    shine = _sharpen(key.gloss, 16) * np.float32(0.85) + _sharpen(fill.gloss, 16) * np.float32(0.38)
    light = light + (coat * (1 - metal))[..., None] + colour * (shine * metal)[..., None]
    light = light * (1 - shadow)[..., None]
    if defect is not None and defect.kind == "residue":
        r = defect.rng
        centre = (float(r.uniform(-0.7, 0.7)), float(r.uniform(-0.7, 0.7)))
        blob = _blob(r, size, centre, r.uniform(0.08, 0.2), 0.3)
        film = _step(blob, 0.05) * (np.float32(0.35) + np.float32(0.65) * np.exp(-np.abs(blob) / np.float32(0.02)))
        speckle = np.clip(1 + np.float32(0.35) * _noise(r, size, size / 8, size / 8), 0, 2)
        veil = np.asarray([0.55, 0.53, 0.45], np.float32) * body[..., None]
        light = _paint(light, veil, film * speckle * np.float32(r.uniform(0.25, 0.55)))

    around = _cast(board, size / 60, size / 70, size / 60)
    table = (
        np.asarray([0.40, 0.39, 0.375], np.float32)
        * (1 + np.float32(0.015) * grain + np.float32(0.01) * cloud)[..., None]
    )
    table = table * (1 - np.float32(0.6) * around)[..., None]
    return _paint(table, light, board)


_PRODUCTS: dict[str, _Product] = {
    "board": _Product(_board, ("missing_part", "open_track", "residue", "scratch", "skewed_part", "solder_bridge")),
    "fabric": _Product(_fabric, ("broken_thread", "foreign_fibre", "hole", "misweave", "stain")),
    "flange": _Product(_flange, ("chip", "dent", "missing_hole", "rust", "scratch")),
}

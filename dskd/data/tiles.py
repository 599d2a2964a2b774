"""Large images as square tiles, and the tiles' maps as one map of the image.

Tiles start at multiples of `Geometry.alignment`, so that the same pixels give the same features wherever they lie in
an image.
The map of an image has one value per `MAP_STRIDE` pixels along each side: no teacher here is finer, and the map of
100 megapixels then takes 25 MB.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dskd.data.depth import PixelScale
from dskd.data.geometry import ALIGNMENT, Frame, Geometry, LargeCanvas
from dskd.data.images import in_threads, load_framed
from dskd.data.samples import Sample

MAP_STRIDE = 4
"""Pixels of an image per value of its map, along one side: the stride of a ResNet's first level."""
_LEAST_INSIDE = 0.05
"""A tile with a smaller share of pixels that are scored teaches nothing."""


class TilePlace(NamedTuple):
    """Where a tile lies."""

    image: int
    """Index of the image."""
    top: int
    left: int


def tile_starts(length: int, tile: int, overlap: int, alignment: int = ALIGNMENT) -> list[int]:
    """First pixels of the tiles along a side of `length` pixels, multiples of `alignment`.

    The last tile may reach beyond the side, by fewer pixels than `alignment`.

    >>> tile_starts(500, 256, 32)
    [0, 224, 256]
    >>> tile_starts(100, 256, 32)
    [0]
    """
    last = max(-(-length // alignment) * alignment - tile, 0)
    return [*range(0, last, tile - overlap), last]


def cut(canvas: npt.NDArray[np.generic] | LargeCanvas, top: int, left: int, tile: int) -> npt.NDArray[np.generic]:
    """The tile of a canvas (h, w, …); beyond the canvas's end it is mirrored."""
    rows, columns = (_mirrored(start, tile, side) for start, side in zip((top, left), canvas.shape, strict=False))
    first, last = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
    part: npt.NDArray[np.generic] = canvas[first[0] : last[0], first[1] : last[1]]
    if part.shape[0] == part.shape[1] == tile:
        return part
    mirrored: npt.NDArray[np.generic] = part[(rows - first[0])[:, None], columns - first[1]]
    return mirrored


def _mirrored(start: int, count: int, length: int) -> npt.NDArray[np.intp]:
    steps = np.arange(start, start + count) % (2 * length)
    return np.minimum(steps, 2 * length - 1 - steps)


def tile_places(frames: Sequence[Frame], geometry: Geometry) -> list[TilePlace]:
    """All tiles of images with these frames that lie in the region of interest, image by image."""
    places = []
    tile = geometry.tile
    for index, frame in enumerate(frames):
        width, height = frame.canvas
        inside = geometry.inside(frame, MAP_STRIDE)
        side = tile // MAP_STRIDE
        for top in tile_starts(height, tile, geometry.overlap, geometry.alignment):
            for left in tile_starts(width, tile, geometry.overlap, geometry.alignment):
                row, column = top // MAP_STRIDE, left // MAP_STRIDE
                if inside[row : row + side, column : column + side].mean() >= _LEAST_INSIDE:
                    places.append(TilePlace(index, top, left))
    return places


def some_places(places: Sequence[TilePlace], limit: int, seed: int) -> list[TilePlace]:
    """At most `limit` of the tiles, drawn without replacement, in their order."""
    if len(places) <= limit:
        return list(places)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:limit])
    return [places[index] for index in chosen]


def load_tiles(
    paths: Sequence[Path],
    places: Sequence[TilePlace],
    geometry: Geometry,
    scale: PixelScale | None = None,
    out: npt.NDArray[np.uint8] | None = None,
    *,
    progress: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Pixels (N, T, T, 3) of tiles of these images, each image decoded once; written into `out` if given.

    With `progress` a progress bar of that name counts the images. Errors as `load_framed`.
    """
    tile = geometry.tile
    pixels = np.empty((len(places), tile, tile, 3), np.uint8) if out is None else out
    of_image: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        of_image.setdefault(place.image, []).append(index)

    def load(image: int) -> None:
        canvas = load_framed(paths[image], geometry, scale).rgb
        for index in of_image[image]:
            pixels[index] = cut(canvas, places[index].top, places[index].left, tile)

    used = list(of_image)
    in_threads(load, used, [paths[image] for image in used], progress=progress)
    return pixels


def tiles_inside(
    frames: Sequence[Frame], places: Sequence[TilePlace], geometry: Geometry
) -> npt.NDArray[np.bool_] | None:
    """Which pixels (N, T, T) of the tiles are scored; None if all are."""
    whole = geometry.region is None or geometry.region.is_box
    if whole and all(frame.place == (0, 0, *frame.canvas) for frame in frames):
        return None
    found = np.empty((len(places), geometry.tile, geometry.tile), np.bool_)
    inside = _once_per_image(lambda image: geometry.inside(frames[image]))
    for index, place in enumerate(places):
        found[index] = cut(inside(place.image), place.top, place.left, geometry.tile)
    return found


def tile_masks(
    samples: Sequence[Sample],
    masks: Callable[[Sample], npt.NDArray[np.bool_]],
    frames: Sequence[Frame],
    places: Sequence[TilePlace],
    geometry: Geometry,
) -> npt.NDArray[np.bool_]:
    """Defect pixels (N, T, T) of the tiles; `masks` reads the mask (H, W) of a sample that has one."""
    found = np.zeros((len(places), geometry.tile, geometry.tile), np.bool_)
    mask = _once_per_image(lambda image: geometry.mask(masks(samples[image]), frames[image]))
    for index, place in enumerate(places):
        if samples[place.image].mask is not None:
            found[index] = cut(mask(place.image), place.top, place.left, geometry.tile)
    return found


def defective_tiles(
    samples: Sequence[Sample],
    masks: Callable[[Sample], npt.NDArray[np.bool_]],
    frames: Sequence[Frame],
    places: Sequence[TilePlace],
    geometry: Geometry,
) -> list[bool]:
    """Which tiles have a defect, as `tile_masks`, but with one image's mask in memory at a time.

    Every tile of a defective sample without a mask has one.
    """
    found, side = [], geometry.tile // MAP_STRIDE
    marked = _once_per_image(lambda image: on_map(geometry.mask(masks(samples[image]), frames[image])))
    for place in places:
        sample = samples[place.image]
        if sample.mask is None:
            found.append(sample.is_defective)
        else:
            row, column = place.top // MAP_STRIDE, place.left // MAP_STRIDE
            found.append(bool(marked(place.image)[row : row + side, column : column + side].any()))
    return found


def _once_per_image(
    read: Callable[[int], npt.NDArray[np.bool_]],
) -> Callable[[int], npt.NDArray[np.bool_]]:
    """`read` of an image's number, once for its tiles, which follow each other; only the last image is kept."""
    return functools.lru_cache(maxsize=1)(read)


def on_map(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A mask (h, w) with one value per `MAP_STRIDE` pixels along each side: true if any of them is."""
    rows, columns = (np.arange(0, side, MAP_STRIDE) for side in mask.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)


def stitched_map(
    canvas: npt.NDArray[np.uint8] | LargeCanvas,
    inside: npt.NDArray[np.bool_],
    geometry: Geometry,
    blur_sigma: float,
    score_tiles: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]],
    batch_size: int,
) -> npt.NDArray[np.float32]:
    """The map (ceil(h / 4), ceil(w / 4)) of a canvas (h, w, 3) from the maps of its tiles, 0 where not `inside`.

    `score_tiles` gives the maps (B, T / 4, T / 4), not blurred, of at most `batch_size` tiles (B, T, T, 3). Where
    tiles overlap their maps are averaged, with weights that fall towards a tile's border, where the network sees
    nothing beyond it. Blurred as a whole, so that no seam comes from there; `blur_sigma` in values of the map.
    """
    tile, overlap = geometry.tile, geometry.overlap
    side = tile // MAP_STRIDE
    tops, lefts = (tile_starts(length, tile, overlap, geometry.alignment) for length in canvas.shape[:2])
    sums = np.zeros(((tops[-1] + tile) // MAP_STRIDE, (lefts[-1] + tile) // MAP_STRIDE), np.float32)
    weights = np.zeros_like(sums)
    down, across = (_weights(side, overlap // MAP_STRIDE, starts) for starts in (tops, lefts))
    scored = np.zeros(sums.shape, np.bool_)
    scored[: inside.shape[0], : inside.shape[1]] = inside

    def on_the_map(start: int) -> slice:
        return slice(start // MAP_STRIDE, start // MAP_STRIDE + side)

    places = [(top, left) for top in tops for left in lefts if scored[on_the_map(top), on_the_map(left)].any()]
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        maps = score_tiles(np.stack([cut(canvas, top, left, tile) for top, left in batch]))
        for (top, left), heat in zip(batch, maps, strict=True):
            where, weight = (on_the_map(top), on_the_map(left)), down[top][:, None] * across[left]
            sums[where] += weight * heat
            weights[where] += weight
    np.divide(sums, weights, out=sums, where=weights > 0)
    found = sums[: inside.shape[0], : inside.shape[1]]
    if blur_sigma > 0:
        found = ndimage.gaussian_filter(found, blur_sigma, mode="reflect", truncate=4.0)
    return np.where(inside, found, np.float32(0))


def _weights(side: int, overlap: int, starts: Sequence[int]) -> dict[int, npt.NDArray[np.float32]]:
    """Weights (side,) along the tile of each start: next to nothing in the outer 3/8 of the overlap, then rising to 1
    within 1/4 of it.

    The features near a tile's border are made of the zeros beyond it. Of several windows none left weaker seams. Where
    the tile's border is the image's there is nothing better, and the weight is 1.
    """
    ramp = np.clip((np.arange(side) + 0.5 - overlap * 3 / 8) / max(overlap / 4, 1), 1e-6, 1).astype(np.float32)
    ones = np.ones_like(ramp)
    return {
        start: (ones if start == starts[0] else ramp) * (ones if start == starts[-1] else ramp[::-1])
        for start in starts
    }


def tiled_score(heat: npt.NDArray[np.float32], geometry: Geometry, top_fraction: float) -> float:
    """The image's score: its map's maximum, or the mean of as many highest values as are that share of one tile."""
    count = max(1, round(top_fraction * (geometry.tile // MAP_STRIDE) ** 2))
    values = heat.ravel()
    if top_fraction == 0 or count >= values.size:
        return float(values.max() if top_fraction == 0 else values.mean())
    return math.fsum(np.partition(values, values.size - count)[-count:].tolist()) / count

"""The images of one category as training needs them: whole on their canvas or as tiles, in the region of interest."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dskd.data.cache import ArrayCache
from dskd.data.datasets import fingerprint
from dskd.data.depth import PixelScale
from dskd.data.geometry import Frame, Geometry
from dskd.data.images import frame_of, load_images, load_inside
from dskd.data.samples import Sample
from dskd.data.tiles import TilePlace, load_tiles, some_places, tile_places, tiles_inside
from dskd.evaluate import LabelledImages, label, label_tiles
from dskd.model.features import content_sha256
from dskd.model.teacher import Teacher


class Seen(NamedTuple):
    """Images as the network sees them, or their tiles."""

    images: npt.NDArray[np.uint8]
    """(N, H, W, 3)"""
    inside: npt.NDArray[np.bool_] | None
    """(N, H, W), which pixels are scored; None: all."""
    sha256: str
    """Of the files."""
    frames: tuple[Frame, ...] = ()
    """Of the files that tiles were cut from."""
    places: tuple[TilePlace, ...] = ()

    @property
    def content(self) -> str:
        """SHA-256 of the pixels, and of which of them are scored."""
        found = content_sha256(self.images)
        if self.inside is not None:
            found += hashlib.sha256(np.packbits(self.inside).tobytes()).hexdigest()
        return found

    def none(self) -> "Seen":
        """No image, of the same size."""
        return Seen(self.images[:0], None, "")


class ImageReader(NamedTuple):
    """How all images of one category are read."""

    geometry: Geometry
    scale: PixelScale
    cache: ArrayCache | None
    progress: bool
    """Count the files on the terminal."""
    seed: int
    """Which tiles are drawn where there are too many."""
    on_note: Callable[[str], object]

    def read(self, samples: Sequence[Sample], what: str, limit: int | None = None) -> Seen:
        """The images of the samples, or at most `limit` of their tiles; from the cache if they are there."""
        paths = [sample.path for sample in samples]
        label = f"reading {what}" if self.progress else None
        geometry, scale, content = self.geometry, self.scale, fingerprint(paths)
        if geometry.tile:
            frames = tuple(frame_of(path, geometry) for path in paths)
            every = tile_places(frames, geometry)
            places = tuple(some_places(every, limit or len(every), self.seed))
            self.on_note(f"{what}: {len(places)} of {len(every)} tiles of {geometry.tile} x {geometry.tile} pixels.")
            where = hashlib.sha256(repr((places, geometry)).encode()).hexdigest()
            tiles = self._cached(
                f"upright tiles|{scale}|{content}|{where}",
                len(places),
                lambda out: load_tiles(paths, places, geometry, scale, out, progress=label),
            )
            return Seen(tiles, tiles_inside(frames, places, geometry), content, frames, places)
        pixels = self._cached(
            f"upright bilinear pixels|{scale}|{content}{'' if geometry.is_plain else f'|{geometry}'}",
            len(paths),
            lambda out: load_images(paths, geometry, out, scale=scale, progress=label),
        )
        return Seen(pixels, load_inside(paths, geometry), content)

    def _cached(self, key: str, count: int, fill: Callable[[npt.NDArray[np.uint8]], object]) -> npt.NDArray[np.uint8]:
        shape = (count, self.geometry.height, self.geometry.width, 3)
        if self.cache is not None:
            return self.cache.get(key, shape, np.uint8, fill)
        pixels = np.empty(shape, np.uint8)
        fill(pixels)
        return pixels

    def labelled(self, samples: Sequence[Sample], seen: Seen) -> LabelledImages:
        """What `read` saw of the samples, with labels and masks."""
        if self.geometry.tile:
            return label_tiles(samples, seen.frames, seen.places, seen.images, self.geometry)
        return label(samples, seen.images, self.geometry, self.on_note)

    def with_known_defects(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that `labelled` can label: with tiles no defective one without a mask."""
        if not self.geometry.tile:
            return list(samples)
        kept = [sample for sample in samples if sample.mask is not None or not sample.is_defective]
        if len(kept) < len(samples):
            self.on_note(
                f"{len(samples) - len(kept)} defective images without a mask are left out: nobody knows which of "
                "their tiles is defective."
            )
        return kept


def check_input(teacher: Teacher, backbone: str, geometry: Geometry, device: torch.device) -> None:
    """Raise ValueError if the backbone takes no input of this width and height, as some transformers do not."""
    if geometry.width == geometry.height:
        return
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, 3, geometry.height, geometry.width, device=device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"backbone {backbone} takes no images of {geometry.width} x {geometry.height} pixels "
            f"({str(error).splitlines()[0]}); use --resize square or letterbox."
        ) from None

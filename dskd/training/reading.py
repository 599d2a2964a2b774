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
from dskd.data.images import checked_mask, frame_of, load_images, load_inside
from dskd.data.samples import Sample
from dskd.data.tiles import TilePlace, defective_tiles, load_tiles, some_places, tile_places, tiles_inside
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
    is_whole: bool = False
    """Whether a defective image is so all over, as in one-class novelty: then its tiles need no mask."""

    def read(self, samples: Sequence[Sample], what: str, limit: int | None = None) -> Seen:
        """The images of the samples, or (at most `limit` of) their tiles; from the cache if they are there."""
        if self.geometry.tile:
            frames = self._frames(samples)
            every = tile_places(frames, self.geometry)
            return self._tiles(samples, what, frames, some_places(every, limit or len(every), self.seed), len(every))
        paths = [sample.path for sample in samples]
        content = fingerprint(paths)
        pixels = self._cached(
            f"upright bilinear pixels|{self.scale}|{content}{'' if self.geometry.is_plain else f'|{self.geometry}'}",
            len(paths),
            lambda out: load_images(paths, self.geometry, out, scale=self.scale, progress=self._label(what)),
        )
        return Seen(pixels, load_inside(paths, self.geometry), content)

    def read_labelled(self, samples: Sequence[Sample], what: str, limit: int) -> tuple[LabelledImages, str]:
        """The images of the samples with labels and masks, or at most `limit` of their tiles, and SHA-256 of the files.

        Of tiles at least half are defective, if there are so many.
        """
        geometry = self.geometry
        if not geometry.tile:
            seen = self.read(samples, what, limit)
            return label(samples, seen.images, geometry, self.on_note), seen.sha256
        frames = self._frames(samples)
        every = tile_places(frames, geometry)
        known = list(zip(every, defective_tiles(samples, checked_mask, frames, every, geometry), strict=True))
        good = [place for place, is_defective in known if not is_defective]
        bad = [place for place, is_defective in known if is_defective]
        bad = some_places(bad, max(limit // 2, limit - len(good)), self.seed)
        places = sorted([*bad, *some_places(good, limit - len(bad), self.seed)])
        seen = self._tiles(samples, what, frames, places, len(every))
        return label_tiles(samples, frames, places, seen.images, geometry), seen.sha256

    def _tiles(
        self, samples: Sequence[Sample], what: str, frames: Sequence[Frame], places: Sequence[TilePlace], num_all: int
    ) -> Seen:
        geometry, paths = self.geometry, [sample.path for sample in samples]
        content = fingerprint(paths)
        self.on_note(f"{what}: {len(places)} of {num_all} tiles of {geometry.tile} x {geometry.tile} pixels.")
        where = hashlib.sha256(repr((places, geometry)).encode()).hexdigest()
        tiles = self._cached(
            f"upright tiles|{self.scale}|{content}|{where}",
            len(places),
            lambda out: load_tiles(paths, places, geometry, self.scale, out, progress=self._label(what)),
        )
        return Seen(tiles, tiles_inside(frames, places, geometry), content)

    def _frames(self, samples: Sequence[Sample]) -> list[Frame]:
        return [frame_of(sample.path, self.geometry) for sample in samples]

    def _label(self, what: str) -> str | None:
        return f"reading {what}" if self.progress else None

    def _cached(self, key: str, count: int, fill: Callable[[npt.NDArray[np.uint8]], object]) -> npt.NDArray[np.uint8]:
        shape = (count, self.geometry.height, self.geometry.width, 3)
        if self.cache is not None:
            return self.cache.get(key, shape, np.uint8, fill)
        pixels = np.empty(shape, np.uint8)
        fill(pixels)
        return pixels

    def with_known_defects(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that `read_labelled` can label: with tiles no defective one without a mask, unless `is_whole`."""
        if not self.geometry.tile or self.is_whole:
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

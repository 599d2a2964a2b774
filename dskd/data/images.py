"""Read pixels from image files.

All image reading uses `read_pixels`: it rotates the image upright by its EXIF orientation, accepts only one page,
converts to 8 bits by the category's scale, and puts transparent images on black. An image that cannot be read in this
way is refused with an error that names the file.
"""

import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from tqdm import tqdm

from dskd.data.depth import Levels, PixelScale, check_finite, high_byte
from dskd.data.files import UnreadableImageError, check_regular
from dskd.data.geometry import Frame, Geometry, LargeCanvas, is_same_shape
from dskd.data.samples import Sample

MAX_PIXELS = 512_000_000
"""Images with more pixels are refused as decompression bombs, unless the environment variable DSKD_MAX_MEGAPIXELS sets
another limit. Line scans of more than 300 million pixels are still accepted."""
MAX_MEGAPIXELS = "DSKD_MAX_MEGAPIXELS"
"""Environment variable that replaces `MAX_PIXELS` in this process and its child processes, in millions of pixels."""
DECODING_BYTES = 1 << 30
"""Bytes of memory that all threads together may use for decoding; an image that needs more is decoded alone."""
_BYTES_PER_PIXEL = 12
"""Peak memory of decoding and resizing, measured with Pillow on RGB: two buffers of 4 bytes, and a reserve."""
_MAX_THREADS = 16
_PICTURE_SIDE = 1024
_SOFT_MASK_PEAK = 250
_FEW_VALUES = 16
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image with each EXIF orientation upright."""
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LOW_BYTES = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Pillow's 16-bit unpackers keep the high byte; with the byte order swapped in this way they keep the low one."""

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # our own errors report what is wrong with a file


class Pixels(NamedTuple):
    """One image as input for a network."""

    rgb: npt.NDArray[np.uint8]
    """(H, W, 3)"""
    num_clipped: int
    """Number of values out of the scale's range, in images of more than 8 bits."""


def read_pixels(path: Path, scale: PixelScale | None = None) -> Pixels:
    """RGB pixels at the file's own size, upright; without `scale`, 16-bit values lose their low 8 bits.

    Raises UnreadableImageError, which names the file, if it is no plain file, cannot be decoded, has several pages, is
    too large, or has values that do not fit `scale`.
    """
    image, num_clipped = _in_rgb(path, scale)
    return Pixels(np.asarray(image), num_clipped)


def read_image(path: Path, scale: PixelScale | None = None) -> npt.NDArray[np.uint8]:
    """RGB pixels (H, W, 3) at the file's own size; errors as `read_pixels`."""
    return read_pixels(path, scale).rgb


class Framed(NamedTuple):
    """One image as input for a network, with the way back to its own pixels."""

    rgb: npt.NDArray[np.uint8] | LargeCanvas
    """(h, w, 3), the canvas: the network's input, or for tiles the region of interest at its own size."""
    frame: Frame
    picture: npt.NDArray[np.uint8]
    """(H, W, 3), the whole image, reduced to at most 1024 pixels a side: what people are shown."""
    num_clipped: int = 0
    """Number of values out of the scale's range, in images of more than 8 bits."""


def load_framed(path: Path, geometry: Geometry, scale: PixelScale | None = None) -> Framed:
    """An image on its canvas; errors as `read_pixels`, also if the region of interest does not fit the image."""
    image, num_clipped = _in_rgb(path, scale)
    with _named(path):
        return place_on_canvas(image, geometry, num_clipped)


def place_on_canvas(image: Image.Image, geometry: Geometry, num_clipped: int) -> Framed:
    """An RGB image on its canvas; ValueError if the region of interest does not fit the image."""
    frame = geometry.frame(*image.size)
    share = min(1.0, _PICTURE_SIDE / max(image.size))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    picture = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) if share < 1 else image)
    return Framed(geometry.canvas(image, frame), frame, picture, num_clipped)


def frame_of(path: Path, geometry: Geometry) -> Frame:
    """The frame of an image from its header; errors as `load_framed`."""
    size = image_size(path)
    with _named(path):
        return geometry.frame(*size)


def load_inside(paths: Sequence[Path], geometry: Geometry) -> npt.NDArray[np.bool_] | None:
    """Which pixels (N, h, w) of the images' canvases are scored, from their headers; None if all are."""
    if not geometry.is_masked:
        return None
    found = np.empty((len(paths), geometry.height, geometry.width), np.bool_)
    for index, path in enumerate(paths):
        found[index] = geometry.inside(frame_of(path, geometry))
    return found


def read_levels(path: Path) -> Levels | None:
    """Lowest and highest value of an image of more than 8 bits; None for 8-bit images, which are not decoded.

    Errors as `read_pixels`, also if a value is not finite.
    """
    with _opened(path) as image:
        if image is not None and not _is_deep(image):
            return None
    decoded = _decoded(path)
    if isinstance(decoded, Image.Image):
        return None
    values, stated = decoded.values, decoded.stated
    is_float = values.dtype.kind == "f"
    if is_float:
        with _named(path):
            check_finite(values)
    return Levels(float(values.min()), float(values.max()), is_float, stated)


def find_scale(paths: Sequence[Path]) -> PixelScale:
    """The scale of a category with these training images, read on all cores; errors as `read_levels`."""
    return PixelScale.of([levels for levels in in_threads(read_levels, paths) if levels is not None])


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from its header; errors as `read_pixels`."""
    with _opened(path) as image:
        if image is None:
            values = _tiff(path).values
            return values.shape[1], values.shape[0]
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # in a TIFF Pillow has swapped the sides already
        return (image.height, image.width) if turned else (image.width, image.height)


def check_header(path: Path) -> None:
    """Raise ValueError, which names the file, if it has no image header or is an incomplete PNG; nothing is decoded."""
    with _opened(path) as image, _named(path):
        if image is not None and image.format == "PNG" and not _ends_as_png(path):
            image.verify()


def _ends_as_png(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(12, path.stat().st_size), os.SEEK_END)
        return b"IEND" in file.read()


def read_mask(path: Path, above: int = 127) -> npt.NDArray[np.bool_]:
    """Defect pixels (H, W) of a mask file at its own size, upright; the threshold depends on the mask's values.

    With `above` 0 every value except 0 is a defect, also palette indices and 16-bit values. Otherwise, a mask with
    - two values: the higher one is the defect;
    - grey levels up to white: those above the middle (`above` for 8 bits) are defects;
    - a few low values: all except 0 are defects;
    - grey levels up to another peak: those above half of it are defects.
    Of a palette the colours are used if all are grey, otherwise the indices. Of a colour image the strongest channel
    is used; if all visible pixels have the same colour, the alpha channel is used. Errors as `read_pixels`.
    """
    decoded = _decoded(path)
    if not isinstance(decoded, Image.Image):
        values = decoded.values
        if values.ndim == 3:
            values = values[..., : min(3, values.shape[2])].max(axis=2)
        with _named(path):
            check_finite(values)
        return values > 0 if above == 0 else values > _cut(values, 127)
    if above == 0 and decoded.mode in ("1", "L", "P"):
        return np.asarray(decoded) > 0
    grey = _grey_mask(decoded)
    return grey > (above if above == 0 else _cut(grey, above))


def resize_mask(mask: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """A mask (H, W) resized to (size, size), each pixel from the nearest one."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def load_images(
    paths: Sequence[Path],
    geometry: Geometry,
    out: npt.NDArray[np.uint8] | None = None,
    *,
    scale: PixelScale | None = None,
    on_clipped: Callable[[Path, int], object] = lambda path, count: None,
    progress: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Canvases (N, h, w, 3) of many files, decoded on all cores; written into `out` if given.

    `on_clipped` is called with each image that has values out of the range of `scale`, and with their number. With
    `progress` a progress bar of that name on the terminal counts the files. Errors as `load_framed`.
    """
    pixels = np.empty((len(paths), geometry.height, geometry.width, 3), np.uint8) if out is None else out

    def load(index: int) -> int:
        framed = load_framed(paths[index], geometry, scale)
        pixels[index] = framed.rgb
        return framed.num_clipped

    counts = in_threads(load, range(len(paths)), paths, progress=progress)
    for path, num_clipped in zip(paths, counts, strict=True):
        if num_clipped:
            on_clipped(path, num_clipped)
    return pixels


def load_masks(
    samples: Sequence[Sample],
    geometry: Geometry,
    on_note: Callable[[str], object] = lambda note: None,
    on_outside: Callable[[int], object] = lambda index: None,
) -> npt.NDArray[np.bool_]:
    """Defect pixels (N, h, w) on the images' canvases; all false for a sample without a mask.

    `on_note` is called with a message for each mask that marks more than half of its image, `on_outside` with the
    index of each sample whose defect lies outside of the region of interest. Raises ValueError as `read_pixels`, and
    if a mask has another aspect ratio than its image, so that it would mark the wrong place.
    """
    masks = np.zeros((len(samples), geometry.height, geometry.width), np.bool_)
    for index, sample in enumerate(samples):
        if sample.mask is not None:
            mask = checked_mask(sample, on_note)
            if geometry.is_outside(mask):
                on_outside(index)
            masks[index] = geometry.mask(mask, frame_of(sample.path, geometry))
    return masks


def checked_mask(sample: Sample, on_note: Callable[[str], object] = lambda note: None) -> npt.NDArray[np.bool_]:
    """Defect pixels (H, W) of a sample that has a mask, at the mask's own size; notes and errors as `load_masks`."""
    assert sample.mask is not None
    mask = read_mask(sample.mask, sample.mask_above)
    width, height = image_size(sample.path)
    if not is_same_shape((mask.shape[1], mask.shape[0]), (width, height)):
        raise ValueError(
            f"mask {sample.mask} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}: "
            "another shape, so it may mark the wrong place; draw it again, or remove it."
        )
    if (share := float(mask.mean())) > 0.5:
        on_note(f"mask {sample.mask} marks {share:.0%} of its image as defect; is it inverted?")
    return mask


T = TypeVar("T")
S = TypeVar("S")


def in_threads(
    work: Callable[[T], S],
    items: Sequence[T],
    files: Sequence[Path] | None = None,
    *,
    progress: str | None = None,
    also: Callable[[T], Sequence[Path]] = lambda item: (),
) -> list[S]:
    """`work` of every item, in order, with one thread per core, but only as many at once as fit into memory.

    `files` are the images that the items decode, by default the items themselves; `also` gives more files of an item.
    """
    names: Sequence[Any] = items if files is None else files

    def guarded(index: int) -> S:
        with _room.taken(sum(_decoding_bytes(path) for path in (names[index], *also(items[index])))):
            return work(items[index])

    threads = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MAX_THREADS
    )
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(progress_bar(pool.map(guarded, range(len(items))), progress, len(items), "image"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Room:
    """Memory that several threads share; a thread that needs more than is free waits, or runs alone."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._taken = 0

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._taken == 0 or self._taken + num_bytes <= DECODING_BYTES)
            self._taken += num_bytes
        try:
            yield
        finally:
            with self._free:
                self._taken -= num_bytes
                self._free.notify_all()


_room = _Room()


def _decoding_bytes(path: Path) -> int:
    """Bytes that decoding a file may take, from its header; 0 if it is unreadable, which reading reports later."""
    try:
        with _opened(path) as image:
            if image is None:
                return path.stat().st_size * 4
            return image.width * image.height * (_BYTES_PER_PIXEL * (2 if _is_deep(image) else 1))
    except (ValueError, OSError):
        return 0


class _Deep(NamedTuple):
    """Values of more than 8 bits per channel."""

    values: npt.NDArray[Any]
    """(H, W) grey, or (H, W, C): grey and alpha, RGB, or RGB and alpha."""
    stated: int | None


_limit_lock = threading.Lock()
_num_readers = 0
_pillows_limit: int | None = None


@contextmanager
def _own_limit() -> Iterator[None]:
    """Turn off Pillow's pixel limit, since `MAX_PIXELS` replaces it; turn it on again when no thread reads."""
    global _num_readers, _pillows_limit
    with _limit_lock:
        if _num_readers == 0:
            _pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _num_readers += 1
    try:
        yield
    finally:
        with _limit_lock:
            _num_readers -= 1
            if _num_readers == 0:
                Image.MAX_IMAGE_PIXELS = _pillows_limit


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn errors of decoders, and our own errors without a file name, into one line that names the file."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files make decoders raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{path} is not a readable image ({reason}); replace or remove it.") from None


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile | None]:
    """The file's only page, not decoded yet; None for a TIFF that Pillow does not support."""
    check_regular(path)
    with _named(path), _own_limit():
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            if _is_tiff(path):
                yield None
                return
            raise
        with image:
            _check_pixels(path, image.width, image.height)
            if (num_pages := _num_pages(image)) > 1:
                raise UnreadableImageError(
                    f"{path} has {num_pages} pages, of which one alone could be seen; split it into files."
                )
            yield image


def _check_pixels(path: Path, width: int, height: int) -> None:
    limit = max_pixels()
    if width * height > limit:
        raise UnreadableImageError(
            f"{path} is refused as a decompression bomb: {width} x {height} pixels are more than {limit}; where it is "
            f"an image of yours, allow more with --max-megapixels or ${MAX_MEGAPIXELS}."
        )


def max_pixels() -> int:
    """The largest number of pixels that an image file may have.

    Raises ValueError if the environment variable is no positive number.
    """
    given = os.environ.get(MAX_MEGAPIXELS)
    if given is None:
        return MAX_PIXELS
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"${MAX_MEGAPIXELS} must be a number of millions of pixels above 0, got {given!r}.")
    return int(limit * 1e6)


def _num_pages(image: ImageFile.ImageFile) -> int:
    """Number of pages or frames, without the previews that cameras and microscopes add."""
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return 1
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    count = 0
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        count += page == 0 or not int(image.tag_v2.get(254, 0)) & 0b101  # type: ignore[attr-defined]
    image.seek(0)
    return count


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF_SIGNATURES


def _rawmode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args)


def _is_deep(image: ImageFile.ImageFile) -> bool:
    rawmodes = {_rawmode(tile) for tile in image.tile}
    return (
        image.mode[0] in "IF"
        # 16-bit print colours, and 16-bit premultiplied colours, are read by their high byte
        or any(";16" in name and not name.startswith(("CMYK", "RGBa")) for name in rawmodes)
        or _is_odd_tiff(image)
    )


def _is_odd_tiff(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow reads wrong values from a TIFF: signed bytes, unsigned 32 bits, deep colours in planes."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kind, are_planes = max(tags.get(258, (1,))), tags.get(339, (1,))[0], tags.get(284, 1) == 2
    return bool((bits == 32 and kind == 1) or (bits == 8 and kind == 2) or (bits > 8 and are_planes))


def _decoded(path: Path) -> "Image.Image | _Deep":
    """The upright image: a Pillow image of 8 bits, or the values of a deeper one."""
    with _opened(path) as image:
        if image is None or _is_odd_tiff(image):
            return _tiff(path)
        is_deep, rawmodes = _is_deep(image), {_rawmode(tile) for tile in image.tile}
        if image.format != "TIFF":
            # Before its metadata, for which Pillow decodes a PNG: damaged pixels must not pass for odd metadata.
            image.load()
        orientation = _orientation(image)
        if image.format == "TIFF":
            if orientation >= 5:
                image.filename = ""  # Pillow would map the file with width and height swapped
            orientation = 1  # Pillow rotates it
        if not is_deep:
            image.load()
            return image.transpose(_TURNS[orientation]) if orientation != 1 else image
        found = _deep(path, image, rawmodes)
        return found._replace(values=_upright(found.values, orientation))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata, of an image that may be intact, make Pillow raise errors of any type
        return 1
    return int(found) if found in _TURNS else 1


def _deep(path: Path, image: ImageFile.ImageFile, rawmodes: set[str]) -> _Deep:
    stated = None
    if image.format == "TIFF":
        stated = _stated(image.tag_v2.get(281), image.tag_v2.get(258, (16,)))  # type: ignore[attr-defined]
    if image.mode[0] in "IF":
        image.load()
        return _Deep(np.asarray(image), stated)
    (rawmode,) = rawmodes
    # Pillow keeps only the high byte of 16-bit colours; a second decoding with another raw mode gives the low byte.
    if rawmode.startswith("LA"):
        both = _decoded_as(path, "RGBA").astype(np.uint16)
        return _Deep(both[..., 0::2] << 8 | both[..., 1::2], stated)
    image.load()
    high = np.asarray(image).astype(np.uint16)
    name, _, order = rawmode.partition(";16")
    return _Deep(high << 8 | _decoded_as(path, f"{name};16{_LOW_BYTES[order]}"), stated)


def _decoded_as(path: Path, rawmode: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        (tile, *others) = image.tile
        args = (rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode
        image.tile = [each._replace(args=args) for each in (tile, *others)]
        return np.asarray(image)


def _stated(highest: Any, bits: Any) -> int | None:
    value = max(highest) if isinstance(highest, tuple) else highest
    return int(value) if isinstance(value, int) and 0 < value < 2 ** max(bits) - 1 else None


def _tiff(path: Path) -> _Deep:
    """Read a TIFF that Pillow cannot read, or reads wrongly: floating-point colours, 32 and 64 bits, …"""
    with _named(path):
        try:
            with tifffile.TiffFile(path) as file:
                every = [page.aspage() for page in file.pages]
                pages = [page for page in every if not page.is_reduced and not page.is_mask]
                if len(pages) != 1:
                    raise UnreadableImageError(
                        f"{path} has {len(pages)} pages, of which one alone could be seen; split it into files."
                    )
                (page,) = pages
                _check_pixels(path, page.imagewidth, page.imagelength)
                stated = _stated(page.tags.valueof(281), (page.bitspersample,))
                orientation = page.tags.valueof(274, 1)
                values = page.asarray()
                if page.axes == "SYX":
                    values = np.moveaxis(values, 0, -1)
        except tifffile.TiffFileError as error:
            raise ValueError(str(error)) from None
        if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] > 4) or values.dtype.kind not in "uifb":
            raise ValueError(f"its values are {values.dtype} of shape {values.shape}, not grey or RGB")
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
    return _Deep(_upright(values, orientation), stated)


def _upright(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn an array upright by its EXIF orientation, 1 to 8: which array sides are the picture's top and left."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)


def _in_rgb(path: Path, scale: PixelScale | None) -> tuple[Image.Image, int]:
    """The upright image in 8-bit RGB, and how many values were clipped."""
    decoded = _decoded(path)
    with _named(path):
        if isinstance(decoded, Image.Image):
            return in_rgb(decoded), 0
        values = decoded.values
        alpha = None
        if values.ndim == 3 and values.shape[2] in (2, 4):
            top = np.iinfo(values.dtype).max if values.dtype.kind != "f" else 1.0
            alpha, values = values[..., -1:] / top, values[..., :-1]
        levels, num_clipped = (high_byte(values), 0) if scale is None else scale.apply(values)
        if alpha is not None:
            levels = np.rint(levels * alpha.clip(0, 1)).astype(np.uint8)
        if levels.ndim == 3 and levels.shape[2] == 1:
            levels = levels[..., 0]
        image = Image.fromarray(levels)
        return (image if image.mode == "RGB" else image.convert("RGB")), num_clipped


def in_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit image of any mode in RGB, on black where it is transparent."""
    seen = _on_black(image)
    return seen if seen.mode == "RGB" else seen.convert("RGB")


def _on_black(image: Image.Image) -> Image.Image:
    """An opaque image unchanged; a transparent one on black, so that the colours of invisible pixels don't matter."""
    if not image.has_transparency_data:
        return image
    seen = image.convert("RGBA")
    ground = Image.new("RGBA", seen.size, (0, 0, 0, 255))
    ground.alpha_composite(seen)
    return ground


def _grey_mask(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey levels (H, W) of a mask in any 8-bit mode; see `read_mask`."""
    if image.mode == "P" and not image.has_transparency_data:
        entries = np.asarray(image)
        used = np.unique(entries)
        colours = _palette(image)[used]
        are_greys = bool((colours.max(axis=1) == colours.min(axis=1)).all())
        if not are_greys or colours.max() == 0:
            is_black = colours.max(axis=1) == 0
            ground = used[is_black] if is_black.sum() == 1 else np.zeros(1, entries.dtype)
            return np.where(np.isin(entries, ground), 0, 255).astype(np.uint8)
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        seen = np.asarray(image.convert("RGBA"))
        colours, alpha = seen[..., :3], seen[..., 3]
        visible = colours[alpha > 0]
        if alpha.min() < 255 and (not visible.size or (visible == visible[0]).all()):
            return np.asarray(alpha)
        return np.asarray((colours.max(axis=2).astype(np.uint16) * alpha // 255).astype(np.uint8))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(np.asarray(image.convert("RGB")).max(axis=2))


def _palette(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Colours (256, 3) of a palette's entries; black after its last entry."""
    table = np.zeros((256, 3), np.uint8)
    colours = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    table[: len(colours)] = colours
    return table


def _cut(values: npt.NDArray[Any], middle: int) -> float:
    """The level above which a mask's pixel is a defect; `middle` is the level for 8-bit grey, where white is 255."""
    found = np.flatnonzero(np.bincount(values.reshape(-1))) if values.dtype == np.uint8 else np.unique(values)
    top = float(found[-1])
    if found.size <= 2:
        return float(found[0]) if found.size == 2 else 0.0
    if _SOFT_MASK_PEAK <= top <= 255:
        return float(middle)
    if 64_000 <= top <= 65_535:
        return 32_767.0
    return 0.0 if found.size <= _FEW_VALUES else top / 2


def progress_bar(steps: Iterable[T], label: str | None, total: int, unit: str) -> Iterable[T]:
    """The same `steps`, counted by a bar on stderr that is removed at the end; no bar if `label` is None."""
    # tqdm's disable=None: draw only if stderr is a terminal
    return tqdm(steps, desc=label, total=total, unit=unit, leave=False, disable=None if label else True)

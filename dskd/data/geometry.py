"""Where an image's pixels lie on the canvas that a network sees, and the way back to the image's own pixels.

An image is cut to the region of interest's box, then brought to the canvas: stretched, or with its aspect ratio kept
between bars, or, for tiles, at its own size. Bars and what lies outside of the region are painted in a neutral colour,
so that nothing there can change a score.
"""

import base64
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dskd.config import DataConfig

NEUTRAL = (124, 116, 104)
"""ImageNet's mean colour: zero after ImageNet's normalisation."""
ALIGNMENT = 32
"""Tiles start at multiples of this: the stride of a ResNet's deepest level."""
_MAX_MASK_SIDE = 2048
"""Of the mask that a detector keeps: a finer one is reduced."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom; the last two are exclusive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionOfInterest:
    """The part of a category's images that is inspected, in pixels of an image of `width` × `height`.

    Images of another size but the same aspect ratio have it at their own scale.
    """

    width: int
    height: int
    left: int
    top: int
    right: int
    """Exclusive."""
    bottom: int
    """Exclusive."""
    outline: tuple[tuple[int, int], ...] = ()
    """Corners (x, y) of a polygon; empty if the whole box is of interest, or a mask says which part."""
    mask: str = ""
    """Base64 text of a PNG of the box's size, white where it is of interest."""

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= self.width and 0 <= self.top < self.bottom <= self.height):
            raise ValueError(
                f"the region of interest {self.left},{self.top},{self.right},{self.bottom} must be a box within its "
                f"image of {self.width} x {self.height} pixels: LEFT,TOP,RIGHT,BOTTOM."
            )
        if self.mask:
            self.pixels()

    @property
    def box(self) -> Box:
        return self.left, self.top, self.right, self.bottom

    @property
    def is_box(self) -> bool:
        return not self.outline and not self.mask

    def pixels(self) -> Image.Image:
        """The mask as a picture of the box's size.

        Raises ValueError if it is none.
        """
        wanted = (self.right - self.left, self.bottom - self.top)
        try:
            with Image.open(io.BytesIO(base64.b64decode(self.mask, validate=True)), formats=("PNG",)) as picture:
                # The size stands in the header: a larger picture is not decoded.
                found = picture.convert("L") if picture.size == wanted and max(wanted) <= _MAX_MASK_SIDE else None
                size = picture.size
        except Exception as error:  # damaged pictures make decoders raise errors of any type
            raise ValueError(f"the mask of the region of interest is no picture: {error}") from None
        if found is None:
            raise ValueError(
                f"the mask of the region of interest must be {wanted[0]} x {wanted[1]} pixels, at most "
                f"{_MAX_MASK_SIDE} on a side, got {size[0]} x {size[1]}."
            )
        return found


def box_or_polygon(text: str, size: tuple[int, int]) -> RegionOfInterest:
    """The region that `text` tells, in pixels of images of `size` (width, height).

    `text` is LEFT,TOP,RIGHT,BOTTOM or at least three points X,Y X,Y X,Y. Raises ValueError on anything else, and if
    the region is not within the image.

    >>> box_or_polygon("10,20,30,60", (100, 100)).box
    (10, 20, 30, 60)
    >>> box_or_polygon("0,0 40,0 0,30", (100, 100)).box
    (0, 0, 40, 30)
    """
    width, height = size
    try:
        groups = [tuple(int(number) for number in group.split(",")) for group in text.split()]
    except ValueError:
        groups = []
    if len(groups) == 1 and len(groups[0]) == 4:
        left, top, right, bottom = groups[0]
        return RegionOfInterest(width=width, height=height, left=left, top=top, right=right, bottom=bottom)
    points = tuple((group[0], group[1]) for group in groups if len(group) == 2)
    if len(points) < 3 or len(points) < len(groups):
        raise ValueError(
            "--region must be LEFT,TOP,RIGHT,BOTTOM, three or more points 'X,Y X,Y X,Y', or a mask image, all in "
            f"pixels of the original images; got {text!r}."
        )
    columns, rows = zip(*points, strict=True)
    return RegionOfInterest(
        width=width,
        height=height,
        left=min(columns),
        top=min(rows),
        right=max(columns),
        bottom=max(rows),
        outline=points,
    )


def region_of_mask(mask: npt.NDArray[np.bool_]) -> RegionOfInterest:
    """The region where a mask (H, W) is true.

    Raises ValueError if it is true nowhere.
    """
    if not mask.any():
        raise ValueError("the region of interest is empty: its mask marks no pixel; mark what to inspect in white.")
    picture = Image.fromarray(mask)
    if max(picture.size) > _MAX_MASK_SIDE:
        share = _MAX_MASK_SIDE / max(picture.size)
        size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    box = picture.getbbox()
    if box is None:
        raise ValueError("the region of interest is too thin to keep; mark a larger part.")
    file = io.BytesIO()
    picture.crop(box).save(file, "PNG", optimize=True)
    left, top, right, bottom = box
    text = base64.b64encode(file.getvalue()).decode()
    return RegionOfInterest(
        width=picture.width, height=picture.height, left=left, top=top, right=right, bottom=bottom, mask=text
    )


class Frame(NamedTuple):
    """Where the canvas of one image comes from."""

    width: int
    """Of the original image, upright."""
    height: int
    box: Box
    """The part of the image that is on the canvas, in pixels of the image."""
    canvas: tuple[int, int]
    """(width, height)"""
    place: Box
    """Where `box` lies on the canvas, in pixels of the canvas."""

    def to_image(
        self, heat: npt.NDArray[np.float32], stride: int = 1, size: tuple[int, int] | None = None
    ) -> npt.NDArray[np.float32]:
        """A map (h, w) of one value per `stride` pixels of the canvas as a map (height, width) of the image.

        Each pixel has the highest of the values that lie on it, so no peak is lost or lowered; 0 outside of the box.
        `size` (width, height) is that of a smaller or larger copy of the image, instead of the image's own.
        """
        width, height = size or (self.width, self.height)
        left, right, columns = _sources(self.width, width, self.box[::2], self.place[::2])
        top, bottom, rows = _sources(self.height, height, self.box[1::2], self.place[1::2])
        part = heat[: -(-self.place[3] // stride), : -(-self.place[2] // stride)]
        part = np.maximum.reduceat(np.maximum.reduceat(part, rows // stride, axis=0), columns // stride, axis=1)
        found = np.zeros((height, width), np.float32)
        found[top:bottom, left:right] = part
        return found

    def column(self, x: float) -> float:
        """The image's column of a canvas's column; both count from the left edge of the first pixel."""
        return _between(x, self.place[0], self.place[2], self.box[0], self.box[2])

    def row(self, y: float) -> float:
        """The image's row of a canvas's row."""
        return _between(y, self.place[1], self.place[3], self.box[1], self.box[3])


def _sources(
    full: int, wanted: int, box: tuple[int, int], place: tuple[int, int]
) -> tuple[int, int, npt.NDArray[np.intp]]:
    """Along one side: where the box begins and ends in a copy of `wanted` pixels of an image of `full` pixels, and
    the first canvas pixel that lies on each pixel of it."""
    first, last = box[0] * wanted // full, -(-box[1] * wanted // full)
    return first, last, place[0] + np.arange(last - first) * (place[1] - place[0]) // (last - first)


def _between(value: float, near: int, far: int, first: int, last: int) -> float:
    return min(max(first + (value - near) * (last - first) / (far - near), first), last)


def whole_frame(width: int, height: int) -> Frame:
    """The frame of an image that is its own canvas."""
    box = (0, 0, width, height)
    return Frame(width, height, box, (width, height), box)


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How every image of a category becomes the network's input."""

    width: int
    """Of the network's input."""
    height: int
    letterbox: bool = False
    """Keep the aspect ratio and fill the rest of the canvas with bars."""
    tile: int = 0
    """Side of the square tiles that an image is cut into at its own size; 0: the image is brought to one input."""
    overlap: int = 0
    """Pixels that neighbouring tiles share."""
    alignment: int = ALIGNMENT
    """Tiles start at multiples of this."""
    region: RegionOfInterest | None = None

    @classmethod
    def of(cls, config: DataConfig, region: RegionOfInterest | None = None, alignment: int = ALIGNMENT) -> "Geometry":
        """The geometry that a configuration asks for, within a region of interest.

        `alignment` is `ModelConfig.tile_alignment` of the network that sees the tiles.
        """
        width, height = config.input_size
        return cls(
            width=width,
            height=height,
            letterbox=config.resize == "letterbox",
            tile=config.tile,
            overlap=config.shared(alignment),
            alignment=alignment if config.tile else ALIGNMENT,
            region=region,
        )

    @classmethod
    def square(cls, side: int) -> "Geometry":
        """Whole images stretched to a square."""
        return cls(width=side, height=side)

    @property
    def is_plain(self) -> bool:
        """Whether whole images are stretched to a square."""
        return self == Geometry.square(self.width)

    @property
    def is_masked(self) -> bool:
        """Whether some of a canvas may lie outside of the region of interest, or in bars."""
        return self.letterbox or self.tile > 0 or (self.region is not None and not self.region.is_box)

    def frame(self, width: int, height: int) -> Frame:
        """The frame of an image of this size.

        Raises ValueError if the region of interest was drawn on images of another aspect ratio.
        """
        box = (0, 0, width, height)
        if self.region is not None:
            drawn_on = (self.region.width, self.region.height)
            if not is_same_shape(drawn_on, (width, height)):
                raise ValueError(
                    f"the region of interest was drawn on images of {drawn_on[0]} x {drawn_on[1]} pixels, this one "
                    f"has {width} x {height}: another shape, so it would be cut in the wrong place"
                )
            box = _scaled(self.region.box, width / drawn_on[0], height / drawn_on[1], (width, height))
        wide, high = box[2] - box[0], box[3] - box[1]
        if self.tile:
            canvas = (max(wide, self.tile), max(high, self.tile))
            return Frame(width, height, box, canvas, (0, 0, wide, high))
        canvas = (self.width, self.height)
        place = (0, 0, *canvas)
        if self.letterbox:
            share = min(self.width / wide, self.height / high)
            across, down = max(1, round(wide * share)), max(1, round(high * share))
            left, top = (self.width - across) // 2, (self.height - down) // 2
            place = (left, top, left + across, top + down)
        return Frame(width, height, box, canvas, place)

    def inside(self, frame: Frame, stride: int = 1) -> npt.NDArray[np.bool_]:
        """Which positions of an image's canvas are scored: one for each `stride` × `stride` pixels.

        In shape (canvas height / stride, canvas width / stride), rounded up. With a stride a position is inside if a
        part of it is.
        """
        wide, high = (-(-side // stride) for side in frame.canvas)
        left, top, right, bottom = frame.place
        right, bottom = -(-right // stride), -(-bottom // stride)
        found = np.zeros((high, wide), np.bool_)
        found[top // stride : bottom, left // stride : right] = True
        if self.region is None or self.region.is_box:
            return found
        size = (right - left // stride, bottom - top // stride)
        if self.region.outline:
            across, down = (size[0] / (self.region.right - self.region.left),
                            size[1] / (self.region.bottom - self.region.top))  # fmt: skip
            drawn = Image.new("1", size)
            corners = [((x - self.region.left) * across, (y - self.region.top) * down) for x, y in self.region.outline]
            ImageDraw.Draw(drawn).polygon(corners, fill=1)
        else:
            drawn = self.region.pixels().resize(size, Image.Resampling.NEAREST)
        found[top // stride : bottom, left // stride : right] = np.asarray(drawn) > 0
        return found

    def canvas(self, image: Image.Image, frame: Frame) -> "npt.NDArray[np.uint8] | LargeCanvas":
        """The canvas (h, w, 3) of an upright RGB image: resized bilinearly with antialiasing, or to be cut in tiles."""
        large = LargeCanvas(image, frame, self)
        if self.tile:
            return large
        size = (frame.place[2] - frame.place[0], frame.place[3] - frame.place[1])
        if (frame.box[2] - frame.box[0], frame.box[3] - frame.box[1]) != size:
            part = image if frame.box == (0, 0, *image.size) else image.crop(frame.box)
            large = LargeCanvas(part.resize(size, Image.Resampling.BILINEAR), frame._replace(box=(0, 0, *size)), self)
        return np.asarray(large)

    def mask(self, mask: npt.NDArray[np.bool_], frame: Frame) -> npt.NDArray[np.bool_]:
        """A mask (H, W) of the image, at its own or at another scale, on the canvas; false where nothing is scored."""
        across, down = mask.shape[1] / frame.width, mask.shape[0] / frame.height
        left, top, right, bottom = _scaled(frame.box, across, down, (mask.shape[1], mask.shape[0]))
        part = Image.fromarray(mask[top:bottom, left:right])
        place = frame.place
        found = np.zeros((frame.canvas[1], frame.canvas[0]), np.bool_)
        size = (place[2] - place[0], place[3] - place[1])
        found[place[1] : place[3], place[0] : place[2]] = np.asarray(part.resize(size, Image.Resampling.NEAREST))
        return found & self.inside(frame) if self.is_masked else found

    def is_outside(self, mask: npt.NDArray[np.bool_]) -> bool:
        """Whether a mask (H, W) marks pixels, but none in the region of interest."""
        if self.region is None or not mask.any():
            return False
        own = Geometry(width=1, height=1, tile=1, region=self.region)
        return not own.mask(mask, own.frame(mask.shape[1], mask.shape[0])).any()


class LargeCanvas:
    """The canvas (h, w, 3) of an image at its own size, of which only the parts asked for become arrays.

    So an image takes the four bytes a pixel of its decoder, and no three more. Behaves as an array that is sliced along
    both sides.
    """

    def __init__(self, image: Image.Image, frame: Frame, geometry: Geometry) -> None:
        self._image, self._frame = image, frame
        region = geometry.region
        self._inside = None if region is None or region.is_box else geometry.inside(frame)

    @property
    def shape(self) -> tuple[int, int, int]:
        width, height = self._frame.canvas
        return height, width, 3

    def __getitem__(self, part: tuple[slice, slice]) -> npt.NDArray[np.uint8]:
        """Pixels (h, w, 3) of some rows and columns, a copy; slices as of an array, without a step."""
        slices = (each.indices(side) for each, side in zip(part, self.shape[:2], strict=True))
        (top, bottom, _), (left, right, _) = slices
        place, box = self._frame.place, self._frame.box
        seen_top, seen_bottom = max(top, place[1]), min(bottom, place[3])
        seen_left, seen_right = max(left, place[0]), min(right, place[2])
        found = np.empty((bottom - top, right - left, 3), np.uint8)
        if (seen_left, seen_top, seen_right, seen_bottom) != (left, top, right, bottom):
            found[:] = NEUTRAL
        if seen_top < seen_bottom and seen_left < seen_right:
            across, down = box[0] - place[0], box[1] - place[1]
            seen = self._image.crop((seen_left + across, seen_top + down, seen_right + across, seen_bottom + down))
            found[seen_top - top : seen_bottom - top, seen_left - left : seen_right - left] = np.asarray(seen)
        if self._inside is not None:
            found[~self._inside[top:bottom, left:right]] = NEUTRAL
        return found

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.uint8]:
        return self[:, :] if dtype is None else self[:, :].astype(dtype)


def is_same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two (width, height) have the same aspect ratio, up to a pixel."""
    return abs(first[0] * second[1] - first[1] * second[0]) <= max(*first, *second)


def _scaled(box: Box, across: float, down: float, size: tuple[int, int]) -> Box:
    """A box at another scale, at least a pixel large and within an image of `size` (width, height)."""
    left, top = min(math.floor(box[0] * across), size[0] - 1), min(math.floor(box[1] * down), size[1] - 1)
    right, bottom = math.ceil(box[2] * across - 1e-9), math.ceil(box[3] * down - 1e-9)
    return left, top, min(max(right, left + 1), size[0]), min(max(bottom, top + 1), size[1])

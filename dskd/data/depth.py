"""Convert pixel values of any depth to the 8 bits that a network takes, with one scale per category.

Cameras store 10, 12 or 14 bits in 16-bit files; profile sensors store heights as floating-point values. Which value
is white cannot be found from a single inspected image, whose brightest pixels may be a defect. It is therefore found
once, from the training images, and stored with the detector. 8-bit images are never changed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

_CAMERA_BITS = (8, 10, 12, 14, 16, 18, 20, 24, 32)
_HEADROOM = 0.25
"""Share of the training images' range that is added above and below it if no known camera depth gives the range."""
_STRIP = 1 << 22
"""Number of values that are scaled at a time: limits the extra memory for a large image."""


class Levels(NamedTuple):
    """The values of one image that has more than 8 bits per channel."""

    low: float
    high: float
    is_float: bool
    stated: int | None = None
    """Highest possible value according to the file (TIFF's MaxSampleValue), if it is below the type's limit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PixelScale:
    """How values of more than 8 bits are mapped to the 0 to 255 that the network takes."""

    kind: Literal["integer", "float", "none"]
    """Type of the values; "none": all training images had 8 bits, so there is no scale for deeper ones."""
    low: float = 0.0
    """Value that becomes 0, as do all lower ones."""
    step: float = 1.0
    """Width of one of the 256 levels, in values; above 0."""
    rounding: Literal["down", "nearest"] = "down"
    """"down" drops the low bits of integers, like a shift; "nearest" rounds to the nearest level."""

    def __post_init__(self) -> None:
        if self.kind not in ("integer", "float", "none") or self.rounding not in ("down", "nearest"):
            raise ValueError(f"unknown pixel scale: kind {self.kind!r}, rounding {self.rounding!r}.")
        if not (math.isfinite(self.low) and math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"a pixel scale needs a finite low and a step above 0, got {self.low} and {self.step}.")

    @classmethod
    def of(cls, levels: Sequence[Levels]) -> "PixelScale":
        """The scale of a category whose training images of more than 8 bits have these levels; "none" without any.

        Integers: white is the end of the depth that the files state, otherwise of the smallest camera depth that holds
        all values; the unused rest of that depth is room for bright defects. Floating-point values: white is 1 if the
        highest is at most 1, 255 if it is between 32 and 255, and as for integers from there to 65,536. For all other
        floating-point values and for negative values: the range of the training images, extended by a quarter of it
        (black stays at 0 if no value is negative).
        Raises ValueError if integers and floating-point values are mixed.
        """
        if not levels:
            return cls(kind="none")
        if len({each.is_float for each in levels}) > 1:
            raise ValueError("images of integers and of floating-point values meet in one category; convert one kind.")
        low, high, is_float = min(each.low for each in levels), max(each.high for each in levels), levels[0].is_float
        kind: Literal["integer", "float"] = "float" if is_float else "integer"
        stated = [each.stated for each in levels if each.stated is not None]
        if low < 0 or (is_float and (1 < high < 32 or high >= 2**16)):
            free = _HEADROOM * ((high - low) or 1.0)
            bottom = low - free if low < 0 else 0.0
            return cls(kind=kind, low=bottom, step=(high + free - bottom) / 255, rounding="nearest")
        if is_float and high <= 255:
            return cls(kind=kind, step=1 / 255 if high <= 1 else 1.0, rounding="nearest")
        if len(stated) == len(levels) and high <= max(stated):
            bits = max(8, max(stated).bit_length())
        else:
            bits = next((bits for bits in _CAMERA_BITS if high < 2**bits), 64)
        return cls(kind=kind, step=float(2 ** (bits - 8)))

    @property
    def white(self) -> float:
        """Highest value that is not clipped, apart from rounding."""
        return self.low + self.step * 255

    def describe(self) -> str:
        if self.kind == "none":
            return "8 bits"
        return f"{self.kind} values, {self.low:g} is black and {self.white:g} white"

    def apply(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], int]:
        """The values in 8 bits, and how many of them were out of range and clipped.

        Raises ValueError if the values are of another kind or not finite; the caller adds the file's name to it.
        """
        is_float = values.dtype.kind == "f"
        if self.kind == "none":
            raise ValueError(
                f"has {values.dtype} values, and the training images had 8 bits per channel: no scale is known for "
                "it; convert it as the training images were"
            )
        if is_float != (self.kind == "float"):
            raise ValueError(f"has {values.dtype} values, and the training images had {self.kind} ones; convert it")
        if is_float:
            check_finite(values)
        levels = np.empty(values.shape, np.uint8)
        flat, out = values.reshape(-1), levels.reshape(-1)
        num_clipped = 0
        for start in range(0, flat.size, _STRIP):
            scaled = (flat[start : start + _STRIP].astype(np.float64) - self.low) / self.step
            scaled = np.floor(scaled) if self.rounding == "down" else np.rint(scaled)
            num_clipped += int(np.count_nonzero((scaled < 0) | (scaled > 255)))
            out[start : start + _STRIP] = np.clip(scaled, 0, 255)
        return levels, num_clipped


def high_byte(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The values in 8 bits, for detectors without a scale: 16-bit integers lose their low 8 bits."""
    if values.dtype.kind == "f":
        check_finite(values)
        return values.clip(0, 255).astype(np.uint8)
    return (values >> 8).clip(0, 255).astype(np.uint8)


def check_finite(values: npt.NDArray[Any]) -> None:
    """Raise ValueError if a value is NaN or infinite; the caller adds the file's name to the message."""
    num_wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
    if num_wrong:
        raise ValueError(f"has {num_wrong} values that are not finite (NaN or infinite); fill them")

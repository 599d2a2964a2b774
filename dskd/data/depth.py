"""From pixel values of any depth to the 8 bits that a network sees: one scale per category.

A camera's 10, 12 or 14 bits lie in files of 16, a profile sensor's heights in floating-point ones. Which value is
white cannot be told from one image to inspect, where a defect may be the brightest thing ever seen; it is told once,
from the training images, and kept with the detector. Images of 8 bits are taken as they are, always.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

_CAMERA_BITS = (8, 10, 12, 14, 16, 18, 20, 24, 32)
_HEADROOM = 0.25
"""Of the range seen in training, free above and below it where no depth of a camera says what the range is."""
_STRIP = 1 << 22
"""Values scaled at a time: bounds what a large image takes beside itself."""


class Levels(NamedTuple):
    """The values of one image that has more than 8 bits per channel."""

    low: float
    high: float
    is_float: bool
    stated: int | None = None
    """Highest value that the file says it can have (TIFF's MaxSampleValue), where that is below its type's limit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PixelScale:
    """How values of more than 8 bits become the 0 to 255 that the network sees."""

    kind: Literal["integer", "float", "none"]
    """Type of the values; "none": all training images had 8 bits, and no scale is known for deeper ones."""
    low: float = 0.0
    """Value that becomes 0; all below it does too."""
    step: float = 1.0
    """Difference of values that is one of the 256 levels; above 0."""
    rounding: Literal["down", "nearest"] = "down"
    """Integers lose their low bits, as a shift does; others go to the nearest level."""

    def __post_init__(self) -> None:
        if self.kind not in ("integer", "float", "none") or self.rounding not in ("down", "nearest"):
            raise ValueError(f"unknown pixel scale: kind {self.kind!r}, rounding {self.rounding!r}.")
        if not (math.isfinite(self.low) and math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"a pixel scale needs a finite low and a step above 0, got {self.low} and {self.step}.")

    @classmethod
    def of(cls, levels: Sequence[Levels]) -> "PixelScale":
        """The scale of a category whose training images of more than 8 bits have these levels; "none" without any.

        Integers take the depth that their files state, else the least of a camera's depths that holds them; the
        rest of that depth is the headroom of bright defects. Floating-point values up to 1 take 1 as white, up to
        255 that; others, and negative ones, the range of the training images with a quarter of it free on each side.
        Raises ValueError where integers and floating-point values meet.
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
        """Highest value that is not clipped, but for rounding."""
        return self.low + self.step * 255

    def describe(self) -> str:
        if self.kind == "none":
            return "8 bits"
        return f"{self.kind} values, {self.low:g} is black and {self.white:g} white"

    def apply(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], int]:
        """Levels of 8 bits, and how many values lay beyond them and were clipped.

        Raises ValueError, to be completed by the name of the file, where the values are of another kind or not finite.
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
    """Levels of 8 bits as detectors without a scale take them: integers lose their low 8 bits of 16."""
    if values.dtype.kind == "f":
        check_finite(values)
        return values.clip(0, 255).astype(np.uint8)
    return (values >> 8).clip(0, 255).astype(np.uint8)


def check_finite(values: npt.NDArray[Any]) -> None:
    """Raise ValueError, to be completed by the name of the file, where a value is NaN or infinite."""
    num_wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
    if num_wrong:
        raise ValueError(f"has {num_wrong} values that are not finite (NaN or infinite); fill them")

"""Images that a caller hands over: paths, PIL images, numpy arrays, torch tensors, and lists and generators of them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from dskd.data.depth import PixelScale
from dskd.data.files import UnreadableImageError
from dskd.data.geometry import Geometry
from dskd.data.images import Framed, in_rgb, load_framed, place_on_canvas

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor
"""One image: a path, a PIL image, a numpy array (H, W) or (H, W, 3), or a torch tensor (3, H, W) as torchvision has it.

Arrays hold bytes, or floating-point values from 0 to 1.
"""
_EXPECTED = (
    "images must be a path, a PIL image, a numpy array (H, W, 3), a torch tensor (3, H, W), or several of them in a "
    "list or generator"
)
_DEEP_MODES = ("I", "F")


class GivenImage(NamedTuple):
    """One of the images that a caller gave."""

    path: Path
    """Its file; "image 0", "image 1", … for one that is in memory already."""
    pixels: Image.Image | npt.NDArray[Any] | None = None
    """None: to be read from the file."""

    def framed(self, geometry: Geometry, scale: PixelScale | None) -> Framed:
        """The image on its canvas; errors as `load_framed`."""
        if self.pixels is None:
            return load_framed(self.path, geometry, scale)
        try:
            image, num_clipped = _as_rgb(self.pixels, scale)
            return place_on_canvas(image, geometry, num_clipped)
        except ValueError as error:
            raise UnreadableImageError(f"{self.path} cannot be judged by this detector: it {error}") from None


def is_one_image(images: object) -> bool:
    """Whether this is a single image, and not several: arrays and tensors of four dimensions are several."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return isinstance(images, str | os.PathLike | Image.Image)


def given_images(images: Any) -> Iterator[GivenImage]:
    """Each of the images, as they come; batches (N, H, W, 3) or (N, 3, H, W) among them image by image.

    Raises TypeError or ValueError, in a sentence, on what is no image.
    """
    if not is_one_image(images) and (isinstance(images, bytes | dict) or not isinstance(images, Iterable)):
        raise TypeError(f"{_EXPECTED}; got {_named(images)}.")
    for number, image in enumerate(_each([images] if is_one_image(images) else images)):
        yield _given(image, number)


def _each(images: Iterable[Any]) -> Iterator[Any]:
    for image in images:
        if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4:
            yield from image
        else:
            yield image


def _given(image: object, number: int) -> GivenImage:
    name = Path(f"image {number}")
    if isinstance(image, Image.Image):
        return GivenImage(name, image)
    if isinstance(image, torch.Tensor):
        return GivenImage(name, _channels_last(image))
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            turn = "; array.transpose(1, 2, 0) puts the colours last" if image.shape[:1] in ((1,), (3,)) else ""
            raise ValueError(f"a numpy array must be (H, W) or (H, W, 3), got {image.shape}{turn}.")
        return GivenImage(name, image)
    if not isinstance(image, str | os.PathLike):
        raise TypeError(f"{_EXPECTED}; number {number} is {_named(image)}.")
    path = Path(image)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its images, such as sorted(Path({str(path)!r}).glob('*.png')).")
    return GivenImage(path)


def _named(thing: object) -> str:
    text = repr(thing)
    return f"{type(thing).__name__} {text if len(text) <= 40 else f'{text[:40]}…'}"


def _channels_last(image: torch.Tensor) -> npt.NDArray[Any]:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        turn = "; tensor.permute(2, 0, 1) puts the colours first" if image.shape[-1:] in ((1,), (3,)) else ""
        raise ValueError(f"a tensor must be (3, H, W) or (1, H, W), got {tuple(image.shape)}{turn}.")
    pixels: npt.NDArray[Any] = image.detach().cpu().permute(1, 2, 0).numpy()
    return pixels


def _as_rgb(pixels: Image.Image | npt.NDArray[Any], scale: PixelScale | None) -> tuple[Image.Image, int]:
    """The image in 8-bit RGB, and how many values were clipped; as it would be if it came from a file."""
    if isinstance(pixels, Image.Image):
        if not pixels.mode.startswith(_DEEP_MODES):
            return in_rgb(ImageOps.exif_transpose(pixels)), 0
        pixels = np.asarray(pixels)
    num_clipped = 0
    if pixels.dtype == np.uint8:
        levels = pixels
    elif scale is not None and scale.kind != "none":
        levels, num_clipped = scale.apply(pixels)
    elif pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"has values from {low:g} to {high:g}, and floating-point ones must lie between 0 and 1; leave out a "
                "normalisation, the detector does its own."
            )
        levels = np.rint(pixels * 255).astype(np.uint8)
    else:
        raise ValueError(f"has {pixels.dtype} values, and the training images had 8 bits per channel; give bytes.")
    levels = np.ascontiguousarray(levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)
    return in_rgb(Image.fromarray(levels)), num_clipped

"""Brushes, light and camera shared by the demo's products."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]


class Defect(NamedTuple):
    kind: str
    rng: Generator


Draw: TypeAlias = Callable[[Generator, int, Defect | None], Floats]
"""Renders one scene (S, S, 3) in linear light, where 1 is about white. It draws the same random numbers with and
without a defect, so two calls with equal generators show the same part."""


# ------------------------------------------------------------------------------------------------ the lab


def smooth_noise(rng: Generator, size: int, down: float, across: float) -> Floats:
    """Smooth noise (S, S) of unit variance, with about `down` by `across` lumps."""
    rows, columns = max(2, round(down) + 1), max(2, round(across) + 1)
    coarse = Image.fromarray(rng.standard_normal((rows, columns)).astype(np.float32))
    field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(field / np.float32(max(float(field.std()), 1e-6)))


def soften(field: Floats, sigma: float) -> Floats:
    """Wide Gaussian blur, computed on a smaller copy."""
    step = max(1, int(sigma / 2))
    size = field.shape[0]
    small = Image.fromarray(field).resize((-(-size // step),) * 2, Image.Resampling.BOX)
    blurred = ndimage.gaussian_filter(np.asarray(small), sigma / step, mode="nearest")
    return np.asarray(Image.fromarray(blurred).resize((size, size), Image.Resampling.BICUBIC))


def pixel_grid(
    size: int, *, turn: float = 0.0, zoom: float = 1.0, x: float = 0.0, y: float = 0.0
) -> tuple[Floats, Floats]:
    """Product coordinates u (right), v (down) of every pixel; the picture covers -1 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across, down = (
        (line[None, :] - np.float32(x)) / np.float32(zoom),
        (line[:, None] - np.float32(y)) / np.float32(zoom),
    )
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return across * cos + down * sin, down * cos - across * sin


def soft_step(distance: Floats, width: float) -> Floats:
    """0 below -width/2, 1 above width/2, a smooth rise between."""
    t = np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def sharpen(cosine: Floats, power: int) -> Floats:
    """Cosine raised to `power`, a power of two: repeated squaring is many times faster than a general power."""
    while power > 1:
        cosine, power = cosine * cosine, power // 2
    return cosine


def cast_shadow(shape: Floats, down: float, right: float, blur: float) -> Floats:
    """The soft shadow of a shape, shifted by `down` and `right` pixels; at the border the shape is taken to go on."""
    return soften(ndimage.shift(shape, (round(down), round(right)), order=0, mode="nearest"), blur)


class Lamp(NamedTuple):
    """Directions of the light over the surface, for a viewer straight above."""

    diffuse: Floats
    gloss: Floats
    """Cosine between the surface normal and the half vector."""
    half_x: Floats
    half_y: Floats


def lit_by_lamp(height: Floats, position: tuple[float, float, float]) -> Lamp:
    """A lamp at `position` (right, down, up) over a surface of `height`; the picture covers -1 to 1."""
    size = height.shape[0]
    down, across = np.gradient(height, np.float32(2 / size))
    u, v = pixel_grid(size)
    x, y, z = np.float32(position[0]) - u, np.float32(position[1]) - v, np.float32(position[2])
    inverse = 1 / np.sqrt(x * x + y * y + z * z)
    to_x, to_y, to_z = x * inverse, y * inverse, z * inverse
    inverse = 1 / np.sqrt(to_x * to_x + to_y * to_y + (to_z + 1) ** 2)
    half_x, half_y, half_z = to_x * inverse, to_y * inverse, (to_z + 1) * inverse
    steepness = np.sqrt(1 + across * across + down * down)
    diffuse = np.clip((to_z - to_x * across - to_y * down) / steepness, 0, None)
    gloss = np.clip((half_z - half_x * across - half_y * down) / steepness, 0, None)
    return Lamp(*(np.asarray(field, dtype=np.float32) for field in (diffuse, gloss, half_x, half_y)))


def draw_line(size: int, points: NDArray[Any], width: float) -> Floats:
    """Coverage (S, S) of a polyline (K, 2) of (u, v), `width` in the same units, tapered at its ends."""
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    pixels = (points + 1) * (size / 2)
    count = len(pixels) - 1
    for index in range(count):
        thickness = max(width * size / 2, 2.5) * min(1.0, 0.4 + 4 * min(index + 1, count - index) / count)
        pen.line([tuple(pixels[index]), tuple(pixels[index + 1])], fill=255, width=max(1, round(thickness)))
    return np.asarray(ndimage.gaussian_filter(np.asarray(canvas, dtype=np.float32) / 255, 0.6))


def wandering_line(rng: Generator, centre: tuple[float, float], length: float, bend: float) -> NDArray[Any]:
    """Points (40, 2) of a smooth, wandering curve around `centre`."""
    steps = 39
    bends = ndimage.gaussian_filter1d(rng.normal(0, bend, size=steps), 4, mode="nearest")
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(bends)
    points = np.stack([np.cos(heading), np.sin(heading)], axis=1).cumsum(axis=0) * (length / steps)
    points = np.concatenate([np.zeros((1, 2)), points])
    return np.asarray(points - points.mean(axis=0) + np.asarray(centre))


def draw_blob(rng: Generator, size: int, centre: tuple[float, float], radius: float, ragged: float) -> Floats:
    """Signed distance (S, S), positive inside, to an irregular disc."""
    u, v = pixel_grid(size)
    noise = smooth_noise(rng, size, 2.2 / radius, 2.2 / radius)
    stretch, turn = rng.uniform(1, 1.5), rng.uniform(0, np.pi)
    du, dv = u - np.float32(centre[0]), v - np.float32(centre[1])
    along = (du * np.cos(turn) + dv * np.sin(turn)) / stretch
    beside = (dv * np.cos(turn) - du * np.sin(turn)) * stretch
    return np.asarray(radius - np.hypot(along, beside) + ragged * radius * noise, dtype=np.float32)


def paint(canvas: Floats, colour: tuple[float, float, float] | Floats, cover: Floats) -> Floats:
    return np.asarray(canvas + cover[..., None] * (np.asarray(colour, dtype=np.float32) - canvas))


def photograph(rng: Generator, light: Floats, scale: int) -> Bytes:
    """The camera: exposure, a little colour cast and vignetting, lens blur, sampling, noise, 8 bits."""
    size = light.shape[0] // scale
    exposure = rng.normal(1, 0.03)
    cast = rng.normal(1, 0.008, size=3).astype(np.float32)
    blur = rng.uniform(0.35, 0.6)
    parts = [light[row::scale, column::scale] for row in range(scale) for column in range(scale)]
    pixels = sum(parts[1:], start=parts[0]) / np.float32(len(parts))
    pixels = ndimage.gaussian_filter(pixels, (blur, blur, 0), mode="nearest")
    u, v = pixel_grid(size)
    fall = 1 - np.float32(0.10) * (u * u + v * v) / 2
    pixels = np.clip(pixels * cast * np.float32(exposure) * fall[..., None], 0, None)
    noise = rng.standard_normal((size, size, 1)) * 0.7 + rng.standard_normal((size, size, 3)) * 0.7
    pixels = pixels + noise * np.sqrt(0.0004**2 + 0.00006 * pixels)  # read and shot noise
    # bright values are compressed smoothly, as on film, instead of clipped at white
    pixels = np.clip(pixels, 0, None)
    pixels = np.where(pixels < 0.7, pixels, 0.7 + 0.3 * np.tanh((pixels - 0.7) / 0.3))
    return np.asarray(np.rint(255 * pixels ** (1 / 2.2)).clip(0, 255), dtype=np.uint8)

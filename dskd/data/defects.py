"""Synthetic defects on good images, for validation without labelled real defects.

Three families, one drawn per image, each for a third of the images:
texture:    Perlin-shaped spots of foreign texture (Zavrtanik et al., DRAEM, ICCV 2021, section 3.2)
cut-paste:  a patch or thin scar of the same image in another place (Li et al., CutPaste, CVPR 2021)
structural: dents and swirls, stains, smears and scratches (ours)
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import ndimage

from dskd.data.files import UnreadableImageError, list_images
from dskd.data.images import read_image

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Coordinates: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

NOTICEABLE = 8
"""A pixel belongs to a defect if its most changed channel differs by more than this, in 8-bit levels."""

_MIN_SIDE = 16
_MIN_AREA, _MAX_AREA = 0.001, 0.1  # shares of the image; areas are drawn log-uniformly between them
_MIN_CONTRAST = 12.0  # of the slightly blurred difference: noise replaced by noise is no defect
_ATTEMPTS = 12
_TEXTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class _Site(NamedTuple):
    """Where a defect goes and how large it should be."""

    allowed: Mask  # (H, W)
    y: int
    x: int
    area: float  # pixels
    unit: float  # one pixel of a 256-pixel image, so that a defect looks the same at every resolution

    @property
    def radius(self) -> float:
        return float(np.sqrt(self.area / np.pi))


def add_defects(
    images: Bytes,
    *,
    seed: int,
    textures: Bytes | None = None,
    inside: NDArray[np.bool_] | None = None,
    objects: Sequence[Mask] | None = None,
) -> tuple[Bytes, NDArray[np.bool_]]:
    """Copies of good images (N, H, W, 3), each with one visible defect, and the defects' masks (N, H, W).

    The texture family takes its textures from `textures` (M, H', W', 3); without them it uses noise, stripes and
    shuffled patches of the image itself. The defect of an image depends only on the image, its index, `seed` and
    `textures`, so it stays the same when images are appended. Outside its mask no channel differs by more than
    `NOTICEABLE`; inside, every pixel is changed by more than that or lies between such pixels.
    Areas are mostly 0.1 % to 10 % of the image, centred on the object if it differs from the image border.
    `inside` (N, H, W) are the pixels that may change; an image without such pixels has no defect. `objects` are what
    `find_foreground` gives for the images, for callers that know it already: finding it takes a quarter of the time.
    Raises ValueError on arrays of another type or shape, sides below 16 pixels, and negative seeds.
    """
    _check_images("images", images)
    if min(images.shape[1:3]) < _MIN_SIDE:
        raise ValueError(f"images must be at least {_MIN_SIDE} pixels a side, got {images.shape[1:3]}; enlarge them.")
    if textures is not None:
        _check_images("textures", textures)
        if textures.size == 0:
            raise ValueError("textures holds no image; pass None to use the built-in ones.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    changed = np.empty_like(images, subok=False)
    masks = np.empty(images.shape[:3], dtype=np.bool_)
    for index, image in enumerate(images):
        rng = np.random.default_rng([seed, index])
        where = None if inside is None else inside[index]
        found = find_foreground(image) if objects is None else objects[index]
        changed[index], masks[index] = _add_defect(rng, np.asarray(image), found, textures, where)
        if where is not None:
            masks[index] &= where
    return changed, masks


def choose_textures(folder: Path, limit: int = 64, seed: int = 0) -> list[Path]:
    """Up to `limit` png and jpg files in `folder` and below, drawn without replacement.

    The draw depends on the files' paths below `folder`, `limit` and `seed`. Raises ValueError
    if there is no such file.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    paths = [path for path in list_images(folder) if path.suffix.lower() in _TEXTURE_SUFFIXES and path.is_file()]
    if not paths:
        raise ValueError(f"no texture in {folder}: expected png or jpg files there or in folders below it.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(paths))[:limit])
    return [paths[index] for index in chosen]


def load_textures(paths: Sequence[Path], size: int) -> Bytes:
    """Images (M, size, size, 3), centre-cropped to squares.

    Raises ValueError if one cannot be read.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    return np.stack([_read_texture(path, size) for path in paths])


def perlin_noise(rng: Generator, shape: tuple[int, int], *, cells: tuple[float, float], angle: float = 0.0) -> Floats:
    """Gradient noise (H, W) in [-1, 1] with about `cells` cells (vertically, horizontally), turned by `angle` radians.

    Perlin, "Improving Noise" (2002): random unit gradients on a lattice, blended with 6t^5 - 15t^4 + 10t^3.
    The rotation is applied to the coordinates, so no corner is left empty.
    """
    height, width = shape
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width), indexing="ij")
    v = (y * np.cos(angle) - x * np.sin(angle)) * cells[0]
    u = (y * np.sin(angle) + x * np.cos(angle)) * cells[1]
    v, u = v - v.min() + rng.random(), u - u.min() + rng.random()
    row, column = v.astype(np.intp), u.astype(np.intp)
    v, u = v - row, u - column
    turns = rng.uniform(0, 2 * np.pi, size=(row.max() + 2, column.max() + 2))
    down, across = np.sin(turns), np.cos(turns)

    def ramp(dy: int, dx: int) -> NDArray[np.float64]:
        corner = row + dy, column + dx
        return np.asarray(down[corner] * (v - dy) + across[corner] * (u - dx))

    fade_v, fade_u = _fade(v), _fade(u)
    top = ramp(0, 0) + fade_u * (ramp(0, 1) - ramp(0, 0))
    bottom = ramp(1, 0) + fade_u * (ramp(1, 1) - ramp(1, 0))
    return np.asarray(np.sqrt(2.0) * (top + fade_v * (bottom - top)), dtype=np.float32)


def find_foreground(image: Bytes) -> Mask:
    """Mask (H, W) of the object: pixels that differ from the border's median colour by more than the border varies.

    All true if that covers less than 5 % or more than 95 % of `image` (H, W, 3), as with textures and close-ups.
    """
    step = max(1, round(_unit(image.shape)))  # about 256 pixels are enough for an outline
    if step > 1:
        found = find_foreground(image[::step, ::step])
        return np.asarray(found.repeat(step, axis=0).repeat(step, axis=1)[: image.shape[0], : image.shape[1]])
    height, width = image.shape[:2]
    unit = _unit(image.shape)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (unit, unit, 0))
    rim = max(1, round(4 * unit))
    is_rim = np.ones((height, width), dtype=np.bool_)
    is_rim[rim:-rim, rim:-rim] = False
    backdrop = np.median(smooth[is_rim], axis=0)
    deviation = _strongest(smooth - backdrop)
    # a cast shadow differs too, but much less than the object
    shadow = 0.2 * float(np.percentile(deviation, 99))
    limit = max(12.0, 4.0 * float(np.median(deviation[is_rim])), shadow)
    found = ndimage.binary_opening(deviation > limit, iterations=max(1, round(unit)))
    found = ndimage.binary_fill_holes(ndimage.binary_closing(found, iterations=max(1, round(2 * unit))))
    labels, count = ndimage.label(found)
    large = np.bincount(labels.ravel(), minlength=count + 1) >= 0.005 * height * width
    large[0] = False
    found = large[labels]
    if not 0.05 <= found.mean() <= 0.95:
        return np.ones((height, width), dtype=np.bool_)
    return np.asarray(found, dtype=np.bool_)


def _check_images(name: str, images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{name} must be uint8 of shape (N, H, W, 3), got {images.dtype} of {images.shape}.")


def _read_texture(path: Path, size: int) -> Bytes:
    try:
        picture = Image.fromarray(read_image(path))
    except UnreadableImageError as error:
        raise ValueError(f"texture {path} cannot be read as an image; remove or replace it.") from error
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))


def _unit(shape: tuple[int, ...]) -> float:
    return float(np.sqrt(shape[0] * shape[1]) / 256)


def _fade(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return t**3 * (t * (6 * t - 15) + 10)


def _strongest(difference: NDArray[Any]) -> NDArray[Any]:
    """The largest of three absolute channels; many times faster than a reduction along such a short axis."""
    red, green, blue = np.moveaxis(np.abs(difference), 2, 0)
    return np.asarray(np.maximum(np.maximum(red, green), blue))


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _add_defect(
    rng: Generator, image: Bytes, found: Mask, textures: Bytes | None, inside: Mask | None
) -> tuple[Bytes, Mask]:
    where = np.ones(image.shape[:2], np.bool_) if inside is None else inside
    if not where.any():
        return image, np.zeros_like(where)
    foreground = found & where
    if not foreground.any():
        foreground = where
    is_grey = bool((image == image[..., :1]).all())
    pixels = image.astype(np.float32)
    family = rng.integers(3)
    for _ in range(_ATTEMPTS):
        site = _choose_site(rng, foreground, where)
        if family == 0:
            painted = _blend_texture(rng, pixels, site, textures)
        elif family == 1:
            painted = _cut_and_paste(rng, pixels, site, foreground)
        else:
            painted = _STRUCTURAL[rng.integers(len(_STRUCTURAL))](rng, pixels, site)
        if is_grey:  # a monochrome camera sees no colours
            painted = np.repeat(painted.mean(axis=2, keepdims=True), 3, axis=2)
        outcome = _keep_noticeable(image, np.where(where[..., None], _to_bytes(painted), image))
        if outcome is not None:
            return outcome
    blot = np.where(where[..., None], _to_bytes(_blot(pixels, _choose_site(rng, foreground, where))), image)
    return _keep_noticeable(image, blot) or (blot, (blot != image).any(axis=2))


def _to_bytes(pixels: Floats) -> Bytes:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _choose_site(rng: Generator, foreground: Mask, inside: Mask) -> _Site:
    height, width = foreground.shape
    area = height * width * _log_uniform(rng, _MIN_AREA, _MAX_AREA)
    # dirt beside the object is a defect too, but rarer
    on_object = rng.random() < 0.95
    allowed = foreground if on_object else inside
    spots = np.flatnonzero(allowed)
    y, x = divmod(int(spots[rng.integers(spots.size)]), width)
    return _Site(allowed, y, x, min(area, 0.5 * spots.size), _unit(foreground.shape))


def _keep_noticeable(image: Bytes, painted: Bytes) -> tuple[Bytes, Mask] | None:
    """The painted image without isolated specks, and its mask; None if the defect is not visible."""
    difference = painted.astype(np.int16) - image
    labels, count = ndimage.label(_strongest(difference) > NOTICEABLE, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= max(4, labels.size // 16384)
    keep[0] = False
    mask = keep[labels]
    area = mask.sum() / mask.size
    if not 0.5 * _MIN_AREA <= area <= 1.2 * _MAX_AREA:
        return None
    unit = _unit(image.shape)
    blurred = ndimage.gaussian_filter(difference.astype(np.float32), (1.2 * unit, 1.2 * unit, 0))
    if np.percentile(_strongest(blurred)[mask], 80) < _MIN_CONTRAST:
        return None
    specks = (labels > 0) & ~mask
    mask |= ndimage.binary_closing(mask, iterations=max(1, round(unit)))
    return np.where((specks & ~mask)[..., None], image, painted), mask


def _offsets(shape: tuple[int, ...], site: _Site) -> tuple[Floats, Floats]:
    """Rows (H, 1) and columns (1, W), relative to the site."""
    rows = np.arange(shape[0], dtype=np.float32)[:, None] - site.y
    columns = np.arange(shape[1], dtype=np.float32)[None, :] - site.x
    return rows, columns


def _mix(pixels: Floats, other: Floats, weight: Floats) -> Floats:
    return pixels + weight[..., None] * (other - pixels)


def _sample(pixels: Floats, rows: Coordinates, columns: Coordinates) -> Floats:
    """Pixels (K, 3) at fractional positions (K,); the image is mirrored beyond its border."""
    where = np.stack([rows, columns])
    channels = [ndimage.map_coordinates(pixels[..., c], where, order=1, mode="mirror") for c in range(3)]
    return np.stack(channels, axis=-1)


# ------------------------------------------------------------------------------------------------ texture


def _blend_texture(rng: Generator, pixels: Floats, site: _Site, textures: Bytes | None) -> Floats:
    """(1 - beta) texture + beta image inside a Perlin mask, beta uniform in [0, 0.8).

    The mask differs from the paper: not all pixels above 0.5, but the `area` highest pixels near the site. With a
    threshold the area, and so the validation metrics, would depend on the noise's frequency.
    """
    shape = pixels.shape[:2]
    cells = 2.0 ** rng.integers(0, 6, size=2)
    noise = perlin_noise(
        rng, (shape[0], shape[1]), cells=(cells[0], cells[1]), angle=rng.uniform(-np.pi / 2, np.pi / 2)
    )
    rows, columns = _offsets(shape, site)
    reach = site.radius * rng.uniform(1.2, 2.5)
    height = np.where(site.allowed, noise - (rows**2 + columns**2) / reach**2, -np.inf)
    count = min(max(1, round(site.area)), height.size)
    shape_mask = height >= np.partition(height, height.size - count, axis=None)[-count]
    weight = ndimage.gaussian_filter(shape_mask.astype(np.float32), 0.6 * site.unit)
    texture = _tile(rng, textures, shape) if textures is not None else _draw_texture(rng, pixels, site)
    texture = _vary(rng, texture)
    if rng.random() < 0.5:  # foreign material in the product's own colours: the harder half
        texture = _recolour(texture, pixels[site.allowed])
    return _mix(pixels, texture, (1 - rng.uniform(0, 0.8)) * weight)


def _tile(rng: Generator, textures: Bytes, shape: tuple[int, ...]) -> Floats:
    """A window of one of the textures; a texture that is too small is mirrored."""
    texture = textures[rng.integers(len(textures))]
    picked = []
    for axis in (0, 1):
        size = texture.shape[axis]
        steps = (rng.integers(2 * size) + np.arange(shape[axis])) % (2 * size)
        picked.append(np.minimum(steps, 2 * size - 1 - steps))
    return np.asarray(texture[np.ix_(*picked)], dtype=np.float32)


def _draw_texture(rng: Generator, pixels: Floats, site: _Site) -> Floats:
    height, width = shape = (pixels.shape[0], pixels.shape[1])
    source = rng.integers(3)
    if source == 0:  # noise of several scales, mapped to a range of colours
        field = sum(
            perlin_noise(rng, shape, cells=(cells, cells)) / np.sqrt(cells)
            for cells in 2.0 ** rng.uniform(1, 6, size=3)
        )
    elif source == 1:  # stripes, from soft to sharp
        rows, columns = _offsets(shape, site)
        angle, period = rng.uniform(0, np.pi), site.unit * _log_uniform(rng, 4, 40)
        wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 2 * np.pi / period)
        field = np.tanh(_log_uniform(rng, 0.5, 8) * wave) + 0.1 * rng.standard_normal(shape)
    else:  # shuffled patches of the image
        side = max(4, round(site.unit * _log_uniform(rng, 6, 32)))
        index = np.arange(0, max(height - side, 0) + 1), np.arange(0, max(width - side, 0) + 1)
        blocks = [
            [pixels[top : top + side, left : left + side] for left in rng.choice(index[1], -(-width // side))]
            for top in rng.choice(index[0], -(-height // side))
        ]
        return np.concatenate([np.concatenate(row, axis=1) for row in blocks])[:height, :width]
    field = np.asarray(field, dtype=np.float32)
    field = (field - field.min()) / max(float(np.ptp(field)), 1e-6)
    low, high = rng.uniform(0, 255, size=(2, 3)).astype(np.float32)
    grain = rng.normal(0, rng.uniform(0, 12), size=shape).astype(np.float32)
    return np.asarray(np.clip(low + field[..., None] * (high - low) + grain[..., None], 0, 255), dtype=np.float32)


def _vary(rng: Generator, texture: Floats) -> Floats:
    """Three of eight photometric changes (the paper: three of ten)."""
    picture = Image.fromarray(_to_bytes(texture))
    changes: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: image.point(list(_gamma_table(rng))),
        lambda image: image.point([min(255, max(0, round(v * gain + shift))) for v in range(256)] * 3),
        lambda image: ImageEnhance.Sharpness(image).enhance(3.0),
        lambda image: ImageEnhance.Color(image).enhance(rng.uniform(0, 2)),
        lambda image: ImageOps.solarize(image, int(rng.integers(32, 129))),
        lambda image: ImageOps.posterize(image, int(rng.integers(2, 6))),
        lambda image: ImageOps.autocontrast(image),
        lambda image: ImageOps.equalize(image),
    )
    gain, shift = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
    for index in rng.choice(len(changes), size=3, replace=False):
        picture = changes[index](picture)
    return np.asarray(picture, dtype=np.float32)


def _gamma_table(rng: Generator) -> list[int]:
    return [round(255 * (v / 255) ** gamma) for gamma in rng.uniform(0.5, 2.0, size=3) for v in range(256)]


def _recolour(texture: Floats, product: Floats) -> Floats:
    """The texture with the mean and spread of the product's pixels (K, 3), channel by channel."""
    spread = product.std(axis=0) + 8.0
    scaled = (texture - texture.mean(axis=(0, 1))) / (texture.std(axis=(0, 1)) + 1.0)
    return np.asarray(np.clip(scaled * spread + product.mean(axis=0), 0, 255), dtype=np.float32)


# ---------------------------------------------------------------------------------------------- cut-paste


def _cut_and_paste(rng: Generator, pixels: Floats, site: _Site, foreground: Mask) -> Floats:
    """A patch (aspect 0.3 to 3.3) or a thin, rotated scar, half of them with colours jittered by 10 %.

    Sizes are drawn as for all families, not as in the paper: 2 to 15 % (patch) and 10 to 25 pixels (scar).
    """
    height, width = pixels.shape[:2]
    is_scar = rng.random() < 0.5
    if is_scar:
        area, aspect, angle = (
            min(site.area, 0.02 * height * width),
            _log_uniform(rng, 3, 12),
            rng.uniform(0, np.pi),
        )
    else:
        area, aspect, angle = site.area, _log_uniform(rng, 0.3, 3.3), 0.0
    half_long, half_short = np.sqrt(area * aspect) / 2, np.sqrt(area / aspect) / 2
    half_long, half_short = min(half_long, 0.4 * width), max(min(half_short, 0.4 * height), 0.8)
    rows, columns = _offsets(pixels.shape, site)
    across = columns * np.cos(angle) + rows * np.sin(angle)
    down = rows * np.cos(angle) - columns * np.sin(angle)
    weight = np.clip(0.5 + np.minimum(half_long - np.abs(across), half_short - np.abs(down)), 0, 1)
    inside = np.nonzero(weight)
    # Background on the object looks like a missing piece; object on the object looks like a misplaced piece.
    spots = np.flatnonzero(foreground if rng.random() < 0.7 else np.ones_like(foreground))
    source_y, source_x = divmod(int(spots[rng.integers(spots.size)]), width)
    source_y = float(np.clip(source_y, half_short, height - 1 - half_short))
    source_x = float(np.clip(source_x, half_long, width - 1 - half_long))
    patch = _sample(pixels, source_y + down[inside], source_x + across[inside])
    if rng.random() < 0.5:
        patch = _jitter(rng, patch)
    painted = pixels.copy()
    share = weight[inside][:, None]
    painted[inside] += share * (patch - painted[inside])
    return painted


def _jitter(rng: Generator, patch: Floats) -> Floats:
    """Brightness, contrast, saturation and channel balance of pixels (K, 3), each by up to 10 %."""
    brightness, contrast, saturation = 1 + rng.uniform(-0.1, 0.1, size=3)
    balance = 1 + rng.uniform(-0.1, 0.1, size=3)
    patch = patch * brightness
    patch = patch.mean(axis=0) + contrast * (patch - patch.mean(axis=0))
    grey = patch.mean(axis=1, keepdims=True)
    return np.asarray(np.clip((grey + saturation * (patch - grey)) * balance, 0, 255), dtype=np.float32)


# --------------------------------------------------------------------------------------------- structural


def _warp(rng: Generator, pixels: Floats, site: _Site) -> Floats:
    """A disc of the image that is shifted, twisted or pinched, weakly enough not to fold over itself."""
    rows, columns = _offsets(pixels.shape, site)
    radius = max(1.6 * site.radius, 6 * site.unit)
    bump = np.clip(1 - (rows**2 + columns**2) / radius**2, 0, None) ** 2
    inside = np.nonzero(bump)
    strength = bump[inside]
    y, x = inside[0] - np.float32(site.y), inside[1] - np.float32(site.x)
    sign = rng.choice([-1.0, 1.0])
    mode = rng.integers(3)
    if mode == 0:
        angle, push = rng.uniform(0, 2 * np.pi), strength * radius * rng.uniform(0.25, 0.5)
        y, x = y - push * np.sin(angle), x - push * np.cos(angle)
    elif mode == 1:
        turn = sign * strength * rng.uniform(0.8, 2.0)
        y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    else:
        scale = 1 + sign * strength * rng.uniform(0.4, 0.65)
        y, x = y * scale, x * scale
    painted = pixels.copy()
    painted[inside] = _sample(pixels, site.y + y, site.x + x)
    return painted


def _spot(rng: Generator, shape: tuple[int, ...], site: _Site) -> Floats:
    """Weights (H, W) in [0, 1] of an irregular ellipse with a more or less soft edge."""
    rows, columns = _offsets(shape, site)
    angle, stretch = rng.uniform(0, np.pi), _log_uniform(rng, 1, 2)
    along = (columns * np.cos(angle) + rows * np.sin(angle)) / stretch
    beside = (rows * np.cos(angle) - columns * np.sin(angle)) * stretch
    direction = np.arctan2(beside, along)
    outline = np.ones_like(direction)
    for waves in range(2, 7):
        outline += rng.normal(0, 0.25 / waves) * np.cos(waves * direction + rng.uniform(0, 2 * np.pi))
    depth = np.maximum(outline, 0.2) - np.hypot(along, beside) / max(site.radius, site.unit)
    softness = max(rng.uniform(0.1, 0.7), site.unit / max(site.radius, site.unit))
    return np.asarray(_fade(np.clip(0.5 + depth / softness, 0, 1)), dtype=np.float32)


def _stain(rng: Generator, pixels: Floats, site: _Site) -> Floats:
    weight = _spot(rng, pixels.shape, site) * site.allowed
    if rng.random() < 0.4:  # drying liquid leaves more at its edge
        weight = weight * (1 - rng.uniform(0.4, 0.8) * np.clip(2 * weight - 1, 0, 1))
    tint = rng.uniform(0.7, 1.0, size=3)
    if rng.random() < 0.6:
        target = pixels * (tint * rng.uniform(0.2, 0.6)).astype(np.float32)
    else:
        target = 255 - (255 - pixels) * (tint * rng.uniform(0.3, 0.7)).astype(np.float32)
    return _mix(pixels, target.astype(np.float32), (rng.uniform(0.35, 1.0) * weight).astype(np.float32))


def _smear(rng: Generator, pixels: Floats, site: _Site) -> Floats:
    sigma = site.unit * rng.uniform(2.5, 7, size=2)
    weight = _spot(rng, pixels.shape, site)
    return _mix(pixels, ndimage.gaussian_filter(pixels, (sigma[0], sigma[1], 0)), weight)


def _scratch(rng: Generator, pixels: Floats, site: _Site) -> Floats:
    """A thin, wandering groove, dark or bright, often with a lit flank."""
    height, width = pixels.shape[:2]
    breadth = site.unit * _log_uniform(rng, 1.2, 4)
    length = min(max(site.area / breadth, 8 * breadth), 0.7 * min(height, width))
    steps = 24
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, rng.uniform(0, 0.2), size=steps))
    path = np.stack([np.cos(heading), np.sin(heading)], axis=1).cumsum(axis=0) * length / steps
    path += np.array([site.x, site.y]) - path[steps // 2]
    scale = 4  # drawn at a larger size, then averaged, for smooth edges
    canvas = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(canvas)
    points = [(float(x) * scale, float(y) * scale) for x, y in path]
    for index, (start, end) in enumerate(itertools.pairwise(points)):
        taper = np.sin(np.pi * (index + 1) / steps) ** 0.5 * rng.uniform(0.7, 1.0)
        pen.line([start, end], fill=255, width=max(2, round(breadth * scale * taper)))
    weight = np.asarray(canvas.reduce(scale), dtype=np.float32) / 255
    weight = ndimage.gaussian_filter(weight, 0.4 * site.unit)
    sign = rng.choice([-1.0, 1.0], p=[0.6, 0.4])
    depth = sign * rng.uniform(35, 110)
    painted = pixels + (depth * weight)[..., None]
    if rng.random() < 0.5:
        shift = max(1, round(breadth))
        flank = np.clip(np.roll(weight, shift, axis=0) - weight, 0, 1)
        flank[:shift] = 0
        painted = painted - (0.5 * depth * flank)[..., None]
    return np.asarray(painted, dtype=np.float32)


_STRUCTURAL: tuple[Callable[[Generator, Floats, _Site], Floats], ...] = (_warp, _stain, _smear, _scratch)


def _blot(pixels: Floats, site: _Site) -> Floats:
    """Used when nothing else is visible: a disc shifted by 64 levels towards, and possibly beyond, mid-grey."""
    rows, columns = _offsets(pixels.shape, site)
    inside = rows**2 + columns**2 <= max(site.radius, 4 * site.unit) ** 2
    step = np.where(pixels.mean(axis=2, keepdims=True) < 128, 64, -64)
    return np.where(inside[..., None], pixels + step, pixels).astype(np.float32)

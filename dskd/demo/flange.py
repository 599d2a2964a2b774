"""The demo's machined flange."""

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from dskd.demo.rendering import (
    Defect,
    Floats,
    cast_shadow,
    draw_blob,
    draw_line,
    lit_by_lamp,
    paint,
    pixel_grid,
    sharpen,
    smooth_noise,
    soft_step,
    wandering_line,
)

# ------------------------------------------------------------------------------------------------- flange

_BOLTS = 6
_BORE, _RIM, _BOLT_CIRCLE, _BOLT = 0.27, 0.86, 0.61, 0.085


def draw_flange(rng: Generator, size: int, defect: Defect | None) -> Floats:
    """A turned steel flange with six bolt holes on a dark rubber mat."""
    turn, zoom = rng.uniform(-0.25, 0.25), rng.uniform(0.96, 1.02)
    x, y = rng.normal(0, 0.015, size=2)
    lamp = (rng.normal(-1.0, 0.15), rng.normal(-1.3, 0.15), rng.normal(1.7, 0.1))
    u, v = pixel_grid(size, turn=turn, zoom=zoom, x=x, y=y)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)

    # ring marks of the lathe tool, which change slowly around the circle
    rings = rng.standard_normal((220, 9)).astype(np.float32)
    rings[:, -1] = rings[:, 0]
    rings = 0.8 * rings + 1.2 * ndimage.gaussian_filter1d(rings, 3, axis=0) * 2.0
    where = np.stack([np.clip(radius, 0, 1) * 219, (angle / (2 * np.pi) + 0.5) * 8])
    ring = ndimage.map_coordinates(rings, where, order=1, mode="nearest")
    mat = smooth_noise(rng, size, size / 3, size / 3)
    cloud = smooth_noise(rng, size, 5, 5)

    fold = 2 * np.pi / _BOLTS
    sector = np.floor(angle / fold).astype(np.int8)
    local = angle - (sector + np.float32(0.5)) * np.float32(fold)
    to_bolt = np.hypot(radius * np.cos(local) - _BOLT_CIRCLE, radius * np.sin(local)) - _BOLT
    if defect is not None and defect.kind == "missing_hole":
        to_bolt = np.where(sector == defect.rng.integers(-3, 3), np.float32(1), to_bolt)
    inside = np.minimum(np.minimum(_RIM - radius, radius - _BORE), to_bolt)

    stain = scratch = np.zeros((size, size), np.float32)
    dent = np.zeros((size, size), np.float32)
    if defect is not None:
        r = defect.rng
        place, spot = r.uniform(0, 2 * np.pi), r.uniform(0.36, 0.78)
        centre = x + zoom * spot * np.cos(place), y + zoom * spot * np.sin(place)
        if defect.kind == "chip":
            edge = x + zoom * _RIM * np.cos(place), y + zoom * _RIM * np.sin(place)
            inside = np.minimum(inside, -draw_blob(r, size, edge, r.uniform(0.05, 0.12), 0.25))
        elif defect.kind == "dent":
            for _ in range(r.integers(1, 3)):
                spread = r.uniform(0.025, 0.055)
                du, dv = pixel_grid(size, x=centre[0] + r.normal(0, 0.06), y=centre[1] + r.normal(0, 0.06))
                distance = (du * du + dv * dv) / np.float32(spread**2)
                # a crater with a raised lip
                dent += np.float32(0.8 * spread) * np.exp(-distance / 2) * (1 - np.float32(0.35) * distance)
        elif defect.kind == "scratch":
            for _ in range(r.integers(1, 3)):
                path = wandering_line(r, centre, r.uniform(0.25, 0.6), 0.03)
                scratch = np.maximum(scratch, draw_line(size, path, r.uniform(0.011, 0.022)))
        elif defect.kind == "rust":
            blob = draw_blob(r, size, centre, r.uniform(0.06, 0.16), 0.45)
            blob = blob + np.float32(0.016) * smooth_noise(r, size, size / 7, size / 7)  # corroded edges and pits
            stain = soft_step(blob, 0.07) * np.float32(r.uniform(0.6, 0.9))

    metal = soft_step(inside, 4 / size)
    bevel = np.float32(0.028)
    height = bevel * np.clip(inside / bevel, -1, 1) * np.float32(0.9)
    height += np.interp(radius, [0.40, 0.425, 0.735, 0.742, 0.765, 0.772], [0.03, 0, 0, -0.008, -0.008, 0]).astype(
        np.float32
    )
    seat = soft_step(np.float32(0.05) - to_bolt, 0.012)  # spot-faced around each bolt
    height += np.float32(-0.006) * seat - dent - np.float32(0.008) * scratch
    height += np.float32(0.00022) * ring * (1 - seat)

    key = lit_by_lamp(height, lamp)
    fill = lit_by_lamp(height, (1.3, 0.4, 1.8))
    sin, cos = v / np.maximum(radius, 1e-3), u / np.maximum(radius, 1e-3)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along_x, along_y = -(sin * c + cos * s), cos * c - sin * s  # direction of the tool marks in the picture
    shine = np.zeros_like(radius)
    for source, strength in ((key, 1.25), (fill, 0.55)):
        across = along_x * source.half_x + along_y * source.half_y + np.float32(0.03) * ring
        # grooves spread the reflected light across their direction (Kajiya and Kay 1989, eq. 16)
        shine += np.float32(strength) * sharpen(np.clip(1 - across * across, 0, 1), 16) * sharpen(source.gloss, 8)
    shine *= 1 + np.float32(0.07) * ring + np.float32(0.04) * cloud
    flat = np.float32(0.05) + np.float32(0.13) * key.diffuse + np.float32(0.05) * fill.diffuse
    shine = shine * (1 - np.float32(0.75) * stain) + np.float32(0.35) * scratch * key.diffuse
    steel = np.asarray([0.80, 0.82, 0.85], np.float32) * (flat + np.float32(0.62) * shine)[..., None]
    glint = sharpen(key.gloss, 32) * np.float32(0.30) * (1 - stain)
    steel = steel + glint[..., None]
    rust = np.asarray([0.20, 0.075, 0.028], np.float32) * (0.5 + 0.7 * key.diffuse)[..., None]
    rust = rust * np.clip(1 + np.float32(0.3) * mat + np.float32(0.35) * cloud, 0.2, 2)[..., None]
    steel = paint(steel, rust, stain)

    reach = size / 40
    shadow = cast_shadow(metal, reach * 0.9, reach * 0.7, reach)
    table = np.asarray([0.050, 0.053, 0.060], np.float32) * (1 + np.float32(0.16) * mat)[..., None]
    table = (
        table
        * (1 - np.float32(0.75) * shadow)[..., None]
        * (np.float32(0.6) + np.float32(0.5) * key.diffuse)[..., None]
    )
    return paint(table, steel, metal)

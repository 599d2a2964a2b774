"""The demo's woven fabric."""

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

# ------------------------------------------------------------------------------------------------- fabric

_THREADS = 25


def draw_fabric(rng: Generator, size: int, defect: Defect | None) -> Floats:
    """A plain weave of oatmeal warp and blue-grey weft, filling the picture."""
    pitch = np.float32(2 / _THREADS)
    u, v = pixel_grid(size, turn=rng.normal(0, 0.025), x=rng.uniform(-0.1, 0.1), y=rng.uniform(-0.1, 0.1))
    lamp = (rng.normal(-1.6, 0.2), rng.normal(-1.4, 0.2), rng.normal(1.9, 0.1))
    u = u + pitch * np.float32(0.22) * smooth_noise(rng, size, 3, 5)
    v = v + pitch * np.float32(0.22) * smooth_noise(rng, size, 5, 3)
    upright = smooth_noise(rng, size, 24, 0.7 * size)
    level = smooth_noise(rng, size, 0.7 * size, 24)
    uneven = smooth_noise(rng, size, 14, 14)
    lumps = rng.normal(0, 1, size=(2, 2, 3 * _THREADS)).astype(np.float32)

    centre = (0.0, 0.0)
    if defect is not None:
        centre = (float(defect.rng.uniform(-0.75, 0.75)), float(defect.rng.uniform(-0.75, 0.75)))
    opening = np.ones((size, size), np.float32)
    if defect is not None and defect.kind == "hole":
        reach = defect.rng.uniform(0.05, 0.085)
        blob = draw_blob(defect.rng, size, centre, reach, 0.2)
        du, dv = pixel_grid(size, x=centre[0], y=centre[1])
        push = np.exp(-(du * du + dv * dv) / np.float32(2 * (1.3 * reach) ** 2)) * np.float32(0.40)
        u, v = u - push * du, v - push * dv  # the threads around the hole are pulled apart
        opening = 1 - soft_step(blob + np.float32(0.02) * upright, 0.03)

    row, column = np.floor(v / pitch), np.floor(u / pitch)
    i, j = column.astype(np.intp) + _THREADS, row.astype(np.intp) + _THREADS
    s, t = 2 * (u / pitch - column) - 1, 2 * (v / pitch - row) - 1
    over = np.where((i + j) % 2 == 0, np.float32(1), np.float32(-1))
    warp_wide = np.float32(0.90) + np.float32(0.035) * lumps[0, 0, i] + np.float32(0.025) * uneven
    weft_wide = np.float32(0.86) + np.float32(0.035) * lumps[1, 0, j] - np.float32(0.025) * uneven
    warp_wave, weft_wave = over * np.cos(np.pi / 2 * t), -over * np.cos(np.pi / 2 * s)
    warp_wide, weft_wide = warp_wide * opening, weft_wide * opening

    if defect is not None and defect.kind in ("broken_thread", "misweave"):
        thread, first = i[tuple(((np.array(centre[::-1]) + 1) * size / 2).astype(int))], centre[1]
        reach = defect.rng.uniform(0.06, 0.2) if defect.kind == "broken_thread" else 2.5 * float(pitch)
        picked = (i == thread) & (np.abs(pixel_grid(size)[1] - np.float32(first)) < np.float32(reach))
        if defect.kind == "broken_thread":
            warp_wide = np.where(picked, np.float32(0.02), warp_wide)
            weft_wave = np.where(picked, np.float32(0.5), weft_wave)
        else:  # the thread passes over three others instead of over and under in turn
            warp_wave = np.where(picked, np.float32(1.0), warp_wave)
            weft_wave = np.where(picked, np.float32(-1.0), weft_wave)

    def yarn(offset: Floats, wide: Floats, wave: Floats) -> Floats:
        body = np.sqrt(np.clip(1 - (offset / np.maximum(wide, 0.01)) ** 2, 0, None))
        return np.where(np.abs(offset) < wide, np.float32(0.6) * body + np.float32(0.4) * wave, np.float32(-0.9))

    warp, weft = yarn(s, warp_wide, warp_wave), yarn(t, weft_wide, weft_wave)
    is_warp = warp >= weft
    top = np.maximum(warp, weft)
    twist = np.where(is_warp, np.sin(np.float32(4.2) * s + 9 * v / pitch), np.sin(np.float32(4.2) * t + 9 * u / pitch))
    fibre = np.where(is_warp, upright, level)
    relief = top + np.float32(0.05) * twist + np.float32(0.07) * fibre
    height = ndimage.gaussian_filter(relief, size / 700) * pitch * np.float32(0.30)

    tone = np.where(is_warp, lumps[0, 1, i], lumps[1, 1, j])
    colour = np.where(
        is_warp[..., None],
        np.asarray([0.56, 0.47, 0.35], np.float32),
        np.asarray([0.25, 0.30, 0.37], np.float32),
    )
    colour = colour * (1 + np.float32(0.05) * tone + np.float32(0.07) * fibre + np.float32(0.04) * twist)[..., None]
    backing = top < np.float32(-0.85)
    colour = np.where(backing[..., None], np.asarray([0.035, 0.032, 0.030], np.float32), colour)

    shade = np.ones((size, size), np.float32)
    if defect is not None:
        r = defect.rng
        if defect.kind == "stain":
            blob = draw_blob(r, size, centre, r.uniform(0.08, 0.22), 0.25)
            wet = soft_step(blob, r.uniform(0.04, 0.12)) * (1 - np.float32(0.35) * soft_step(blob, 0.3))
            tint = np.asarray(r.uniform([0.35, 0.28, 0.18], [0.7, 0.6, 0.5]), np.float32)
            colour = colour * (1 - wet[..., None] * (1 - tint))
        elif defect.kind == "foreign_fibre" or defect.kind == "broken_thread":
            loose = defect.kind == "broken_thread"
            count = 5 if loose else 1
            hue = np.asarray(
                [0.62, 0.53, 0.41] if loose else r.choice([[0.5, 0.04, 0.05], [0.02, 0.02, 0.03], [0.05, 0.30, 0.10]])
            )
            for _ in range(count):
                spread = 0.05 if loose else 0.0
                start = (centre[0] + r.normal(0, 0.3 * spread), centre[1] + r.normal(0, 1.5 * spread))
                path = wandering_line(r, start, r.uniform(0.06, 0.14) if loose else r.uniform(0.3, 0.8), 0.25)
                hair = draw_line(size, path, 0.008 if loose else r.uniform(0.012, 0.022))
                shade *= 1 - np.float32(0.45) * cast_shadow(hair, size / 120, size / 120, size / 170)
                colour = paint(colour, hue.astype(np.float32), hair)
                height = height + hair * np.float32(0.012)

    key = lit_by_lamp(height, lamp)
    occlusion = np.float32(0.45) + np.float32(0.55) * np.clip((top + 1) / np.float32(1.7), 0, 1)
    sheen = sharpen(key.gloss, 16) * np.float32(0.06)
    light = (np.float32(0.22) + np.float32(0.95) * key.diffuse) * occlusion * shade
    return np.asarray(colour * light[..., None] + (sheen * occlusion * opening)[..., None], dtype=np.float32)

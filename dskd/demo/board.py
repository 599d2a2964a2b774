"""The demo's printed circuit board, drawn from above as a flat sheet."""

import functools
import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
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

# -------------------------------------------------------------------------------------------------- board


_Colour: TypeAlias = tuple[int, int, int]

_GREEN, _TRACK, _TIN, _DARK = (12, 62, 40), (36, 110, 66), (196, 194, 186), (30, 30, 33)
_SILK, _HOLE, _TAN, _BARE, _CAN = (214, 217, 208), (9, 12, 10), (158, 124, 84), (176, 138, 92), (172, 174, 176)
_ROWS = tuple(0.30 + 0.133 * row for row in range(4))  # positions of the small parts, left and right
_PINS = tuple(0.365 + 0.045 * pin for pin in range(7))  # positions of the chip's pins, left and right
_PADS = tuple(0.22 + 0.08 * pad for pad in range(8))  # positions of the connectors' pads, at the top and bottom
_TALL = 60  # greater heights are parts, lower ones are the bare board


class _Sheet(NamedTuple):
    """The board from straight above, drawn in three layers; coordinates 0 to 1."""

    colour: Image.Image
    height: Image.Image
    metal: Image.Image

    def polygon(self, points: NDArray[Any], colour: _Colour, height: int, metal: int) -> None:
        corners = [(float(x), float(y)) for x, y in np.asarray(points) * self.colour.width]
        ImageDraw.Draw(self.colour).polygon(corners, fill=colour)
        ImageDraw.Draw(self.height).polygon(corners, fill=height)
        ImageDraw.Draw(self.metal).polygon(corners, fill=metal)

    def track(self, points: NDArray[Any], width: float, colour: _Colour, height: int) -> None:
        corners = [(float(x), float(y)) for x, y in np.asarray(points) * self.colour.width]
        pixels = round(width * self.colour.width)
        ImageDraw.Draw(self.colour).line(corners, fill=colour, width=pixels, joint="curve")
        ImageDraw.Draw(self.height).line(corners, fill=height, width=pixels, joint="curve")

    def text(self, x: float, y: float, words: str, size: float, colour: _Colour) -> None:
        _write(self.colour, x, y, words, size, colour)


def _write(layer: Image.Image, x: float, y: float, words: str, size: float, colour: _Colour | int) -> None:
    font = ImageFont.load_default(size * layer.width)
    ImageDraw.Draw(layer).text((x * layer.width, y * layer.width), words, fill=colour, font=font, anchor="mm")


def _rectangle(x: float, y: float, width: float, height: float, turn: float = 0.0) -> NDArray[Any]:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    cos, sin = np.cos(turn), np.sin(turn)
    return np.asarray(corners @ np.array([[cos, sin], [-sin, cos]]) + [x, y])


def _ellipse(x: float, y: float, width: float, height: float) -> NDArray[Any]:
    turns = np.linspace(0, 2 * np.pi, 33)
    return np.stack([x + width / 2 * np.cos(turns), y + height / 2 * np.sin(turns)], axis=1)


def _disc(x: float, y: float, radius: float) -> NDArray[Any]:
    return _ellipse(x, y, 2 * radius, 2 * radius)


@functools.lru_cache(maxsize=1)
def _lettering(canvas: int) -> Image.Image:
    """Coverage of everything printed on the bare board."""
    layer = Image.new("L", (canvas, canvas))
    _write(layer, 0.5, 0.055, "DK-42  REV C", 0.034, 255)
    for number, x in enumerate(_PADS, start=1):
        _write(layer, x, 0.945, str(number), 0.026, 255)
    for number, y in enumerate(_ROWS, start=1):
        _write(layer, 0.185, y - 0.043, f"R{number}", 0.026, 255)
        _write(layer, 0.815, y - 0.043, f"C{number}", 0.026, 255)
    return layer


def _tracks() -> list[NDArray[Any]]:
    """The copper tracks, the same in all pictures: polylines (K, 2)."""
    half = []
    for row, pin in zip(_ROWS, _PINS[::2], strict=True):
        half.append([(0.35, pin), (0.31, pin), (0.31 - abs(pin - row), row), (0.22, row)])
        half.append([(0.15, row), (0.105, row), (0.085, row + 0.02), (0.085, 0.74)])
    half.extend([(0.35, pin), (0.285, pin)] for pin in _PINS[1::2])
    for number, x in enumerate(_PADS[1:4]):
        inner = 0.405 + 0.035 * number
        half.append([(x, 0.12), (x, 0.19), (inner, 0.19 + inner - x), (inner, 0.30)])
        half.append([(x, 0.88), (x, 0.84 - 0.025 * number), (inner, 0.74 - 0.01 * number), (inner, 0.66)])
    half.append([(0.22, 0.12), (0.22, 0.18), (0.15, 0.25), (0.085, 0.25), (0.085, 0.34)])
    half.append([(0.22, 0.88), (0.22, 0.80), (0.16, 0.74), (0.085, 0.74)])
    left = [np.array(points) for points in half]
    return left + [points * [-1, 1] + [1, 0] for points in left]


def _draw_bare_board(rng: Generator, canvas: int, defect: Defect | None) -> _Sheet:
    sheet = _Sheet(
        Image.new("RGB", (canvas, canvas), _GREEN),
        Image.new("L", (canvas, canvas), 20),
        Image.new("L", (canvas, canvas), 0),
    )
    tracks = _tracks()
    for points in tracks:
        sheet.track(points, 0.013, _TRACK, 26)
    if defect is not None and defect.kind == "open_track":
        points = tracks[defect.rng.integers(len(tracks))]
        lengths = np.hypot(*np.diff(points, axis=0).T)
        start = int(np.argmax(lengths))
        middle, half = (
            defect.rng.uniform(0.35, 0.65),
            max(defect.rng.uniform(0.012, 0.028), 9 / canvas) / lengths[start],
        )
        ends = np.array([[middle - half], [middle + half]])
        sheet.track(points[start] + ends * (points[start + 1] - points[start]), 0.020, _GREEN, 20)
    for x, y in itertools.product((0.075, 0.925), repeat=2):
        sheet.polygon(_disc(x, y, 0.040), _TIN, 26, 200)
        sheet.polygon(_disc(x, y, 0.024), _HOLE, 0, 0)
    for x, y in itertools.product(_PADS, (0.12, 0.88)):
        swell, dx, dy = rng.normal(0, 0.0006, size=3)
        sheet.polygon(_disc(x, y, 0.025 + swell), _TIN, 32, 210)
        sheet.polygon(_disc(x + dx, y + dy, 0.012), _HOLE, 0, 0)
    for x, y in itertools.product((0.285, 0.715), _PINS[1::2]):
        sheet.polygon(_disc(x, y, 0.011), _TIN, 28, 200)
        sheet.polygon(_disc(x, y, 0.005), _HOLE, 0, 0)
    sheet.colour.paste(_SILK, mask=_lettering(canvas))
    return sheet


def _mount_small_parts(rng: Generator, sheet: _Sheet, defect: Defect | None) -> None:
    """Resistors on the left, capacitors on the right, a crystal below the chip."""
    kind, victim = "", -1
    if defect is not None and defect.kind in ("missing_part", "skewed_part"):
        kind, victim = defect.kind, int(defect.rng.integers(9))
    for number, (x, y) in enumerate(itertools.product((0.185, 0.815), _ROWS)):
        dx, dy = rng.normal(0, 0.0015, size=2)
        turn = rng.normal(0, 0.012)
        for end in (-0.036, 0.036):
            sheet.polygon(_rectangle(x + end, y, 0.034, 0.052), _TIN, 30, 190)
        if number == victim and kind == "missing_part":
            continue
        if number == victim and defect is not None:
            turn = float(defect.rng.choice([-1, 1]) * defect.rng.uniform(0.3, 0.9))
            dx, dy = defect.rng.normal(0, 0.008, size=2)
        for end in (-0.032, 0.032):
            tip = x + dx + end * np.cos(turn), y + dy + end * np.sin(turn)
            sheet.polygon(_rectangle(*tip, 0.020, 0.042, turn), _TIN, 95, 230)
        sheet.polygon(_rectangle(x + dx, y + dy, 0.046, 0.043, turn), _DARK if x < 0.5 else _TAN, 100, 0)
        if x < 0.5 and number != victim:
            sheet.text(x + dx, y + dy, "103", 0.021, (190, 190, 188))
    turn = rng.normal(0, 0.015)
    for end in (-0.085, 0.085):
        sheet.polygon(_disc(0.5 + end, 0.765, 0.016), _TIN, 32, 200)
    if victim == 8 and kind == "missing_part":
        return
    if victim == 8 and defect is not None:
        turn = float(defect.rng.choice([-1, 1]) * defect.rng.uniform(0.15, 0.4))
    can = _rectangle(0.5, 0.765, 0.125, 0.062, turn)
    for x, y in ((can[0] + can[3]) / 2, (can[1] + can[2]) / 2):
        sheet.polygon(_disc(x, y, 0.031), _CAN, 110, 255)
    sheet.polygon(can, _CAN, 110, 255)


def _mount_chip(rng: Generator, sheet: _Sheet, defect: Defect | None) -> None:
    for side, y in itertools.product((-1, 1), _PINS):
        sheet.polygon(_rectangle(0.5 + side * 0.148, y, 0.052, 0.026), _TIN, 30, 190)
        sheet.polygon(_rectangle(0.5 + side * 0.134, y + rng.normal(0, 0.0008), 0.052, 0.017), _TIN, 62, 235)
    if defect is not None and defect.kind == "solder_bridge":
        r = defect.rng
        for _ in range(r.integers(1, 3)):
            x = 0.5 + r.choice([-1, 1]) * r.uniform(0.145, 0.16)
            y = (_PINS[0] + _PINS[1]) / 2 + 0.045 * r.integers(6)
            ring = _ellipse(x, y, r.uniform(0.016, 0.032), 0.056)
            bulge = 1 + 0.12 * np.sin(3 * np.linspace(0, 2 * np.pi, len(ring)) + r.uniform(0, 6))
            sheet.polygon((ring - [x, y]) * bulge[:, None] + [x, y], _TIN, 58, 240)
    dx, dy = rng.normal(0, 0.0015, size=2)
    sheet.polygon(_rectangle(0.5 + dx, 0.5 + dy, 0.232, 0.345, rng.normal(0, 0.004)), _DARK, 140, 0)
    sheet.polygon(_disc(0.415 + dx, 0.355 + dy, 0.011), (18, 18, 20), 130, 0)
    sheet.text(0.5 + dx, 0.475 + dy, "74HC165", 0.038, (150, 150, 150))
    sheet.text(0.5 + dx, 0.52 + dy, "K2403", 0.030, (135, 135, 135))


def _scratch_board(sheet: _Sheet, r: Generator) -> None:
    """Cuts through the green lacquer, not through the parts that stand above it."""
    centre = float(r.uniform(-0.7, 0.7)), float(r.uniform(-0.7, 0.7))
    cut = draw_line(sheet.colour.width, wandering_line(r, centre, r.uniform(0.25, 0.6), 0.03), r.uniform(0.010, 0.018))
    cut = np.where(np.asarray(sheet.height) < _TALL, cut, np.float32(0))
    mask = Image.fromarray(np.asarray(255 * cut, dtype=np.uint8))
    sheet.colour.paste(_BARE, mask=mask)
    sheet.height.paste(18, mask=mask)
    sheet.metal.paste(150, mask=mask)


def draw_board(rng: Generator, size: int, defect: Defect | None) -> Floats:
    """A small circuit board with a chip, resistors, capacitors and a crystal on a light table."""
    turn, zoom = rng.normal(0, 0.02), rng.uniform(0.90, 0.92)
    x, y = rng.normal(0, 0.012, size=2)
    lamp = (rng.normal(-1.2, 0.2), rng.normal(-1.5, 0.2), rng.normal(1.8, 0.1))
    u, v = pixel_grid(size, turn=turn, zoom=zoom, x=x, y=y)
    grain, cloud = smooth_noise(rng, size, size / 2, size / 2), smooth_noise(rng, size, 6, 6)
    sheet = _draw_bare_board(rng, 2 * size, defect)
    _mount_small_parts(rng, sheet, defect)
    _mount_chip(rng, sheet, defect)
    if defect is not None and defect.kind == "scratch":
        _scratch_board(sheet, defect.rng)

    # from picture to sheet: the grid above as the matrix that Pillow needs
    scale = 0.5 * size
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    across = (cos, sin, scale - cos * (scale + x * scale) - sin * (scale + y * scale))
    down = (-sin, cos, scale + sin * (scale + x * scale) - cos * (scale + y * scale))
    colour_bytes, relief_bytes, metal_bytes = (
        np.asarray(
            layer.reduce(2).transform((size, size), Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR)
        )
        for layer in sheet
    )
    linear = (np.arange(256, dtype=np.float32) / 255) ** np.float32(2.2)
    colour, metal = linear[colour_bytes], metal_bytes / np.float32(255)
    relief = relief_bytes / np.float32(255)

    corner = np.float32(0.06)
    out = np.hypot(np.clip(np.abs(u) - 1 + corner, 0, None), np.clip(np.abs(v) - 1 + corner, 0, None)) - corner
    board = soft_step(-out, 4 / size)
    relief = ndimage.gaussian_filter(relief, size / 260)
    weave = np.sin(u * np.float32(170)) * np.sin(v * np.float32(170))
    height = np.float32(0.10) * relief + np.float32(0.00035) * weave * (1 - metal) + np.float32(0.0004) * cloud
    height = height + np.float32(0.0003) * grain * (1 + 2 * metal)
    key, fill = lit_by_lamp(height, lamp), lit_by_lamp(height, (1.5, 0.8, 1.6))
    standing = soft_step(relief - np.float32(0.22), 0.1)
    reach = size / 90
    shadow = cast_shadow(standing, reach * 1.2, reach, reach * 0.8)
    shadow = np.float32(0.65) * shadow * (1 - standing)

    body = np.float32(0.25) + np.float32(0.85) * key.diffuse + np.float32(0.15) * fill.diffuse
    light = colour * (body * (1 - np.float32(0.55) * metal) * (1 + np.float32(0.03) * grain))[..., None]
    coat = sharpen(key.gloss, 32) * np.float32(0.16) + sharpen(fill.gloss, 32) * np.float32(0.06)
    shine = sharpen(key.gloss, 16) * np.float32(0.85) + sharpen(fill.gloss, 16) * np.float32(0.38)
    light = light + (coat * (1 - metal))[..., None] + colour * (shine * metal)[..., None]
    light = light * (1 - shadow)[..., None]
    if defect is not None and defect.kind == "residue":
        r = defect.rng
        centre = (float(r.uniform(-0.7, 0.7)), float(r.uniform(-0.7, 0.7)))
        blob = draw_blob(r, size, centre, r.uniform(0.08, 0.2), 0.3)
        film = soft_step(blob, 0.05) * (np.float32(0.35) + np.float32(0.65) * np.exp(-np.abs(blob) / np.float32(0.02)))
        speckle = np.clip(1 + np.float32(0.35) * smooth_noise(r, size, size / 8, size / 8), 0, 2)
        veil = np.asarray([0.55, 0.53, 0.45], np.float32) * body[..., None]
        light = paint(light, veil, film * speckle * np.float32(r.uniform(0.25, 0.55)))

    around = cast_shadow(board, size / 60, size / 70, size / 60)
    table = (
        np.asarray([0.40, 0.39, 0.375], np.float32)
        * (1 + np.float32(0.015) * grain + np.float32(0.01) * cloud)[..., None]
    )
    table = table * (1 - np.float32(0.6) * around)[..., None]
    return paint(table, light, board)

"""Kinds of image files that inspectors have: each is read as its plain 8-bit twin, or refused by name."""

import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from dskd.data import images
from dskd.data.depth import PixelScale
from dskd.data.files import UnreadableImageError
from dskd.data.geometry import Geometry
from dskd.data.images import (
    find_scale,
    image_size,
    load_framed,
    load_images,
    load_masks,
    read_image,
    read_levels,
    read_mask,
)
from dskd.data.samples import Sample

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
GREY[0, :2] = 0, 255
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
RGB[0, :2] = [[0] * 3, [255] * 3]
TURNS = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3),
}  # fmt: skip
"""How an upright picture is stored under each EXIF orientation."""


def png16(path: Path, values: np.ndarray) -> Path:
    """A PNG of 16 bits per channel; Pillow writes none of more than one channel."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(np.int16)
    left = np.zeros_like(rows)
    left[:, 2 * channels :] = rows[:, : -2 * channels]
    filtered = np.concatenate([np.ones((height, 1), np.uint8), (rows - left).astype(np.uint8)], axis=1)  # filter "sub"

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(filtered.tobytes()))
        + chunk(b"IEND", b"")
    )
    return path


def with_alpha(values: np.ndarray, opaque: int) -> np.ndarray:
    planes = values.reshape(*values.shape[:2], -1)
    return np.concatenate([planes, np.full_like(planes[..., :1], opaque)], axis=2)


def twelve(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint16) * 16


def tiff(values: np.ndarray, **options: Any) -> Callable[[Path], object]:
    return lambda path: tifffile.imwrite(path, values, **options)


SIGNED = GREY.astype(np.int16) - 128
DEEP: dict[str, tuple[str, Callable[[Path], object], np.ndarray]] = {
    "12 bits, tiff": ("tif", tiff(twelve(GREY)), GREY),
    "12 bits, big-endian tiff": ("tif", tiff(twelve(GREY), byteorder=">"), GREY),
    "12 bits, deflated tiff": ("tif", tiff(twelve(GREY), compression="zlib"), GREY),
    "12 bits, png": ("png", lambda path: png16(path, twelve(GREY)), GREY),
    "10 bits, png": ("png", lambda path: png16(path, GREY.astype(np.uint16) * 4), GREY),
    "16 bits, replicated": ("tif", tiff(GREY.astype(np.uint16) * 257), GREY),
    "8 bits in 16": ("tif", tiff(GREY.astype(np.uint16)), GREY),
    "12 bits of colour, png": ("png", lambda path: png16(path, twelve(RGB)), RGB),
    "16 bits of colour and alpha, png": ("png", lambda path: png16(path, with_alpha(RGB * np.uint16(257), 65535)), RGB),
    "16 bits of grey and alpha, png": ("png", lambda path: png16(path, with_alpha(GREY * np.uint16(257), 65535)), GREY),
    "12 bits of colour, tiff": ("tif", tiff(twelve(RGB), photometric="rgb"), RGB),
    "12 bits of colour, big-endian tiff": ("tif", tiff(twelve(RGB), photometric="rgb", byteorder=">"), RGB),
    "12 bits of colour, deflated tiff": ("tif", tiff(twelve(RGB), photometric="rgb", compression="zlib"), RGB),
    "12 bits of colour in planes": (
        "tif", tiff(twelve(RGB).transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB,
    ),
    "int32": ("tif", tiff(twelve(GREY).astype(np.int32)), GREY),
    "uint32": ("tif", tiff(twelve(GREY).astype(np.uint32)), GREY),
    "uint32 of 24 bits": ("tif", tiff(GREY.astype(np.uint32) << 16), GREY),
    "uint32 of all bits": ("tif", tiff(GREY.astype(np.uint32) << 24), GREY),
    "float32 in 0..1": ("tif", tiff((GREY / 255).astype(np.float32)), GREY),
    "float64 in 0..1": ("tif", tiff(GREY / 255), GREY),
    "float32 in 0..255": ("tif", tiff(GREY.astype(np.float32)), GREY),
    "float32 colours in 0..1": ("tif", tiff((RGB / 255).astype(np.float32), photometric="rgb"), RGB),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_deeper_values_give_the_very_pixels_of_their_eight_bit_twin(kind: str, tmp_path: Path) -> None:
    suffix, write, twin = DEEP[kind]
    path = tmp_path / f"deep.{suffix}"
    write(path)
    expected = twin if twin.ndim == 3 else twin[..., None].repeat(3, axis=2)
    scale = find_scale([path])
    np.testing.assert_array_equal(read_image(path, scale), expected)
    assert image_size(path) == (9, 6)
    Image.fromarray(twin).save(tmp_path / "twin.png")
    small = Geometry.square(4)
    reduced = load_framed(tmp_path / "twin.png", small).rgb
    np.testing.assert_array_equal(load_framed(path, small, scale).rgb, reduced)
    with pytest.raises(UnreadableImageError, match=r"deep\.\w+ is not a readable image .*8 bits per channel"):
        read_image(path, find_scale([tmp_path / "twin.png"]))


@pytest.mark.parametrize("kind", [np.int16, np.int8])
def test_signed_values_are_told_from_unsigned_ones(kind: type, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "signed.tif", SIGNED.astype(kind))
    levels = read_levels(tmp_path / "signed.tif")
    assert levels is not None and (levels.low, levels.high) == (-128, 127)
    pixels = read_image(tmp_path / "signed.tif", find_scale([tmp_path / "signed.tif"]))[..., 0].astype(int)
    assert np.corrcoef(pixels.ravel(), GREY.ravel())[0, 1] > 0.999


def test_a_defect_of_twelve_levels_of_a_dim_camera_is_seen(tmp_path: Path) -> None:
    part = np.full((32, 32), 300, np.uint16)
    defect = part.copy()
    defect[5:25, 5:25] += 12 * 4
    for name, values in (("good.tif", part), ("bad.tif", defect)):
        tifffile.imwrite(tmp_path / name, values)
    scale = find_scale([tmp_path / "good.tif"])
    found = read_image(tmp_path / "bad.tif", scale).astype(int) - read_image(tmp_path / "good.tif", scale)
    assert found[5:25, 5:25].min() == 12


def test_the_highest_value_that_a_tiff_states_is_believed(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "dim.tif", GREY.astype(np.uint16), extratags=[(281, "H", 1, 4095, False)])
    levels = read_levels(tmp_path / "dim.tif")
    assert levels is not None and levels.stated == 4095


def test_clipped_values_are_told_of_each_image(tmp_path: Path) -> None:
    for name, top in (("a.tif", 4000), ("b.tif", 5000), ("c.tif", 9000)):
        tifffile.imwrite(tmp_path / name, np.array([[0, top, top]], np.uint16))
    paths = sorted(tmp_path.glob("*.tif"))
    told: list[tuple[str, int]] = []
    load_images(
        paths,
        Geometry.square(4),
        scale=find_scale(paths[:1]),
        on_clipped=lambda path, count: told.append((path.name, count)),
    )
    assert told == [("b.tif", 2), ("c.tif", 2)]


def test_values_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    tifffile.imwrite(tmp_path / "holes.tif", values)
    for read in (read_levels, read_mask, read_image):
        with pytest.raises(UnreadableImageError, match=r"holes\.tif is not a readable image \(has 3 values"):
            read(tmp_path / "holes.tif")


def test_more_channels_than_colours_are_refused_by_name(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "five.tif", np.zeros((8, 8, 5), np.float64), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(UnreadableImageError, match=r"five\.tif is not a readable image"):
        read_image(tmp_path / "five.tif")


def stored(path: Path, orientation: int, values: np.ndarray) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](values))).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_images_and_masks_are_turned_upright_as_their_exif_says(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](RGB))).save(path, exif=exif, **options)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert image_size(path) == (9, 6)
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](GREY))).save(path, exif=exif, **options)
    np.testing.assert_array_equal(read_image(path)[..., 0], GREY)
    spot = np.where(GREY > 127, np.uint8(255), np.uint8(0))
    mask = stored(tmp_path / "mask.png", orientation, spot)
    np.testing.assert_array_equal(read_mask(mask), spot > 0)
    assert load_masks([Sample(path, "bent", mask)], Geometry.square(8)).any()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    "values",
    [twelve(GREY), twelve(RGB), (GREY / 255).astype(np.float32), GREY / 255],
    ids=["12 bits", "colour", "float32", "float64"],
)
def test_deep_images_are_turned_upright_too(values: np.ndarray, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "turned.tif"
    colours: dict[str, Any] = {"photometric": "rgb"} if values.ndim == 3 else {}
    turned = np.ascontiguousarray(TURNS[orientation](values))
    tifffile.imwrite(path, turned, extratags=[(274, "H", 1, orientation, True)], **colours)
    expected = RGB if values.ndim == 3 else GREY[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(path, find_scale([path])), expected)


def test_damaged_exif_leaves_a_sound_image_as_it_lies(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\xff\xffdamaged")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_pixels_that_nobody_sees_do_not_count(mode: str, tmp_path: Path) -> None:
    pictures = []
    for hidden in (0, 200):
        pixels = np.full((8, 8, 4), (90, 90, 90, 255), np.uint8)
        pixels[2:5, 2:5] = hidden, hidden, hidden, 0
        picture = Image.fromarray(pixels)
        if mode == "LA":
            picture = picture.convert("LA")
        elif mode != "RGBA":
            picture = Image.fromarray(pixels[..., 0]).convert("P")
            picture.info["transparency"] = hidden
        path = tmp_path / f"{hidden}.png"
        options: dict[str, Any] = {"transparency": hidden} if mode in ("P", "PA") else {}
        picture.save(path, **options)
        pictures.append(read_image(path))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0][2:5, 2:5] == 0).all() and (pictures[0][0] == 90).all()


MASK = np.zeros((8, 8), bool)
MASK[2:4, 2:6] = True
SPOT = MASK.astype(np.uint8)


def palette(entries: np.ndarray, colours: list[int]) -> Image.Image:
    picture = Image.fromarray(entries).convert("P")
    picture.putdata(entries.ravel().tolist())
    picture.putpalette(colours)
    return picture


def soft(peak: float) -> np.ndarray:
    ramp = np.linspace(0, peak, 64).reshape(8, 8)
    return ramp


MASKS: dict[str, tuple[Image.Image | np.ndarray, np.ndarray]] = {
    "0/255": (SPOT * 255, MASK),
    "0/1": (SPOT, MASK),
    "0/100": (SPOT * 100, MASK),
    "0/127": (SPOT * 127, MASK),
    "1/2": (SPOT + 1, MASK),
    "class numbers": (SPOT * np.where(np.arange(8) < 4, 3, 7).astype(np.uint8), MASK),
    "16 bits, 0/255": (SPOT.astype(np.uint16) * 255, MASK),
    "16 bits, 0/1": (SPOT.astype(np.uint16), MASK),
    "16 bits, 0/65535": (SPOT.astype(np.uint16) * 65535, MASK),
    "int32": (SPOT.astype(np.int32) * 255, MASK),
    "floats of 0 and 1": (SPOT.astype(np.float32), MASK),
    "bits": (Image.fromarray(MASK), MASK),
    "red on black": (np.stack([SPOT * 255, SPOT * 0, SPOT * 0], axis=2), MASK),
    "dark blue on black": (np.stack([SPOT * 0, SPOT * 0, SPOT * 128], axis=2), MASK),
    "palette of red": (palette(SPOT, [0, 0, 0, 128, 0, 0]), MASK),
    "palette of two greys, white first": (palette(1 - SPOT, [255, 255, 255, 0, 0, 0]), MASK),
    "palette of colours, black last": (palette(1 - SPOT, [128, 0, 0, 0, 0, 0]), MASK),
    "palette that looks black": (palette(SPOT, [0, 0, 0] * 2), MASK),
    "alpha alone": (np.stack([SPOT * 0, SPOT * 0, SPOT * 0, SPOT * 255], axis=2), MASK),
    "white where it is seen": (np.stack([SPOT * 0 + 255] * 3 + [SPOT * 255], axis=2), MASK),
    "white on black, opaque": (np.stack([SPOT * 255] * 3 + [SPOT * 0 + 255], axis=2), MASK),
    "soft edges up to white": (soft(255).astype(np.uint8), soft(255).astype(np.uint8) > 127),
    "soft edges up to a grey": (soft(100).astype(np.uint8), soft(100).astype(np.uint8) > 50),
    "soft floats": (soft(1).astype(np.float32), soft(1) > 0.5),
    "soft 16 bits": (soft(65535).astype(np.uint16), soft(65535).astype(np.uint16) > 32767),
    "empty": (SPOT * 0, MASK & False),
    "empty 16 bits": (SPOT.astype(np.uint16) * 0, MASK & False),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_by_what_they_hold(kind: str, tmp_path: Path) -> None:
    content, expected = MASKS[kind]
    path = tmp_path / "mask.tif"
    if isinstance(content, Image.Image):
        path = tmp_path / "mask.png"
        content.save(path)
    elif content.ndim == 3:
        path = tmp_path / "mask.png"
        Image.fromarray(content).save(path)
    else:
        tifffile.imwrite(path, content)
    np.testing.assert_array_equal(read_mask(path), expected)


def test_masks_of_another_shape_are_refused_and_of_another_scale_taken(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "image.png")
    for name, size in (("same.png", (20, 10)), ("other.png", (20, 20))):
        Image.new("L", size).save(tmp_path / name)
    load_masks([Sample(tmp_path / "image.png", "bent", tmp_path / "same.png")], Geometry.square(8))
    with pytest.raises(ValueError, match=r"other\.png is 20 x 20 pixels, its image 40 x 20: another shape"):
        load_masks([Sample(tmp_path / "image.png", "bent", tmp_path / "other.png")], Geometry.square(8))


def test_a_mask_of_most_of_its_image_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    told: list[str] = []
    for name, values in (("spot.png", SPOT * 255), ("inverted.png", 255 - SPOT * 255)):
        Image.fromarray(values).save(tmp_path / name)
        load_masks([Sample(tmp_path / "image.png", "bent", tmp_path / name)], Geometry.square(8), told.append)
    assert len(told) == 1 and "inverted.png marks 88% of its image" in told[0]


def several(path: Path, suffix: str) -> Path:
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB), Image.fromarray(RGB // 2)]
    pages[0].save(path.with_suffix(suffix), save_all=True, append_images=pages[1:])
    return path.with_suffix(suffix)


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".png"])
def test_several_pages_are_named_and_not_judged_by_the_first(suffix: str, tmp_path: Path) -> None:
    path = several(tmp_path / "stack", suffix)
    with pytest.raises(UnreadableImageError, match=r"stack\.\w+ has 3 pages, of which one alone could be seen"):
        read_image(path)
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((2, 8, 8)), photometric="minisblack")
    with pytest.raises(UnreadableImageError, match=r"deep\.tif has 2 pages"):
        read_image(tmp_path / "deep.tif")


def test_previews_beside_the_one_page_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "scan.tif") as file:
        file.write(RGB, photometric="rgb")
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "scan.tif"), RGB)


def test_large_images_are_read_beyond_pillows_limit_which_stays_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow's own error comes at twice that
    monkeypatch.setattr(images, "MAX_PIXELS", 54)
    Image.fromarray(RGB).save(tmp_path / "scan.tif")
    assert read_image(tmp_path / "scan.tif").shape == (6, 9, 3)
    assert Image.MAX_IMAGE_PIXELS == 20
    monkeypatch.setattr(images, "MAX_PIXELS", 53)
    with pytest.raises(UnreadableImageError, match=r"scan\.tif is refused as a decompression bomb: 9 x 6 pixels"):
        read_image(tmp_path / "scan.tif")
    assert Image.MAX_IMAGE_PIXELS == 20
    assert images.MAX_PIXELS < 2 * images.DECODING_BYTES


def test_threads_decode_no_more_at_once_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for index in range(12):
        paths.append(tmp_path / f"{index:02}.png")
        Image.fromarray(RGB).save(paths[-1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    now, most, lock = 0, 0, threading.Lock()

    def work(path: Path) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return path.name

    one = images._decoding_bytes(paths[0])
    for allowed, expected in ((1, 1), (3, 3)):
        monkeypatch.setattr(images, "DECODING_BYTES", allowed * one)
        most = 0
        assert images.in_threads(work, paths) == [path.name for path in paths]
        assert most <= expected
    monkeypatch.setattr(images, "DECODING_BYTES", 1)
    assert images.in_threads(work, paths) == [path.name for path in paths], "one that needs more goes alone"


def test_pipes_and_devices_do_not_hang_and_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        for read in (read_image, read_mask, images.check_header, read_levels):
            with pytest.raises(UnreadableImageError, match=name):
                read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "webp", "jp2", "pgm"])
def test_mutated_files_raise_nothing_but_one_line(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sound = tmp_path / f"sound.{suffix}"
    Image.fromarray(GREY if suffix == "pgm" else RGB).save(sound)
    contents = [sound.read_bytes()]
    if suffix == "tif":
        tifffile.imwrite(sound, GREY / 255)
        contents.append(sound.read_bytes())
        tifffile.imwrite(sound, GREY.astype(np.uint32), compression="zlib")
        contents.append(sound.read_bytes())
    path = tmp_path / f"mutated.{suffix}"
    for number in range(150):
        content = bytearray(contents[number % len(contents)])
        for _ in range(int(rng.integers(1, 6))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(bytes(content[: int(rng.integers(len(content)))] if number % 5 == 0 else content))
        for read in (read_image, read_mask, lambda path: find_scale([path])):
            try:
                read(path)
            except UnreadableImageError as error:
                assert path.name in str(error) and "\n" not in str(error)


def test_eight_bits_are_taken_as_they_are_whatever_the_scale(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for scale in (None, PixelScale(kind="none"), PixelScale(kind="integer", step=16.0)):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", scale), RGB)

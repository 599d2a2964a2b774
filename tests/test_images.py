import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd.data import images
from dskd.data.files import list_images
from dskd.data.geometry import Geometry
from dskd.data.images import (
    check_header,
    load_framed,
    load_images,
    load_masks,
    read_image,
    read_mask,
    resize_mask,
)
from dskd.data.samples import Sample


def paint(path: Path, value: int = 90, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def test_a_truncated_or_foreign_file_is_named(mvtec_root: Path, tmp_path: Path) -> None:
    whole = next((mvtec_root / "tile/train/good").iterdir()).read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a readable image") as raised:
            load_framed(tmp_path / name, Geometry.square(32))
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        load_images([paint(tmp_path / "fine.png"), tmp_path / "gone.png"], Geometry.square(32))


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    with pytest.raises(ValueError, match=r"large\.png is refused as a decompression bomb"):
        load_framed(paint(tmp_path / "large.png"), Geometry.square(32))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 255], [256 * 100, 65535]], np.uint16)
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = np.asarray(load_framed(tmp_path / name, Geometry.square(2)).rgb)
        assert pixels.tolist() == [[[0] * 3, [0] * 3], [[100] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert np.asarray(load_framed(path, Geometry.square(4)).rgb).tolist() == [[[255] * 3] * 4] * 4


def test_images_keep_their_order_and_can_be_written_in_place(tmp_path: Path) -> None:
    paths = [paint(tmp_path / f"{value}.png", value) for value in range(0, 200, 10)]
    out = np.empty((len(paths), 4, 4, 3), np.uint8)
    assert load_images(paths, Geometry.square(4), out) is out
    assert [int(image[0, 0, 0]) for image in out] == list(range(0, 200, 10))
    np.testing.assert_array_equal(load_images(paths, Geometry.square(4)), out)


def test_masks_are_resized_to_their_nearest_pixel(tmp_path: Path) -> None:
    spot = np.zeros((3, 3), np.uint8)
    spot[1, 1] = 255
    Image.fromarray(spot).save(tmp_path / "mask.png")
    # Any interpolation would round the corners of the one pixel.
    np.testing.assert_array_equal(resize_mask(read_mask(tmp_path / "mask.png"), 24), spot.repeat(8, 0).repeat(8, 1) > 0)
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert resize_mask(read_mask(tmp_path / "mask.png"), 2).tolist() == [[False, False], [True, True]]


def save(values: list[list[int]], path: Path, dtype: type = np.uint8, *, palette: bool = False) -> Path:
    image = Image.fromarray(np.array(values, dtype))
    if palette:
        image = image.convert("P")
        image.putpalette([0, 0, 0] * 3)  # entries that all look black
    image.save(path)
    return path


def test_small_class_numbers_are_defects_where_the_layout_says_so(tmp_path: Path) -> None:
    numbers, wanted = [[0, 1], [2, 127]], [[False, True], [True, True]]
    for path in (
        save(numbers, tmp_path / "eight.png"),
        save(numbers, tmp_path / "sixteen.png", np.uint16),
        save(numbers, tmp_path / "palette.png", palette=True),
    ):
        assert read_mask(path, above=0).tolist() == wanted, path.name
    # white among them makes them levels of grey where the layout does not say so
    save([[0, 1], [2, 255]], tmp_path / "eight.png")
    image = paint(tmp_path / "x.png", size=(2, 2))
    ids, grey = (Sample(image, "bent", tmp_path / "eight.png", above) for above in (0, 127))
    assert load_masks([ids, grey], Geometry.square(2)).tolist() == [wanted, [[False, False], [False, True]]]


def test_hidden_files_are_no_images_and_broken_links_are(tmp_path: Path) -> None:
    paint(tmp_path / "b.PNG")
    (tmp_path / "._b.PNG").write_bytes(b"what macOS leaves on a foreign disk")
    (tmp_path / "a.png").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.PNG"]
    with pytest.raises(ValueError, match=r"a\.png does not exist"):
        load_images(list_images(tmp_path), Geometry.square(8))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_reading_is_counted_on_a_terminal_where_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [paint(tmp_path / f"{index}.png") for index in range(3)]
    for name, seen in (("reading tiles", True), (None, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        load_images(paths, Geometry.square(8), progress=name)
        assert ("reading tiles" in terminal.getvalue() and "/3" in terminal.getvalue()) == seen


def test_reading_is_silent_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_images([paint(tmp_path / "a.png")], Geometry.square(8), progress="reading")
    assert capfd.readouterr() == ("", "")


def test_a_header_is_checked_without_decoding(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = tmp_path / "whole.png"
    Image.fromarray(pixels).save(whole)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    check_header(whole)
    check_header(tmp_path / "whole.jpg")
    longer = tmp_path / "longer.png"
    longer.write_bytes(whole.read_bytes() + b"something after the end" * 2)
    check_header(longer)
    for name, content in {"cut.png": whole.read_bytes()[:-100], "empty.png": b"", "text.jpg": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a readable image"):
            check_header(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        check_header(tmp_path / "none.png")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0MM\0*\0\0\0\x08\0\0"], ids=["without EXIF", "with EXIF"])
def test_a_file_that_is_damaged_in_its_middle_is_never_read_as_a_sound_one(
    depth: int, exif: bytes, tmp_path: Path
) -> None:
    """Pillow decodes a PNG to find its EXIF; an error there once passed for odd metadata."""
    noise = np.random.default_rng(0).integers(0, 2**depth, (64, 64))
    path = tmp_path / "spoilt.png"
    Image.fromarray(noise.astype(np.uint8 if depth == 8 else np.uint16)).save(path, exif=exif)
    assert read_image(path).shape == (64, 64, 3)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"x" * 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"spoilt\.png is not a readable image"):
        read_image(path)

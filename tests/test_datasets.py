import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd.data.datasets import (
    Sample,
    find_categories,
    fingerprint,
    hold_out,
    load_image,
    load_images,
    load_mask,
    load_masks,
    read_category,
)


def paint(path: Path, value: int = 90, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(path)
    return path


def category(folder: Path, num_train: int = 2) -> Path:
    for index in range(num_train):
        paint(folder / "train" / "good" / f"{index}.png")
    return folder


@pytest.mark.parametrize("place", [".", "nut", "a/nut", "a/b/nut"])
def test_categories_are_found_at_the_folder_itself_and_up_to_three_levels_below(tmp_path: Path, place: str) -> None:
    folder = category(tmp_path / "nut" / place)
    assert find_categories(tmp_path / "nut") == {"nut": folder.resolve()}


def test_a_category_four_levels_below_or_in_a_hidden_folder_is_not_found(tmp_path: Path) -> None:
    category(tmp_path / "a/b/c/nut")
    category(tmp_path / ".trash/nut")
    with pytest.raises(ValueError, match=r"no category in .*train/good"):
        find_categories(tmp_path)


def test_two_categories_of_one_name_are_refused_naming_both(tmp_path: Path) -> None:
    category(tmp_path / "old/nut")
    category(tmp_path / "new/nut")
    with pytest.raises(ValueError, match=r"two categories are named nut: .*new/nut and .*old/nut"):
        find_categories(tmp_path)


def test_missing_data_folder_and_unknown_category_name_what_there_is(mvtec_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_categories(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no category 'screw' in .*; it holds: tile, wood\."):
        read_category(mvtec_root, "screw")


def test_samples_know_split_label_and_mask(mvtec_root: Path) -> None:
    tile = read_category(mvtec_root, "tile")
    assert [sample.path.name for sample in tile.train] == [f"{index:03d}.png" for index in range(12)]
    assert all(
        sample.path.parent == mvtec_root / "tile/train/good" and not sample.is_defective for sample in tile.train
    )
    assert [sample.defect for sample in tile.test] == ["good"] * 4 + ["scratch"] * 4
    assert [sample.mask for sample in tile.test[:4]] == [None] * 4
    expected = [mvtec_root / "tile/ground_truth/scratch" / f"{index:03d}_mask.png" for index in range(4)]
    assert [sample.mask for sample in tile.test[4:]] == expected


def test_a_defective_image_without_a_mask_stays_defective(tmp_path: Path) -> None:
    folder = category(tmp_path / "nut")
    paint(folder / "test/bent/0.png")
    (sample,) = read_category(tmp_path, "nut").test
    assert sample.is_defective and sample.mask is None
    assert not load_masks([sample], 8).any()


def test_a_mask_without_an_image_is_refused(tmp_path: Path) -> None:
    folder = category(tmp_path / "nut")
    paint(folder / "test/bent/0.png")
    paint(folder / "ground_truth/bent/0_mask.png", mode="L")
    paint(folder / "ground_truth/bent/1_mask.png", mode="L")
    with pytest.raises(ValueError, match=r"bent/1_mask\.png has no image 1\.\* in "):
        read_category(tmp_path, "nut")


def test_a_single_training_image_is_too_few(tmp_path: Path) -> None:
    category(tmp_path / "nut", num_train=1)
    with pytest.raises(ValueError, match="holds 1 images; training needs at least 2"):
        read_category(tmp_path, "nut")


def test_other_files_beside_the_images_are_passed_over(tmp_path: Path) -> None:
    good = category(tmp_path / "nut") / "train/good"
    (good / "notes.txt").write_text("no image")
    paint(good / "sub/9.png")
    paint(good / "3.PNG")
    assert [sample.path.name for sample in read_category(tmp_path, "nut").train] == ["0.png", "1.png", "3.PNG"]


def test_a_truncated_or_foreign_file_is_named(mvtec_root: Path, tmp_path: Path) -> None:
    whole = next((mvtec_root / "tile/train/good").iterdir()).read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a readable image") as raised:
            load_image(tmp_path / name, 32)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        load_images([paint(tmp_path / "fine.png"), tmp_path / "gone.png"], 32)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"large\.png is refused as a decompression bomb"):
        load_image(paint(tmp_path / "large.png"), 32)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 255], [256 * 100, 65535]], np.uint16)
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = load_image(tmp_path / name, 2)
        assert pixels.tolist() == [[[0] * 3, [0] * 3], [[100] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert load_image(path, 4).tolist() == [[[255] * 3] * 4] * 4


def test_images_keep_their_order_and_can_be_written_in_place(tmp_path: Path) -> None:
    paths = [paint(tmp_path / f"{value}.png", value) for value in range(0, 200, 10)]
    out = np.empty((len(paths), 4, 4, 3), np.uint8)
    assert load_images(paths, 4, out) is out
    assert [int(image[0, 0, 0]) for image in out] == list(range(0, 200, 10))
    np.testing.assert_array_equal(load_images(paths, 4), out)


def test_masks_are_resized_to_their_nearest_pixel(tmp_path: Path) -> None:
    spot = np.zeros((3, 3), np.uint8)
    spot[1, 1] = 255
    Image.fromarray(spot).save(tmp_path / "mask.png")
    # Any interpolation would round the corners of the one pixel.
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", 24), spot.repeat(8, 0).repeat(8, 1) > 0)
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", 2).tolist() == [[False, False], [True, True]]


def samples(folder: str, names: list[str]) -> list[Sample]:
    return [Sample(Path(folder, name), "good", None) for name in names]


def test_hold_out_is_a_partition_that_depends_on_names_and_seed_alone() -> None:
    names = [f"{index:03d}.png" for index in range(50)]
    train, held = hold_out(samples("/a", names), 0.2, 0)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(sample.path.name for sample in train + held) == names
    assert list(train) == sorted(train) and list(held) == sorted(held)
    assert hold_out(samples("/a", names), 0.2, 0) == (train, held)
    elsewhere = hold_out(samples("/somewhere/else", names[::-1]), 0.2, 0)
    assert {sample.path.name for sample in elsewhere[1]} == {sample.path.name for sample in held}
    assert hold_out(samples("/a", names), 0.2, 1)[1] != held


def test_a_larger_share_holds_out_a_superset() -> None:
    everything = samples("/a", [f"{index}.png" for index in range(30)])
    assert set(hold_out(everything, 0.1, 5)[1]) < set(hold_out(everything, 0.5, 5)[1])


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_both_parts_have_an_image(fraction: float, count: int) -> None:
    train, held = hold_out(samples("/a", [f"{index}.png" for index in range(count)]), fraction, 0)
    assert train and held and len(train) + len(held) == count


def test_fingerprint_follows_content_and_order_and_not_the_place(mvtec_root: Path, tmp_path: Path) -> None:
    original = sorted((mvtec_root / "tile/train/good").iterdir())
    shutil.copytree(mvtec_root / "tile/train/good", tmp_path / "copy")
    copied = sorted((tmp_path / "copy").iterdir())
    assert fingerprint(copied) == fingerprint(original)
    assert fingerprint(copied[::-1]) != fingerprint(original)
    assert fingerprint(copied[1:]) != fingerprint(original)
    content = bytearray(copied[3].read_bytes())
    content[-1] ^= 1
    copied[3].write_bytes(content)
    assert fingerprint(copied) != fingerprint(original)

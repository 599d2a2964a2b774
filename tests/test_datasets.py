import shutil
from pathlib import Path

import pytest
from PIL import Image

from dskd.data import datasets
from dskd.data.datasets import (
    Category,
    find_categories,
    fingerprint,
    hold_out,
    read_category,
    read_test_split,
    split_calibration,
    split_normals,
)
from dskd.data.geometry import Geometry
from dskd.data.images import load_masks
from dskd.data.layouts import Layout, recognised
from dskd.data.samples import Sample


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


def test_a_category_is_looked_for_among_all_only_when_it_is_not_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nut", "bolt", "ring"):
        category(tmp_path / "old" / name)
    looked: list[Path] = []

    def look(folder: Path) -> tuple[Layout, ...]:
        looked.append(folder)
        return recognised(folder)

    monkeypatch.setattr(datasets, "recognised", look)

    def folder_of(name: str) -> Path:
        return read_category(tmp_path, name).folder.relative_to(tmp_path.resolve())

    assert folder_of("nut") == Path("old/nut") and len(looked) == 5
    looked.clear()
    assert folder_of("bolt") == Path("old/bolt") and folder_of("nut") == Path("old/nut") and len(looked) == 2
    (tmp_path / "new").mkdir()
    (tmp_path / "old/nut").rename(tmp_path / "new/nut")
    category(tmp_path / "new/screw")
    assert folder_of("nut") == Path("new/nut") and folder_of("screw") == Path("new/screw")
    paint(tmp_path / "new/nut/train/ok/0.png")
    with pytest.raises(ValueError, match="nut is ambiguous"):
        folder_of("nut")


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
    assert not load_masks([sample], Geometry.square(8)).any()


def test_folders_inside_a_category_are_no_categories(tmp_path: Path) -> None:
    folder = category(tmp_path / "nut")
    paint(folder / "test/good/0.png")
    for inside in ("train", "test"):
        with pytest.raises(ValueError, match=r"no category in "):
            find_categories(folder / inside)


def test_a_folder_of_two_layouts_is_refused_and_an_unknown_one_told_what_was_looked_for(tmp_path: Path) -> None:
    folder = category(tmp_path / "nut")
    paint(folder / "train/ok/0.png")
    paint(folder / "good/0.png")
    wanted = r"nut is ambiguous, it holds train/good \(MVTec AD\) and train/ok \(BTAD\) and good \(plain folder\)"
    for read in (find_categories, lambda root: read_category(root, "nut")):
        with pytest.raises(ValueError, match=wanted) as raised:
            read(tmp_path)
        assert "\n" not in str(raised.value)
    paint(tmp_path / "other/pictures/0.png")
    with pytest.raises(
        ValueError, match=r"no category in .*train/good \(MVTec AD\).*MT_Free/Imgs.*good \(plain"
    ) as raised:
        find_categories(tmp_path / "other")
    assert "\n" not in str(raised.value)


def test_a_mask_without_an_image_is_refused(tmp_path: Path) -> None:
    folder = category(tmp_path / "nut")
    paint(folder / "test/bent/0.png")
    paint(folder / "ground_truth/bent/0_mask.png", mode="L")
    paint(folder / "ground_truth/bent/1_mask.png", mode="L")
    with pytest.raises(ValueError, match=r"bent/1_mask\.png has no image 1\.\* among the bent images"):
        read_test_split(tmp_path, "nut")
    assert len(read_category(tmp_path, "nut").train) == 2, "what is wrong with test masks forbids no training"


def test_a_single_training_image_is_too_few(tmp_path: Path) -> None:
    category(tmp_path / "nut", num_train=1)
    with pytest.raises(ValueError, match="holds 1 images; training needs at least 2"):
        read_category(tmp_path, "nut")


def test_other_files_beside_the_images_are_passed_over(tmp_path: Path) -> None:
    good = category(tmp_path / "nut") / "train/good"
    (good / "notes.txt").write_text("no image")
    paint(good / "sub/9.png")
    paint(good / "3.PNG")
    found = read_category(tmp_path, "nut")
    assert [sample.path.name for sample in found.train] == ["0.png", "1.png", "3.PNG", "9.png"]
    assert "4 training" in found.describe() and "1 .txt" in found.describe()


def test_held_out_images_of_several_folders_are_named_by_their_place(tmp_path: Path) -> None:
    good = category(tmp_path / "nut", num_train=0) / "train/good"
    for lot in ("lot1", "lot2"):
        for index in range(3):
            paint(good / lot / f"{index}.png")
    _, held, names = split_normals(read_category(tmp_path, "nut"), 0.5, 0)
    assert [good / name for name in names] == [sample.path for sample in held] and len(set(names)) == 3


def test_a_test_split_alone_can_be_evaluated_and_is_nothing_to_train_on(tmp_path: Path) -> None:
    folder = tmp_path / "nut"
    paint(folder / "test/good/0.png")
    paint(folder / "test/bent/0.png")
    assert [sample.defect for sample in read_test_split(tmp_path, "nut").test] == ["bent", "good"]
    with pytest.raises(ValueError, match="no category in"):
        read_category(tmp_path, "nut")


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


def test_validation_normals_of_the_user_are_the_held_out_ones() -> None:
    folder, train = Path("/a/nut"), tuple(samples("/a/nut/train/good", ["0.png", "1.png", "2.png"]))
    bent = Sample(folder / "validation/bent/0.png", "bent", None)
    own = tuple(samples("/a/nut/validation/good", ["0.png", "7.png"]))
    found = split_normals(Category("nut", train, (), (bent, *own), folder), 0.3, 0)
    assert found == (train, own, ("validation/good/0.png", "validation/good/7.png"))
    kept, held, names = split_normals(Category("nut", train, (), (bent,), folder), 0.3, 0)
    assert (kept, held) == hold_out(train, 0.3, 0) and names == tuple(sample.path.name for sample in held)


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


@pytest.mark.parametrize(("count", "fraction", "calibrating"), [(10, 0.5, 5), (2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2)])
def test_calibration_split_leaves_both_parts_an_image(count: int, fraction: float, calibrating: int) -> None:
    held = samples("/a", [f"{index:02d}.png" for index in range(count)])
    select, calibrate = split_calibration(held, fraction, 0)
    assert len(calibrate) == calibrating and sorted(select + calibrate) == sorted(held)
    again = split_calibration(samples("/b", [sample.path.name for sample in held][::-1]), fraction, 0)
    assert {sample.path.name for sample in again[1]} == {sample.path.name for sample in calibrate}


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (4, 0.0)])
def test_held_out_images_that_cannot_or_must_not_be_split_serve_both(count: int, fraction: float) -> None:
    held = samples("/a", [f"{index}.png" for index in range(count)])
    assert split_calibration(held, fraction, 0) == (tuple(held), tuple(held))
